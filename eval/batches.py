"""A per-sample measurement, batch by batch: resumable at any kill, shared by several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.common import Subject, images_digest, progress_bar
from rb_noisy.errors import InputError
from rb_noisy.files import UNREADABLE, atomic_path
from rb_noisy.processes import Processes, forget_state, own_file, state_files

Measured = dict[str, Tensor]
"""Per-sample tensors by name."""


def in_batches(
    subject: Subject,
    stage: str,
    settings: dict[str, Any],
    batch_size: int,
    folder: Path,
    compute: Callable[[Tensor, Tensor, int], Measured],
) -> Measured:
    """Run `compute` over the test images batch by batch, with a progress bar, so that a kill loses one batch at most.

    Several processes share the batches; each gets the whole result.

    Args:
        stage: names the progress bar and the state file, which goes once all is done.
        settings: what decides the outcome; a state file of other settings is started over.
        compute: (x on the device, y on the device, seed of this batch) → per-sample tensors.
    """
    total, processes = len(subject.x), subject.processes
    count = math.ceil(total / batch_size)
    file = subject.folder(folder) / f".{stage}.state.npz"
    about = subject.describe(seed=settings["seed"], batch_size=batch_size) | {"images": images_digest(subject)}
    key = json.dumps({**about, **settings, "date": None})
    parts: dict[int, Measured] = {}
    for state in state_files(file):
        parts |= _read_state(state, key)
    finished = torch.zeros(count, dtype=torch.bool)
    finished[list(parts)] = True
    finished = processes.largest(finished)  # by any; and none writes before all have read
    own = (~finished).nonzero().flatten().tolist()[processes.index :: processes.count]
    with progress_bar() as bar:
        task = bar.add_task(stage, total=total, completed=min(int(finished.sum()) * batch_size, total))
        for number in own or ([] if parts else [0]):  # who knows nothing could not take part in what follows
            at = slice(number * batch_size, (number + 1) * batch_size)
            x, y = subject.x[at].to(subject.device), subject.y[at].to(subject.device)
            seed = int(np.random.SeedSequence((settings["seed"], number)).generate_state(1)[0])
            parts[number] = {name: values.cpu() for name, values in compute(x, y, seed).items()}
            arrays = {f"{i}.{name}": v.numpy() for i, part in parts.items() for name, v in part.items()}
            with atomic_path(own_file(file, processes)) as temporary:
                np.savez(temporary, key=key, **arrays)
            bar.update(task, advance=len(x) * processes.count)
    measured = _of_all(parts, total, batch_size, processes)
    if processes.main:
        forget_state(file)
    return measured


def _of_all(parts: dict[int, Measured], total: int, batch_size: int, processes: Processes) -> Measured:
    measured = {}
    for name, some in next(iter(parts.values())).items():
        dtype = torch.uint8 if some.dtype == torch.bool else some.dtype
        lowest = torch.finfo(dtype).min if dtype.is_floating_point else torch.iinfo(dtype).min
        values = torch.full((total, *some.shape[1:]), lowest, dtype=dtype)
        for number, part in parts.items():
            values[number * batch_size : (number + 1) * batch_size] = part[name]
        measured[name] = processes.largest(values).to(some.dtype)
    return measured


def _read_state(file: Path, key: str) -> dict[int, Measured]:
    """What is saved there, by batch; nothing where it is of other settings."""
    try:
        with np.load(file, allow_pickle=False) as state:
            if str(state["key"]) != key:
                return {}
            parts: dict[int, Measured] = {}
            for name in state.files:
                number, dot, array = name.partition(".")
                if dot:
                    parts.setdefault(int(number), {})[array] = torch.from_numpy(state[name])
    except UNREADABLE as error:
        raise InputError(f"{file} is damaged ({error}); delete it to start this evaluation over") from error
    return parts
