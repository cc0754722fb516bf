"""Reading what others may have written: bytes to JSON, JSON to checked content, safetensors to tensors.

Every file that holds JSON comes in by `parse_json`, every one with a form of its own also passes one of the models in
`rb_noisy.schemas` by `checked`. Whatever is wrong with it is an `InputError` that names the file and the place in it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.files import refuse_streams

# No file of ours is deeper than 12. Python's own limit is near 1000, which code that walks a value may meet earlier.
DEEPEST = 100


def read_json(file: Path, what: str, way_out: str) -> Any:
    """The JSON in a file.

    Args:
        what: begins the message, "the card", say; the file's name follows.
        way_out: ends it: what to do.

    Raises:
        InputError: the file cannot be read, or holds no usable JSON (see `parse_json`).
    """
    return parse_json(read_bytes(file, what, way_out), f"{what} {file}", way_out)


def read_bytes(file: Path, what: str, way_out: str) -> bytes:
    """The bytes of a regular file, or an `InputError` in the words of `read_json`."""
    refuse_streams(file)
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise InputError(f"{what} {file} cannot be read ({error}); {way_out}") from error


def parse_json(text: str | bytes, source: str, way_out: str) -> Any:
    """JSON from outside.

    Raises:
        InputError: not UTF-8, not JSON, deeper than any file of ours, or text that cannot be written again.
    """
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is damaged (no UTF-8 text from byte {error.start} on); {way_out}") from error
    except RecursionError:
        raise InputError(f"{source} is damaged (nested more than {DEEPEST} deep); {way_out}") from None
    except ValueError as error:  # also a number of thousands of digits
        raise InputError(f"{source} is damaged (not valid JSON: {error}); {way_out}") from error
    for value, depth in _walk(content):
        if depth > DEEPEST:
            raise InputError(f"{source} is damaged (nested more than {DEEPEST} deep); {way_out}")
        if isinstance(value, str) and not is_text(value):
            raise InputError(f"{source} is damaged ({value!a} holds half a character); {way_out}")
    return content


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: names of files that are not UTF-8, and "\\ud800" in JSON, cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _walk(content: Any) -> Iterator[tuple[Any, int]]:
    """Every value in `content`, keys included, with its depth."""
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        yield value, depth
        if depth > DEEPEST:
            continue
        if isinstance(value, dict):
            stack += ((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            stack += ((part, depth + 1) for part in value)


def checked(form: Any, content: Any, source: str, way_out: str) -> Any:
    """`content` as it is, once it has the form of a pydantic model or type.

    Raises:
        InputError: it has not; the first place that is wrong is named.
    """
    try:
        _adapter(form).validate_python(content)
    except ValidationError as error:
        found = [(_place(one["loc"]), one) for one in error.errors(include_url=False, include_context=False)]
        if missing := sorted(place for place, one in found if one["type"] == "missing"):
            raise InputError(f"{source} lacks {', '.join(missing)}; {way_out}") from error
        place, first = found[0]
        problem = f"{place} is {_shortened(first['input'])}: {first['msg'].removeprefix('Value error, ')}"
        raise InputError(f"{source} is damaged ({problem}); {way_out}") from error
    return content


@functools.cache
def _adapter(form: Any) -> TypeAdapter:
    return TypeAdapter(form)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "it"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_tensors(file: Path, way_out: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing; {way_out}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error}); {way_out}") from error
