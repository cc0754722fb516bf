"""What benchmarks share: time side by side, the peak of the tensors that a call allocates, the published loop of κ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
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


def published_kappa(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int, batch_size: int = 256
) -> Tensor:
    """The counting loop of GAIRAT's code, for the first definition: a Python loop over samples after every step."""
    found = []
    for xb, yb in zip(x.split(batch_size), y.split(batch_size), strict=True):
        values, alive, x_adv = torch.zeros_like(yb), torch.ones_like(yb, dtype=torch.bool), xb.clone()
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            model.zero_grad()
            logits = model(x_adv)
            predicted = logits.argmax(1)
            for i in range(len(xb)):
                if predicted[i] != yb[i]:
                    alive[i] = False
                elif alive[i]:
                    values[i] += 1
            F.cross_entropy(logits, yb).backward()
            x_adv = x_adv.detach() + alpha * x_adv.grad.sign()
            x_adv = torch.clamp(torch.min(torch.max(x_adv, xb - eps), xb + eps), 0, 1)
        found.append(values)
    return torch.cat(found)
