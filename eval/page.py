"""The leaderboard as one page that needs nothing but itself: a table to sort and filter, a scatter, a card each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.confidence_splits import SPLITS
from eval.leaderboard import MISSING, Rate, Row
from eval.page_plots import CURVES, by_kappa, reliability, three
from model_zoo.registry import dataset_title, eps_label
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path
from rb_noisy.hints import command_line
from rb_noisy.pages import render_page
from rb_noisy.recipes import Recipe, flatten
from rb_noisy.subsets import DRAWN, images_of, kind_of

TEMPLATES = Path(__file__).with_name("templates")
INPUTS = (("natural", "natural inputs"), ("pgd-20", "PGD-20 inputs"))
ATTACKED = "pgd-20"  # the inputs whose calibration stands in the table; the card has both


@dataclass(frozen=True)
class Column:
    """`first` is the order that the first click sorts in: the better end on top."""

    key: str
    title: str
    hint: str
    first: str = "ascending"
    number: bool = True
    over: str = ""


_TRACKED, _KAPPA, _SURE = "tracked in training", "κ-calibration, PGD-20 inputs", "robust confidence"
COLUMNS = (
    Column("rank", "#", "Rank by AutoAttack among models of the same data set, noise and threat"),
    Column("name", "Model", "Opens the card", number=False),
    Column("origin", "Origin", "Measured here or copied from its source", number=False),
    Column("dataset", "Data set", "Trained and tested on", number=False),
    Column("noise", "Label noise", "In the training labels", number=False),
    Column("natural", "Natural", "Accuracy without an attack, %", "descending"),
    Column("pgd20", "PGD-20", "Accuracy under PGD-20, final iterate, %", "descending"),
    Column("autoattack", "AutoAttack", "Accuracy under AutoAttack, %", "descending"),
    Column("threat", "Threat", "Threat model and ε of the attacks", number=False),
    Column("method", "Method", "How it was trained", number=False),
    Column("backbone", "Backbone", "Network", number=False),
    Column("checkpoint", "Weights", "Of the best epoch or the final one", number=False),
    Column("best", "best", "Highest over the epochs, %", "descending", over=_TRACKED),
    Column("final", "final", "After the last epoch, %", "descending", over=_TRACKED),
    Column("diff", "diff", "Best less final, points", over=_TRACKED),
    Column("ece", "ECE", "Of the plain softmax; 0 is perfect", over=_KAPPA),
    Column("ece_temperature", "ECE temp.", "After temperature scaling; 0 is perfect", over=_KAPPA),
    Column("ece_kappa", "ECE κ", "Of isotonic regression on κ; 0 is perfect", over=_KAPPA),
    Column("auroc_kappa", "AUROC κ", "κ of right against wrong predictions; 1 is perfect", "descending", over=_KAPPA),
    Column("aurc_kappa", "AURC κ", "Errors left as κ sets aside the suspicious; 0 is perfect", over=_KAPPA),
    Column("kept", "top 30%", "Robust accuracy of the 30% surest answers, %", "descending", over=_SURE),
    Column("brier_ratio", "Brier ratio", "To the best without an attack; below 1 κ helps", over=_SURE),
)
FIGURE_HEAD = ("Figure", "Accuracy, %", "95% interval", "Data", "Split", "Images", "Seed", "ε", "α", "Steps", "Date")
FIGURE_NAMES = {"final_iterate": "final iterate", "any_iterate": "any iterate", "pgd-20": "on PGD-20 inputs"}
CALIBRATORS = {name: text for name, (text, *_) in CURVES.items()} | {"isotonic_max_softmax": "isotonic on max-softmax"}
SCORES = {"kappa": "κ", "max_softmax": "max-softmax", "margin": "margin"}
# What measures the figures that a card has under a name, "pgd-20" being of the kind "pgd".
EVALUATIONS = {kind: (f"eval.{kind}",) for kind in ("pgd", "autoattack", "calibration")}
EVALUATIONS["confidence"] = ("eval.calibration", "--target", "robust")


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by ("" comes last)."""

    text: str = MISSING
    sort: str | float = ""
    details: Sequence[str] = ()


def write_page(
    path: str | Path,
    rows: Sequence[Row],
    cards: Iterable[dict[str, Any]],
    zoo: str | None = None,
    highlight: str | None = None,
) -> None:
    """Write `page` to a file."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(rows, cards, zoo, highlight), encoding="utf-8")


def page(
    rows: Sequence[Row], cards: Iterable[dict[str, Any]], zoo: str | None = None, highlight: str | None = None
) -> str:
    """The HTML page of `leaderboard_rows`; `cards` are those of the rows measured here, `zoo` where they are from.

    Groups (data set, noise, threat) with a model measured here come first; `highlight` marks one of those.
    """
    of_name = {card["name"]: card for card in cards}
    own = {row.group for row in rows if row.measured}
    ordered = sorted(rows, key=lambda row: row.group not in own)
    entries = [
        _entry(number, row, of_name[row.name] if row.measured else None, zoo) for number, row in enumerate(ordered)
    ]
    for entry in entries:
        entry["highlight"] = entry["row"].measured and entry["row"].name == highlight
    return render_page(
        TEMPLATES,
        "leaderboard",
        title="rb-noisy leaderboard",
        entries=entries,
        measured=sum(row.measured for row in rows),
        columns=COLUMNS,
        heads=_heads(),
        filters=_filters(entries),
        datasets=[(name, dataset_title(name)) for name in sorted({row.dataset for row in rows})],
        figure_head=FIGURE_HEAD,
        zip=zip,
    )


def _heads() -> list[tuple[str, int]]:
    """What stands over the columns, and over how many of them."""
    heads: list[tuple[str, int]] = []
    for column in COLUMNS:
        if heads and heads[-1][0] == column.over:
            heads[-1] = (column.over, heads[-1][1] + 1)
        else:
            heads.append((column.over, 1))
    return heads


def _filters(entries: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    names = {"dataset": "Data set", "noise": "Label noise", "method": "Method", "backbone": "Backbone"}
    filters = []
    for name, title in names.items():
        values = sorted({entry["data"][name] for entry in entries}, key=lambda value: (value.lower(), value))
        show = dataset_title if name == "dataset" else str
        filters.append((name, title, [(value, show(value)) for value in values]))
    return filters


def _entry(number: int, row: Row, card: dict[str, Any] | None, zoo: str | None) -> dict[str, Any]:
    method = row.method or row.name
    natural, robust = row.clean, row.autoattack
    label = f"{row.name}, {row.origin}\n{dataset_title(row.dataset)}, {row.noise}, {row.threat}"
    if natural and robust:
        interval = "" if robust.low is None else f" [{robust.low:.1f}, {robust.high:.1f}]"
        label += f"\nnatural {natural.value:.2f}%, AutoAttack {robust.value:.2f}%{interval}"
    return {
        "row": row,
        "id": row.name if row.measured else f"published {row.name}, {row.source}, {row.checkpoint}, {row.dataset}",
        "data": {
            "dataset": row.dataset,
            "noise": row.noise,
            # One spelling for one method, ours and the papers': "PGD-AT + SGLR" is pgd-at+sglr.
            "method": re.sub(r"\s*\+\s*", "+", method).lower(),
            "backbone": row.architecture,
            "measured": "yes" if row.measured else "",
            "label": label,
            "natural": _number(natural and natural.value),
            "robust": _number(robust and robust.value),
            "low": _number(robust and robust.low),
            "high": _number(robust and robust.high),
        },
        "cells": _cells(row, card),
        "card": _published_card(row) if card is None else _card(row, card, zoo),
    }


def _cells(row: Row, card: dict[str, Any] | None) -> list[Cell]:
    texts = {
        "dataset": dataset_title(row.dataset),
        "noise": row.noise,
        "threat": row.threat,
        "method": row.method or row.name,
        "backbone": row.architecture,
        "checkpoint": row.checkpoint,
        "origin": row.origin,
    }
    cells = {name: Cell(text, "" if text == MISSING else text) for name, text in texts.items()}
    cells["rank"] = Cell() if row.rank is None else Cell(str(row.rank), row.rank)
    cells["name"] = Cell(row.name, row.name, [row.source] if row.source else [])
    cells["natural"], cells["autoattack"], cells["kept"] = _rate(row.clean), _rate(row.autoattack), _rate(row.kept)
    sure = ((card or {}).get("results") or {}).get("confidence", {}).get("rows", {})
    if sure and (ratio := sure["auto"]["brier_ratio"]["mean"]) is not None:
        cells["brier_ratio"] = Cell(f"{ratio:.3f}", ratio)
    cells["pgd20"] = _rate(row.pgd20)
    if row.pgd20 is None and row.pgd10 is not None:
        cells["pgd20"] = Cell(f"{row.pgd10.value}", "", ["PGD-10"])  # not sorted among figures of more steps
    cells |= _tracked((card or {}).get("training") or {})
    part = _report(card or {}).get(ATTACKED)
    if part:
        found = {f"ece_{name.removeprefix('isotonic_')}": part["calibrated"][name]["ece"]["mean"] for name in CURVES}
        found |= {"ece": found["ece_uncalibrated"], "auroc_kappa": part["scores"]["kappa"]["auroc"]}
        found |= {"aurc_kappa": part["scores"]["kappa"]["aurc"]}
        cells |= {name: Cell() if value is None else Cell(f"{value:.3f}", value) for name, value in found.items()}
    return [cells.get(column.key, Cell()) for column in COLUMNS]


def _tracked(training: dict[str, Any]) -> dict[str, Cell]:
    cells = {}
    for name in ("best", "final"):
        line = training.get(name) or {}
        if line.get("test_pgd_acc") is not None:
            value = 100 * line["test_pgd_acc"]
            cells[name] = Cell(f"{value:.2f}", value, [f"epoch {line['epoch'] + 1}"])
    if len(cells) == 2:
        difference = round(cells["best"].sort - cells["final"].sort, 6)
        cells["diff"] = Cell(f"{difference:.2f}", difference)
    return cells


def _rate(rate: Rate | None) -> Cell:
    if rate is None:
        return Cell()
    if rate.low is None:
        return Cell(f"{rate.value}", rate.value)
    details = [f"[{rate.low:.1f}, {rate.high:.1f}]"]
    return Cell(f"{rate.value:.2f}", rate.value, details + ([f"n={rate.n}"] if rate.n else []))


def _published_card(row: Row) -> dict[str, Any]:
    facts = [("Source", row.source), ("Data set", dataset_title(row.dataset)), ("Label noise", row.noise)]
    facts += [("Threat", row.threat), ("Backbone", row.architecture), ("Weights", row.checkpoint)]
    facts.append(("Extra data", "yes" if row.additional_data else "no"))
    figures = (("Natural", row.clean), ("PGD-20", row.pgd20), ("PGD-10", row.pgd10), ("AutoAttack", row.autoattack))
    facts += [(f"{name}, %", f"{rate.value}") for name, rate in figures if rate]
    return {"facts": facts} | dict.fromkeys(("commands", "figures", "notes", "plots", "calibration", "recipe"), ())


def _card(row: Row, card: dict[str, Any], zoo: str | None) -> dict[str, Any]:
    noise, training, results = card.get("noise") or {}, card.get("training") or {}, card.get("results") or {}
    facts = [("Data set", dataset_title(row.dataset)), ("Label noise", row.noise), ("Threat", row.threat)]
    facts += [("Noise seed", noise.get("seed")), ("Method", row.method), ("Backbone", row.architecture)]
    facts += [("Parameters", f"{card['parameters']:,}" if card.get("parameters") else None)]
    facts += [("Weights", row.checkpoint), ("Published", card.get("published")), ("Authors", card.get("authors"))]
    facts += [("Paper", row.source), ("Extra data", "yes" if row.additional_data else "no")]
    if training.get("seconds"):
        facts.append(("Training took", f"{training['seconds'] / 60:.1f} minutes"))
    notes = [f"AutoAttack: {text}" for text in (results.get("autoattack") or {}).get("warnings") or []]
    if cells := _tracked(training):
        text = ", ".join(f"{name} {cell.text}% ({cell.details[0]})" for name, cell in cells.items() if cell.details)
        how = f"{training.get('attack')}, {training.get('tracked_test_samples')} test images"
        notes.append(f"Tracked in training: {how}; {text}; best chosen on the {training.get('best_chosen_on')} set.")
    report = _report(card)
    recipe = {name: value for name, value in flatten(card.get("recipe") or {}).items() if value not in (None, {}, [])}
    return {
        "facts": [(name, value) for name, value in facts if value not in (None, "")],
        "commands": _commands(card, zoo),
        "figures": [line for name, figures in results.items() for line in _figure_lines(name, figures)],
        "notes": notes,
        "plots": [
            {"reliability": reliability(report[kind], inputs), "by_kappa": by_kappa(report[kind], inputs)}
            for kind, inputs in INPUTS
            if kind in report
        ],
        "calibration": _calibration_lines(report),
        "recipe": [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in recipe.items()],
    }


def _commands(card: dict[str, Any], zoo: str | None) -> list[str]:
    """What trains the model again, and what measured the figures of its card."""
    commands = []
    if card.get("recipe"):
        commands.append(train_command(card["recipe"], f"runs/{card['name']}"))
    for name, figures in (card.get("results") or {}).items():
        kind, _, steps = name.partition("-")
        if kind not in EVALUATIONS:
            continue
        words = ["python", "-m", *EVALUATIONS[kind], "--model", card["name"]]
        words += ["--zoo", zoo] if zoo else []
        words += ["--steps", steps] if kind == "pgd" and steps != "20" else []
        words += ["--splits", figures["splits"]] if figures.get("splits", SPLITS) != SPLITS else []
        words += ["--kappa-steps", figures["steps"]] if kind == "calibration" and "steps" in figures else []
        words += ["--n", figures["n"]] if figures.get("n") != figures.get("of") else []
        words += ["--seed", figures.get("seed", 0), "--batch-size", figures.get("batch_size", 250)]
        old = "images" not in figures and figures.get("of", 0) > figures.get("n", 0)
        drawn = old and kind_of(figures.get("dataset", "")) == DRAWN
        note = f"  # drawn by class now; the figures are of {images_of(figures)}" if drawn else ""
        commands.append(command_line(*words) + note)
    return commands


def train_command(recipe: dict[str, Any], out: str) -> str:
    """The `rb-noisy train` command that a recipe means, in one line; in a shell it gives that very recipe again."""
    try:
        changes = flatten(Recipe.recorded(recipe).changes())
    except (InputError, TypeError) as error:
        return f"# not a recipe of this version: {' '.join(str(error).split())}"
    words = ["rb-noisy", "train"]
    for name in ("data", "method", "noise", "noise_rate", "backbone", "epochs", "seed"):
        if name in changes:
            words += [f"--{name.replace('_', '-')}", str(changes.pop(name))]
    for name, value in changes.items():
        words += ["--set", f"{name}={_as_setting(value)}"]
    return command_line(*words, "--out", out)


def _as_setting(value: Any) -> str:
    """The text after FIELD= : text as it stands, unless it would be read as JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value)


def _figure_lines(name: str, figures: dict[str, Any]) -> list[list[str]]:
    """A line for every accuracy among the figures of an evaluation, wherever it stands among them."""
    eps = figures.get("eps")
    setting = [dataset_title(str(figures.get("dataset", MISSING))), figures.get("split")]
    setting += [images_of(figures) if "of" in figures else figures.get("n"), figures.get("seed")]
    setting += [None if eps is None else eps_label(eps)]
    setting += [None if figures.get("alpha") is None else f"{figures['alpha']:.4g}", figures.get("steps")]
    setting += [figures.get("date")]
    rest = [MISSING if value is None else str(value) for value in setting]
    lines = []

    def look(part: dict[str, Any], words: list[str]) -> None:
        if isinstance(part.get("accuracy"), int | float):
            interval = part.get("interval")
            shown = MISSING if not interval else f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
            lines.append([" ".join([name, *words]), f"{100 * part['accuracy']:.2f}", shown, *rest])
        for key, value in part.items():
            if isinstance(value, dict) and key not in ("by_kappa", "reliability"):
                look(value, words if key == "report" else [*words, FIGURE_NAMES.get(key, key)])

    look(figures, [])
    return lines


def _report(card: dict[str, Any]) -> dict[str, Any]:
    return ((card.get("results") or {}).get("calibration") or {}).get("report") or {}


def _calibration_lines(report: dict[str, Any]) -> list[list[str]]:
    """[measure, on natural inputs, on PGD-20 inputs], and what κ says of right *and* robust predictions."""
    if not report:
        return []
    parts = [report[kind] for kind, _ in INPUTS]
    plain = {"ece": "ECE, all inputs", "adaptive_ece": "adaptive ECE", "nll": "NLL", "brier": "Brier score"}
    lines = [[text, *(three(part[name]) for part in parts)] for name, text in plain.items()]
    for name, text in CALIBRATORS.items():
        errors = [part["calibrated"][name]["ece"] for part in parts]
        lines.append([f"ECE on the other half: {text}", *(f"{three(e['mean'])} ± {three(e['std'])}" for e in errors)])
    for measure in ("auroc", "aurc"):
        for name, text in SCORES.items():
            values = [three(part["scores"][name][measure]) for part in parts]
            lines.append([f"{measure.upper()} of {text}, right predictions", *values])
    if robust := parts[0].get("robust"):
        for name, text in SCORES.items():
            lines.append([f"AUROC of {text}, right and robust", three(robust["scores"][name]["auroc"]), MISSING])
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
