"""Targets that keep the hard label and add a penalty: temporal ensembling, early-learning regularisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.record import SampleRecord
from rb_noisy.targets.base import Assignment, Batch, Penalty, Targets, check_at_least, check_fraction, softmax


@dataclass(frozen=True)
class TemporalEnsembling(Targets):
    """Temporal ensembling for AT (Dong et al. 2022, as their code does it): the hard label, and w·mean((p − p̂)²).

    p̂ is the running average of the *natural* prediction in eval mode, from a zero start, divided by its row sum; it is
    updated before the attack, which raises the penalty too. The mean is over batch and classes;
    w = weight·exp(−5(1−t)²), t from 0 at `start_epoch` to 1 at `ramp_end`.
    """

    weight: float = 300.0
    momentum: float = 0.9
    start_epoch: int = 0
    ramp_end: int = 0

    start_average = "zero"
    attack_penalty = True

    def __post_init__(self) -> None:
        check_fraction(momentum=self.momentum)
        check_at_least(0, weight=self.weight, start_epoch=self.start_epoch)
        if self.ramp_end < self.start_epoch:
            raise InputError(f"ramp_end is {self.ramp_end}, before start_epoch {self.start_epoch}; give a later epoch")

    def natural_mode(self, epoch: int) -> str | None:
        return "eval" if epoch >= self.start_epoch else None

    def ramp(self, epoch: int) -> float:
        """w in this epoch."""
        length = self.ramp_end - self.start_epoch
        t = min(1.0, (epoch - self.start_epoch) / length) if length > 0 else 1.0
        return self.weight * math.exp(-5 * (1 - t) ** 2)

    def penalty(self, batch: Batch, record: SampleRecord) -> Penalty | None:
        if batch.epoch < self.start_epoch:
            return None
        average = record.average[batch.index]
        average = average / average.sum(1, keepdim=True)
        return lambda logits: self.ramp(batch.epoch) * (logits.float().softmax(1) - average).square().mean()

    def before_attack(self, batch: Batch, record: SampleRecord) -> None:
        if batch.guiding is not None:
            record.update_average(batch.gather(batch.index), batch.gather(softmax(batch.guiding)), self.momentum)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(batch.hard, penalty=self.penalty(batch, record))


@dataclass(frozen=True)
class EarlyLearning(Targets):
    """Early-learning regularisation (ELR, Liu et al. 2020): the hard label, and λ·mean(log(1 − ⟨p̂, p⟩)).

    p̂ ← β·p̂ + (1−β)·p/Σp from a zero start, p clamped to [1e-4, 1 − 1e-4], from the supervised pass.
    """

    weight: float = 3.0
    momentum: float = 0.7

    start_average = "zero"

    def __post_init__(self) -> None:
        check_fraction(momentum=self.momentum)
        check_at_least(0, weight=self.weight)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        p = softmax(batch.supervised).clamp(1e-4, 1 - 1e-4)
        mix = p / p.sum(1, keepdim=True)
        record.update_average(batch.gather(batch.index), batch.gather(mix), self.momentum)
        average = record.average[batch.index]

        def penalty(logits: Tensor) -> Tensor:
            q = logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)
            return self.weight * (1 - (average * q).sum(1)).log().mean()

        return Assignment(batch.hard, penalty=penalty)
