"""What every command shares: the consoles, the progress bar, and how errors reach a user."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rb_noisy.errors import InputError, NetworkWarning
from rb_noisy.placement import end_with_parent, is_main

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
    """Bad input becomes one line on stderr and exit code 2, an interruption 130; bugs keep their traceback.

    Of several processes that a launcher started the first one alone prints. One that has lost the others ends with code
    1. And each ends with the process that placed it on its cores.
    """
    from rb_noisy.processes import lost_process
    from rb_noisy.training import TrainingDiverged

    end_with_parent()
    try:
        with contextlib.ExitStack() as muted:
            if not is_main():
                nowhere = muted.enter_context(open(os.devnull, "w", encoding="utf-8"))
                muted.enter_context(contextlib.redirect_stdout(nowhere))
            muted.enter_context(_network_warnings())
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
    except RuntimeError as error:
        if not (said := lost_process(error)):
            raise
        errors.print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted; what was finished is kept", soft_wrap=True)
        raise typer.Exit(130) from error


@contextmanager
def _network_warnings() -> Iterator[None]:
    """What speaks against a network's figures is a line on stderr, each kind of it once; other warnings are as ever."""
    said: set[str] = set()
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, NetworkWarning):
                return plain(message, category, *where)
            kind = re.sub(r"\d+", "#", str(message))
            if kind not in said:
                said.add(kind)
                errors.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

        warnings.simplefilter("always", NetworkWarning)
        warnings.showwarning = show
        yield


def progress_bar() -> Progress:
    """The progress bar of every command; on stderr, so that stdout stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not is_main() or (not sys.stderr.isatty() and "RB_NOISY_PROGRESS" not in os.environ),
    )
