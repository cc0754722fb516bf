"""The geometry value κ, the margin that an attack leaves, and whether a sample stands PGD.

What is decided leaves the batch, and the next sample takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rb_noisy.attacks import (
    ATTACK_LOSSES,
    Definition,
    Norm,
    check_attack,
    generator_of,
    in_mode,
    kappa_of,
    logits_of,
    margin_of,
    pgd_step,
    start_of,
)
from rb_noisy.errors import InputError


def kappa(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    definition: Definition = "first",
    batch_size: int = 256,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The geometry value κ of every sample ([NL] §5; Zhang et al. 2021b).

    κ(x, y) is the least t in {0, …, n−1} with argmax f(x⁽ᵗ⁾) ≠ y, or n if there is none. κ = 0: misclassified at the
    start already; κ = n: PGD-n never got it. Range 0..n; a *small* κ is the suspicious end. A sample leaves the batch
    as soon as it is misclassified. With `definition="count"` κ is the number of iterates t < n that are classified
    as y (what the GAIRAT code computes); the two differ only where a prediction flips back, and nothing can be dropped.

    Args:
        y: labels (N,); None measures against the model's own prediction on x (for unlabelled samples).
        batch_size: samples attacked at a time; the random start does not depend on it.
        progress: called with the number of samples finished since the last call.

    Other arguments and errors as in `pgd`. The attack runs in eval mode on the cross entropy. An image's logits must
    not depend on the others of its batch, which change as samples leave.

    Returns:
        (N,) int64 on the device of x.
    """
    check_attack(x, y, eps=eps, alpha=alpha, steps=steps, norm=norm, definition=definition)
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    with in_mode(model, "eval"):
        labels = _predictions(model, x, batch_size) if y is None else y
        if definition == "count":
            return _count_right(attack, x, labels, progress)
        return _resistance(attack, x, labels, progress).kappa


@dataclass(frozen=True, eq=False)
class Resistance:
    """How PGD-n fared against N samples, on the device of x.

    Attributes:
        kappa: (N,) int64 in 0..n, as `rb_noisy.kappa` returns it; small = easily attacked.
        margin: (N,) the least z_y − max z_j (j ≠ y, logits) among the iterates x⁽⁰⁾ … x⁽ⁿ⁻¹⁾ up to the first that is
            misclassified; at most 0 where there is one, else how far the attack was from one. inf for no steps.
    """

    kappa: Tensor
    margin: Tensor


def resistance(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    batch_size: int = 256,
    seed: int | None = None,
    target: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Resistance:
    """κ with the least margin that was met on its way, from the same passes.

    With `target` (N,), a class for each sample, the attack raises z_target − z_y (logits) and not the cross entropy; a
    sample is broken by any wrong class. Other arguments and errors as in `kappa`.
    """
    check_attack(x, y, eps=eps, alpha=alpha, steps=steps, norm=norm, definition="first")
    _check_target(target, y)
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    with in_mode(model, "eval"):
        return _resistance(attack, x, y, progress, target)


def _resistance(
    attack: _Attack,
    x: Tensor,
    y: Tensor,
    progress: Callable[[int], None] | None,
    target: Tensor | None = None,
) -> Resistance:
    if attack.steps == 0:
        return Resistance(torch.zeros_like(y), torch.full(y.shape, torch.inf, device=y.device))
    # x⁽ⁿ⁻¹⁾ is the last that counts, and no step is taken from it.
    return _first_wrong(replace(attack, steps=attack.steps - 1), x, y, progress, target)


def _check_target(target: Tensor | None, y: Tensor) -> None:
    if target is not None and target.shape != y.shape:
        raise InputError(f"{tuple(target.shape)} target classes for {len(y)} images; give one for each")


def stands(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    batch_size: int = 256,
    seed: int | None = None,
    target: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Whether a sample stands PGD-n: none of x⁽⁰⁾ … x⁽ⁿ⁾ is misclassified. What `pgd` calls not `broken`, sooner.

    Arguments and errors as in `resistance`.

    Returns:
        (N,) bool on the device of x; the mean is the any-iterate accuracy.
    """
    check_attack(x, y, eps=eps, alpha=alpha, steps=steps, norm=norm, definition="first")
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    _check_target(target, y)
    with in_mode(model, "eval"):
        return _first_wrong(attack, x, y, progress, target).kappa > steps


@dataclass(frozen=True)
class _Attack:
    model: nn.Module
    eps: float
    alpha: float
    steps: int
    norm: Norm
    random_start: bool
    generator: torch.Generator | None
    batch_size: int

    def start(self, x: Tensor) -> Tensor:
        return start_of(x, self.eps, self.norm, self.random_start, self.generator)

    def step(self, x_adv: Tensor, x: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next iterate, and the logits of this one."""
        loss = ATTACK_LOSSES["ce"] if target is None else partial(to_target, target)
        return pgd_step(self.model, x_adv, x, y, x.new_empty(0), loss, self.eps, self.alpha, self.norm)


def to_target(target: Tensor, logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """z_target − z_y, summed over the samples, for an attack to raise; target (N,) a class for each."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).sum()


@dataclass
class _Batch:
    """Samples that are not decided yet: place in x, iterates so far, label and target, each (B,); image and iterate."""

    place: Tensor
    t: Tensor
    y: Tensor
    target: Tensor
    x: Tensor
    x_adv: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, rows: Tensor) -> _Batch:
        return _Batch(*(part[rows] for part in vars(self).values()))

    @staticmethod
    def cat(batches: list[_Batch]) -> _Batch:
        return _Batch(*(torch.cat(parts) for parts in zip(*(vars(batch).values() for batch in batches), strict=True)))


def _first_wrong(
    attack: _Attack,
    x: Tensor,
    y: Tensor,
    progress: Callable[[int], None] | None,
    target: Tensor | None = None,
) -> Resistance:
    """As κ, the first t in 0..n where x⁽ᵗ⁾ is misclassified, n + 1 where there is none; the least margin until then."""
    device = device_of(attack.model, x)
    found = torch.full((len(x),), attack.steps, device=device)
    margin = torch.full((len(x),), torch.inf, device=device)

    def enter(first: int, count: int) -> _Batch:
        rows = slice(first, first + count)
        images, labels = x[rows].to(device), y[rows].to(device)
        place = torch.arange(first, first + len(images), device=device)
        aim = labels if target is None else target[rows].to(device)
        return _Batch(place, torch.zeros_like(place), labels, aim, images, attack.start(images))

    def judge(batch: _Batch, logits: Tensor) -> Tensor:
        """Which are misclassified."""
        least = torch.minimum(margin[batch.place], margin_of(logits, batch.y).to(margin.dtype))
        margin[batch.place] = least
        return logits.argmax(1) != batch.y

    def classify(at_end: _Batch) -> None:
        right = ~judge(at_end, logits_of(attack.model, at_end.x_adv))
        found[at_end.place[right]] = attack.steps + 1

    batch = enter(0, attack.batch_size)
    entered, reported, at_end = len(batch), 0, batch[batch.t > 0]
    while len(batch):
        if attack.steps:
            aim = None if target is None else batch.target
            moved, logits = attack.step(batch.x_adv, batch.x, batch.y, aim)
            wrong = judge(batch, logits)
            found[batch.place[wrong]] = batch.t[wrong]
            batch.t, batch.x_adv = batch.t + 1, moved
            batch = batch[~wrong]
        finished = batch.t == attack.steps
        at_end = _Batch.cat([at_end, batch[finished]])
        if len(at_end) >= attack.batch_size:
            classify(at_end)
            at_end = at_end[:0]
        batch = batch[~finished]
        if progress is not None:
            progress(entered - len(batch) - reported)
            reported = entered - len(batch)
        if len(batch) < attack.batch_size and entered < len(x):
            entering = enter(entered, attack.batch_size - len(batch))
            batch, entered = _Batch.cat([batch, entering]), entered + len(entering)
    if len(at_end):
        classify(at_end)
    return Resistance(found.to(x.device), margin.to(x.device))


def _count_right(attack: _Attack, x: Tensor, y: Tensor, progress: Callable[[int], None] | None) -> Tensor:
    device = device_of(attack.model, x)
    values = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for at in range(0, len(x), attack.batch_size):
        rows = slice(at, at + attack.batch_size)
        images, labels = x[rows].to(device), y[rows].to(device)
        x_adv, right = attack.start(images), []
        for _ in range(attack.steps):
            x_adv, logits = attack.step(x_adv, images, labels)
            right.append(logits.argmax(1) == labels)
        values.append(kappa_of(right, labels, "count").to(x.device))
        if progress is not None:
            progress(len(images))
    return torch.cat(values)


def _predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    device = device_of(model, x)
    batches = (x[at : at + batch_size].to(device) for at in range(0, len(x), batch_size))
    predicted = [logits_of(model, batch).argmax(1).to(x.device) for batch in batches]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=x.device), *predicted])


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Where the weights are; of a network without any, where x is."""
    return next((parameter.device for parameter in model.parameters()), x.device)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1")
    return batch_size
