"""Targets made of the label and of the network's own predictions: hard, LS, SGLR with SAT, and our κ-guided form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.errors import InputError
from rb_noisy.record import TEMPERATURES, SampleRecord
from rb_noisy.targets.base import (
    Assignment,
    Batch,
    Targets,
    check_at_least,
    check_fraction,
    check_temperature,
    softmax,
)


@dataclass(frozen=True)
class Hard(Targets):
    """The given label, one-hot."""

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(batch.hard)


@dataclass(frozen=True)
class LabelSmoothing(Targets):
    """(r/K)·1 + (1−r)·onehot [SGLR eq. 5]."""

    r: float = 0.2

    def __post_init__(self) -> None:
        check_fraction(r=self.r)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(self.r / batch.hard.shape[1] + (1 - self.r) * batch.hard)


@dataclass(frozen=True)
class SelfGuided(Targets):
    """Self-guided label refinement [SGLR eq. 6–8], and self-adaptive training (SAT, Huang et al. 2020), its ancestor.

    The paper prints neither α nor λ: 0.9 and 0.8 are the released code's. r = 0.2 and T = 1.5 rest on one cell of
    Table 4 (natural 82.9, robust 55.9). The released code has r = 1 and T = 1 instead, see `sglr_released`.

    Attributes:
        r: weight of the running average p̄ in the target (eq. 6, 8); 0 is the hard label, 1 is p̄ alone.
        temperature: T of the softmax that enters p̄ (Table 4).
        momentum: α of the running average (eq. 8).
        adversarial_weight: λ, the share of p(x̃) in what is averaged (eq. 7).
        start_epoch: the hard label until this epoch (counted from 0); p̄ is updated from it on.
        weighted: weigh every sample by max p̄, as SAT does.
        natural_pass: "train", as the released code has it, in which the pass on x moves the BatchNorm statistics (in
            short runs that costs robust accuracy), or "eval", in which it does not.
    """

    r: float = 0.2
    temperature: float = 1.5
    momentum: float = 0.9
    adversarial_weight: float = 0.8
    start_epoch: int = 0
    weighted: bool = False
    natural_pass: str = "train"

    def __post_init__(self) -> None:
        if self.natural_pass not in ("train", "eval"):
            raise InputError(f"natural_pass is {self.natural_pass!r}; give 'train' or 'eval'")
        check_fraction(r=self.r, momentum=self.momentum, adversarial_weight=self.adversarial_weight)
        check_temperature(self.temperature)
        check_at_least(0, start_epoch=self.start_epoch)

    @property
    def averages_from(self) -> int:
        """The epoch from which on p̄ is updated."""
        return self.start_epoch

    @property
    def averages_before_attack(self) -> bool:
        """Whether p̄ is updated in `before_attack` already."""
        return False

    def natural_mode(self, epoch: int) -> str | None:
        return self.natural_pass if epoch >= self.averages_from and self.adversarial_weight < 1 else None

    @torch.no_grad()
    def mix(self, natural: Tensor | None, adversarial: Tensor | None) -> Tensor:
        """λ·p(x̃) + (1−λ)·p(x), (B, K) [SGLR eq. 7]; p of the one pass alone where there is no other."""
        if natural is None or self.adversarial_weight == 1:
            return softmax(adversarial, self.temperature)
        if adversarial is None:
            return softmax(natural, self.temperature)
        share = self.adversarial_weight
        return share * softmax(adversarial, self.temperature) + (1 - share) * softmax(natural, self.temperature)

    def share_of_average(self, batch: Batch, record: SampleRecord) -> Tensor | float:
        """r, of every sample alike; (B, 1) where it differs."""
        return self.r

    def refined(self, batch: Batch, record: SampleRecord) -> Tensor:
        """The refined labels (B, K) by the record as it is [SGLR eq. 8]."""
        r = self.share_of_average(batch, record)
        return r * record.prior(batch.index) + (1 - r) * batch.hard

    def update_average(self, batch: Batch, record: SampleRecord) -> None:
        """p̄ of the batch's samples, on every process [SGLR eq. 8]."""
        if batch.epoch >= self.averages_from:
            mix = self.mix(batch.on_natural, batch.adversarial)
            record.update_average(batch.gather(batch.index), batch.gather(mix), self.momentum)

    def target(self, batch: Batch, record: SampleRecord) -> Tensor:
        """What is trained towards (B, K)."""
        return self.refined(batch, record)

    @torch.no_grad()
    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        if not self.averages_before_attack:
            self.update_average(batch, record)
        if batch.epoch < self.start_epoch:
            return Assignment(batch.hard)
        weight = record.average[batch.index].amax(1) if self.weighted else None
        return Assignment(self.target(batch, record), weight)


@dataclass(frozen=True)
class KappaGuided(SelfGuided):
    """κ-guided refinement (ours): SGLR with an r of its own for every sample, from its κ and its predictions.

    rᵢ = r + (r_max − r)·(1 − κ̄ᵢ/n)·(1 − qᵢ)/(1 − p̄ᵢ(ỹᵢ)). κ̄ᵢ is the running κ against the given label ỹᵢ (n steps), and
    qᵢ = p̄ᵢ(ỹᵢ)·T(ỹᵢ, ỹᵢ) / Σₖ p̄ᵢ(k)·T(k, ỹᵢ) the probability that the given label is right, T the label transition
    matrix that `SampleRecord.judge` estimates before every epoch. Without the factor of κ, r = 0 and r_max = 1 the
    refined label rᵢ·p̄ᵢ + (1−rᵢ)·onehot [SGLR eq. 8] gives ỹᵢ exactly the probability qᵢ. A label that PGD hardly moves
    (κ̄ near n) is kept; one that is lost at once *and* that the predictions contradict is replaced.

    From `start_epoch` on, the label that is trained towards is drawn anew from the refined label every time (`draw`),
    and the attack moves away from the drawn label. p̄ is averaged from the first epoch on, before the attack where it
    takes nothing from x̃.

    On MNIST the factor of κ changed no accuracy (README, Results): what carries the method is qᵢ and the drawn label.

    The defaults are for networks that are right more often than the given labels. A weaker one confirms its own
    mistakes: for it, give `draw = False`, `temperature = 1` with `fit_temperature`, `witness_every = 5` and a later
    start (the study `refinement-weak`).

    With `r_max = r`, `draw = False` and start epoch 0 this is SGLR; with rᵢ in {0, 1}, momentum 0 and a sharp natural
    prediction it is the annotator.

    Attributes:
        r: of a sample whose label is beyond doubt. r_max: of one whose label is certainly wrong.
        draw: train towards a label drawn from the refined one, else towards the refined label itself.
        fit_temperature: before every epoch, give p̄ the temperature that fits the given labels best
            (`SampleRecord.judge`), on top of `temperature`, which should then be 1.
        witness_every: every so many-th training sample is a witness: it keeps the given label (r), and T and the
            temperature are estimated from the witnesses alone. Of labels that it has refined itself, a weak network
            says no more than that it was right. 0: no witnesses.
    """

    r: float = 0.0
    temperature: float = 0.25
    momentum: float = 0.5
    adversarial_weight: float = 0.0
    natural_pass: str = "eval"
    r_max: float = 1.0
    draw: bool = True
    fit_temperature: bool = False
    witness_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(r_max=self.r_max)
        if self.r_max < self.r:
            raise InputError(f"r_max is {self.r_max}, below r = {self.r}; give at least r")
        check_at_least(0, witness_every=self.witness_every)

    @property
    def averages_from(self) -> int:
        return 0

    @property
    def averages_before_attack(self) -> bool:
        return self.adversarial_weight == 0 and self.natural_pass == "eval"

    def begin_epoch(self, record: SampleRecord, epoch: int) -> None:
        if epoch >= self.start_epoch:
            record.judge(
                temperatures=TEMPERATURES if self.fit_temperature else (1.0,),
                among=self.witnesses(torch.arange(len(record.labels), device=record.labels.device)),
            )

    def witnesses(self, index: Tensor) -> Tensor | None:
        """(B,) bool, which of these samples are witnesses; None where there are none."""
        return index % self.witness_every == 0 if self.witness_every else None

    def before_attack(self, batch: Batch, record: SampleRecord) -> None:
        if self.averages_before_attack:
            self.update_average(batch, record)

    def share_of_average(self, batch: Batch, record: SampleRecord) -> Tensor:
        # Never attacked (standard training): κ̄ is NaN, and the predictions alone decide.
        kept = (record.kappa_average[batch.index] / max(1, batch.steps)).nan_to_num(0.0).clamp(0, 1)
        doubt = (1 - kept) * record.contradiction(batch.index)
        if (witnesses := self.witnesses(batch.index)) is not None:
            doubt = doubt * ~witnesses
        return (self.r + (self.r_max - self.r) * doubt)[:, None]

    @torch.no_grad()
    def attack_labels(self, model: nn.Module, batch: Batch, record: SampleRecord) -> Tensor:
        if batch.epoch < self.start_epoch:
            return batch.y
        refined = self.refined(batch, record)
        if not self.draw:
            return refined.argmax(1)
        return torch.multinomial(refined.cpu(), 1, generator=batch.draws)[:, 0].to(batch.y)

    def target(self, batch: Batch, record: SampleRecord) -> Tensor:
        if self.draw:
            return F.one_hot(batch.labels, batch.hard.shape[1]).to(batch.hard)
        return self.refined(batch, record)


def self_adaptive(**options: float) -> SelfGuided:
    """SAT for AT (Huang et al. 2020): p̄ of the natural prediction is the whole target, samples weigh max p̄."""
    preset = {"r": 1.0, "temperature": 1.0, "adversarial_weight": 0.0, "weighted": True, "natural_pass": "eval"}
    return SelfGuided(**preset | options)


def sglr_released(**options: float) -> SelfGuided:
    """What the authors' released code does: plain cross entropy for 89 of 200 epochs, then p̄ itself is the target.

    Its README reports 83.0 natural, 55.9 PGD-20 and 50.2 AutoAttack for it, the very finals of PGD-AT+SGLR in [SGLR]
    Table 2: those are figures of r = 1 and T = 1, not of Table 4's r = 0.2 and T = 1.5.
    """
    return SelfGuided(**{"r": 1.0, "temperature": 1.0} | options)
