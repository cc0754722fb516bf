"""Whether what is there now is what a network learnt: the names of its classes, and the digest of its data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rb_noisy.errors import InputError


def check_classes(
    learnt: Sequence[str], found: Sequence[str], who: str, data: str, way_out: str, *, other_names: bool = False
) -> str | None:
    """Refuse data whose classes are not those that a network learnt; or what speaks against them, None for nothing.

    The numbers 0..K−1 in order are what classes without names are called. They say nothing, and go with all names but
    the same numbers in another order. Capitals and leading zeros make no difference.

    Args:
        learnt, found: the K class names of the network, and of the data.
        who, data: what the message calls the two.
        way_out: ends the message: what to do.
        other_names: let other names pass, with a doubt, as long as no name that both have is another class.

    Raises:
        InputError: the names differ, with `other_names` only where both have a name in different places.
    """
    ours, theirs = (tuple(map(_plain, names)) for names in (learnt, found))
    if ours == theirs:
        return None
    reordered = sorted(ours) == sorted(theirs)
    if not reordered and len(ours) == len(theirs) and tuple(map(str, range(len(ours)))) in (ours, theirs):
        return None
    pairs = enumerate(zip_longest(learnt, found, fillvalue=""))
    differing = ((i, *pair) for i, pair in pairs if _plain(pair[0]) != _plain(pair[1]))
    place, was, now = next(differing, (min(len(ours), len(theirs)), "", ""))
    what = "the same classes in another order than" if reordered else "other classes than"
    text = f"{data} has {what} {who}: class {place} is {now!r} there and {was!r} to the network"
    moved = any(name in theirs and theirs[i : i + 1] != (name,) for i, name in enumerate(ours))
    if moved or not other_names:
        raise InputError(f"{text}; {way_out}")
    return text


def _plain(name: str) -> str:
    return name.lstrip("0") or "0" if name.isdecimal() else name.casefold()


def check_digest(recorded: str | None, digest: str, data: str, who: str) -> None:
    """Raise `InputError` where the images and labels of a data set are not those that something was trained on.

    `recorded` is their SHA-256 then, None where an earlier version kept none, and `digest` that of today.
    """
    if recorded not in (None, digest):
        raise InputError(
            f"the images or labels of {data} are not those that {who} was trained on; put them back, or train into "
            "another folder"
        )
