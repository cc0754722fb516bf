"""What the benchmarks measure: time side by side, and the peak of the tensors that a call allocates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn so that a slower moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def profiled(call: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Peak of the tensors that it allocates on the CPU, in MiB, and the seconds of its operators by name."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = run.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = np.cumsum([0, *(size for _, size in changes)]).max() / 2**20
    return float(peak), {event.key: event.self_cpu_time_total / 1e6 for event in run.key_averages()}
