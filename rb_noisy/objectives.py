"""What is minimised: standard training, PGD-AT and TRADES, each for any target distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from rb_noisy.errors import InputError, make_named


@dataclass(frozen=True)
class StandardTraining:
    """CE(f(x), target)."""

    uses_natural = True
    attack_loss = None
    random_start = False

    def __call__(self, natural: Tensor | None, adversarial: Tensor | None, target: Tensor) -> Tensor:
        return F.cross_entropy(natural, target)


@dataclass(frozen=True)
class PGDAT:
    """CE(f(x̃), target), x̃ from PGD on the cross entropy with the given label (Madry et al. 2018)."""

    uses_natural = False
    attack_loss = "ce"
    random_start = True

    def __call__(self, natural: Tensor | None, adversarial: Tensor | None, target: Tensor) -> Tensor:
        return F.cross_entropy(adversarial, target)


@dataclass(frozen=True)
class TRADES:
    """CE(f(x), target) + β·KL(f(x) ‖ f(x̃)), x̃ from raising that KL from x + 0.001·N(0, 1) (Zhang et al. 2019)."""

    beta: float = 6.0

    uses_natural = True
    attack_loss = "kl"
    random_start = "gaussian"

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise InputError(f"beta is {self.beta}; give a number of at least 0")

    def __call__(self, natural: Tensor | None, adversarial: Tensor | None, target: Tensor) -> Tensor:
        divergence = F.kl_div(
            adversarial.log_softmax(1), natural.log_softmax(1), reduction="batchmean", log_target=True
        )
        return F.cross_entropy(natural, target) + self.beta * divergence


Objective = StandardTraining | PGDAT | TRADES
OBJECTIVES: dict[str, Callable[..., Objective]] = {"st": StandardTraining, "pgd-at": PGDAT, "trades": TRADES}


def make_objective(name: str, **options: float) -> Objective:
    """An objective by its name in `OBJECTIVES`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("objective", name, OBJECTIVES, options)
