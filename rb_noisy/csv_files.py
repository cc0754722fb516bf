"""CSV files, all of them: whole or absent, and harmless in a spreadsheet, which takes =1+1 in a cell for a formula."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rb_noisy.files import atomic_path

# The apostrophes before it, too: so that one that is taken away again was put there. rb_noisy/templates/gallery.js
# writes its corrections.csv by the same two patterns.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", re.IGNORECASE)


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, the whole file or nothing: a line of column names, then a line for each row.

    Text that a spreadsheet would take for a formula gets an apostrophe before it, which `from_cell` takes away again;
    numbers stay as they are, whether they come as such or as text.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        _write(file, columns, rows, "\r\n")


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """What `write_csv` writes, as text with plain line feeds."""
    text = io.StringIO()
    _write(text, columns, rows, "\n")
    return text.getvalue()


def from_cell(text: str) -> str:
    """The text that a cell was made from."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _write(file: Any, columns: Sequence[str], rows: Iterable[Iterable[Any]], end: str) -> None:
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(map(_to_cell, columns))
    writer.writerows(map(_to_cell, row) for row in rows)


def _to_cell(value: Any) -> Any:
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"
