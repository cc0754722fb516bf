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
    gradient_of,
    kappa_of,
    logits_of,
    margin_of,
    moved,
    start_of,
)
from rb_noisy.forward import (
    ask,
    checked_classes,
    checked_labels,
    device_of,
    finite,
    in_mode,
    is_right,
    masked,
    outside_inference,
    warn_of_attack,
)
from rb_noisy.radius import whole_number


@outside_inference
def kappa(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | str,
    alpha: float | str,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    definition: Definition = "first",
    batch_size: int = 256,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
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

    Other arguments, errors and warnings as in `pgd`. The attack runs in eval mode on the cross entropy. An image's
    logits must not depend on the others of its batch, which change as samples leave.

    Returns:
        (N,) int64 on the device of x.
    """
    eps, alpha = check_attack(eps=eps, alpha=alpha, steps=steps, norm=norm, definition=definition)
    if check or y is None:
        asked = ask(model, x, y, batch_size=_positive(batch_size))
        model, x, y = asked.model, asked.x, asked.logits.argmax(1) if y is None else asked.y
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    with in_mode(model, "eval"):
        met = (_count_right if definition == "count" else _resistance)(attack, x, y, progress)
    return (_told(met) if check else met).kappa


@dataclass(frozen=True, eq=False)
class Resistance:
    """How PGD-n fared against N samples, on the device of x.

    Attributes:
        kappa: (N,) int64 in 0..n, as `rb_noisy.kappa` returns it; small = easily attacked.
        margin: (N,) the least z_y − max z_j (j ≠ y, logits) among the iterates x⁽⁰⁾ … x⁽ⁿ⁻¹⁾ up to the first that is
            misclassified; at most 0 where there is one, else how far the attack was from one. inf for no steps, −inf
            where logits are not finite.
        masked: (N,) bool, whether the gradient at x⁽⁰⁾ is zero or not finite, so that the attack was blind.
        spoiled: (N,) bool, whether the logits of an iterate were not finite, which counts as misclassified.
    """

    kappa: Tensor
    margin: Tensor
    masked: Tensor
    spoiled: Tensor


def _told(met: Resistance) -> Resistance:
    """The same, once what speaks against it has been said."""
    warn_of_attack(met.masked, met.spoiled)
    return met


@outside_inference
def resistance(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    alpha: float | str,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    batch_size: int = 256,
    seed: int | None = None,
    target: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> Resistance:
    """κ with the least margin that was met on its way, from the same passes.

    With `target` (N,), a class for each sample, the attack raises z_target − z_y (logits) and not the cross entropy; a
    sample is broken by any wrong class. `check=False` is for callers that have looked at network, images and labels
    before (`rb_noisy.forward.ask`), and say themselves what speaks against the figures. Other arguments and errors as
    in `kappa`.
    """
    eps, alpha = check_attack(eps=eps, alpha=alpha, steps=steps, norm=norm)
    if check:
        model, x, y, target = _asked(model, x, y, target, batch_size)
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    with in_mode(model, "eval"):
        met = _resistance(attack, x, y, progress, target)
    return _told(met) if check else met


def _resistance(
    attack: _Attack,
    x: Tensor,
    y: Tensor,
    progress: Callable[[int], None] | None,
    target: Tensor | None = None,
) -> Resistance:
    if attack.steps == 0:
        none = torch.zeros_like(y, dtype=torch.bool)
        return Resistance(torch.zeros_like(y), torch.full(y.shape, torch.inf, device=y.device), none, none)
    # x⁽ⁿ⁻¹⁾ is the last that counts, and no step is taken from it.
    return _first_wrong(replace(attack, steps=attack.steps - 1), x, y, progress, target)


def _asked(
    model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, batch_size: int
) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    asked = ask(model, x, y, batch_size=_positive(batch_size))
    if target is not None:
        target = checked_labels(target, asked.x, "target classes")
        checked_classes(target, asked.logits.shape[1], "target classes")
    return asked.model, asked.x, asked.y, target


@outside_inference
def stands(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    alpha: float | str,
    steps: int,
    norm: Norm = "Linf",
    random_start: bool = True,
    batch_size: int = 256,
    seed: int | None = None,
    target: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> Tensor:
    """Whether a sample stands PGD-n: none of x⁽⁰⁾ … x⁽ⁿ⁾ is misclassified. What `pgd` calls not `broken`, sooner.

    Arguments and errors as in `resistance`.

    Returns:
        (N,) bool on the device of x; the mean is the any-iterate accuracy.
    """
    eps, alpha = check_attack(eps=eps, alpha=alpha, steps=steps, norm=norm)
    if check:
        model, x, y, target = _asked(model, x, y, target, batch_size)
    attack = _Attack(model, eps, alpha, steps, norm, random_start, generator_of(seed, None), _positive(batch_size))
    with in_mode(model, "eval"):
        met = _first_wrong(attack, x, y, progress, target)
    return (_told(met) if check else met).kappa > steps


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

    def gradient(self, x_adv: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of the loss at this iterate, and its logits."""
        loss = ATTACK_LOSSES["ce"] if target is None else partial(to_target, target)
        return gradient_of(self.model, x_adv, y, x_adv.new_empty(0), loss)

    def moved(self, x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        """The next iterate."""
        return moved(x_adv, x, gradient, self.eps, self.alpha, self.norm)


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
    hidden, spoiled = (torch.zeros(len(x), dtype=torch.bool, device=device) for _ in range(2))

    def enter(first: int, count: int) -> _Batch:
        rows = slice(first, first + count)
        images, labels = x[rows].to(device), y[rows].to(device)
        place = torch.arange(first, first + len(images), device=device)
        aim = labels if target is None else target[rows].to(device)
        return _Batch(place, torch.zeros_like(place), labels, aim, images, attack.start(images))

    def judge(batch: _Batch, logits: Tensor) -> Tensor:
        """Which are misclassified."""
        usable = finite(logits)
        now = margin_of(logits, batch.y).to(margin.dtype).where(usable, -torch.inf)
        margin[batch.place] = torch.minimum(margin[batch.place], now)
        spoiled[batch.place] |= ~usable
        return ~is_right(logits, batch.y)

    def classify(at_end: _Batch) -> None:
        right = ~judge(at_end, logits_of(attack.model, at_end.x_adv))
        found[at_end.place[right]] = attack.steps + 1

    batch = enter(0, attack.batch_size)
    entered, looked_at, reported, at_end = len(batch), 0, 0, batch[batch.t > 0]
    while len(batch):
        if attack.steps:
            gradient, logits = attack.gradient(batch.x_adv, batch.y, None if target is None else batch.target)
            wrong = judge(batch, logits)
            found[batch.place[wrong]] = batch.t[wrong]
            if entered > looked_at:  # some are at x⁽⁰⁾
                rows = batch.t == 0
                hidden[batch.place[rows]], looked_at = masked(gradient[rows]), entered
            batch.t, batch.x_adv = batch.t + 1, attack.moved(batch.x_adv, batch.x, gradient)
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
    return Resistance(*(values.to(x.device) for values in (found, margin, hidden, spoiled)))


def _count_right(attack: _Attack, x: Tensor, y: Tensor, progress: Callable[[int], None] | None) -> Resistance:
    """κ by `definition="count"`; the margin is not measured."""
    device = device_of(attack.model, x)
    values = torch.zeros_like(y)
    hidden, spoiled = (torch.zeros_like(y, dtype=torch.bool) for _ in range(2))
    for at in range(0, len(x), attack.batch_size):
        rows = slice(at, at + attack.batch_size)
        images, labels = x[rows].to(device), y[rows].to(device)
        x_adv, right = attack.start(images), []
        for step in range(attack.steps):
            gradient, logits = attack.gradient(x_adv, labels)
            if step == 0:
                hidden[rows] = masked(gradient).to(x.device)
            spoiled[rows] |= ~finite(logits).to(x.device)
            x_adv = attack.moved(x_adv, images, gradient)
            right.append(is_right(logits, labels))
        values[rows] = kappa_of(right, labels, "count").to(x.device)
        if progress is not None:
            progress(len(images))
    return Resistance(values, torch.full(y.shape, torch.nan, device=y.device), hidden, spoiled)


def _positive(batch_size: int) -> int:
    return whole_number(batch_size, "batch_size", least=1)
