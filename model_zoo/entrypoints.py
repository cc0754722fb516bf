"""The zoo's models as timm models, so that timm and RobustBench load them by name.

Importing this module registers every built-in card by its `timm_names`: as `<name>`, and as
`<name>_<dataset>_<threat model>`, which is what `robustbench.utils.load_model(name, dataset=…, threat_model=…)` asks
timm for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

from model_zoo.registry import load_model, read_cards, timm_names
from rb_noisy.errors import InputError


def _entrypoint(card: dict[str, Any], name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from rb_noisy.backbones import build_backbone  # at import time it may still be waiting for timm

        for ours_already in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(ours_already, None)
        options = card["model_options"]
        num_classes = kwargs.pop("num_classes", None)
        in_chans = kwargs.pop("in_chans", options["in_chans"])
        if kwargs or in_chans != options["in_chans"]:
            given = kwargs | {"in_chans": in_chans}
            raise InputError(f"{name} is a finished model and takes num_classes only, not {given}")
        model = load_model(card["name"]) if pretrained else build_backbone(**options)
        if num_classes not in (None, options["num_classes"]):
            getattr(model, "model", model).reset_classifier(num_classes)
            model.class_names = None  # they were those of the finished model
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"{card['name']} of the rb-noisy zoo."
    return register_model(create)


for _card in read_cards():
    for _name in timm_names(_card):
        globals()[_name] = _entrypoint(_card, _name)
