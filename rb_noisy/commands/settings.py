"""Recipe fields from the command line: FIELD=VALUE settings."""

from __future__ import annotations

import json
from typing import Any

from rb_noisy.errors import InputError


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["lr=0.05", "target_options.r=0.4"] → {"lr": 0.05, "target_options": {"r": 0.4}}, values as JSON or text."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} is not FIELD=VALUE; write for example --set lr=0.05")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        outer, dot, inner = key.partition(".")
        if dot:
            values.setdefault(outer, {})[inner] = value
        else:
            values[outer] = value
    return values
