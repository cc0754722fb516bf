"""The forms of what is read back: cards, run folders and their parts. Unknown fields are let through.

They say what the code that reads on relies on, no more: a card of an older or newer version still loads.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def is_plain(value: Any) -> bool:
    """Whether this can be an option of a network: a number, a word within its code ("relu", "avg"), or a list of them.

    No path and no address is a word, and no object an option: timm takes both for places of weights.
    """
    if isinstance(value, list | tuple):
        return all(is_plain(part) for part in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w+-]{0,64}", value) is not None
    return value is None or (isinstance(value, bool | int | float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    if not is_plain(value):
        raise ValueError("give a number, a word or a list of them")
    return value


Plain = Annotated[Any, AfterValidator(_plain)]


def _percent(text: str) -> str:
    try:
        within = text == "" or 0 <= float(text) <= 100
    except ValueError:
        within = False
    if not within:
        raise ValueError("give a percentage as text, such as '48.40', or '' for none")
    return text


Percent = Annotated[str, AfterValidator(_percent)]


def _file_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*\.safetensors", name):
        raise ValueError("want a plain .safetensors")
    return name


class Form(BaseModel):
    """No conversions: a number in quotes is text."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class ModelOptions(Form):
    """What `rb_noisy.backbones.build_backbone` builds a network from; which other options a network has, it knows."""

    __pydantic_extra__: dict[str, Plain]

    name: str
    num_classes: Annotated[int, Field(ge=1)]
    in_chans: Annotated[int, Field(ge=1)]
    mean: list[FiniteFloat] | None = None
    std: list[Positive] | None = None

    @model_validator(mode="after")
    def _no_pretrained(self) -> ModelOptions:
        if "pretrained" in (self.__pydantic_extra__ or {}):
            raise ValueError("pretrained belongs into a recipe; the weights of a finished network lie beside it")
        return self


class _Network(Form):
    model_options: ModelOptions
    class_names: list[str]
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] | None = None

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> _Network:
        if len(self.class_names) != self.model_options.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.model_options.num_classes} classes")
        return self


class RunFile(_Network):
    """`run.json`; the recipe's own fields are checked by `Recipe`."""

    recipe: dict[str, JsonValue]
    data_sha256: Sha256 | None = None


class MetricsLine(Form):
    """A line of `metrics.jsonl`: what one epoch came to."""

    __pydantic_extra__: dict[str, float | int | list[int] | None]

    epoch: Count
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    learning_rate: float
    train_loss: float
    gradient_norm: float
    test_natural_acc: Share
    test_pgd_acc: Share
    test_loss: float
    test_kappa: float | None
    selection_pgd_acc: Share
    # None: no such samples, or no attack.
    train_correct_natural_acc: Share | None
    train_correct_pgd_acc: Share | None
    train_correct_loss: float | None
    train_correct_kappa: float | None
    train_incorrect_natural_acc: Share | None
    train_incorrect_pgd_acc: Share | None
    train_incorrect_loss: float | None
    train_incorrect_kappa: float | None
    processes: Annotated[int, Field(ge=1)] = 1
    threads: list[int] = []


Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]


class Rate(Form):
    accuracy: Share
    interval: Interval | None = None


class Figures(Form):
    """What one evaluation measured."""

    n: Annotated[int, Field(ge=1)]
    weights_sha256: str
    natural: Rate | None = None
    final_iterate: Rate | None = None
    any_iterate: Rate | None = None
    accuracy: Share | None = None
    interval: Interval | None = None
    report: dict[str, Any] | None = None


def _with_rates(results: dict[str, Figures]) -> dict[str, Figures]:
    for evaluation, rate in (("pgd-20", "final_iterate"), ("autoattack", "accuracy")):
        for name in (rate, "natural"):
            if evaluation in results and getattr(results[evaluation], name) is None:
                raise ValueError(f"{evaluation} lacks {name}")
    return results


Results = Annotated[dict[str, Figures], AfterValidator(_with_rates)]


class Noise(Form):
    kind: str
    rate: Share | None = None
    seed: int | None = None
    key: str | None = None


class Weights(Form):
    # In the zoo's own folder of weights, in a format that holds no code.
    file: Annotated[str, AfterValidator(_file_name)]
    sha256: Sha256
    bytes: Count
    precision: str = "fp32"
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None


class CardRecipe(Form):
    data: str
    eps: Annotated[FiniteFloat, Field(ge=0)]


class Training(Form):
    threads: list[int] = []


class CardFile(_Network):
    """A model's card."""

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    dataset: str
    threat_model: str
    architecture: str
    eps: str
    method: str
    clean_acc: Percent
    autoattack_acc: Percent
    noise: Noise | None
    recipe: CardRecipe
    weights: Weights
    results: Results
    training: Training
    checkpoint: str = ""
    parameters: Count | None = None
    venue: str = ""
    authors: str = ""
    link: str = ""
    published: str = ""
    reported: str = ""


class StateHeader(BaseModel):
    """The header of `state.safetensors`, in which every value is text."""

    epochs_done: Count
    samples_done: Count
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    best: Annotated[float, Field(le=1)]  # −inf before the first epoch
    threads: Annotated[int, Field(ge=1)] | None = None


def without_pretrained(values: Any) -> Any:
    """The content of a `run.json` or a card, less a "pretrained" that its recipe says already, as it once was written.

    The weights of its network lie beside it: to build it, nothing is fetched.
    """
    if isinstance(values, dict) and isinstance(options := values.get("model_options"), dict):
        recipe = values.get("recipe")
        asked = recipe.get("backbone_options") if isinstance(recipe, dict) else None
        if isinstance(asked, dict) and asked.get("pretrained") is True and options.get("pretrained") is True:
            del options["pretrained"]
    return values
