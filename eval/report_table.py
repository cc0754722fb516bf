"""The table of `eval.report`: groups of figure columns, rows, a caption; as terminal table, Markdown, LaTeX and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from eval.leaderboard import MISSING, latex, latex_line, markdown_line
from rb_noisy.csv_files import csv_text

SYMBOLS = str.maketrans({"†": r"$^\dagger$", "ε": r"$\varepsilon$", "α": r"$\alpha$", "κ": r"$\kappa$", "−": "$-$"})


@dataclass(frozen=True)
class Group:
    """Columns under one heading; `digits` after the point."""

    key: str
    title: str
    names: tuple[str, ...]
    digits: int = 1

    @property
    def keys(self) -> list[str]:
        return [f"{self.key} {name}" for name in self.names]


class Figure(NamedTuple):
    """The mean over `n` runs and the half-width of its 95% t-interval; None for one run."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """One recipe, run `n` times: what tells it from the others, and its figures by column.

    `marked`: its natural and PGD figures are not those of the heading, but those of training.
    """

    labels: tuple[str, ...]
    figures: dict[str, Figure | None]
    n: int
    marked: bool = False


@dataclass(frozen=True)
class Report:
    """A table: names of the label columns, groups of figure columns, rows, and what a caption says."""

    labels: list[str]
    groups: list[Group]
    rows: list[Row]
    caption: str


def _cell(row: Row, group: Group, key: str) -> str:
    figure = row.figures[key]
    if figure is None:
        return MISSING
    spread = "" if figure.half_width is None else f" ± {figure.half_width:.{group.digits}f}"
    fewer = "" if figure.n == row.n else f" (n={figure.n})"
    number = f"{figure.mean:.{group.digits}f}"
    number = number[1:] if number.startswith("-") and float(number) == 0 else number  # no "-0.0"
    return f"{number}{spread}{fewer}{'†' if row.marked and group.key != 'autoattack' else ''}"


def _cells(report: Report, row: Row) -> list[str]:
    return [*row.labels, *(_cell(row, group, key) for group in report.groups for key in group.keys)]


def render_terminal(report: Report) -> Table:
    table = Table(*report.labels)
    for group in report.groups:
        for title, name in zip([group.title, *[""] * len(group.names)], group.names, strict=False):
            table.add_column(f"{title}\n{name}", justify="right")
    for row in report.rows:
        table.add_row(*_cells(report, row))
    return table


def render_markdown(report: Report) -> str:
    heads = [*report.labels, *(f"{group.title} {name}" for group in report.groups for name in group.names)]
    aligned = ["---"] * len(report.labels) + ["---:"] * (len(heads) - len(report.labels))
    lines = [[cell.replace("|", r"\|") for cell in _cells(report, row)] for row in report.rows]
    return "\n".join([*map(markdown_line, [heads, aligned, *lines]), "", report.caption, ""])


def render_latex(report: Report) -> str:
    r"""A booktabs table with its caption; needs `\usepackage{booktabs}`."""
    titles = [rf"\multicolumn{{{len(group.names)}}}{{c}}{{{latex(group.title)}}}" for group in report.groups]
    names = [name for group in report.groups for name in group.names]
    head = [r"\begin{table}", rf"\caption{{{latex(report.caption)}}}"]
    head += [rf"\begin{{tabular}}{{{'l' * len(report.labels)}{'r' * len(names)}}}", r"\toprule"]
    head += [" & ".join([""] * len(report.labels) + titles) + r" \\"]
    head += [latex_line([*report.labels, *names]), r"\midrule"]
    lines = [latex_line(_cells(report, row)) for row in report.rows]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*head, *lines, *end]).translate(SYMBOLS)


def render_csv(report: Report) -> str:
    """Unrounded means, their half-widths and counts; the caption in the last column."""
    keys = [key for group in report.groups for key in group.keys]
    figures = [f"{key}{part}" for key in keys for part in ("", " half-width", " n")]
    rows = []
    for row in report.rows:
        cells = [value for key in keys for value in row.figures[key] or ("", "", 0)]
        rows.append([*row.labels, *cells, "†" if row.marked else "", report.caption])
    return csv_text([*report.labels, *figures, "tracked", "caption"], rows)


FORMATS = {"terminal": render_terminal, "markdown": render_markdown, "latex": render_latex, "csv": render_csv}
