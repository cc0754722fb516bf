"""How one prediction is scored against its target distribution: cross entropy, and losses that tolerate wrong labels.

A criterion takes logits (B, K) and a target distribution (B, K) and returns the loss of each sample, (B,), at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from rb_noisy.errors import InputError, make_named

Criterion = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ target·log p, (B,)."""
    return F.cross_entropy(logits, target, reduction="none")


def reverse_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ p·log target, (B,), with p clamped at 1e-7 and the target at 1e-4 (Wang et al. 2019)."""
    return -(logits.softmax(1).clamp_min(1e-7) * target.clamp_min(1e-4).log()).sum(1)


def normalized_and_reverse(logits: Tensor, target: Tensor) -> Tensor:
    """NCE + RCE, (B,) (Ma et al. 2020): the cross entropy over its sum for all K classes, plus the reverse one.

    A soft target replaces the one-hot label in both terms; that extension is ours.
    """
    log_p = logits.log_softmax(1)
    normalized = (target * log_p).sum(1) / log_p.sum(1)
    return normalized + reverse_cross_entropy(logits, target)


@dataclass(frozen=True)
class SymmetricCrossEntropy:
    """α·CE + β·reverse CE (Wang et al. 2019): 0.1 and 1 for CIFAR-10, 6 and 1 for CIFAR-100.

    With p = softmax(logits), q the label (clamped as in `reverse_cross_entropy`) and H the entropy, KL(p ‖ q) =
    RCE(p, q) − H(p). The [SGLR] loss with the target r·p̄ + (1−r)·q at T = 1 is therefore, exactly,

        (1−r)·CE + r·CE(p̄, p) = SCE(α=1−r, β=r) evaluated with p̄ in the reverse term − r·KL(p̄ ‖ q) + r·KL(p̄ ‖ p).

    [SGLR Prop. 1], L_sglr = L_sce − α·L_rkl, is the case p̄ = p (the target is the current prediction), where the last
    term vanishes; its α is r, the weight of the reverse term, and the two weights of L_sce sum to 1. It is an identity
    of values, not of gradients: none flows through the target. It is derived here, the proof is not in the paper's
    main text.
    """

    alpha: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; give a number of at least 0")

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.alpha * cross_entropy(logits, target) + self.beta * reverse_cross_entropy(logits, target)


CRITERIA: dict[str, Callable[..., Criterion]] = {"ce": lambda: cross_entropy, "sce": SymmetricCrossEntropy}


def make_criterion(name: str, **options: float) -> Criterion:
    """A criterion by its name in `CRITERIA`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("criterion", name, CRITERIA, options)
