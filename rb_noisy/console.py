"""What every command shares: the consoles, the progress bar, and how errors reach a user."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rb_noisy.errors import DataWarning, InputError, NetworkWarning
from rb_noisy.interruption import interrupt_as_usual
from rb_noisy.placement import end_with_parent, is_main

# Of dependencies among themselves, on every command; users can do nothing about it. Who asks for them gets them.
if not sys.warnoptions:
    warnings.simplefilter("ignore", FutureWarning)

LONGEST_WORD = 300  # characters of an error line; a path of thousands would hide what is wrong with it
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def visible(text: str) -> str:
    r"""`text` with its control characters written out (\x1b), so that none of them acts on a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Terminal(Console):
    """A console on which text is only text: names from cards and files can neither style nor steer the terminal.

    Strings are no markup; what is to stand out is a `rich.text.Text`. Tables are as wide as their longest words need,
    wider than the terminal if need be: names in them are what is copied.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):  # whatever did not come as a string
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def print(self, *objects: Any, **options: Any) -> None:
        tables = any(isinstance(shown, Table) for shown in objects)
        shown = (_Whole(each) if isinstance(each, Table) else each for each in objects)
        super().print(*shown, **({"crop": False} if tables else {}), **options)


class _Whole:
    """A table whose columns are narrowed to the terminal's width, but none below its longest word."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self.table
        found = [
            [Measurement.get(console, options.update(width=10_000), cell) for cell in (column.header, *column.cells)]
            for column in table.columns
        ]
        least = [max(measured.minimum for measured in column) for column in found]
        most = [max(measured.maximum for measured in column) for column in found]
        lines = 3 * len(found) + 1  # one space on either side of a cell, lines around it
        # The widest columns are cut to one width, the greatest for which the table fits.
        for limit in range(max(most, default=0), -1, -1):
            widths = [max(low, min(high, limit)) for low, high in zip(least, most, strict=True)]
            if sum(widths) + lines <= options.max_width:
                break
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
        yield from console.render(table, options.update(width=max(sum(widths) + lines, options.max_width)))


console = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
errors = Terminal(stderr=True)

ZooOption = Annotated[
    str | None, typer.Option("--zoo", help="Another zoo: a folder, or hf://USER/REPO. Default: the one that ships.")
]


def print_text(text: str) -> None:
    """Print a text that may be written to a file too (Markdown, LaTeX, CSV), its lines as they are."""
    console.print(text, soft_wrap=True, end="")


def print_warning(what: str, text: str, to: Console = console) -> None:
    """One line that begins with `what` ("warning:") in yellow."""
    to.print(Text(what, "yellow"), text, soft_wrap=True)


def print_error(what: str, text: str) -> None:
    """One line on stderr, whatever name with a line feed or text of a library it quotes, `what` in red.

    Of a word longer than `LONGEST_WORD` the middle is left out, and of a line of ten such words.
    """
    line = re.sub(r"\s*\n\s*", " ", text.strip())
    line = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: _shortened(found[0], LONGEST_WORD), line)
    errors.print(Text(what, "bold red"), _shortened(line, 10 * LONGEST_WORD), soft_wrap=True)


def _shortened(text: str, length: int) -> str:
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


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
        interrupt_as_usual()
        with contextlib.ExitStack() as muted:
            if not is_main():
                nowhere = muted.enter_context(open(os.devnull, "w", encoding="utf-8"))
                muted.enter_context(contextlib.redirect_stdout(nowhere))
            muted.enter_context(_own_warnings())
            yield
    except InputError as error:
        print_error("error:", str(error))
        raise typer.Exit(2) from error
    except OSError as error:  # a full disk, a folder that cannot be written: the message names the file
        print_error("error:", str(error))
        raise typer.Exit(2) from error
    except TrainingDiverged as error:
        print_error("diverged:", str(error))
        raise typer.Exit(3) from error
    except RuntimeError as error:
        if not (said := lost_process(error)):
            raise
        print_error("error:", said)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted; what was finished is kept", soft_wrap=True)
        raise typer.Exit(130) from error


@contextmanager
def _own_warnings() -> Iterator[None]:
    """What speaks against figures or is odd about data is a line on stderr, each kind once; others are as ever."""
    said: set[str] = set()
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, (NetworkWarning, DataWarning)):
                return plain(message, category, *where)
            kind = re.sub(r"\d+", "#", str(message))
            if kind not in said:
                said.add(kind)
                print_warning("warning:", str(message), errors)

        warnings.simplefilter("always", NetworkWarning)
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = show
        yield


def progress_bar() -> Progress:
    """The progress bar of every command; on stderr, so that stdout stays clean."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not is_main() or (not sys.stderr.isatty() and "RB_NOISY_PROGRESS" not in os.environ),
    )
