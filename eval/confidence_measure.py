"""What the study of robust confidence asks of the network, per sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from eval import common
from eval.confidence_splits import measured
from rb_noisy.calibrators import MEASURED, SOFTMAX, Observed
from rb_noisy.confidence import observe, withstands

STEPS, MAIN = (3, 5, 10, 20), 10
ATTACKS = {"": "ε", "_targeted": "targeted", "_2eps": "2ε"}
"""What ends the names of an attack's features: PGD, PGD towards the second likeliest class, PGD in 2ε."""

PGD = (*SOFTMAX, "kappa", "attack_margin")


def measure(subject: common.Subject, *, seed: int, batch_size: int, out: Path) -> dict[str, Tensor]:
    """Logits (N, K), and for each of `ATTACKS` and `STEPS` `kappa…@STEPS` and `attack_margin…@STEPS` (N,)."""

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        found = {}
        for steps in STEPS:
            options = {"eps": subject.eps, "norm": subject.norm, "alpha": 2.5 * subject.eps / steps, "steps": steps}
            met = observe(subject.fast, x, features=MEASURED, batch_size=batch_size, **options)
            found |= {"logits": met.logits} | {f"{name}@{steps}": getattr(met, name) for name in MEASURED}
        return found

    return measured(subject, "confidence-robust", {"seed": seed, "steps": STEPS}, batch_size, out, compute)


def own_verdicts(
    subject: common.Subject, labels: Tensor, name: str, *, seed: int, batch_size: int, out: Path
) -> Tensor:
    """(N,) bool: predicted as `labels` (N,), and `withstands`; kept as NAME.npz."""
    of = dataclasses.replace(subject, y=labels)

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            stays = subject.fast(x).argmax(1) == y
        rows = stays.nonzero().flatten()
        options = {"eps": subject.eps, "norm": subject.norm, "seed": batch_seed, "batch_size": batch_size}
        stays[rows] = withstands(subject.fast, x[rows], y[rows], **options)
        return {"stands": stays}

    return measured(of, name, {"seed": seed}, batch_size, out, compute)["stands"]


def observed(arrays: dict[str, Tensor], steps: int) -> Observed:
    """What a calibrator with κ of so many steps is given."""
    return Observed(arrays["logits"], **{name: arrays[f"{name}@{steps}"] for name in MEASURED})
