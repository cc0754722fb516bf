"""The papers' tables and figures as named grids of recipes, for `rb-noisy sweep --grid NAME --out RUNS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rb_noisy.errors import InputError, unknown_name
from rb_noisy.reading import read_json
from rb_noisy.recipes import family_of, flatten

FILE = Path(__file__).with_name("studies.json")


@dataclass(frozen=True)
class Grid:
    """A grid of recipes: `axes` (field → its values) span it, each of `recipes` is merged over every combination."""

    axes: Mapping[str, list[Any]]
    recipes: list[dict[str, Any]]


def studies() -> dict[str, str]:
    """What each named study is about."""
    return {name: study["about"] for name, study in _read().items()}


def study(name: str, data: Sequence[str] = ()) -> Grid:
    """A named study, for these data sets, whose settings in the paper are axes of one value each.

    Its teachers are named by their methods, see `rb_noisy.sweep_teachers`.

    Raises:
        InputError: no such study, or one with other settings for one of the data sets than for another.
    """
    known = _read()
    if name not in known:
        raise unknown_name("study", name, known)
    found = known[name]
    settings = {one: found.get("settings", {}).get(family_of(one), {}) for one in data}
    first = next(iter(settings.values()), {})
    for one, own in settings.items():
        if own != first:
            raise InputError(f"{name} has other settings for {one} than for {data[0]}; sweep them into two folders")
    axes = {field: [value] for field, value in flatten(first).items()}
    return Grid(axes | found.get("axes", {}), found.get("recipes", [{}]))


def _read() -> dict[str, Any]:
    return read_json(FILE, "the list of studies", "install rb-noisy again")
