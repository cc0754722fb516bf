"""What is minimised: standard and adversarial training, each for any target distribution and any criterion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rb_noisy.criteria import Criterion, cross_entropy, normalized_and_reverse
from rb_noisy.device import to_device
from rb_noisy.errors import InputError, make_named


class Objective:
    """A loss of the logits on x and on x̃, and what the training loop must know about it.

    Attributes:
        uses_natural: whether the loss takes the logits on x.
        supervises: which logits the target is for, "natural" or "adversarial".
        attack_loss: what the training attack raises (`rb_noisy.attacks.ATTACK_LOSSES`); None for no attack.
        random_start: how the attack starts, see `rb_noisy.attacks.pgd`.
        steps: steps of the attack where the method fixes them; None leaves them to the recipe.
        alpha_ratio: its step size over ε where the method fixes it; None leaves it to the recipe.
        start_ratio: radius of the uniform random start over ε.
        project: whether the attack is projected onto the ε-ball.
        trains_start: whether the pass at the attack's start is trained too, see `LIET`.
    """

    uses_natural: ClassVar[bool]
    supervises: ClassVar[Literal["natural", "adversarial"]]
    attack_loss: ClassVar[str | None]
    random_start: ClassVar[bool | Literal["gaussian"]]
    steps: ClassVar[int | None] = None
    alpha_ratio: ClassVar[float | None] = None
    start_ratio: ClassVar[float] = 1.0
    project: ClassVar[bool] = True
    trains_start: ClassVar[bool] = False

    @property
    def attack_weight(self) -> float:
        """The weight in the loss of what the attack raises (β of a KL), for penalties that it raises beside it."""
        return self.beta if self.attack_loss == "kl" else 1.0

    def __call__(
        self,
        natural: Tensor | None,
        adversarial: Tensor | None,
        target: Tensor,
        weight: Tensor | None = None,
        criterion: Criterion = cross_entropy,
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            natural, adversarial: (B, K) logits on x and on x̃; None where the objective does not take them.
            target: (B, K) distributions.
            weight: (B,), at least 0: what is measured against the target becomes Σ w·ℓ / Σ w (Huang et al. 2020).
                Terms that compare f(x) with f(x̃) stay plain means.
            criterion: takes the place of the cross entropy with the target.
        """
        raise NotImplementedError


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return losses.mean()
    return (weight * losses).sum() / weight.sum().clamp_min(1e-12)  # no weight at all: no loss, not NaN


def _kl(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax(natural) ‖ softmax(adversarial)), (B,)."""
    return F.kl_div(adversarial.log_softmax(1), natural.log_softmax(1), reduction="none", log_target=True).sum(1)


def _check_beta(beta: float) -> None:
    if not 0 <= beta < math.inf:
        raise InputError(f"beta is {beta}; give a number of at least 0")


@dataclass(frozen=True)
class StandardTraining(Objective):
    """CE(f(x), target)."""

    uses_natural = True
    supervises = "natural"
    attack_loss = None
    random_start = False

    def __call__(self, natural, adversarial, target, weight=None, criterion=cross_entropy) -> Tensor:
        return _mean(criterion(natural, target), weight)


@dataclass(frozen=True)
class PGDAT(Objective):
    """CE(f(x̃), target), x̃ from PGD on the cross entropy with the given label (Madry et al. 2018)."""

    uses_natural = False
    supervises = "adversarial"
    attack_loss = "ce"
    random_start = True

    def __call__(self, natural, adversarial, target, weight=None, criterion=cross_entropy) -> Tensor:
        return _mean(criterion(adversarial, target), weight)


class FGSMRS(PGDAT):
    """PGD-AT with one step α = 1.25·ε from a uniform start (FGSM-RS, Wong et al. 2020)."""

    steps = 1
    alpha_ratio = 1.25


class NFGSM(PGDAT):
    """PGD-AT with one step α = ε from x + U(−2ε, 2ε), cut to [0, 1] but not to the ε-ball (de Jorge et al. 2022)."""

    steps = 1
    alpha_ratio = 1.0
    start_ratio = 2.0
    project = False


@dataclass(frozen=True)
class LIET(PGDAT):
    """Label-information elimination (LIET; Pan et al., ICCV 2025; what the paper leaves open is the released code's).

    One step of ε from a start that holds what a one-step network would hide a label in: ±ε·signs[y], the signs of the
    gradient on a grey image of class y (`label_signs`), with a random share of the pixels replaced by noise. The pass
    at the start is trained too, and both passes are held together:

        CE(f(x̃), soft target) + λₜ·JS(p(x₀), p(x̃)),  λₜ growing linearly over the epochs to `consistency`.

    The target is softened by a random distribution over the other classes (`soften`), drawn anew each time; so is the
    label in the attack's loss. Above ε = 8/255 the noise reaches 2ε and x̃ is not projected onto the ε-ball. The
    defaults are the authors' for CIFAR-10, with averaged weights; for CIFAR-100 smoothing is 0.8 and consistency 200.

    Attributes:
        smoothing: share of the target that goes to the other classes at random.
        consistency: the last λ.
        noise_from, noise_to: the share of replaced pixels is drawn from this range for every batch.
        refresh: steps (within an epoch) for which `label_signs` are kept.
    """

    smoothing: float = 0.6
    consistency: float = 100.0
    noise_from: float = 0.1
    noise_to: float = 0.5
    refresh: int = 20

    steps = 1
    alpha_ratio = 1.0
    trains_start = True

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing is {self.smoothing}; give a share of the target, from 0 to below 1")
        if not 0 <= self.consistency < math.inf:
            raise InputError(f"consistency is {self.consistency}; give a number of at least 0")
        if not 0 <= self.noise_from <= self.noise_to <= 1:
            raise InputError(
                f"noise_from and noise_to are {self.noise_from}, {self.noise_to}; give 0 <= from <= to <= 1"
            )
        if self.refresh < 1:
            raise InputError(f"refresh is {self.refresh}; give a number of steps, from 1 up")

    @staticmethod
    def wide(eps: float) -> bool:
        """Whether ε is so great that the noise reaches 2ε and x̃ is not projected."""
        return eps > 8 / 255 + 1e-9

    def label_signs(
        self, network: Callable[[Tensor], Tensor], num_classes: int, like: Tensor, draws: torch.Generator | None
    ) -> Tensor:
        """(K, C, H, W) of −1, 0 and 1: the sign of the loss' gradient on a uniformly grey image, for every class.

        Args:
            network: (K, C, H, W) images → logits (K, K), in eval mode.
            like: images (N, C, H, W) of that size and device.
            draws: of the softened labels.
        """
        grey = torch.full((num_classes, *like.shape[1:]), 0.5, device=like.device).requires_grad_()
        labels = torch.arange(num_classes, device=like.device)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.start_loss(network(grey), labels, draws), grey)
        return gradient.sign()

    def start(self, x: Tensor, signs: Tensor, eps: float, wide: bool, draws: torch.Generator | None) -> Tensor:
        """x₀, (N, C, H, W) in [0, 1], for images x and the (N, C, H, W) label signs of their classes."""

        def uniform(*shape: int) -> Tensor:
            return to_device(torch.rand(shape, generator=draws), x.device)

        replaced, noise = uniform(*x.shape), 2 * uniform(*x.shape) - 1
        share, sign = (float(torch.rand((), generator=draws)) for _ in range(2))
        share = self.noise_from + (self.noise_to - self.noise_from) * share
        delta = torch.where(replaced < share, (2 * eps if wide else eps) * noise, eps * signs)
        return (x - delta if sign < 0.5 else x + delta).clamp(0.0, 1.0)

    def soften(self, target: Tensor, labels: Tensor, draws: torch.Generator | None) -> Tensor:
        """(1 − s)·target + s·r, (B, K), r a random distribution over the classes other than `labels` (B,).

        r has the target's mass, which is below 1 where a teacher has the rest.
        """
        if not self.smoothing:
            return target
        random = to_device(torch.rand(target.shape, generator=draws), target.device).to(target)
        random = random.scatter(1, labels[:, None], 0.0)
        random = random * target.sum(1, keepdim=True) / random.sum(1, keepdim=True).clamp_min(1e-30)
        return (1 - self.smoothing) * target + self.smoothing * random

    def start_loss(self, logits: Tensor, labels: Tensor, draws: torch.Generator | None) -> Tensor:
        """What the step from the start raises, summed over the batch: the cross entropy with softened labels (B,)."""
        hard = F.one_hot(labels, logits.shape[1]).to(logits)
        return cross_entropy(logits, self.soften(hard, labels, draws)).sum()

    def compared(self, start: Tensor, adversarial: Tensor, share: float) -> Tensor:
        """λₜ·JS(p(x₀), p(x̃)), a scalar, of the (B, K) logits; `share` (0..1) of the epochs, this one included."""
        p, q = start.float().softmax(1), adversarial.float().softmax(1)
        middle = ((p + q) / 2).clamp_min(1e-30).log()
        divergence = F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")
        return self.consistency * share * divergence / 2


@dataclass(frozen=True)
class TRADES(Objective):
    """CE(f(x), target) + β·KL(f(x) ‖ f(x̃)), x̃ from raising that KL from x + 0.001·N(0, 1) (Zhang et al. 2019)."""

    beta: float = 6.0

    uses_natural = True
    supervises = "natural"
    attack_loss = "kl"
    random_start = "gaussian"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, natural, adversarial, target, weight=None, criterion=cross_entropy) -> Tensor:
        return _mean(criterion(natural, target), weight) + self.beta * _kl(natural, adversarial).mean()


@dataclass(frozen=True)
class MART(Objective):
    """Boosted CE on x̃ + β·KL(f(x) ‖ f(x̃))·(1 − p_y(x)), x̃ from PGD on the cross entropy (Wang et al. 2020).

    The boosted CE is CE(f(x̃), target) − log(1.0001 − max_{k≠y} p_k(x̃)); 1.0001 and the start from x + 0.001·N(0, 1)
    are the released code's. For a soft target (ours) y is its largest class and p_y(x) = Σ target·p(x). A `weight`
    applies to the whole boosted CE, both terms of which trust the label.
    """

    beta: float = 5.0

    uses_natural = True
    supervises = "adversarial"
    attack_loss = "ce"
    random_start = "gaussian"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, natural, adversarial, target, weight=None, criterion=cross_entropy) -> Tensor:
        y = target.argmax(1, keepdim=True)
        wrong = adversarial.softmax(1).scatter(1, y, 0.0).amax(1)
        boosted = criterion(adversarial, target) - (1.0001 - wrong).log()
        doubt = 1 - (target * natural.softmax(1)).sum(1)
        return _mean(boosted, weight) + self.beta * (_kl(natural, adversarial) * doubt).mean()


@dataclass(frozen=True)
class NRAT(Objective):
    """NCE + RCE on x + β·½(KL(f(x) ‖ f(x̃)) + KL(f(x̃) ‖ f(x))) (Chen et al. 2024, as in their released code).

    NCE and RCE have weight 1 each (`rb_noisy.criteria.normalized_and_reverse`), and x̃ is TRADES': it raises
    KL(f(x) ‖ f(x̃)) from x + 0.001·N(0, 1). A criterion other than the cross entropy replaces NCE + RCE (ours).
    """

    beta: float = 6.0

    uses_natural = True
    supervises = "natural"
    attack_loss = "kl"
    random_start = "gaussian"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, natural, adversarial, target, weight=None, criterion=cross_entropy) -> Tensor:
        own = normalized_and_reverse if criterion is cross_entropy else criterion
        symmetric = (_kl(natural, adversarial) + _kl(adversarial, natural)) / 2
        return _mean(own(natural, target), weight) + self.beta * symmetric.mean()


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "st": StandardTraining,
    "pgd-at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "nrat": NRAT,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "liet": LIET,
}


def make_objective(name: str, **options: float) -> Objective:
    """An objective by its name in `OBJECTIVES`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("objective", name, OBJECTIVES, options)
