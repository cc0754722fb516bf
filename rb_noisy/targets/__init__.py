"""What stands in for the hard label, composed with any objective: targets, sample weights and penalties.

A target never carries a gradient. Each class here is called once per batch, after the forward passes, and may move the
`SampleRecord`; those that choose the label *before* the attack do it in `attack_labels`.
"""

from __future__ import annotations

from collections.abc import Callable

from rb_noisy.errors import make_named
from rb_noisy.targets.annotator import Annotator
from rb_noisy.targets.base import Assignment, Batch, Penalty, Targets
from rb_noisy.targets.labels import Hard, KappaGuided, LabelSmoothing, SelfGuided, self_adaptive, sglr_released
from rb_noisy.targets.penalties import EarlyLearning, TemporalEnsembling
from rb_noisy.targets.teachers import ARD, RSLAD, AnnealedSelfDistillation, Distillation

__all__ = [
    "EPOCH_SHARES",
    "TARGETS",
    "TAUGHT",
    "Annotator",
    "Assignment",
    "Batch",
    "Hard",
    "KappaGuided",
    "LabelSmoothing",
    "Penalty",
    "SelfGuided",
    "Targets",
    "make_targets",
]

TARGETS: dict[str, Callable[..., Targets]] = {
    "hard": Hard,
    "ls": LabelSmoothing,
    "sglr": SelfGuided,
    "sglr-released": sglr_released,
    "sat": self_adaptive,
    "te": TemporalEnsembling,
    "elr": EarlyLearning,
    "adr": AnnealedSelfDistillation,
    "kd": Distillation,
    "ard": ARD,
    "rslad": RSLAD,
    "annotator": Annotator,
    "kgr": KappaGuided,
}

TAUGHT = ("kd", "ard", "rslad")  # targets that are nothing without a teacher by name

# Epochs that a target's options name, as shares of the run, for recipes that leave them out.
EPOCH_SHARES: dict[str, dict[str, float]] = {
    # The released code of SGLR and of TE counts epochs from 1 and starts at its epoch 90 of 200, which is 89 counted
    # from 0; SAT's counts from 0. SGLR's paper is silent.
    "sglr": {"start_epoch": 89 / 200},
    "sglr-released": {"start_epoch": 89 / 200},
    "sat": {"start_epoch": 60 / 200},
    "te": {"start_epoch": 89 / 200, "ramp_end": 149 / 200},
    "annotator": {"start_epoch": 40 / 120},
    "kgr": {"start_epoch": 0.3},
}


def make_targets(name: str, **options: float) -> Targets:
    """A target by its name in `TARGETS`, with the options of its class.

    Raises:
        InputError: unknown name, unknown option, or an option out of range.
    """
    return make_named("target", name, TARGETS, options)
