"""Several processes that share one piece of work, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import atexit
import functools
import gc
import glob
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from rb_noisy.files import remove_left_by_killed
from rb_noisy.placement import GO_ON, launched

PATIENCE = timedelta(days=30)
"""How long a process waits for the others; they have shares of hours, and PyTorch's default is 10 to 30 minutes."""
MEETING = timedelta(minutes=5)
"""How long it waits for them to begin: one that died before they met is noticed by nobody else."""


@dataclass(frozen=True)
class Processes:
    """This process' place among `count`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def launched() -> Processes:
        """Those this process was launched with; itself alone without a launcher."""
        if launched() == 1:
            return Processes()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=MEETING)
        be_patient()
        leave_group_at_exit()
        return Processes(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes' values, elementwise, on every process; `values` is left as it is."""
        if self.count == 1:
            return values
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        found = values.to(device, torch.uint8 if values.dtype == torch.bool else values.dtype, copy=True)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.to(values)


def be_patient() -> None:
    """Now that the processes have met, wait for each other as long as their shares of the work may take."""
    if distributed.is_initialized():
        change = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
        change(PATIENCE, distributed.group.WORLD)


def lost_process(error: RuntimeError) -> str:
    """What to say if an error is that of a process whose peers ended or never came; "" for any other error."""
    text = str(error)
    if launched() == 1 or not (isinstance(error, distributed.DistError) or "gloo" in text.lower() or "NCCL" in text):
        return ""
    known = re.search("closed by peer|reset by peer|broken pipe|timed out|timeout", text, re.IGNORECASE)
    reason = known.group().lower() if known else text.splitlines()[0]
    which = f"process {int(os.environ.get('RANK', '0')) + 1} of {launched()}"
    return f"{which} has lost another one, which ended or never began ({reason}); {GO_ON}"


def own_file(path: str | os.PathLike, processes: Processes) -> Path:
    """Where this process keeps its part of what would be kept in `path`: `path` itself, if it is alone."""
    path = Path(path)
    mark = f".{processes.index}of{processes.count}" if processes.count > 1 else ""
    return path.with_name(f"{path.stem}{mark}{path.suffix}")


def state_files(path: str | os.PathLike) -> list[Path]:
    """All that there are of `path` and its parts, left by any number of processes."""
    path = Path(path)
    shared = path.parent.glob(f"{glob.escape(path.stem)}.*of*{path.suffix}")
    own = re.compile(rf"{re.escape(path.stem)}\.\d+of\d+{re.escape(path.suffix)}")
    return [file for file in (path, *sorted(shared)) if file.exists() and (file == path or own.fullmatch(file.name))]


def forget_state(path: str | os.PathLike) -> None:
    """Remove `path`, all its parts, and what processes that were killed while they wrote them left."""
    for file in state_files(path):
        file.unlink(missing_ok=True)
    remove_left_by_killed(path)


@functools.cache
def leave_group_at_exit() -> None:
    """A process that ends with threads of its process group still running is aborted now and then (SIGABRT).

    They end with the last reference to the group. A network that averages its gradients over processes has one.
    """

    def leave() -> None:
        gc.collect()
        if distributed.is_initialized():
            distributed.destroy_process_group()

    # Not at once: what comes after may train again, or gather something.
    atexit.register(leave)
