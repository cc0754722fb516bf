"""`python -m eval.leaderboard`: the zoo's models beside the published figures, ranked per data set and label noise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from model_zoo.registry import CLEAN_LABELS, choose, dataset_title, is_dataset, is_noise, noise_title, read_cards
from rb_noisy.console import ZooOption, console, print_text, user_errors
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.measures import wilson_interval

PUBLISHED = Path(__file__).with_name("published.json")
MISSING = "–"
COLUMNS = ("#", "Model", "Method or source", "Origin", "Architecture", "Checkpoint", "Clean", "PGD-20", "AutoAttack")
COLUMNS += ("Top 30%",)  # robust accuracy of the answers that robust confidence calls surest


@dataclass(frozen=True)
class Rate:
    """An accuracy in percent; `low`, `high` (its 95% interval, percent) and `n` only where it was measured here."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard. `kept` is the robust accuracy of the 30% of the answers in which robust confidence
    (`eval.calibration --target robust`) is greatest; `rank` is None where there is no AutoAttack figure to rank by."""

    name: str
    method: str
    source: str
    measured: bool
    dataset: str
    noise: str
    threat: str
    architecture: str
    checkpoint: str
    additional_data: bool
    clean: Rate | None
    pgd20: Rate | None
    pgd10: Rate | None
    autoattack: Rate | None
    kept: Rate | None = None
    rank: int | None = None

    @property
    def origin(self) -> str:
        return "measured here" if self.measured else "as published"

    @property
    def group(self) -> tuple[str, str, str]:
        return self.dataset, self.noise, self.threat


def published_rows() -> list[dict[str, Any]]:
    """The published figures that ship with the package: percent, exactly as printed in their sources."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def leaderboard_rows(
    cards: Iterable[dict[str, Any]],
    published: Iterable[dict[str, Any]],
    dataset: str | None = None,
    noise: str | None = None,
) -> list[Row]:
    """All rows of one data set and noise (None: of all), group by group, each group ranked by AutoAttack accuracy.

    A group shares data set, label noise and threat model, so that figures of different tasks are never ranked against
    each other. Equal AutoAttack accuracies share a rank; rows without one come last, by PGD-20 accuracy, unranked.
    `noise` is 'none' or 'clean labels', a kind ('symmetric') or a kind with its rate ('symmetric 0.4').
    Raises `InputError` for a data set or noise that no row has.
    """
    rows = [_measured_row(card) for card in cards] + [_published_row(entry) for entry in published]
    rows = choose(rows, "data set on the leaderboard", dataset, lambda row: row.dataset, is_dataset)
    rows = choose(rows, "label noise on the leaderboard", noise, _noise_asked_for, is_noise)
    ordered = []
    for _, group in _groups(sorted(rows, key=_group_order)):
        group = sorted(group, key=_within_group)
        scores = [row.autoattack.value for row in group if row.autoattack]
        ranks = [1 + scores.index(row.autoattack.value) if row.autoattack else None for row in group]
        ordered += [replace(row, rank=rank) for row, rank in zip(group, ranks, strict=True)]
    return ordered


def standing(rows: list[Row], name: str) -> str:
    """One sentence: where the zoo model `name` stands in its group. Raises `InputError` for a name not in the rows."""
    row = next((row for row in rows if row.measured and row.name == name), None)
    if row is None:
        raise unknown_name("model on the leaderboard", name, {row.name for row in rows if row.measured})
    labels = "no label noise" if row.noise == CLEAN_LABELS else f"{row.noise} label noise"
    data, peers = dataset_title(row.dataset), [peer for peer in rows if peer.group == row.group]
    if row.autoattack:
        by, note = "autoattack", "by AutoAttack accuracy"
    elif row.pgd20:
        by, note = "pgd20", "by PGD-20 accuracy (AutoAttack not measured yet)"
    else:
        return f"{name} is not ranked on {data}, {labels}: neither AutoAttack nor PGD-20 has been measured yet"
    scores = [getattr(peer, by).value for peer in peers if getattr(peer, by)]
    place = 1 + sum(score > getattr(row, by).value for score in scores)
    return f"{name} is {_ordinal(place)} of {len(scores)} on {data}, {labels}, {note}"


def render_terminal(rows: list[Row], highlight: str | None = None) -> list[Table]:
    """One Rich table per group; the row of the zoo model `highlight` stands out."""
    tables = []
    for title, group in _groups(rows):
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column in ("#", *COLUMNS[-4:]) else "left")
        for row in group:
            style = "bold yellow" if _is_highlighted(row, highlight) else "green" if row.measured else None
            table.add_row(*_cells(row, "\n"), style=style)
        tables.append(table)
    return tables


def render_markdown(rows: list[Row], highlight: str | None = None) -> str:
    """One heading and one table per group."""
    lines = []
    for title, group in _groups(rows):
        lines += [f"### {title}", "", markdown_line(COLUMNS), markdown_line(["---"] * len(COLUMNS))]
        for row in group:
            cells = [cell.replace("|", r"\|").replace("\n", " ") for cell in _cells(row, " ")]
            if _is_highlighted(row, highlight):
                cells = [f"**{cell}**" for cell in cells]
            lines.append(markdown_line(cells))
        lines.append("")
    return "\n".join(lines)


def render_latex(rows: list[Row], highlight: str | None = None) -> str:
    r"""One booktabs `tabular` with RobustBench's columns (and PGD-20 and the origin); needs `\usepackage{booktabs}`."""
    head = (
        "#",
        "Method",
        "Clean",
        "PGD-20",
        "AutoAttack",
        "Top 30%",
        "Extra data",
        "Architecture",
        "Venue",
        "Model Zoo ID",
        "Origin",
    )
    lines = [r"\begin{tabular}{rlrrrrcllll}", r"\toprule", latex_line(head)]
    for title, group in _groups(rows):
        lines += [r"\midrule", rf"\multicolumn{{{len(head)}}}{{l}}{{\textit{{{latex(title)}}}}} \\", r"\midrule"]
        for row in group:
            cells = [
                MISSING if row.rank is None else str(row.rank),
                row.method or row.name,
                *_figures(row, " "),
                "Y" if row.additional_data else "N",
                row.architecture.replace("WideResNet", "WRN").replace("ResNet", "RN"),
                row.source or MISSING,
                row.name if row.measured else "N/A",
                row.origin,
            ]
            lines.append(latex_line(cells, bold=_is_highlighted(row, highlight)))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _measured_row(card: dict[str, Any]) -> Row:
    results = card.get("results") or {}
    pgd, autoattack = results.get("pgd-20") or {}, results.get("autoattack") or {}
    clean = _measured_rate(pgd.get("natural"), pgd.get("n"))
    clean = clean or _measured_rate(autoattack.get("natural"), autoattack.get("n"))
    return Row(
        name=card["name"],
        method=card.get("method") or "",
        source=card.get("venue") or "",
        measured=True,
        dataset=card["dataset"],
        noise=_noise_name(card.get("noise")),
        threat=_threat(card.get("threat_model"), card.get("eps")),
        architecture=card.get("architecture") or MISSING,
        checkpoint=card.get("checkpoint") or MISSING,
        additional_data=bool(card.get("additional_data")),
        clean=clean or _plain_rate(card.get("clean_acc")),
        pgd20=_measured_rate(pgd.get("final_iterate"), pgd.get("n")),
        pgd10=None,
        autoattack=_measured_rate(autoattack, autoattack.get("n")) or _plain_rate(card.get("autoattack_acc")),
        kept=_kept(results.get("confidence") or {}),
    )


def _published_row(entry: dict[str, Any]) -> Row:
    note = f" ({entry['note']})" if entry.get("note") else ""
    return Row(
        name=entry["method"],
        method="",
        source=entry["source"] + note,
        measured=False,
        dataset=entry["dataset"],
        noise=_noise_name(entry["noise"]),
        threat=_threat(entry["threat_model"], entry["eps"]),
        architecture=entry["architecture"],
        checkpoint=entry["checkpoint"] or MISSING,
        additional_data=entry["additional_data"],
        clean=_plain_rate(entry["clean_acc"]),
        pgd20=_plain_rate(entry["pgd20_acc"]),
        pgd10=_plain_rate(entry["pgd10_acc"]),
        autoattack=_plain_rate(entry["autoattack_acc"]),
    )


def _measured_rate(result: dict[str, Any] | None, n: int | None) -> Rate | None:
    """A result of a card, whose accuracy and interval are shares of 1."""
    if not result or result.get("accuracy") is None:
        return None
    value, interval = result["accuracy"], result.get("interval")
    if interval is None and n:
        interval = wilson_interval(round(value * n), n)
    low, high = (None, None) if interval is None else (100 * interval[0], 100 * interval[1])
    return Rate(100 * value, low, high, n)


def _kept(confidence: dict[str, Any]) -> Rate | None:
    figure = confidence.get("rows", {}).get("auto", {}).get("kept_30")
    if not figure or figure["mean"] is None:
        return None
    low, high = (100 * min(1.0, max(0.0, end)) for end in figure["interval"])
    return Rate(100 * figure["mean"], low, high)


def _plain_rate(percent: float | str | None) -> Rate | None:
    if percent in (None, ""):
        return None
    try:
        return Rate(float(percent))
    except ValueError:
        raise InputError(
            f"accuracy {percent!r} in a card is no number; write percent as '71.30' or leave it empty"
        ) from None


def _noise_name(noise: dict[str, Any] | None) -> str:
    return noise_title(noise) if noise else CLEAN_LABELS


def _noise_asked_for(row: Row) -> str:
    return "none" if row.noise == CLEAN_LABELS else row.noise


def _threat(threat_model: str | None, eps: str | float | None) -> str:
    """'Linf 8/255': one spelling for one ε, so that '8/255' and '0.03137254901960784' share a group."""
    threat_model = threat_model or "Linf"
    if eps in (None, ""):
        return threat_model
    try:
        size = float(Fraction(str(eps)))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"eps {eps!r} in a card is no number; write '0.3' or '8/255'") from None
    if abs(float(f"{size:.4g}") - size) < 1e-9:
        return f"{threat_model} {size:.4g}"
    steps = size * 255
    return f"{threat_model} {round(steps)}/255" if abs(steps - round(steps)) < 1e-3 else f"{threat_model} {size:.6g}"


def _group_order(row: Row) -> tuple:
    return row.dataset, row.noise != CLEAN_LABELS, row.noise, row.threat


def _within_group(row: Row) -> tuple:
    figures = (row.autoattack, row.pgd20, row.pgd10)
    return (*((figure is None, -figure.value if figure else 0.0) for figure in figures), row.name)


def _groups(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    groups = ((key, list(group)) for key, group in groupby(rows, key=lambda row: row.group))
    return [(", ".join((dataset_title(dataset), *rest)), group) for (dataset, *rest), group in groups]


def _cells(row: Row, gap: str) -> list[str]:
    rank = MISSING if row.rank is None else str(row.rank)
    detail = ", ".join(part for part in (row.method, row.source) if part) or MISSING
    return [rank, row.name, detail, row.origin, row.architecture, row.checkpoint, *_figures(row, gap)]


def _figures(row: Row, gap: str) -> list[str]:
    pgd = _rate(row.pgd20, gap)
    if row.pgd20 is None and row.pgd10 is not None:
        pgd = f"{_rate(row.pgd10, gap)}{gap}(PGD-10)"
    return [_rate(row.clean, gap), pgd, _rate(row.autoattack, gap), _rate(row.kept, gap)]


def _rate(rate: Rate | None, gap: str) -> str:
    if rate is None:
        return MISSING
    if rate.low is None:
        return f"{rate.value}"
    count = "" if rate.n is None else f" n={rate.n}"
    return f"{rate.value:.2f}{gap}[{rate.low:.1f}, {rate.high:.1f}]{count}"


def _is_highlighted(row: Row, highlight: str | None) -> bool:
    return row.measured and row.name == highlight


def markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex_line(cells: Iterable[str], bold: bool = False) -> str:
    escaped = [rf"\textbf{{{latex(cell)}}}" if bold else latex(cell) for cell in cells]
    return " & ".join(escaped) + r" \\"


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}
)


def latex(text: str) -> str:
    return text.translate(LATEX)


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


FORMATS = ("terminal", "markdown", "latex")
app = typer.Typer(add_completion=False)


@app.command()
def leaderboard(
    dataset: str | None = typer.Option(None, help="Only this data set, for example digits."),
    noise: str | None = typer.Option(
        None, help="Only this label noise: none, a kind, or a kind with rate ('symmetric 0.4')."
    ),
    zoo: ZooOption = None,
    format: str = typer.Option("terminal", help=f"One of {', '.join(FORMATS)}."),
    highlight: str | None = typer.Option(None, help="A zoo model to mark, and to say where it stands."),
    html: Annotated[
        Path | None, typer.Option(help="Write a page for the web to this file instead of printing.")
    ] = None,
) -> None:
    """The zoo's models and the published figures in one ranked table."""
    with user_errors():
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        cards = read_cards(zoo)
        rows = leaderboard_rows(cards, published_rows(), dataset, noise)
        sentence = standing(rows, highlight) if highlight else None
        if html is not None:
            from eval.page import write_page  # which reads this module

            write_page(html, rows, cards, zoo, highlight)
            console.print(f"{html}: {len(rows)} models", soft_wrap=True)
            return
    if format == "terminal":
        for table in render_terminal(rows, highlight):
            console.print(table)
        if sentence:
            console.print(sentence, soft_wrap=True)
    else:
        print_text((render_markdown if format == "markdown" else render_latex)(rows, highlight) + "\n")


if __name__ == "__main__":
    app()
