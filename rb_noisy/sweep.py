"""Grids of recipes, and the names of their run folders."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rb_noisy.errors import InputError
from rb_noisy.recipes import Recipe, flatten, merge, split_noise

NOISE_FIELDS = ("noise", "noise_rate", "noise_seed", "noise_options")
NOISES_WITHOUT_RATE = ("human", "matrix")


def expand_grid(
    axes: Mapping[str, Sequence[Any]], entries: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Recipe]:
    """The recipes that a grid spans, by the names of their run folders.

    A name says method, label noise and seed, and whatever else varies, so that a grid with more methods, rates or
    seeds finds the runs of the smaller one. An entry may give its own instead, as "name". Noise at rate 0 is no noise:
    one run, whatever its kind. Where there are several kinds of noise, those that take no rate (none, human, matrix)
    are one run for all rates.

    Args:
        axes: recipe field, or option ("target_options.r") → its values; every combination is a recipe.
        entries: recipe fields as dicts, each of them merged over every combination.

    Raises:
        InputError: a value that no recipe can have; two different recipes with one name.
    """
    points = []
    for values in itertools.product(*axes.values()):
        point: dict[str, Any] = {}
        for name, value in zip(axes, values, strict=True):
            field, dot, option = name.partition(".")
            point = merge(point, {field: {option: value}} if dot else {field: value})
        points += [merge(point, dict(entry)) for entry in (entries or [{}])]
    given = [_given_name(point) for point in points]
    points = [_split_noise(point) for point in points]
    several = len({_noise_kind(point) for point in points}) > 1
    points = [_settle_noise(point, several) for point in points]
    flat = [flatten(point) for point in points]
    fields = sorted({name for point in flat for name in point}, key=_field_order)
    always = {"method", "seed", *NOISE_FIELDS[:2]}
    if "noise_seed" not in axes and not any("noise_seed" in entry for entry in entries or []):
        # Another seed is another repetition of the whole experiment: its labels are drawn anew too.
        always.add("noise_seed")
        noisy = [point for point in points if point.get("noise", "none") != "none"]
        for point in noisy:
            point["noise_seed"] = point.get("seed", 0)
        flat = [flatten(point) for point in points]
    varying = [name for name in fields if name not in always and _varies(name, flat)]
    recipes: dict[str, Recipe] = {}
    for point, values, own in zip(points, flat, given, strict=True):
        recipe = Recipe.from_dict(point)
        name = own or _run_name(recipe, {name: values[name] for name in varying if name in values})
        if recipes.setdefault(name, recipe) != recipe:
            raise InputError(
                f"two recipes of the sweep share the name {name!r} and differ in "
                f"{', '.join(differing(recipe, recipes[name]))}; run them into two folders"
            )
    return recipes


def _given_name(point: dict[str, Any]) -> str | None:
    """The name that a point gives itself, taken out of it."""
    name = point.pop("name", None)
    if name is not None and (not isinstance(name, str) or not name or name != _slug(name) or name.startswith(".")):
        raise InputError(f"the name {name!r} of a recipe cannot be a folder's; give letters, figures and . + - _")
    return name


def _split_noise(point: dict[str, Any]) -> dict[str, Any]:
    """`point` with "symmetric 0.4" as two fields, unless it has another rate, which the recipe refuses."""
    kind, rate = split_noise(noise) if isinstance(noise := point.get("noise"), str) else (noise, None)
    if kind == noise or point.get("noise_rate", rate) != rate:
        return point
    return point | {"noise": kind} | ({} if rate is None else {"noise_rate": rate})


def _noise_kind(point: Mapping[str, Any]) -> str:
    return str(point.get("noise", "none")).partition(":")[0]


def _settle_noise(point: dict[str, Any], several: bool) -> dict[str, Any]:
    """`point` without the noise fields that have no effect; `several`: the grid has several kinds of noise."""
    kind, rate = _noise_kind(point), point.get("noise_rate")
    if kind in NOISES_WITHOUT_RATE:
        dropped = ("noise_rate",) if several or rate == 0 else ()
    elif kind == "none" and rate and not several:
        raise InputError(f"the noise rate is {rate} but no noise is named; name one, such as symmetric")
    else:
        dropped = NOISE_FIELDS if kind == "none" or rate == 0 else ()
    return {name: value for name, value in point.items() if name not in dropped}


def _varies(name: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether points differ in a field; the other fields of a noise only among those that have noise."""
    points = [point for point in flat if point.get("noise", "none") != "none"] if name.startswith("noise_") else flat
    return len({repr(point.get(name)) for point in points}) > 1


def _field_order(name: str) -> tuple[int, str]:
    known = [field.name for field in dataclasses.fields(Recipe)]
    field = name.partition(".")[0]
    return (known.index(field) if field in known else len(known), name)


def _run_name(recipe: Recipe, varying: Mapping[str, Any]) -> str:
    """`varying`: the values to name besides method, noise and seed, by field."""
    varying = dict(varying)
    data = [_slug(varying.pop("data"))] if "data" in varying else []
    noise = "clean" if recipe.noise == "none" else _slug(recipe.noise)
    noise += "" if recipe.noise_rate is None else _slug(recipe.noise_rate)
    if recipe.noise == "human" and recipe.noise_options.get("key"):
        noise += f"-{_slug(recipe.noise_options['key'])}"  # several sets of one file, as CIFAR-N has them
    rest = [_slug(value) if name == "backbone" else _named_slug(name, value) for name, value in varying.items()]
    return "_".join([*data, _slug(recipe.method), noise, *rest, f"seed{recipe.seed}"])


def _named_slug(name: str, value: Any) -> str:
    short = name.rpartition(".")[2]
    return f"{short}{'-' if isinstance(value, bool | str) else ''}{_slug(value)}"


def _slug(value: Any) -> str:
    """A value as part of a file name: letters, figures and . + - _, with no path of a file."""
    if isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    elif isinstance(value, str) and not re.fullmatch(r"[\d.]+/[\d.]+", value):  # 8/255 is no file
        kind, *places = value.split(":")  # npz:/data/mine.npz
        text = "-".join([kind, *(Path(place).stem for place in places)])
    else:
        text = str(value).lower()
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "none"


def differing(one: Recipe, other: Recipe) -> list[str]:
    """The fields that two recipes do not have alike."""
    theirs = other.to_dict()
    return [name for name, value in one.to_dict().items() if value != theirs[name]]
