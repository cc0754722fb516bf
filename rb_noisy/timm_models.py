"""What timm may be asked for: a name it knows, options of an architecture, and weights that hold no code.

`timm.create_model` itself takes files, addresses and configurations beside them, and runs the pickles it finds there.
timm is imported late: it brings our networks with it, and they this module.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from rb_noisy.errors import InputError

_NO_OPTIONS = {"self", "args", "kwargs", "num_classes", "in_chans", "mean", "std"}  # the latter are said beside them


def is_backbone(name: str) -> bool:
    """Whether `build_backbone` knows this name. No scheme ("hf-hub:USER/REPO") and no folder is one."""
    import timm

    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w[\w.-]*)?", name) or not timm.is_model(name):
        return False
    return "." not in name or timm.is_model_pretrained(name)  # with a tag, which timm has to know


def architecture_options(name: str) -> set[str]:
    """The options of a network by its timm name: what the classes it is made of declare, but for configurations.

    What timm does with other keywords is to open files and addresses, and to run the code that it finds in them.
    """
    import timm

    from rb_noisy.backbones import NETWORKS

    if name in NETWORKS:
        return {*inspect.signature(NETWORKS[name]).parameters} - {*_NO_OPTIONS, "depths", "widths", "stem", "preact"}
    module = inspect.getmodule(timm.model_entrypoint(name))
    if module is None or module.__name__ == "model_zoo.entrypoints":  # finished networks
        return set()
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    declared = [inspect.signature(c).parameters for c in classes if not c.__module__.startswith("timm.layers")]
    options = {option for parameters in declared if "num_classes" in parameters for option in parameters}
    return {o for o in options if "cfg" not in o and not o.startswith("pretrained")} - _NO_OPTIONS


def pretrained_network(name: str, **options: Any) -> nn.Module:
    """A network of timm with its pretrained weights, from the Hub's safetensors and from nowhere else; or one of ours.

    `options`: architecture options and `num_classes`, `in_chans`, already checked.

    Raises:
        InputError: there are none in that format, or the Hub cannot be reached.
    """
    import timm

    if inspect.getmodule(timm.model_entrypoint(name)).__name__ == "model_zoo.entrypoints":
        return timm.create_model(name, pretrained=True, **options)
    file = _safetensors_on_hub(name)
    # By the file alone: timm's other ways fall back on a pickle, and its weights for JAX have a reader of their own.
    source = {"file": str(file), "url": None, "hf_hub_id": None, "hf_hub_filename": None, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"the pretrained weights of {name!r} do not fit ({error}); name another backbone") from error


def _safetensors_on_hub(name: str) -> Path:
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cfg = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if cfg is None or not cfg.hf_hub_id:
        raise InputError(f"{name!r} has no pretrained weights as safetensors on the Hub; train it, or name another")
    repo, _, revision = cfg.hf_hub_id.partition("@")
    pickle = cfg.hf_hub_filename or "pytorch_model.bin"
    file = str(Path(pickle.replace("pytorch_model.bin", "model.bin")).with_suffix(".safetensors"))
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None))
    except LocalEntryNotFoundError as error:  # one of the others, which it is not: nobody could be asked
        raise InputError(f"the weights of {name!r} cannot be fetched from hf://{repo}; check the network") from error
    except EntryNotFoundError as error:
        raise InputError(f"hf://{repo} has no {file}, and no pickle is read; name another backbone") from error
    except Exception as error:  # the errors of whichever HTTP client the Hub's library has, of no common kind
        raise InputError(
            f"the weights of {name!r} cannot be fetched from hf://{repo} ({type(error).__name__}); check the network"
        ) from error
