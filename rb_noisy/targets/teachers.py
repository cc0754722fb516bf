"""Targets that ask another network: distillation, and ADR with the averaged weights as the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.record import SampleRecord
from rb_noisy.targets.base import Assignment, Batch, Targets, check_fraction, check_temperature, softmax


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
            raise InputError('kd has no teacher; name a run folder or a model: target_options {"robust": "at_digits"}')

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
