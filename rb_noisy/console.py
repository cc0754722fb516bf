"""What every command shares: the consoles, the progress bar, and how errors reach a user."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rb_noisy.errors import InputError
from rb_noisy.interruption import interrupt_as_usual

# Third-party imports warn of each other on every command; users can do nothing about it.
warnings.filterwarnings("ignore", message=".*torch.jit.(interface|script).*", category=FutureWarning)

# A pipe has no width of its own, and Rich's 80 columns would cut the names in tables.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)
errors = Console(stderr=True, highlight=False)

ZooOption = Annotated[
    str | None, typer.Option("--zoo", help="Another zoo: a folder, or hf://USER/REPO. Default: the one that ships.")
]


@contextmanager
def user_errors() -> Iterator[None]:
    """Bad input becomes one line on stderr and exit code 2, an interruption 130; bugs keep their traceback."""
    from rb_noisy.training import TrainingDiverged

    try:
        interrupt_as_usual()
        yield
    except InputError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    except OSError as error:  # a full disk, a folder that cannot be written: the message names the file
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    except TrainingDiverged as error:
        errors.print(f"[bold red]diverged:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(3) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted; what was finished is kept", soft_wrap=True)
        raise typer.Exit(130) from error


def progress_bar() -> Progress:
    """The progress bar of every command; on stderr, so that stdout stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not sys.stderr.isatty() and "RB_NOISY_PROGRESS" not in os.environ,
    )
