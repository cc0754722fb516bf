"""Where work runs on a CPU: how many threads or processes, chosen by a short measurement on the machine as it is now.

Threads that share one operation wait for each other in it, spinning. Alone that pays for wide networks; narrow ones do
more as processes of one thread each; and beside another process every operation waits for that one's time slices, and a
step takes many times as long. So what is fastest is measured, not guessed, and threads are given up when steps stall.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from rb_noisy.errors import InputError

Work = Callable[[], Any]
ROUNDS = 3  # of a measurement
SECONDS_TO_END = 10.0  # for a process that is asked to end, before it is killed
WATCH = 0.5  # seconds between looks at whether the parent lives
STALLED = 2.5  # times its usual length: a step that long waits for somebody else's work
PATIENCE = 5  # stalled steps in a row before the threads are measured anew
USUAL = 20  # steps that the usual length is the median of
STEADY = 1.25  # how much faster several threads must be than processes of one each, which never wait for each other
GO_ON = "what was saved is kept, and the same command (for train with --resume) goes on from there"
PROBE = (16, 64, 16, 16)  # images, channels and sides of the feature map that a precision is tried on


def usable_cores() -> list[int]:
    """The numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_are_given() -> bool:
    """Whether the user has set the number of threads (OMP_NUM_THREADS; launchers of several processes do, too)."""
    return "OMP_NUM_THREADS" in os.environ


def seconds_by_threads(work: Work, counts: Sequence[int], rounds: int = ROUNDS) -> dict[int, float]:
    """Mean seconds of `work` for each number of threads, measured in turn; the number that was set stays.

    The mean, not the best: what stalls now and then is slow.
    """
    before = torch.get_num_threads()
    found: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for number in range(rounds + 1):
            for count, seconds in found.items():
                torch.set_num_threads(count)
                began = time.perf_counter()
                work()
                if number:  # the first of each warms up
                    seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return {count: statistics.fmean(seconds) for count, seconds in found.items()}


def fastest(seconds: dict[int, float]) -> int:
    """The number of threads with the least time; of two that differ by less than 5% the lower, which stalls less."""
    least = min(seconds.values())
    return min(count for count, value in seconds.items() if value <= 1.05 * least)


class Threads:
    """The number of PyTorch's threads while a CPU computes step after step.

    Attributes:
        count: threads in use.
        seconds: of the last measurement, by number of threads; empty before one.
    """

    def __init__(
        self,
        work: Work,
        count: int | None = None,
        *,
        fixed: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ):
        """Choose now.

        Args:
            work: what is measured: about a step's work, without its effects.
            count: begin with this number, from 1 up, and measure only once steps stall; None measures.
            fixed: keep that number, whatever happens.
            say: takes a line about what was chosen, and why.
        """
        self.fixed, self.given_up = fixed, False
        self.work, self.say, self.all = work, say, len(usable_cores())
        self.seconds: dict[int, float] = {}
        self.stalls, self.recent = 0, deque[float](maxlen=USUAL)
        self.count = self.all if count is None else count
        if count is None:
            self._choose()
        else:
            torch.set_num_threads(count)

    def _choose(self) -> None:
        counts = sorted({1, self.all})
        if len(counts) > 1:
            self.seconds = seconds_by_threads(self.work, counts)
            self.count = fastest(self.seconds)
            measured = ", ".join(f"{count}: {value:.3g} s" for count, value in self.seconds.items())
            self.say(f"threads: {self.count} (a pass over a batch with {measured})")
        torch.set_num_threads(self.count)
        self.stalls = 0
        self.recent.clear()

    def after_step(self, seconds: float) -> None:
        """Take note of a step's length; measure anew when several in a row have stalled."""
        usual = statistics.median(self.recent) if len(self.recent) == USUAL else None
        if self.fixed or self.count == 1 or usual is None or seconds <= STALLED * usual:
            self.stalls = 0
            self.recent.append(seconds)
            return
        self.stalls += 1
        if self.stalls == PATIENCE:
            self.say(f"steps take {seconds / usual:.1f} times as long as before: something else uses the CPU")
            self._choose()
            self.given_up = self.count < self.all

    def between_epochs(self) -> None:
        """Where threads were given up, see whether the cores are free again."""
        if self.given_up:
            self._choose()
            self.given_up = self.count < self.all


@dataclass(frozen=True)
class Layout:
    """Processes of so many threads each, and the seconds that one of `work` takes on average with them."""

    processes: int
    threads: int
    seconds: float


def best_layout(work: Work) -> Layout:
    """The fastest of: one process with all cores, one with one thread, one process of one thread for each core.

    Several threads have to be faster by a quarter, because whatever begins beside them later would stall them. The last
    is tried with one Python thread for each process, in which PyTorch lets go of Python's lock.
    """
    cores = len(usable_cores())
    alone = seconds_by_threads(work, sorted({1, cores}))
    layouts = [Layout(1, count, seconds) for count, seconds in alone.items()]
    if cores > 1:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def together() -> float:
                began = time.perf_counter()
                list(pool.map(lambda _: work(), range(cores)))
                return (time.perf_counter() - began) / cores

            together()
            layouts.append(Layout(cores, 1, statistics.fmean(together() for _ in range(ROUNDS))))
    return min(layouts, key=lambda layout: layout.seconds * (STEADY if layout.threads > 1 else 1))


def bf16_slowdown() -> float:
    """How many times as long as in fp32 a convolution takes in bf16 on this CPU; below 1 where it is faster."""
    x = torch.randn(PROBE).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(PROBE[1], PROBE[1], 3, padding=1).to(memory_format=torch.channels_last)

    def seconds(dtype: torch.dtype) -> float:
        network, images = conv.to(dtype), x.to(dtype)
        with torch.no_grad():
            return seconds_by_threads(lambda: network(images), [torch.get_num_threads()])[torch.get_num_threads()]

    plain = seconds(torch.float32)
    return seconds(torch.bfloat16) / plain


def launched() -> int:
    """How many processes a launcher (torchrun, accelerate) started this one among; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_threads() -> Literal["measured"] | None:
    """What a command that trains asks for: a measurement, but where a user or a launcher has set the number."""
    return "measured" if launched() == 1 and not threads_are_given() else None


def is_main() -> bool:
    """Whether this is the process among those that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def relaunch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run a module as `module_command` does, as so many processes of one thread, each on cores of its own.

    The first prints; what another one says is shown if that is what failed. All end with this process, and where one
    is killed, at once.

    Returns:
        The exit code: 0, or that of one that failed; 128 + the signal's number where one was killed.

    Raises:
        InputError: processes is below 1.
    """
    if processes < 1:
        raise InputError(f"--processes is {processes}; give a number from 1 up")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    command = module_command(module, arguments)
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        started = []
        for rank, cores in enumerate(shares(usable_cores(), processes)):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            streams = {"stdout": subprocess.DEVNULL, "stderr": said[rank]} if rank else {}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            started.append(subprocess.Popen(placed(command, cores, nice=0), env=environment, **streams))
        try:
            codes = _wait(started)
        finally:
            end([process for process in started if process.poll() is None])
        # Of those that failed one that was killed, if there is one: the others have missed it.
        failed = min((rank for rank, code in enumerate(codes) if code), key=lambda rank: codes[rank] >= 0, default=None)
        if failed is None:
            return 0
        if failed:
            said[failed].seek(0)
            sys.stderr.write(said[failed].read().decode("utf-8", "replace"))
        if codes[failed] > 0:
            return codes[failed]
        name = f"process {failed + 1} of {processes}"
        sys.stderr.write(f"error: {name} was killed by signal {-codes[failed]}; the others were ended; {GO_ON}\n")
        return 128 - codes[failed]


def _wait(started: Sequence[subprocess.Popen]) -> list[int]:
    """The exit code of each; 0 for those that had to be ended because another one failed."""
    deadline = math.inf
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if any((process.poll() or 0) < 0 for process in started):
            break
        if deadline == math.inf and any(process.poll() for process in started):
            deadline = time.monotonic() + SECONDS_TO_END  # they may fail of the same, and say so
        time.sleep(0.05)
    return [process.poll() or 0 for process in started]


def end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes: they are asked, and after `SECONDS_TO_END` killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """From now on end when the process that placed this one has ended, also on systems that do not see to it."""
    parent = os.environ.pop("RB_NOISY_PARENT", None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(WATCH)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """`python -m module` with these arguments, which imports from where this process does.

    The current folder is on its path only if it is on this one's: nobody who calls `rb-noisy` in a folder means to run
    what lies there.
    """
    script = str(Path(__file__).with_name("started.py"))
    path = json.dumps([part for part in sys.path if isinstance(part, str)])
    return [sys.executable, script, path, module, *arguments]


def placed(command: Sequence[str], cores: Sequence[int], nice: int = 19) -> list[str]:
    """`command` so that it runs on these cores only and ends with this process; `nice` is added to its niceness."""
    script = str(Path(__file__).with_name("placed.py"))
    return [sys.executable, script, str(os.getpid()), ",".join(map(str, cores)), str(nice), *command]


def shares(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """The cores of each of so many jobs: neighbours, as equal shares as can be; shared ones where jobs are more."""
    if jobs >= len(cores):
        return [[cores[job % len(cores)]] for job in range(jobs)]
    bounds = [len(cores) * job // jobs for job in range(jobs + 1)]
    return [list(cores[low:high]) for low, high in pairwise(bounds)]
