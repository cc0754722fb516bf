"""Targets that ask another network: distillation, ARD and RSLAD, and ADR with the averaged weights as the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rb_noisy.attacks import AttackLoss
from rb_noisy.errors import InputError
from rb_noisy.record import SampleRecord
from rb_noisy.targets.base import (
    Assignment,
    Batch,
    Penalty,
    Targets,
    check_at_least,
    check_fraction,
    check_temperature,
    softmax,
)


@dataclass(frozen=True)
class Distillation(Targets):
    """Distillation: the cross entropy's share + Σ weight·CE(p_teacher, p), on x̃ or on x, whichever is supervised.

    KD-AT with a robust teacher alone; with a standard one beside it the loss of KD-SWA (Chen et al. 2021, as their
    code does it: 0.3, 0.6 and 0.1, T = 2, without the factor T²). CE to the teacher is KL from it but for a constant.

    Attributes:
        robust, standard: a run folder or a timm name (every model of the zoo has one) of each teacher.
        robust_weight, standard_weight: the rest, 1 − both, is the hard label's.
    """

    robust: str | None = None
    standard: str | None = None
    robust_weight: float = 0.6
    standard_weight: float = 0.1
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_fraction(robust_weight=self.robust_weight, standard_weight=self.standard_weight)
        check_fraction(**{"robust_weight + standard_weight": sum(self._weights().values())})
        if not self._weights():
            raise _no_teacher("kd")

    @property
    def teachers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._weights())

    def _weights(self) -> dict[str, float]:
        both = {self.robust: self.robust_weight, self.standard: self.standard_weight}
        return {name: weight for name, weight in both.items() if name is not None}

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        x = batch.x if batch.supervises == "natural" else batch.x_adv
        taught = {name: softmax(batch.teach(name, x), self.temperature) for name in self.teachers}
        weights = self._weights()

        def penalty(logits: Tensor) -> Tensor:
            log_p = (logits.float() / self.temperature).log_softmax(1)
            return sum(-weights[name] * (p * log_p).sum(1).mean() for name, p in taught.items())

        # The cross entropy is linear in its target: this is the hard label's share of it.
        return Assignment(batch.hard * (1 - sum(weights.values())), penalty=penalty)


def _no_teacher(name: str) -> InputError:
    return InputError(f'{name} has no teacher; name a run folder or a model: target_options {{"robust": "at_digits"}}')


def _kl(taught: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(taught/T) ‖ softmax(logits/T)), (B,)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)  # a great T leaves little that half precision could tell
    p, q = ((z.to(dtype) / temperature).log_softmax(1) for z in (taught, logits))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


class _TaughtOnNatural(Targets):
    """What has no loss but a penalty towards the teacher's prediction on x."""

    robust: str | None

    @property
    def teachers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.robust,)

    def before_attack(self, batch: Batch, record: SampleRecord) -> None:
        batch.taught = batch.teach(self.robust, batch.x)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        # The cross entropy with nothing is 0: the penalty is the whole loss.
        return Assignment(torch.zeros_like(batch.hard), penalty=self.loss_of(batch))

    def loss_of(self, batch: Batch) -> Penalty:
        """Logits on x̃ → the loss."""
        raise NotImplementedError


@dataclass(frozen=True)
class ARD(_TaughtOnNatural):
    """Adversarially robust distillation (ARD, Goldblum et al. 2020, as their code does it), with PGD-AT.

        α·T²·s·KL(teacher(x) ‖ f(x̃)) + (1−α)·CE(f(x), y)

    x̃ raises the cross entropy; both predictions in the KL have the temperature T. The authors attack in train mode
    (`attack_mode`), with ε = 8/255, α = 2/255 and 10 steps, and train for 200 epochs with weight decay 2e-4.

    Attributes:
        robust: a run folder or a timm name of the robust teacher.
        alpha: the KL's share; at 1, the default, x still passes in train mode, which moves BatchNorm statistics.
        kl_scale: s. The paper has 1. The code takes the mean over classes where KL has a sum: 1/10 for ten classes.
    """

    robust: str | None = None
    alpha: float = 1.0
    temperature: float = 30.0
    kl_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.robust is None:
            raise _no_teacher("ard")
        check_fraction(alpha=self.alpha)
        check_temperature(self.temperature)
        check_at_least(0, kl_scale=self.kl_scale)

    @property
    def trains_natural(self) -> bool:  # type: ignore[override]
        return self.alpha < 1

    def natural_mode(self, epoch: int) -> str | None:
        return None if self.trains_natural else "train"

    def loss_of(self, batch: Batch) -> Penalty:
        weight = self.alpha * self.temperature**2 * self.kl_scale

        def loss(logits: Tensor) -> Tensor:
            taught = weight * _kl(batch.taught, logits, self.temperature).mean()
            if not self.trains_natural:
                return taught
            return taught + (1 - self.alpha) * F.cross_entropy(batch.natural.float(), batch.y)

        return loss


@dataclass(frozen=True)
class RSLAD(_TaughtOnNatural):
    """Robust soft label adversarial distillation (RSLAD, Zi et al. 2021, as their code does it), with PGD-AT.

        s·(5/6·KL(teacher(x) ‖ f(x̃)) + 1/6·KL(teacher(x) ‖ f(x)))

    No label is used. x̃ raises KL(teacher(x) ‖ f(x̃)) from x + 0.001·N(0, 1), in eval mode, with ε = 8/255, α = 2/255 and
    10 steps. The authors train for 300 epochs, ÷10 at 215, 260 and 285, with weight decay 2e-4.

    Attributes:
        robust: a run folder or a timm name of the robust teacher.
        natural_weight: share of the KL on x.
        kl_scale: s. The paper has 1. The code takes the mean over ten classes where KL has a sum, and for CIFAR-100 ten
            times the mean over a hundred, which is 1/10 for both.
    """

    robust: str | None = None
    natural_weight: float = 1 / 6
    kl_scale: float = 0.1

    attack_start = "gaussian"
    trains_natural = True

    def __post_init__(self) -> None:
        if self.robust is None:
            raise _no_teacher("rslad")
        check_fraction(natural_weight=self.natural_weight)
        check_at_least(0, kl_scale=self.kl_scale)

    def attack_loss(self, batch: Batch) -> AttackLoss:
        return lambda logits, natural, y: _kl(batch.taught, logits).sum()

    def loss_of(self, batch: Batch) -> Penalty:
        shares = (1 - self.natural_weight, self.natural_weight)

        def loss(logits: Tensor) -> Tensor:
            both = (_kl(batch.taught, z).mean() for z in (logits, batch.natural))
            return self.kl_scale * sum(share * kl for share, kl in zip(shares, both, strict=True))

        return loss


@dataclass(frozen=True)
class AnnealedSelfDistillation(Targets):
    """ADR (Wu et al., ICLR 2024): λᵢ·softmax(f_average(x)/τ) + (1−λᵢ)·onehot, the averaged weights as the teacher.

    λᵢ = clip(λ + p_y − max p, 0, 1): the teacher counts less where it disagrees with the label. Over the run λ rises
    and τ falls along half a cosine. Needs `+wa`.
    """

    start_share: float = 0.7
    end_share: float = 0.95
    start_temperature: float = 2.0
    end_temperature: float = 1.0

    teachers = ("average",)

    def __post_init__(self) -> None:
        check_fraction(start_share=self.start_share, end_share=self.end_share)
        check_temperature(self.start_temperature)
        check_temperature(self.end_temperature)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        rise = 0.5 * (1 - math.cos(math.pi * batch.share))
        temperature = self.start_temperature + rise * (self.end_temperature - self.start_temperature)
        share = self.start_share + rise * (self.end_share - self.start_share)
        p = softmax(batch.teach("average", batch.x), temperature)
        mine = (share + (p * batch.hard).sum(1, keepdim=True) - p.amax(1, keepdim=True)).clamp(0, 1)
        return Assignment(mine * p + (1 - mine) * batch.hard)
