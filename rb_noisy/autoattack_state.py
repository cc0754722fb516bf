"""What an AutoAttack run has found so far, in a file that it goes on from; each of several processes has its own."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.files import UNREADABLE, atomic_path
from rb_noisy.processes import Processes, state_files

SURVIVED, WRONG = -1, 0


@dataclass
class State:
    """`attack` is under way, of which the `batches` of `size` are finished; the others as in `AutoAttackResult`.

    `answers`: the network's logits (n, K) of the first images; None in older files.
    """

    broken_by: Tensor
    x_adv: Tensor | None
    attack: int = 0
    batches: set[int] = field(default_factory=set)
    size: int = 0
    answers: Tensor | None = None

    def count_in(self, size: int) -> None:
        """The attack under way goes in batches of `size`; those of another, from another device, were cut elsewhere."""
        if self.size != size:
            self.batches, self.size = set(), size

    def share(self, processes: Processes, x: Tensor) -> None:
        """What any process has found, to all of them; `x` are the images."""
        if processes.count == 1:
            return
        attack = int(processes.largest(torch.tensor(self.attack)))
        finished = torch.zeros(len(x), dtype=torch.bool)
        finished[list(self.batches if self.attack == attack else ())] = True
        self.attack, self.batches = attack, set(processes.largest(finished).nonzero().flatten().tolist())
        if self.x_adv is not None:
            known = (self.broken_by > WRONG).view(-1, 1, 1, 1)
            found = processes.largest(torch.where(known, self.x_adv, -1.0))
            self.x_adv = torch.where(found < 0, x, found)
        self.broken_by = processes.largest(self.broken_by)


class Warnings:
    """The logger given to the reference's checks: keeps one message of each kind, that with the largest figures."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}

    def warning(self, message: str) -> None:
        kind = re.sub(r"\d+", "#", message)
        figures = [int(figure) for figure in re.findall(r"\d+", message)]
        if figures >= [int(figure) for figure in re.findall(r"\d+", self.messages.get(kind, ""))]:
            self.messages[kind] = message

    def log(self, message: str) -> None:
        """fra31's form of the same."""
        self.warning(message.removeprefix("Warning: "))


def save(path: Path, settings: dict[str, Any], state: State, log: Warnings) -> None:
    progress = {"attack": state.attack, "batches": sorted(state.batches), "size": state.size}
    about = {**settings, **progress, "warnings": list(log.messages.values())}
    arrays = {"about": np.array(json.dumps(about)), "broken_by": state.broken_by.numpy()}
    if state.x_adv is not None:
        arrays["x_adv"] = state.x_adv[state.broken_by > WRONG].numpy()
    if state.answers is not None:
        arrays["answers"] = state.answers.numpy()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load(path: str | os.PathLike, settings: dict[str, Any], x: Tensor, log: Warnings) -> State | None:
    """All that the saved states know together, their warnings put into `log`; None if there is none."""
    states = [_load_one(file, settings, x, log) for file in state_files(path)]
    if not states:
        return None
    whole = max(states, key=lambda state: state.attack)
    for state in states:
        if (state.attack, state.size) == (whole.attack, whole.size):
            whole.batches |= state.batches
        if whole.x_adv is not None:
            news = (state.broken_by > WRONG) & (whole.broken_by <= WRONG)
            whole.x_adv[news] = state.x_adv[news]
        whole.broken_by = torch.maximum(whole.broken_by, state.broken_by)
    return whole


def _load_one(path: Path, settings: dict[str, Any], x: Tensor, log: Warnings) -> State:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            broken_by = torch.from_numpy(file["broken_by"])
            x_adv, answers = (torch.from_numpy(file[name]) if name in file else None for name in ("x_adv", "answers"))
        attack, batches, messages = about.pop("attack"), set(about.pop("batches")), about.pop("warnings")
        size = about.pop("size")
        if broken_by.shape != (len(x),) or broken_by.is_floating_point() or not isinstance(attack, int):
            raise ValueError(f"it is of {len(broken_by)} images, not {len(x)}")
        if x_adv is not None and x_adv.shape != (int((broken_by > WRONG).sum()), *x.shape[1:]):
            raise ValueError("its images have another shape")
        messages = list(map(str, messages))
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable AutoAttack state ({error}); delete it or give another path") from error
    differing = [key for key in settings if about.get(key) != settings[key]]
    if differing:
        what = " and ".join(differing)
        raise InputError(f"the AutoAttack state {path} is of a run with other {what}; delete it or give another path")
    for message in messages:
        log.warning(message)
    if x_adv is not None:
        whole = x.clone()
        whole[broken_by > WRONG] = x_adv
        x_adv = whole
    return State(broken_by, x_adv, attack, batches, size, answers)
