"""AutoAttack (Croce & Hein, arXiv:2003.01690), driven so that it can be stopped and resumed at any moment.

The attacks, their parameters and the checks are the reference package's own; the loop around them is ours, and so is
what spares them passes through the network (`rb_noisy.fewer_passes`) and makes a pass cheaper (`rb_noisy.fast`). With
the same seed and batch size the verdicts equal the reference's, sample by sample.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rb_noisy import compat
from rb_noisy.autoattack_state import SURVIVED, WRONG, State, Warnings, load, save
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.fast import FastForm, fast_form
from rb_noisy.fewer_passes import spare_passes
from rb_noisy.files import tensors_digest
from rb_noisy.forward import (
    all_finite,
    checked_classes,
    checked_images,
    checked_labels,
    depends_on_batch,
    differ,
    finite,
    image_shape_of,
    in_training,
    is_right,
    outside_inference,
    spoiled_doubt,
    usable,
)
from rb_noisy.processes import Processes, own_file
from rb_noisy.radius import radius, whole_number
from rb_noisy.weights import kept_buffers

NORMS = ("Linf", "L2", "L1")
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard version's attacks, in its order."""

_OTHER = 1e-2  # logits further apart, as a share of the largest, are another network's, not another device's

# FAB-T draws nothing at random, so that its batches may be cut otherwise than the reference's: on a CPU, where no more
# is won by larger ones, into such that several processes end together.
_FAB_ON_CPU = 32


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
    reference: bool
    processes: Processes
    report: Callable[[str, int, int], None]


@outside_inference
def run_autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    attacks: Sequence[str] = ATTACKS,
    state_path: str | os.PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    return_adversarials: bool = False,
    reference: bool = False,
    fast: FastForm | None = None,
    processes: Processes | None = None,
) -> AutoAttackResult:
    """The standard AutoAttack on `x` (N, C, H, W) in [0, 1] with labels `y` (N,).

    `model` is in eval mode on `device` and returns logits (N, K); it is left as it is, and so is torch's random state.
    `eps` is in pixel units of [0, 1] for `norm` "Linf" (also as text, "8/255"), else the L2 or L1 length. A choice of
    `attacks` runs these alone, in the order given, with the standard version's parameters. APGD-T and FAB-T aim at 9
    classes (APGD-T at 5 for L1), or at the K-1 there are; the warning about that is the reference's, whose own driver
    then fails.

    With `state_path` (an .npz file) every finished batch is saved there, and a call with the same model, data and
    settings goes on from it, after an interruption of any kind, to the result of an uninterrupted run. The file stays
    after the end, so that the next call returns at once, until the caller deletes it.

    `progress(stage, done, total)` is called when a stage begins and after every batch; the stage is "clean" or an
    attack's name, `done` of its `total` samples are finished. An attack's total are the samples that the earlier ones
    left; an attack without any is skipped.

    The attacks run on the fast form of the model (`fast`, else made here: `rb_noisy.fast.fast_form`) and are spared
    passes that cannot change a verdict; what they find is confirmed by the model itself. `reference` leaves both out,
    and so does a model whose own passes compute gradients or draw random numbers, or whose logits of an image depend
    on the others of its batch.

    Several `processes`, each of which makes this same call, share the batches; all return the whole result. Each has
    a state file of its own beside `state_path` and reads those of all, so that another number of them may go on.

    Raises `InputError` for unusable arguments (`seed=None` too), for images, labels or answers of another kind than
    `rb_noisy.forward` says, for fewer than 4 classes with "apgd-t" (its loss looks
    at the four largest logits), and for a state file that is damaged or of another run.
    """
    report, processes = progress or (lambda stage, done, total: None), processes or Processes()
    eps = radius(eps, "eps", norm, above_zero=True) if norm in NORMS else eps
    batch_size = whole_number(batch_size, "batch_size", least=1)
    x = checked_images(x, image_shape_of(model)).cpu()
    y = checked_labels(y.cpu() if isinstance(y, Tensor) else y, x)
    task = _Task(
        model, x, y, eps, norm, seed, batch_size, torch.device(device), tuple(attacks), reference, processes, report
    )
    _check_arguments(task)
    settings = _settings(task, return_adversarials, half=fast is not None and fast.half)
    log = Warnings()
    state = None if state_path is None else load(state_path, settings, x, log)
    model, answers = usable(model, x, "keep")
    task = replace(task, model=model)
    if state is not None and state.answers is not None and differ(state.answers, answers, _OTHER):
        # Its weights are the same, but not what it does with them.
        raise InputError(
            f"the AutoAttack state {state_path} is of a run with another model, whose logits of these images differ; "
            "delete it or give another path"
        )
    if state is None:
        with kept_buffers(model):
            broken_by = torch.where(_clean(task), SURVIVED, WRONG).to(torch.int8)
        state = State(broken_by, x.clone() if return_adversarials else None, answers=answers)
    state.share(processes, x)  # none of the files is written before all are read

    def keep() -> None:
        if state_path is not None:
            save(own_file(state_path, processes), settings, state, log)

    if state.attack < len(task.attacks):
        keep()
        # The attacks seed torch's global generator before every batch; a BatchNorm may have been left in training.
        with torch.random.fork_rng(devices=_devices(task.device)), kept_buffers(model):
            adversary = _build_attacks(task, log)
            dynamic = _check_defence(task, adversary, log)
            random = any("andomized" in message for message in log.messages.values())
            networks = [model]
            if not (reference or dynamic or random or _looks_at_the_batch(task, log)):
                networks.append(fast_form(model) if fast is None else fast)
                spare_passes(adversary, networks[1])
            with torch.no_grad(), _frozen([] if dynamic else list(model.parameters())):
                _attack(task, adversary, networks, state, keep, log)
        _check_square(task, state, log)
        keep()
    if state_path is not None and processes.count > 1:
        processes.wait()
        load(state_path, settings, x, log)  # what the others were warned of
    robust, correct = state.broken_by == SURVIVED, state.broken_by != WRONG
    return AutoAttackResult(robust, correct, state.broken_by, tuple(log.messages.values()), state.x_adv, task.attacks)


def _check_arguments(task: _Task) -> None:
    x, attacks = task.x, task.attacks
    if in_training(task.model):
        raise InputError("the model is in training mode, which attacks would measure and change; call model.eval()")
    if x.dtype != torch.float32 or not len(x):
        raise InputError(f"x is {x.dtype} of shape {tuple(x.shape)}; give float32 images (N, C, H, W), N at least 1")
    if task.norm not in NORMS:
        raise unknown_name("norm", task.norm, NORMS)
    if isinstance(task.seed, bool) or not isinstance(task.seed, (int, np.integer)):
        raise InputError(f"seed must be an integer, not {task.seed!r}: runs seeded by the clock cannot be resumed")
    for attack in attacks:
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS)
    if not attacks or len(set(attacks)) < len(attacks):
        raise InputError(f"attacks is {list(attacks)}; give each attack once, and at least one of {', '.join(ATTACKS)}")


# --- the loop


@torch.no_grad()
def _clean(task: _Task) -> Tensor:
    total = len(task.x)
    task.report("clean", 0, total)
    answers: list[Tensor] = []
    for x in task.x.split(task.batch_size):
        answers.append(task.model(x.to(task.device)).cpu())
        task.report("clean", min(len(answers) * task.batch_size, total), total)
    return all_finite(torch.cat(answers)).argmax(1) == task.y


def _attack(
    task: _Task, adversary: Any, networks: list[nn.Module], state: State, keep: Callable[[], None], log: Warnings
) -> None:
    """Carry `state` on to the end of all attacks, as the reference's loop does; `networks` are what they ask."""
    processes = task.processes
    while state.attack < len(task.attacks):
        attack = task.attacks[state.attack]
        code = _code(attack)
        # An attack's batches are cut from those it started with, of which it may have broken some before a resume.
        started = ((state.broken_by == SURVIVED) | (state.broken_by == code)).nonzero(as_tuple=True)[0]
        size = task.batch_size
        if attack == "fab-t" and task.device.type == "cpu":
            pieces = math.ceil(len(started) / min(size, _FAB_ON_CPU))
            size = math.ceil(len(started) / max(pieces, 1))
        state.count_in(size)
        batches = dict(enumerate(started.split(size) if len(started) else ()))
        own = [number for number in batches if number not in state.batches][processes.index :: processes.count]

        def finished(batches: dict[int, Tensor] = batches) -> int:
            return sum(len(batches[number]) for number in state.batches)

        if batches:
            task.report(attack, finished(), len(started))
        for number in own:
            index = batches[number]
            y = task.y[index].to(task.device)
            x = task.x[index].contiguous().to(task.device)
            with _not_finite(task, networks, x) as found:
                x_adv = _perturb(adversary, attack, x, y)
                broken = ~is_right(task.model(x_adv), y)
            x_adv = torch.where(broken.view(-1, 1, 1, 1), x_adv, found)
            spoiled = (found != x).flatten(1).any(1)
            broken = (broken | spoiled).cpu()
            if spoiled.any():
                log.warning(spoiled_doubt(int(spoiled.sum())))
            state.broken_by[index[broken]] = code
            if state.x_adv is not None:
                state.x_adv[index[broken]] = x_adv.cpu()[broken]
            state.batches.add(number)
            keep()
            task.report(attack, finished(), len(started))
        state.share(processes, task.x)
        state.attack, state.batches = state.attack + 1, set()
        keep()


@contextmanager
def _not_finite(task: _Task, networks: list[nn.Module], x: Tensor) -> Iterator[Tensor]:
    """Like x (N, C, H, W), but for each image where one is met within the block whose logits are not finite, that one.

    The attacks take such logits for class 0, and so for right where the label is 0.
    """
    found, order = x.clone(), {"Linf": torch.inf, "L2": 2, "L1": 1}[task.norm]

    def look(network: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> None:
        for point in given[0].detach()[~finite(logits.detach())]:
            distance = torch.linalg.vector_norm((x - point).flatten(1), order, dim=1)
            found[distance <= task.eps * 1.0001 + 1e-6] = point

    hooks = [network.register_forward_hook(look) for network in networks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


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


def _build_attacks(task: _Task, log: Warnings) -> Any:
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
    left = broken_by != WRONG
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


def _check_defence(task: _Task, adversary: Any, log: Warnings) -> bool:
    """The reference's checks on the first batch; caps the target classes, returns whether the model is dynamic."""
    from autoattack import checks

    model, attacks, targeted = task.model, task.attacks, (adversary.apgd_targeted, adversary.fab)
    x, y = task.x[: task.batch_size].to(task.device), task.y[: task.batch_size].to(task.device)
    checks.check_randomized(model, x, y, bs=task.batch_size, logger=log)
    classes = checks.check_range_output(model, x, logger=log)
    if classes < 4 and "apgd-t" in attacks:
        raise InputError(f"APGD-T's loss needs 4 classes and the model has {classes}; leave 'apgd-t' out of attacks")
    checked_classes(task.y, classes)
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


def _looks_at_the_batch(task: _Task, log: Warnings) -> bool:
    """Whether an image's logits depend on the other images: what is broken may then not leave the batch."""
    apart = depends_on_batch(task.model, task.x[: task.batch_size].to(task.device))
    if apart:
        log.warning("the logits of an image depend on the other images of its batch, and so do the verdicts")
    return apart or any(getattr(module, "training", False) for module in task.model.modules())


def _devices(device: torch.device) -> list[torch.device]:
    """Those whose random state the attacks use: they seed the current one, too."""
    if not torch.cuda.is_available():
        return []
    current = torch.device("cuda", torch.cuda.current_device())
    return list(dict.fromkeys([current, *([device] if device.type == "cuda" and device.index is not None else [])]))


def _check_square(task: _Task, state: State, log: Warnings) -> None:
    from autoattack import checks

    clean = (state.broken_by != WRONG).double().mean().item()
    checks.check_square_sr({"clean": clean, **_accuracies(state.broken_by, task.attacks)}, logger=log)


def _settings(task: _Task, return_adversarials: bool, half: bool) -> dict[str, Any]:
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
        "reference": bool(task.reference),
        "precision": "bf16" if half and not task.reference else "fp32",
    }
