"""What `resume` continues from: `state.safetensors`, written between epochs and within them.

Within an epoch every process has states of its own: the BatchNorm statistics and the random numbers. All of them are
saved, so that the same number of processes goes on bit by bit. Another number takes the mean statistics, draws new
random numbers, and trains on the rest of the epoch's samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rb_noisy.device import gather
from rb_noisy.errors import InputError
from rb_noisy.reading import checked, parse_json
from rb_noisy.record import SampleRecord
from rb_noisy.runs import check_tensors, load_groups, read_metrics, save_tensors
from rb_noisy.same_data import check_digest
from rb_noisy.schemas import StateHeader
from rb_noisy.weights import Averager

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: the epoch under way, counted from 0.
        done: samples of its order that were trained on, over all processes; 0 between epochs.
        seconds: spent on it so far.
        best: the highest score of the finished epochs.
        losses, norms: training loss and gradient norm of this process' steps in it, each () on the device.
        random: states of this process' random numbers, by name; empty between epochs.
        threads: PyTorch's, on a CPU; the arithmetic depends on their number.
        plan: how convolutions are computed (`rb_noisy.convolutions`), where that was measured; likewise.
    """

    epoch: int = 0
    done: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)
    threads: int | None = None
    plan: dict[str, list[str]] | None = None

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, {self.done} samples in" if self.done else f"epoch {self.epoch}"


class Checkpoint:
    """The one file that a run continues from, and the objects whose state it holds."""

    def __init__(
        self,
        file: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averager: Averager | None,
        record: SampleRecord,
        data: tuple[str, str],
        teachers: dict[str, str],
    ):
        """What it is written for.

        Args:
            data: the name of the data set, and the digest of the images and labels that the run is on.
            teachers: the digest of each teacher's weights, by its name in the recipe.
        """
        self.file, self.accelerator, self.data, self.teachers = file, accelerator, data, teachers
        self.model, self.optimizer, self.averager, self.record = model, optimizer, averager, record

    def save(self, progress: Progress) -> None:
        """Write the file, whole or not at all. Every process calls it, the main one writes."""
        own = dict(progress.random)
        if progress.done:
            own |= {"losses": torch.stack(progress.losses), "norms": torch.stack(progress.norms)}
            own |= {f"buffer.{name}": buffer for name, buffer in self._buffers()}
        gathered = {name: gather(self.accelerator, tensor[None]) for name, tensor in own.items()}
        if not self.accelerator.is_main_process:
            return
        momentum = {str(n): s.get("momentum_buffer") for n, s in self.optimizer.state_dict()["state"].items()}
        groups = {
            "model": self.model.state_dict(),
            "record": self.record.state_dict(),
            "averager": {} if self.averager is None else self.averager.state_dict(),
            "optimizer": {number: buffer for number, buffer in momentum.items() if buffer is not None},
            "process": gathered,
        }
        tensors = {f"{group}.{name}": v for group, named in groups.items() for name, v in named.items()}
        header = {"epochs_done": progress.epoch, "samples_done": progress.done, "seconds": progress.seconds}
        header = {name: repr(value) for name, value in (header | {"best": progress.best}).items()}
        if progress.threads is not None:
            header["threads"] = str(progress.threads)
        header["data_sha256"] = self.data[1]
        header["teachers_sha256"] = json.dumps(self.teachers)
        if progress.plan is not None:
            header["plan"] = json.dumps(progress.plan)
        save_tensors(tensors, self.file, header)

    def load(self) -> Progress:
        """Restore every object, and say where the run goes on.

        Raises:
            InputError: the file is damaged or of another run, the run's metrics are gone, or its images, labels or
                teachers have changed (which a file of an earlier version cannot tell).
        """
        groups, header = load_groups(self.file, ("best",))
        if missing := {"epochs_done", "samples_done", "seconds"} - header.keys():
            raise InputError(
                f"{self.file} was written by another version (no {min(missing)}); finish the run with that one, or "
                "delete the file to start over"
            )
        way_out = "delete it to start over, or restore a copy"
        plan = parse_json(header.pop("plan", "{}"), f"the plan in {self.file}", way_out)
        checked(dict[str, list[str]], plan, f"the plan in {self.file}", way_out)
        checked(StateHeader, header, f"the header of {self.file}", way_out)
        name, digest = self.data
        check_digest(header.get("data_sha256"), digest, name, str(self.file))
        self._check_teachers(header.get("teachers_sha256", "{}"))
        epoch, done = int(header["epochs_done"]), int(header["samples_done"])
        if done >= len(self.record.labels):
            raise InputError(f"{self.file} is {done} samples into an epoch of {len(self.record.labels)}; {way_out}")
        lines = len(read_metrics(self.file.parent))
        if lines < epoch:
            raise InputError(
                f"{self.file.parent / 'metrics.jsonl'} has {lines} lines but {epoch} epochs are finished; restore it, "
                f"or delete {self.file.name} to start over"
            )
        check_tensors(groups["model"], self.model.state_dict(), str(self.file))
        parameters = {str(number): parameter for number, parameter in enumerate(self.model.parameters())}
        momentum = groups["optimizer"]
        check_tensors(momentum, {n: p for n, p in parameters.items() if n in momentum}, f"the momentum in {self.file}")
        if self.averager is not None:
            average = self.averager.state_dict()
            check_tensors(groups["averager"], average, f"the averaged weights in {self.file}")
        self.model.load_state_dict(groups["model"])
        self.record.load_state_dict(groups["record"])
        if self.averager is not None:
            self.averager.load_state_dict(groups["averager"])
        optimizer = self.optimizer.state_dict()
        # A momentum buffer has the memory format of its parameter: the arithmetic depends on it.
        optimizer["state"] = {
            int(number): {"momentum_buffer": torch.empty_like(parameters[number]).copy_(buffer)}
            for number, buffer in momentum.items()
        }
        self.optimizer.load_state_dict(optimizer)
        progress = Progress(epoch, done, float(header["seconds"]), float(header["best"]))
        progress.threads = int(header["threads"]) if "threads" in header else None
        progress.plan = plan or None
        if done:
            try:
                self._load_own(groups["process"], progress)
            except (KeyError, IndexError, RuntimeError, TypeError) as error:
                raise InputError(f"{self.file} does not fit this run ({error!r}); {way_out}") from error
        return progress

    def _check_teachers(self, text: str) -> None:
        source = f"the teachers in {self.file}"
        way_out = "delete it to start over, or restore a copy"
        recorded = checked(dict[str, str], parse_json(text, source, way_out), source, way_out)
        for name, digest in self.teachers.items():
            if recorded.get(name, digest) != digest:
                raise InputError(
                    f"the weights of teacher {name!r} are not those that {self.file} was trained with; put them back, "
                    "or train into another folder"
                )

    def _load_own(self, rows: dict[str, Tensor], progress: Progress) -> None:
        """Each tensor of `rows` has one row for each process that saved it."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        same = len(rows["losses"]) == world
        own = {name: _row(saved, rank if same else None) for name, saved in rows.items()}
        device = self.accelerator.device
        progress.losses, progress.norms = (list(own.pop(name).to(device)) for name in ("losses", "norms"))
        buffers = {f"buffer.{name}": buffer for name, buffer in self._buffers()}
        check_tensors({name: own[name] for name in own if name.startswith("buffer.")}, buffers, str(self.file))
        for name, buffer in buffers.items():
            buffer.copy_(own.pop(name))
        if same:
            for name in ("draws", "cpu"):
                torch.Generator().set_state(own[name])  # now, since it would fail in the middle of training
            progress.random = own

    def _buffers(self) -> Iterable[tuple[str, Tensor]]:
        yield from self.model.named_buffers()
        if self.averager is not None:
            yield from ((f"averaged.{name}", buffer) for name, buffer in self.averager.model.named_buffers())


def _row(rows: Tensor, rank: int | None) -> Tensor:
    if rank is not None:
        return rows[rank].clone()  # a generator takes no state that is a part of another tensor
    return rows.mean(0) if rows.is_floating_point() else rows[0]
