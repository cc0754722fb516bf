"""Radii and step sizes, as papers write them, and whole numbers."""

from __future__ import annotations

import math
import operator

from rb_noisy.errors import InputError


def radius(value: float | str, name: str = "eps", norm: str = "Linf", *, above_zero: bool = False) -> float:
    """A radius or step size in units of the image range [0, 1], given as a number or as text ("8/255", "0.031").

    Args:
        value: what was given.
        name: what the message calls it.
        norm: of "Linf" none is above 1, which is the whole image range; an L2 or L1 length may be.
        above_zero: refuse 0 too.

    Raises:
        InputError: no number, below 0, not finite, or above 1 for Linf.

    Example:
        >>> radius("8/255") == 8 / 255
        True
    """
    number = _number(value, name)
    if not 0 <= number < math.inf or (above_zero and not number):
        least = "above 0" if above_zero else "of at least 0"
        raise InputError(f"{name} is {value}; give a number {least}, in units of the image range [0, 1]")
    if norm == "Linf" and number > 1:
        meant = f"{number:g}/255" if number <= 255 else "8/255"
        raise InputError(f"{name} is {value}, more than the whole image range [0, 1]; did you mean {meant}?")
    return number


def step_size(value: float | str, eps: float, name: str = "alpha", norm: str = "Linf") -> float:
    """The step size α of an attack within ε, as `radius`; up to 2.5·ε, [NL]'s for one step, it may be above 1."""
    number = radius(value, name, "L2")
    return number if number <= 2.5 * eps else radius(value, name, norm)


def whole_number(value: int, name: str, *, least: int = 0, most: float = math.inf) -> int:
    """A whole number, NumPy's too.

    Raises:
        InputError: another kind of number, or one out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")
    return number


def parse_radius(text: str, name: str = "--eps") -> float:
    """The number that an option of the command line means; whether it fits the norm is asked once that is known."""
    return _number(text, name)


def _number(value: float | str, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        numerator, slash, denominator = value.partition("/") if isinstance(value, str) else (value, "", "")
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError):
        raise InputError(f"{name} is {value!r}; give a number such as 0.2 or 8/255") from None
