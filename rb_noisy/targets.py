"""What stands in for the hard label: hard, smoothed (LS), or self-guided (SGLR) targets, and the per-sample record.

A target never carries a gradient. `SampleRecord` holds what training learns about each sample, by its index in the
training set; everything that needs a sample's history reads it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rb_noisy.errors import InputError, make_named


class SampleRecord:
    """Per-sample state on the device, row i for training sample i; saved and restored with the run.

    Attributes:
        average: (N, K) float32, p̄ of [SGLR] eq. 8; starts at the one-hot given label, as the released code does.
        kappa: (N,) int64, κ from the last training attack, −1 before the first (small = suspicious).
        loss: (N,) float32, cross entropy with the given label in the last training pass (on x̃ where the method
            attacks, else on x), NaN before the first (large = suspicious).
        prediction: (N,) int64, the predicted label in that pass, −1 before the first.
    """

    def __init__(self, labels: Tensor, num_classes: int):
        self.average = F.one_hot(labels, num_classes).float()
        self.kappa = torch.full_like(labels, -1)
        self.loss = torch.full_like(labels, torch.nan, dtype=torch.float32)
        self.prediction = torch.full_like(labels, -1)

    def observe(self, index: Tensor, kappa: Tensor | None, loss: Tensor, prediction: Tensor) -> None:
        """Enter what a training pass showed of the samples in `index`, each (B,)."""
        if kappa is not None:
            self.kappa[index] = kappa
        self.loss[index] = loss
        self.prediction[index] = prediction

    def update_average(self, index: Tensor, mix: Tensor, momentum: float) -> None:
        """p̄ ← α·p̄ + (1−α)·mix for the rows in `index` [SGLR eq. 8]."""
        self.average[index] = momentum * self.average[index] + (1 - momentum) * mix.to(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average, "kappa": self.kappa, "loss": self.loss, "prediction": self.prediction}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise InputError(f"the per-sample record {name!r} has {found}, not {tuple(own.shape)}: other data?")
            own.copy_(state[name])


def _check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; give a number from 0 to 1")


@dataclass(frozen=True)
class Hard:
    """The given label, one-hot."""

    def __call__(self, hard: Tensor, average: Tensor, epoch: int) -> Tensor:
        return hard


@dataclass(frozen=True)
class LabelSmoothing:
    """(r/K)·1 + (1−r)·onehot [SGLR eq. 5]."""

    r: float = 0.2

    def __post_init__(self) -> None:
        _check_fraction(r=self.r)

    def __call__(self, hard: Tensor, average: Tensor, epoch: int) -> Tensor:
        return self.r / hard.shape[1] + (1 - self.r) * hard


@dataclass(frozen=True)
class SelfGuided:
    """Self-guided label refinement [SGLR eq. 6–8].

    Attributes:
        r: weight of the running average p̄ in the target (eq. 6, 8); 0 is the hard label, 1 is p̄ alone.
        temperature: T of the softmax that enters p̄ (Table 4).
        momentum: α of the running average (eq. 8).
        adversarial_weight: λ, the share of p(x̃) in what is averaged (eq. 7).
        start_epoch: the hard label until this epoch (counted from 0); p̄ is updated from it on.
    """

    r: float = 0.2
    temperature: float = 1.5
    momentum: float = 0.9
    adversarial_weight: float = 0.8
    start_epoch: int = 0

    def __post_init__(self) -> None:
        _check_fraction(r=self.r, momentum=self.momentum, adversarial_weight=self.adversarial_weight)
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; give a number above 0")
        if self.start_epoch < 0:
            raise InputError(f"start_epoch is {self.start_epoch}; give 0 or a later epoch")

    @torch.no_grad()
    def mix(self, natural: Tensor, adversarial: Tensor | None) -> Tensor:
        """λ·p(x̃) + (1−λ)·p(x), (B, K) [SGLR eq. 7]; p(x) alone where there is no x̃ (standard training)."""
        p_natural = (natural.detach().float() / self.temperature).softmax(1)
        if adversarial is None:
            return p_natural
        p_adversarial = (adversarial.detach().float() / self.temperature).softmax(1)
        return self.adversarial_weight * p_adversarial + (1 - self.adversarial_weight) * p_natural  # eq. 7

    def __call__(self, hard: Tensor, average: Tensor, epoch: int) -> Tensor:
        if epoch < self.start_epoch:
            return hard
        return self.r * average + (1 - self.r) * hard  # eq. 8


Targets = Hard | LabelSmoothing | SelfGuided

TARGETS: dict[str, Callable[..., Targets]] = {
    "hard": Hard,
    "ls": LabelSmoothing,
    "sglr": SelfGuided,
    # What the authors' released code does: plain cross entropy for 90 of 200 epochs, then p̄ itself is the target.
    "sglr-released": lambda **options: SelfGuided(**{"r": 1.0, "temperature": 1.0, "start_epoch": 90} | options),
}


def make_targets(name: str, **options: float) -> Targets:
    """A target by its name in `TARGETS`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("target", name, TARGETS, options)


@torch.no_grad()
def refine(
    targets: Targets,
    record: SampleRecord,
    index: Tensor,
    y: Tensor,
    natural: Tensor | None,
    adversarial: Tensor | None,
    epoch: int,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """The (B, K) target distribution of a batch, after its predictions have entered the record.

    Args:
        index: (B,) rows of the batch in the training set.
        y: (B,) given labels.
        natural, adversarial: (B, K) logits on x and x̃; natural is needed by `SelfGuided` alone.
        gather: collects a tensor over processes, so that every process keeps the whole record.
    """
    num_classes = record.average.shape[1]
    if isinstance(targets, SelfGuided) and epoch >= targets.start_epoch:
        record.update_average(gather(index), gather(targets.mix(natural, adversarial)), targets.momentum)
    return targets(F.one_hot(y, num_classes).to(record.average), record.average[index], epoch)
