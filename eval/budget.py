"""AutoAttack for so many minutes: on a random subset, stratified by class, as large as the time allows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import common
from rb_noisy.autoattack import AutoAttackResult
from rb_noisy.errors import InputError
from rb_noisy.files import UNREADABLE, atomic_path
from rb_noisy.processes import forget_state
from rb_noisy.subsets import stratified_order

FIRST = 16  # images of the first part, from which the time that one takes is known
ORDER = "PCG64"  # of the images: a state file of another order has other images' verdicts


def attack_for(
    minutes: float,
    subject: common.Subject,
    attack: Callable[[Tensor, Tensor, int, Path], AutoAttackResult],
    *,
    seed: int,
    batch_size: int,
    file: Path,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor, list[str]]:
    """Attack parts of the test set until the time is up; a part that is begun is finished.

    Args:
        attack: (images, labels, batch size, state file) → verdicts.
        file: what is known so far; another call goes on from it with another so many minutes.
        settings: what else decides the verdicts.

    Returns:
        (k,) the images that were attacked, (k,) int8 what broke them (as `AutoAttackResult.broken_by`), and warnings.
    """
    if not 0 < minutes < float("inf"):
        raise InputError(f"--minutes is {minutes}; give a number above 0")
    processes, order = subject.processes, stratified_order(subject.y, seed)
    about = subject.describe(seed=seed, batch_size=batch_size) | {"images": common.images_digest(subject)}
    about |= {**settings, "date": None, "order": ORDER}
    broken_by, part, warnings = _read(file, about)
    part_file = file.with_name(f"{file.stem}.part{file.suffix}")
    began, measured, attacked = time.monotonic(), 0.0, 0
    while len(broken_by) < len(order):
        resumed, from_then = bool(part), time.monotonic()
        if not resumed:
            left = len(order) - len(broken_by)
            rest = 60 * minutes - (time.monotonic() - began)
            fits = int(rest * attacked / measured) if attacked else FIRST * processes.count * (rest > 0)
            size = min(fits, left, batch_size * processes.count)
            size = int(processes.largest(torch.tensor(size if processes.main else 0)))  # one clock decides
            if size < 1:
                break
            # Another number of processes may go on with the part, in the same batches.
            part = size, math.ceil(size / processes.count)
            _write(file, about, broken_by, part, warnings, subject)
        size, in_batches_of = part
        rows = order[len(broken_by) : len(broken_by) + size]
        result = attack(subject.x[rows], subject.y[rows], in_batches_of, part_file)
        broken_by = torch.cat([broken_by, result.broken_by])
        warnings, part = list(dict.fromkeys([*warnings, *result.warnings])), ()
        if not resumed:  # most of it may have been done before
            measured, attacked = measured + time.monotonic() - from_then, attacked + size
        _write(file, about, broken_by, part, warnings, subject)
        if processes.main:
            forget_state(part_file)
        processes.wait()
    return order[: len(broken_by)], broken_by, warnings


def _write(
    file: Path,
    about: dict[str, Any],
    broken_by: Tensor,
    part: tuple[int, ...],
    warnings: list[str],
    subject: common.Subject,
) -> None:
    if subject.processes.main:
        text = json.dumps({**about, "part": part, "found": warnings})
        with atomic_path(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, about=text, broken_by=broken_by.numpy())
    subject.processes.wait()


def _read(file: Path, about: dict[str, Any]) -> tuple[Tensor, tuple[int, ...], list[str]]:
    """What broke the images so far, the size of the part under way and of its batches, and warnings."""
    if not file.is_file():
        return torch.zeros(0, dtype=torch.int8), (), []
    try:
        with np.load(file, allow_pickle=False) as state:
            known, broken_by = json.loads(str(state["about"])), torch.from_numpy(state["broken_by"])
        part, warnings = tuple(known.pop("part")), list(map(str, known.pop("found")))
        if broken_by.ndim != 1 or broken_by.is_floating_point() or len(part) not in (0, 2):
            raise ValueError("its arrays have another form")
    except UNREADABLE as error:
        raise InputError(f"{file} is damaged ({error}); delete it to start over") from error
    if known != json.loads(json.dumps(about)):
        raise InputError(f"{file} is of another setting; delete it to start over, or give another --out")
    return broken_by, part, warnings
