"""What is minimised: standard and adversarial training, each for any target distribution and any criterion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from rb_noisy.criteria import Criterion, cross_entropy, normalized_and_reverse
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
    """

    uses_natural: ClassVar[bool]
    supervises: ClassVar[Literal["natural", "adversarial"]]
    attack_loss: ClassVar[str | None]
    random_start: ClassVar[bool | Literal["gaussian"]]
    steps: ClassVar[int | None] = None
    alpha_ratio: ClassVar[float | None] = None
    start_ratio: ClassVar[float] = 1.0
    project: ClassVar[bool] = True

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
}


def make_objective(name: str, **options: float) -> Objective:
    """An objective by its name in `OBJECTIVES`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("objective", name, OBJECTIVES, options)
