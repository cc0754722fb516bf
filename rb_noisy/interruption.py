"""Ctrl-C while a command is still importing: one line, as later on, and no traceback of whatever was being imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def leave_quietly() -> None:
    """Until `interrupt_as_usual`, Ctrl-C ends this process at once with exit code 130, if it is one of our commands.

    A command has begun nothing yet that could be lost. In other programs that import us nothing is changed.
    """
    # As long as Python looks for the module to run, its name is "-m".
    command = sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) in ("rb-noisy", "rb-noisy.exe")
    here = threading.current_thread() is threading.main_thread()
    if command and here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, say
        signal.signal(signal.SIGINT, _leave)


def interrupt_as_usual() -> None:
    """Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(130)  # an exception could be swallowed by what is being imported
