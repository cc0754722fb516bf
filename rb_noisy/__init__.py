"""rb-noisy: adversarial training when labels are wrong, and its measurement, as an extension of RobustBench.

Importing this package is cheap and has two effects, both deferred until they are needed: RobustBench becomes
importable, and timm gets to know our networks and the models of our zoo.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rb_noisy.interruption import leave_quietly

leave_quietly()

from rb_noisy import compat  # noqa: E402
from rb_noisy.errors import InputError  # noqa: E402

if TYPE_CHECKING:
    from model_zoo.registry import list_models, load_model
    from rb_noisy.annotation import annotate
    from rb_noisy.attacks import AttackResult, pgd
    from rb_noisy.autoattack import run_autoattack
    from rb_noisy.confidence import Calibrated, calibrate
    from rb_noisy.data import load_data
    from rb_noisy.fast import fast_form
    from rb_noisy.geometry import kappa, stands
    from rb_noisy.label_issues import LabelIssues, find_label_issues
    from rb_noisy.noise import NoisyLabels, corrupt
    from rb_noisy.recipes import Recipe
    from rb_noisy.runs import Run
    from rb_noisy.training import train

__version__ = "0.1.0"
__all__ = [
    "AttackResult",
    "Calibrated",
    "InputError",
    "LabelIssues",
    "NoisyLabels",
    "Recipe",
    "Run",
    "annotate",
    "calibrate",
    "corrupt",
    "fast_form",
    "find_label_issues",
    "kappa",
    "list_models",
    "load_data",
    "load_model",
    "pgd",
    "run_autoattack",
    "stands",
    "train",
]

# Imported at first use: some of these bring timm and torchvision with them.
_HOMES = {
    "model_zoo.registry": ("list_models", "load_model"),
    "rb_noisy.annotation": ("annotate",),
    "rb_noisy.attacks": ("AttackResult", "pgd"),
    "rb_noisy.autoattack": ("run_autoattack",),
    "rb_noisy.confidence": ("Calibrated", "calibrate"),
    "rb_noisy.data": ("load_data",),
    "rb_noisy.fast": ("fast_form",),
    "rb_noisy.geometry": ("kappa", "stands"),
    "rb_noisy.label_issues": ("LabelIssues", "find_label_issues"),
    "rb_noisy.noise": ("NoisyLabels", "corrupt"),
    "rb_noisy.recipes": ("Recipe",),
    "rb_noisy.runs": ("Run",),
    "rb_noisy.training": ("train",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_timm(_: Any) -> None:
    importlib.import_module("rb_noisy.backbones")
    importlib.import_module("model_zoo.entrypoints")


compat.install()
compat.after_import("timm", _register_with_timm)
