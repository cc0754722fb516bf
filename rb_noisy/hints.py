"""Commands that are suggested: printed, and shown on the pages."""

from __future__ import annotations

import shlex


def command_line(*words: object) -> str:
    """The command of these words as one line for a shell, which reads the very same words again."""
    return shlex.join(str(word) for word in words)
