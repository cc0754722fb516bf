"""The one exception type that means *the input was bad*, so that commands can tell it from a bug, and two warnings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Made = TypeVar("Made")


class InputError(ValueError):
    """Something the caller gave cannot be used. The message names the thing, the value and the way out."""


class NetworkWarning(UserWarning):
    """Something a network does that speaks against trusting what is measured of it."""


class DataWarning(UserWarning):
    """Something about data that were given which their owner will want to know, such as what of them is left out."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is in no table, with the nearest known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


def make_named(kind: str, name: str, table: Mapping[str, Callable[..., Made]], options: Mapping[str, Any]) -> Made:
    """`table[name](**options)`.

    Raises:
        InputError: `name` is not in the table, or what it stands for does not take these options.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    try:
        return table[name](**options)
    except TypeError as error:
        takes = inspect.signature(table[name]).parameters
        for option in options:
            if option not in takes:
                known = ", ".join(takes) or "no options"
                raise InputError(f"{kind} {name!r} does not take {option!r}; it takes {known}") from error
        raise InputError(f"{kind} {name!r} does not take {dict(options)}: {error}") from error
