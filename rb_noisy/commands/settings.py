"""Recipe fields from the command line: FIELD=VALUE settings."""

from __future__ import annotations

import json
from typing import Any

from rb_noisy.errors import InputError
from rb_noisy.reading import parse_json


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["lr=0.05", "target_options.r=0.4"] → {"lr": 0.05, "target_options": {"r": 0.4}}, values as JSON or text."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} is not FIELD=VALUE; write for example --set lr=0.05")
        value = _value(text, f"--set {key}")
        outer, dot, inner = key.partition(".")
        if dot and not isinstance(values.setdefault(outer, {}), dict):
            raise InputError(f"--set {outer} is {values[outer]!r} and --set {key} is given too; drop one of them")
        if dot:
            values[outer][inner] = value
        else:
            values[outer] = value
    return values


def _value(text: str, source: str) -> Any:
    """JSON, or else the text itself."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError):  # is JSON, of a kind that `parse_json` refuses
        pass
    return parse_json(text, source, "give another value")
