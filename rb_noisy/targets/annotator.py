"""The robust annotator: re-labels before the attack what κ and loss both suspect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.forward import in_mode
from rb_noisy.geometry import kappa
from rb_noisy.record import SampleRecord
from rb_noisy.targets.base import Assignment, Batch, Targets, check_at_least, check_fraction


@dataclass(frozen=True)
class Annotator(Targets):
    """The robust annotator [NL Algorithms 1 and 2]: κ and loss select together, predictions re-label.

    From `start_epoch` on, the samples of a batch with κ < `kappa_threshold` against the given label and a natural loss
    among the batch's greatest (as many as the noise rate says) get argmax f(x) as their label; the attack and the
    target then use it. κ and loss are measured in eval mode before the attack.

    Attributes:
        noise_rate: the share of a batch whose loss counts as great; None estimates it before every epoch from the
            start epoch on (`SampleRecord.estimate_noise_rate`): the first estimates are far too low.
    """

    kappa_threshold: int = 2
    noise_rate: float | None = None
    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, kappa_threshold=self.kappa_threshold, start_epoch=self.start_epoch)
        if self.noise_rate is not None:
            check_fraction(noise_rate=self.noise_rate)

    def begin_epoch(self, record: SampleRecord, epoch: int) -> None:
        if epoch >= self.start_epoch and self.noise_rate is None:
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
            check=False,
        )
        with in_mode(model, "eval"):
            logits = model(batch.x).float()
        loss = F.cross_entropy(logits, batch.y, reduction="none")
        great = loss > torch.quantile(loss, 1 - rate)
        return torch.where((geometry < self.kappa_threshold) & great, logits.argmax(1), batch.y)

    def __call__(self, batch: Batch, record: SampleRecord) -> Assignment:
        return Assignment(F.one_hot(batch.labels, batch.hard.shape[1]).to(batch.hard))
