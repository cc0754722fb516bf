"""AutoAttack (Croce & Hein, arXiv:2003.01690), driven so that it can be stopped and resumed at any moment.

The attacks, their parameters and the checks are the reference package's own; only the loop around them is ours. With
the same seed and batch size its verdicts equal the reference's, sample by sample.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rb_noisy import compat
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, tensors_digest

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard version's attacks, in its order."""

_SURVIVED, _WRONG = -1, 0


@dataclass(frozen=True, eq=False)
class AutoAttackResult:
    """Verdicts on N samples, on the CPU.

    `robust`: (N,) bool, right on the clean image and after every attack.
    `clean_correct`: (N,) bool.
    `broken_by`: (N,) int8; -1 never broken, 0 wrong before any attack, else 1 + the index in `ATTACKS` of the first
    attack that succeeded.
    `warnings`: what the reference's checks say against trusting the verdicts, each kind once.
    `x_adv`: (N, C, H, W) in [0, 1], or None if not asked for; the clean image where no attack succeeded.
    `attacks`: the attacks that were run, in order.
    """

    robust: Tensor
    clean_correct: Tensor
    broken_by: Tensor
    warnings: tuple[str, ...]
    x_adv: Tensor | None
    attacks: tuple[str, ...]

    @property
    def clean_acc(self) -> float:
        """Accuracy on clean images, 0 to 1; low is bad."""
        return self.clean_correct.double().mean().item()

    @property
    def robust_acc(self) -> float:
        """Accuracy after all attacks, 0 to 1; low is bad."""
        return self.robust.double().mean().item()

    @property
    def accuracy_after(self) -> dict[str, float]:
        """Accuracy, 0 to 1, that is left after each attack, in the order they were run."""
        return _accuracies(self.broken_by, self.attacks)


@dataclass(frozen=True, eq=False)
class _Task:
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    norm: str
    seed: int
    batch_size: int
    device: torch.device
    attacks: tuple[str, ...]
    report: Callable[[str, int, int], None]


@dataclass
class _State:
    """All that a run has found so far; `attack` and `batch` are what comes next."""

    broken_by: Tensor
    x_adv: Tensor | None
    attack: int = 0
    batch: int = 0


def run_autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    attacks: Sequence[str] = ATTACKS,
    state_path: str | os.PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    return_adversarials: bool = False,
) -> AutoAttackResult:
    """The standard AutoAttack on `x` (N, C, H, W) in [0, 1] with labels `y` (N,).

    `model` is in eval mode on `device` and returns logits (N, K); it is left as it is, and so is torch's random state.
    `eps` is in pixel units of [0, 1] for `norm` "Linf", else the L2 or L1 length. A choice of `attacks` runs these
    alone, in the order given, with the standard version's parameters. APGD-T and FAB-T aim at 9 classes (APGD-T at 5
    for L1), or at the K-1 there are; the warning about that is the reference's, whose own driver then fails.

    With `state_path` (an .npz file) every finished batch is saved there, and a call with the same model, data and
    settings goes on from it, after an interruption of any kind, to the result of an uninterrupted run. The file stays
    after the end, so that the next call returns at once, until the caller deletes it.

    `progress(stage, done, total)` is called when a stage begins and after every batch; the stage is "clean" or an
    attack's name, `done` of its `total` samples are finished. An attack's total are the samples that the earlier ones
    left; an attack without any is skipped.

    Raises `InputError` for unusable arguments (`seed=None` too), for fewer than 4 classes with "apgd-t" (its loss looks
    at the four largest logits), and for a state file that is damaged or of another run.
    """
    report = progress or (lambda stage, done, total: None)
    x, y = x.detach().cpu(), y.detach().cpu()
    task = _Task(model, x, y, eps, norm, seed, batch_size, torch.device(device), tuple(attacks), report)
    _check_arguments(task)
    settings = _settings(task, return_adversarials)
    log = _Warnings()
    state = None if state_path is None else _load(state_path, settings, x, log)

    def save(state: _State) -> None:
        if state_path is not None:
            _save(state_path, settings, state, log)

    if state is None or state.attack < len(task.attacks):
        # The attacks seed torch's global generator before every batch.
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            adversary = _build_attacks(task, log)
            dynamic = _check_defence(task, adversary, log)
            with torch.no_grad(), _frozen([] if dynamic else list(model.parameters())):
                if state is None:
                    broken_by = torch.where(_clean(task), _SURVIVED, _WRONG).to(torch.int8)
                    state = _State(broken_by, x.clone() if return_adversarials else None)
                    save(state)
                _attack(task, adversary, state, save)
        _check_square(task, state, log)
        save(state)
    robust, correct = state.broken_by == _SURVIVED, state.broken_by != _WRONG
    return AutoAttackResult(robust, correct, state.broken_by, tuple(log.messages.values()), state.x_adv, task.attacks)


def _check_arguments(task: _Task) -> None:
    x, y, attacks = task.x, task.y, task.attacks
    if task.model.training:
        raise InputError("the model is in training mode, which attacks would measure and change; call model.eval()")
    if x.ndim != 4 or x.dtype != torch.float32 or not len(x):
        raise InputError(f"x is {x.dtype} of shape {tuple(x.shape)}; give float32 images (N, C, H, W), N at least 1")
    if not (x.min() >= 0 and x.max() <= 1):  # also true of NaN
        raise InputError(f"x has values from {x.min():.4g} to {x.max():.4g}; give images in [0, 1]")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise InputError(f"y is {y.dtype} of shape {tuple(y.shape)}; give int64 labels ({len(x)},), one per image")
    if task.norm not in ("Linf", "L2", "L1"):
        raise unknown_name("norm", task.norm, ("Linf", "L2", "L1"))
    if not 0 < task.eps < float("inf"):
        raise InputError(f"eps must be above 0 and finite, not {task.eps}")
    if not isinstance(task.seed, (int, np.integer)):
        raise InputError(f"seed must be an integer, not {task.seed!r}: runs seeded by the clock cannot be resumed")
    if task.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {task.batch_size}")
    for attack in attacks:
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS)
    if not attacks or len(set(attacks)) < len(attacks):
        raise InputError(f"attacks is {list(attacks)}; give each attack once, and at least one of {', '.join(ATTACKS)}")


# --- the loop


def _clean(task: _Task) -> Tensor:
    total = len(task.x)
    task.report("clean", 0, total)
    correct = []
    for x, y in zip(task.x.split(task.batch_size), task.y.split(task.batch_size), strict=True):
        correct.append(task.model(x.to(task.device)).max(1)[1].cpu() == y)
        task.report("clean", min(len(correct) * task.batch_size, total), total)
    return torch.cat(correct)


def _attack(task: _Task, adversary: Any, state: _State, save: Callable[[_State], None]) -> None:
    """Carry `state` on to the end of all attacks, as the reference's loop does."""
    while state.attack < len(task.attacks):
        attack = task.attacks[state.attack]
        code = _code(attack)
        # An attack's batches are cut from those it started with, of which it may have broken some before a resume.
        started = ((state.broken_by == _SURVIVED) | (state.broken_by == code)).nonzero(as_tuple=True)[0]
        batches = started.split(task.batch_size) if len(started) else ()
        if batches:
            task.report(attack, min(state.batch * task.batch_size, len(started)), len(started))
        for index in batches[state.batch :]:
            y = task.y[index].to(task.device)
            x_adv = _perturb(adversary, attack, task.x[index].contiguous().to(task.device), y)
            broken = (task.model(x_adv).max(1)[1] != y).cpu()
            state.broken_by[index[broken]] = code
            if state.x_adv is not None:
                state.x_adv[index[broken]] = x_adv.cpu()[broken]
            state.batch += 1
            save(state)
            task.report(attack, min(state.batch * task.batch_size, len(started)), len(started))
        state.attack, state.batch = state.attack + 1, 0


def _perturb(adversary: Any, attack: str, x: Tensor, y: Tensor) -> Tensor:
    if attack == "apgd-ce":
        adversary.apgd.loss = "ce"
        return adversary.apgd.perturb(x, y)
    if attack == "apgd-t":
        return adversary.apgd_targeted.perturb(x, y)
    if attack == "fab-t":
        adversary.fab.targeted = True
        adversary.fab.n_restarts = 1
        return adversary.fab.perturb(x, y)
    return adversary.square.perturb(x, y)


def _build_attacks(task: _Task, log: _Warnings) -> Any:
    """The reference's AutoAttack object with its standard parameters; only its attacks are used."""
    compat.install()
    from autoattack import AutoAttack

    settings = {"norm": task.norm, "eps": task.eps, "seed": int(task.seed), "device": task.device}
    adversary = AutoAttack(task.model, version="standard", verbose=False, **settings)
    adversary.apgd.logger = adversary.apgd_targeted.logger = log
    return adversary


def _code(attack: str) -> int:
    return ATTACKS.index(attack) + 1


def _accuracies(broken_by: Tensor, attacks: tuple[str, ...]) -> dict[str, float]:
    left = broken_by != _WRONG
    accuracies = {}
    for attack in attacks:
        left = left & (broken_by != _code(attack))
        accuracies[attack] = left.double().mean().item()
    return accuracies


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients for the weights: FAB calls `backward`, which would compute them and add them to the model."""
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


# --- the reference's checks


class _Warnings:
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


def _check_defence(task: _Task, adversary: Any, log: _Warnings) -> bool:
    """The reference's checks on the first batch; caps the target classes, returns whether the model is dynamic."""
    from autoattack import checks

    model, attacks, targeted = task.model, task.attacks, (adversary.apgd_targeted, adversary.fab)
    x, y = task.x[: task.batch_size].to(task.device), task.y[: task.batch_size].to(task.device)
    checks.check_randomized(model, x, y, bs=task.batch_size, logger=log)
    classes = checks.check_range_output(model, x, logger=log)
    if classes < 4 and "apgd-t" in attacks:
        raise InputError(f"APGD-T's loss needs 4 classes and the model has {classes}; leave 'apgd-t' out of attacks")
    if classes < 2:
        raise InputError(f"AutoAttack needs 2 classes and the model gives {classes} logit; give one logit per class")
    if task.y.min() < 0 or task.y.max() >= classes:
        raise InputError(f"y has labels {task.y.min()} to {task.y.max()}; the model knows 0 to {classes - 1}")
    # The check sets its own tracer, leaves none behind, and never resets its counters.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    tracer = sys.gettrace()
    try:
        checks.check_dynamic(model, x, False, logger=log)
    finally:
        sys.settrace(tracer)
    checks.check_n_classes(classes, list(attacks), *(attack.n_target_classes for attack in targeted), logger=log)
    for attack in targeted:
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    return any(checks.funcs.values())


def _check_square(task: _Task, state: _State, log: _Warnings) -> None:
    from autoattack import checks

    clean = (state.broken_by != _WRONG).double().mean().item()
    checks.check_square_sr({"clean": clean, **_accuracies(state.broken_by, task.attacks)}, logger=log)


# --- the state file


def _settings(task: _Task, return_adversarials: bool) -> dict[str, Any]:
    """What a state file must have been made with to be gone on from."""
    return {
        "model": tensors_digest(chain(task.model.named_parameters(), task.model.named_buffers())),
        "x": tensors_digest([("x", task.x)]),
        "y": tensors_digest([("y", task.y)]),
        "eps": float(task.eps),
        "norm": task.norm,
        "seed": int(task.seed),
        "batch_size": int(task.batch_size),
        "attacks": list(task.attacks),
        "return_adversarials": bool(return_adversarials),
    }


def _save(path: str | os.PathLike, settings: dict[str, Any], state: _State, log: _Warnings) -> None:
    about = {**settings, "attack": state.attack, "batch": state.batch, "warnings": list(log.messages.values())}
    arrays = {"about": np.array(json.dumps(about)), "broken_by": state.broken_by.numpy()}
    if state.x_adv is not None:
        arrays["x_adv"] = state.x_adv[state.broken_by > _WRONG].numpy()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _load(path: str | os.PathLike, settings: dict[str, Any], x: Tensor, log: _Warnings) -> _State | None:
    """The saved state, its warnings put into `log`; None if there is no file."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            broken_by = torch.from_numpy(file["broken_by"])
            x_adv = torch.from_numpy(file["x_adv"]) if "x_adv" in file else None
        attack, batch, messages = about.pop("attack"), about.pop("batch"), about.pop("warnings")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no readable AutoAttack state ({error}); delete it or give another path") from error
    differing = [key for key in settings if about.get(key) != settings[key]]
    if differing:
        what = " and ".join(differing)
        raise InputError(f"the AutoAttack state {path} is of a run with other {what}; delete it or give another path")
    for message in messages:
        log.warning(message)
    if x_adv is not None:
        whole = x.clone()
        whole[broken_by > _WRONG] = x_adv
        x_adv = whole
    return _State(broken_by, x_adv, attack, batch)
