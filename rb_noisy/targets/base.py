"""What every target shares: the batch as targets see it, and what they answer with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rb_noisy.attacks import AttackLoss, AttackResult
from rb_noisy.errors import InputError
from rb_noisy.record import SampleRecord


@dataclass
class Batch:
    """One training batch, as targets see it.

    Attributes:
        index: (B,) rows of the batch in the training set.
        x: (B, C, H, W) images. y: (B,) given labels. hard: (B, K) the same, one-hot.
        epoch: counted from 0, of `epochs`. share: how much of the run is done, 0..1.
        guiding: (B, K) logits on x of the pass that only the target needs (`natural_mode`); without a gradient.
        x_adv, natural, adversarial: the attacked images, and the (B, K) logits on x and on x̃ of the passes that are
            trained. Each is None before it is computed, and where the method computes none.
        x_start, start: where the attack starts, and the logits there, where that pass is trained too.
        attack: what the attack found, None before it and without one.
        taught: (B, K) logits of a teacher on x, where the attack or the loss on x̃ needs them.
        gather: collects a (B, …) tensor over processes, so that every process keeps the whole record.
        teach: (teacher's name, images) → its (B, K) logits, without a gradient.
        supervises: which of the two passes the objective trains towards the target, "natural" or "adversarial".
        eps, alpha, steps, norm: the training attack, for targets that measure κ themselves or normalise it.
        draws: the CPU generator of random starts.
        labels: (B,) what the attack moves away from, once `attack_labels` has chosen it.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    hard: Tensor
    epoch: int
    share: float
    epochs: int = 1
    labels: Tensor | None = None
    guiding: Tensor | None = None
    x_adv: Tensor | None = None
    natural: Tensor | None = None
    adversarial: Tensor | None = None
    x_start: Tensor | None = None
    start: Tensor | None = None
    attack: AttackResult | None = None
    taught: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    teach: Callable[[str, Tensor], Tensor] | None = None
    supervises: str = "adversarial"
    eps: float = 0.0
    alpha: float = 0.0
    steps: int = 0
    norm: str = "Linf"
    draws: torch.Generator | None = None

    @property
    def supervised(self) -> Tensor:
        """The logits that are trained towards the target."""
        return self.natural if self.supervises == "natural" else self.adversarial

    @property
    def on_natural(self) -> Tensor | None:
        """Logits on x, of the guiding pass where there is one."""
        return self.natural if self.guiding is None else self.guiding


Penalty = Callable[[Tensor], Tensor]
"""Supervised logits (B, K) → a scalar that is added to the loss, and to what the attack raises."""


@dataclass(frozen=True)
class Assignment:
    """What a batch is trained towards: target (B, K), weight (B,) of its samples or None, penalty or None."""

    target: Tensor
    weight: Tensor | None = None
    penalty: Penalty | None = None


class Targets:
    """What every target shares; the defaults are those of a target that is a function of the label alone."""

    start_average: ClassVar[str] = "onehot"  # what p̄ starts from: the given label, or "zero"
    teachers: ClassVar[tuple[str, ...]] = ()  # names for `Batch.teach`
    attack_penalty: ClassVar[bool] = False  # whether the attack raises the penalty too
    attack_start: ClassVar[Literal["gaussian"] | None] = None  # how the attack starts; None leaves it to the objective
    trains_natural: ClassVar[bool] = False  # whether the penalty takes the trained pass on x, `Batch.natural`

    def natural_mode(self, epoch: int) -> str | None:
        """In which mode the network sees x for this target, "train" or "eval"; None if it needs no such pass."""
        return None

    def begin_epoch(self, record: SampleRecord, epoch: int) -> None:
        """Called before every epoch, on every process."""

    def before_attack(self, batch: Batch, record: SampleRecord) -> None:
        """Called before the attack, after a guiding pass in eval mode."""

    def attack_labels(self, model: nn.Module, batch: Batch, record: SampleRecord) -> Tensor:
        """(B,) the labels that the attack moves away from; called before the attack."""
        return batch.y

    def attack_loss(self, batch: Batch) -> AttackLoss | None:
        """What the attack raises in place of the objective's; None leaves it to the objective."""
        return None

    def penalty(self, batch: Batch, record: SampleRecord) -> Penalty | None:
        return None

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        """What the batch is trained towards."""
        raise NotImplementedError


def check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; give a number from 0 to 1")


def check_at_least(bound: float, **values: float) -> None:
    for name, value in values.items():
        if not bound <= value < math.inf:
            raise InputError(f"{name} is {value}; give a number of at least {bound}")


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give a number above 0")


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.detach().float() / temperature).softmax(1)
