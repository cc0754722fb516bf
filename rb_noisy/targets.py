"""What stands in for the hard label, composed with any objective: targets, sample weights and penalties.

A target never carries a gradient. Each class here is called once per batch, after the forward passes, and may move the
`SampleRecord`; those that choose the label *before* the attack do it in `attack_labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import kappa
from rb_noisy.errors import InputError, make_named
from rb_noisy.record import SampleRecord


@dataclass
class Batch:
    """One training batch, as targets see it.

    Attributes:
        index: (B,) rows of the batch in the training set.
        x: (B, C, H, W) images. y: (B,) given labels. hard: (B, K) the same, one-hot.
        epoch: counted from 0. share: how much of the run is done, 0..1.
        x_adv, natural, adversarial: the attacked images, and the (B, K) logits on x and on x̃; None before they are
            computed, and where the method computes none.
        gather: collects a (B, …) tensor over processes, so that every process keeps the whole record.
        teach: (teacher's name, images) → its (B, K) logits, without a gradient.
        supervises: which of the two passes the objective trains towards the target, "natural" or "adversarial".
        eps, alpha, norm: the training attack's ball and step, for targets that measure κ themselves.
        draws: the CPU generator of random starts.
        labels: (B,) what the attack moves away from, once `attack_labels` has chosen it.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    hard: Tensor
    epoch: int
    share: float
    labels: Tensor | None = None
    x_adv: Tensor | None = None
    natural: Tensor | None = None
    adversarial: Tensor | None = None
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

    def natural_mode(self, epoch: int) -> str | None:
        """In which mode the network sees x for this target, "train" or "eval"; None if it needs no such pass."""
        return None

    def begin_epoch(self, record: SampleRecord, epoch: int) -> None:
        """Called before every epoch, on every process."""

    def attack_labels(self, model: nn.Module, batch: Batch, record: SampleRecord) -> Tensor:
        """(B,) the labels that the attack moves away from; called before the attack."""
        return batch.y

    def penalty(self, batch: Batch, record: SampleRecord) -> Penalty | None:
        return None

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        """What the batch is trained towards."""
        raise NotImplementedError


def _check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; give a number from 0 to 1")


def _check_at_least(bound: float, **values: float) -> None:
    for name, value in values.items():
        if not bound <= value < math.inf:
            raise InputError(f"{name} is {value}; give a number of at least {bound}")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give a number above 0")


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
        _check_fraction(r=self.r)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(self.r / batch.hard.shape[1] + (1 - self.r) * batch.hard)


@dataclass(frozen=True)
class SelfGuided(Targets):
    """Self-guided label refinement [SGLR eq. 6–8], and self-adaptive training (SAT, Huang et al. 2020), its ancestor.

    Attributes:
        r: weight of the running average p̄ in the target (eq. 6, 8); 0 is the hard label, 1 is p̄ alone.
        temperature: T of the softmax that enters p̄ (Table 4).
        momentum: α of the running average (eq. 8).
        adversarial_weight: λ, the share of p(x̃) in what is averaged (eq. 7).
        start_epoch: the hard label until this epoch (counted from 0); p̄ is updated from it on.
        weighted: weigh every sample by max p̄, as SAT does.
    """

    r: float = 0.2
    temperature: float = 1.5
    momentum: float = 0.9
    adversarial_weight: float = 0.8
    start_epoch: int = 0
    weighted: bool = False

    def __post_init__(self) -> None:
        _check_fraction(r=self.r, momentum=self.momentum, adversarial_weight=self.adversarial_weight)
        _check_temperature(self.temperature)
        _check_at_least(0, start_epoch=self.start_epoch)

    @property
    def averages_from(self) -> int:
        """The epoch from which on p̄ is updated."""
        return self.start_epoch

    def natural_mode(self, epoch: int) -> str | None:
        return "train" if epoch >= self.averages_from and self.adversarial_weight < 1 else None

    @torch.no_grad()
    def mix(self, natural: Tensor | None, adversarial: Tensor | None) -> Tensor:
        """λ·p(x̃) + (1−λ)·p(x), (B, K) [SGLR eq. 7]; p of the one pass alone where there is no other."""
        if natural is None or self.adversarial_weight == 1:
            return _softmax(adversarial, self.temperature)
        if adversarial is None:
            return _softmax(natural, self.temperature)
        share = self.adversarial_weight
        return share * _softmax(adversarial, self.temperature) + (1 - share) * _softmax(natural, self.temperature)

    def share_of_average(self, batch: Batch, record: SampleRecord) -> Tensor | float:
        """r, of every sample alike; (B, 1) where it differs."""
        return self.r

    def refined(self, batch: Batch, record: SampleRecord) -> Tensor:
        """The refined labels (B, K) by the record as it is [SGLR eq. 8]."""
        r = self.share_of_average(batch, record)
        return r * record.average[batch.index] + (1 - r) * batch.hard

    @torch.no_grad()
    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        if batch.epoch >= self.averages_from:
            mix = self.mix(batch.natural, batch.adversarial)
            record.update_average(batch.gather(batch.index), batch.gather(mix), self.momentum)
        if batch.epoch < self.start_epoch:
            return Assignment(batch.hard)
        weight = record.average[batch.index].amax(1) if self.weighted else None
        return Assignment(self.refined(batch, record), weight)


@dataclass(frozen=True)
class TemporalEnsembling(Targets):
    """Temporal ensembling for AT (Dong et al. 2022, as their code does it): the hard label, and w·mean((p − p̂)²).

    p̂ is the running average of the *natural* prediction in eval mode, from a zero start, divided by its row sum. The
    mean is over batch and classes; w = weight·exp(−5(1−t)²), t from 0 at `start_epoch` to 1 at `ramp_end`. The attack
    raises the penalty too.
    """

    weight: float = 300.0
    momentum: float = 0.9
    start_epoch: int = 0
    ramp_end: int = 0

    start_average = "zero"
    attack_penalty = True

    def __post_init__(self) -> None:
        _check_fraction(momentum=self.momentum)
        _check_at_least(0, weight=self.weight, start_epoch=self.start_epoch, ramp_end=self.ramp_end)

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
        total = average.sum(1, keepdim=True)
        # Until its first average a sample has no p̂ to be drawn to.
        known, average = (total > 0).float(), average / total.clamp_min(1e-12)
        return lambda logits: self.ramp(batch.epoch) * (known * (logits.float().softmax(1) - average) ** 2).mean()

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        if batch.epoch >= self.start_epoch:
            p = _softmax(batch.natural)
            record.update_average(batch.gather(batch.index), batch.gather(p), self.momentum)
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
        _check_fraction(momentum=self.momentum)
        _check_at_least(0, weight=self.weight)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        p = _softmax(batch.supervised).clamp(1e-4, 1 - 1e-4)
        mix = p / p.sum(1, keepdim=True)
        record.update_average(batch.gather(batch.index), batch.gather(mix), self.momentum)
        average = record.average[batch.index]

        def penalty(logits: Tensor) -> Tensor:
            q = logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)
            return self.weight * (1 - (average * q).sum(1)).log().mean()

        return Assignment(batch.hard, penalty=penalty)


@dataclass(frozen=True)
class Distillation(Targets):
    """Distillation from teachers on x̃ (on x in standard training): hard_weight·CE + Σ weight·CE(p_teacher, p).

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
        _check_temperature(self.temperature)
        _check_fraction(robust_weight=self.robust_weight, standard_weight=self.standard_weight)
        _check_fraction(**{"robust_weight + standard_weight": sum(self._weights().values())})
        if not self._weights():
            raise InputError('kd has no teacher; name a run folder or a model: target_options {"robust": "at_digits"}')

    @property
    def teachers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._weights())

    def _weights(self) -> dict[str, float]:
        both = {self.robust: self.robust_weight, self.standard: self.standard_weight}
        return {name: weight for name, weight in both.items() if name is not None}

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        x = batch.x if batch.x_adv is None else batch.x_adv
        taught = {name: _softmax(batch.teach(name, x), self.temperature) for name in self.teachers}
        weights = self._weights()

        def penalty(logits: Tensor) -> Tensor:
            log_p = (logits.float() / self.temperature).log_softmax(1)
            return sum(-weights[name] * (p * log_p).sum(1).mean() for name, p in taught.items())

        # The criterion's weight falls to the hard label's share.
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
        _check_fraction(start_share=self.start_share, end_share=self.end_share)
        _check_temperature(self.start_temperature)
        _check_temperature(self.end_temperature)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        rise = 0.5 * (1 - math.cos(math.pi * batch.share))
        temperature = self.start_temperature + rise * (self.end_temperature - self.start_temperature)
        share = self.start_share + rise * (self.end_share - self.start_share)
        p = _softmax(batch.teach("average", batch.x), temperature)
        mine = (share + (p * batch.hard).sum(1, keepdim=True) - p.amax(1, keepdim=True)).clamp(0, 1)
        return Assignment(mine * p + (1 - mine) * batch.hard)


@dataclass(frozen=True)
class Annotator(Targets):
    """The robust annotator [NL Algorithms 1 and 2]: κ and loss select together, predictions re-label.

    From `start_epoch` on, the samples of a batch with κ < `kappa_threshold` against the given label and a natural loss
    among the batch's greatest (as many as the noise rate says) get argmax f(x) as their label; the attack and the
    target then use it. κ and loss are measured in eval mode before the attack.

    Attributes:
        noise_rate: the share of a batch whose loss counts as great; None estimates it from κ and loss
            (`rb_noisy.label_issues.estimate_noise_rate`).
    """

    kappa_threshold: int = 2
    noise_rate: float | None = None
    start_epoch: int = 0

    def __post_init__(self) -> None:
        _check_at_least(0, kappa_threshold=self.kappa_threshold, start_epoch=self.start_epoch)
        if self.noise_rate is not None:
            _check_fraction(noise_rate=self.noise_rate)

    def begin_epoch(self, record: SampleRecord, epoch: int) -> None:
        if epoch == self.start_epoch and self.noise_rate is None:
            record.noise_rate.fill_(record.estimate_noise_rate())

    @torch.no_grad()
    def attack_labels(self, model: nn.Module, batch: Batch, record: SampleRecord) -> Tensor:
        if batch.epoch < self.start_epoch:
            return batch.y
        rate = float(record.noise_rate) if self.noise_rate is None else self.noise_rate
        geometry = kappa(
            model,
            batch.x,
            batch.y,
            eps=batch.eps,
            alpha=batch.alpha,
            steps=self.kappa_threshold,
            norm=batch.norm,
            seed=int(torch.randint(2**62, (), generator=batch.draws)),
            batch_size=len(batch.y),
        )
        training = model.training
        logits = model.eval()(batch.x).float()
        model.train(training)
        loss = F.cross_entropy(logits, batch.y, reduction="none")
        great = loss > torch.quantile(loss, 1 - rate)
        return torch.where((geometry < self.kappa_threshold) & great, logits.argmax(1), batch.y)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(F.one_hot(batch.labels, batch.hard.shape[1]).to(batch.hard))


def _softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.detach().float() / temperature).softmax(1)


@dataclass(frozen=True)
class KappaGuided(SelfGuided):
    """κ-guided refinement (ours): SGLR with an r of its own for every sample, from its κ and its predictions.

    rᵢ = r + (r_max − r)·(1 − κ̄ᵢ/n)·vᵢ, where κ̄ᵢ is the running κ against the given label (n steps) and vᵢ the running
    share of the training passes that predicted the sample's most predicted *other* label. A label that PGD hardly moves
    (κ̄ near n) is kept, one that is lost at once and always to the same other label is replaced, hard samples that are
    taken now for this and now for that lie between. The target is rᵢ·p̄ᵢ + (1−rᵢ)·onehot [SGLR eq. 8]; the attack moves
    away from its largest class.

    With `r_max = r` every sample has the same r and this is SGLR; with rᵢ in {0, 1}, momentum 0 and p̄ the natural
    prediction it is the annotator.

    Attributes:
        r: of a sample whose label is beyond doubt. r_max: of one whose label is certainly wrong.
        average_epoch: p̄ is updated from this epoch on, the target refined from `start_epoch` on.
    """

    r: float = 0.1
    temperature: float = 1.0
    momentum: float = 0.7
    adversarial_weight: float = 0.5
    r_max: float = 1.0
    average_epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(r_max=self.r_max)
        _check_at_least(0, average_epoch=self.average_epoch)
        if self.r_max < self.r:
            raise InputError(f"r_max is {self.r_max}, below r = {self.r}; give at least r")

    @property
    def averages_from(self) -> int:
        return min(self.average_epoch, self.start_epoch)

    def share_of_average(self, batch: Batch, record: SampleRecord) -> Tensor:
        kept = record.kappa_average[batch.index] / max(1, batch.steps)
        other = record.votes[batch.index].masked_fill(batch.hard > 0, 0.0).amax(1)
        # Not seen before, or never attacked (standard training): κ̄ is NaN, and the votes alone decide.
        doubt = (1 - kept.nan_to_num(0.0)).clamp(0, 1) * other
        return (self.r + (self.r_max - self.r) * doubt)[:, None]

    @torch.no_grad()
    def attack_labels(self, model: nn.Module, batch: Batch, record: SampleRecord) -> Tensor:
        return batch.y if batch.epoch < self.start_epoch else self.refined(batch, record).argmax(1)


def _sat(**options: float) -> SelfGuided:
    """SAT for AT (Huang et al. 2020): p̄ of the natural prediction is the whole target, samples weigh max p̄."""
    return SelfGuided(**{"r": 1.0, "temperature": 1.0, "adversarial_weight": 0.0, "weighted": True} | options)


def _sglr_released(**options: float) -> SelfGuided:
    """What the authors' released code does: plain cross entropy for 90 of 200 epochs, then p̄ itself is the target."""
    return SelfGuided(**{"r": 1.0, "temperature": 1.0} | options)


TARGETS: dict[str, Callable[..., Targets]] = {
    "hard": Hard,
    "ls": LabelSmoothing,
    "sglr": SelfGuided,
    "sglr-released": _sglr_released,
    "sat": _sat,
    "te": TemporalEnsembling,
    "elr": EarlyLearning,
    "adr": AnnealedSelfDistillation,
    "kd": Distillation,
    "annotator": Annotator,
    "kgr": KappaGuided,
}

# Epochs that a target's options name, as shares of the run, for recipes that leave them out.
EPOCH_SHARES: dict[str, dict[str, float]] = {
    # The released code starts at epoch 90 of 200; the paper is silent.
    "sglr": {"start_epoch": 0.45},
    "sglr-released": {"start_epoch": 0.45},
    "sat": {"start_epoch": 0.3},  # 60 of 200
    "te": {"start_epoch": 0.45, "ramp_end": 0.75},  # 90 and 150 of 200
    "annotator": {"start_epoch": 1 / 3},  # 40 of 120
    "kgr": {"start_epoch": 1 / 3, "average_epoch": 0.2},
}


def make_targets(name: str, **options: float) -> Targets:
    """A target by its name in `TARGETS`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("target", name, TARGETS, options)
