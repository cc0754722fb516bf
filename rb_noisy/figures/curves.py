"""[NL]'s curves over the epochs: accuracy, loss, κ and entropy, by noise rate and method."""

from __future__ import annotations

from typing import Any

import numpy as np

from rb_noisy.figures.base import (
    COLOURS,
    CORRECT,
    INCORRECT,
    MARKERS,
    Context,
    Drawing,
    NotDrawn,
    epochs_axis,
    legend,
    percent_axis,
    same_scale,
    sheet,
)
from rb_noisy.figures.groups import Group, Line, grouped, mean_of

COMMAND = "rb-noisy sweep --data DATA --method st,pgd-at --noise symmetric --noise-rate 0,0.2,0.4 --out RUNS"
KINDS = (("train_correct", "correct labels", CORRECT, "-"), ("train_incorrect", "incorrect labels", INCORRECT, "--"))


def learning_curves(context: Context) -> list[Drawing]:
    """[NL] Figures 4, 15, 16, 19, 20 (and 18, bottom): natural and PGD accuracy on test data over the epochs.

    A column for each method (and network), a line for each noise rate.
    """
    drawings = []
    for group in grouped(context.sources):
        drawing = _Panels(f"learning-curves_{group.name}", f"Test accuracy: {group.title}", group, 2)
        for line in group.lines:
            colour = COLOURS[group.rates.index(line.rate) % len(COLOURS)]
            for row, (metric, what) in enumerate((("test_natural_acc", "natural"), ("test_pgd_acc", _pgd(group)))):
                style = {"color": colour, **_marked(group, line)}
                label = f"noise rate {line.rate}"
                drawing.add(row, line, mean_of(line, metric, 100), label, style, {"data": "test", "attack": what})
                percent_axis(drawing.axis(row, line), f"{what} accuracy in %")
        drawings.append(drawing.finish())
    return drawings


def train_accuracy(context: Context) -> list[Drawing]:
    """[NL] Figures 3, 13, 14, 18: natural and PGD accuracy on correct and incorrect training data, given labels."""
    drawings = []
    for group in _noisy(grouped(context.sources)):
        drawing = _Panels(f"train-accuracy_{group.name}", f"Accuracy on training data: {group.title}", group, 2)
        for line in group.lines:
            for row, (measure, what) in enumerate((("natural_acc", "natural"), ("pgd_acc", _pgd(group)))):
                drawing.add_kinds(row, line, measure, 100, what)
                percent_axis(drawing.axis(row, line), f"{what} accuracy in %")
        drawings.append(drawing.finish())
    return drawings


def kappa_over_epochs(context: Context) -> list[Drawing]:
    """[NL] Figures 5, 21, 22: mean natural loss and mean κ of correct and incorrect training data over the epochs."""
    drawings = []
    for group in _noisy(grouped(context.sources)):
        drawing = _Panels(f"kappa-over-epochs_{group.name}", f"Loss and κ: {group.title}", group, 2)
        for line in group.lines:
            drawing.add_kinds(0, line, "loss", 1, "mean natural loss")
            drawing.axis(0, line).set_ylabel("mean natural loss")
            drawing.add_kinds(1, line, "kappa", 1, "mean κ")
            steps = group.recipe.track_steps
            drawing.axis(1, line).set(ylabel=f"mean κ (PGD-{steps})", ylim=(-0.03 * steps, 1.03 * steps))
        same_scale(drawing.axes[0])
        drawings.append(drawing.finish())
    return drawings


def neighbourhood_entropy(context: Context) -> list[Drawing]:
    """[NL] Figures 2, 12: mean entropy of the prediction around incorrect data, random and adversarial direction.

    The paper takes 100 random points around each sample; training takes one around each of up to `track` samples, the
    start of its tracked PGD, and that attack's first step for the adversarial direction.
    """
    needs = ("train_incorrect_entropy_random", "train_incorrect_entropy_adversarial")
    drawings = []
    for group in _noisy(grouped(context.sources, needs, methods=len(COLOURS))):
        title = f"Entropy around incorrect data: {group.title}"
        figure, axes = sheet(1, 2, title, 4.6, 3.4)
        rows: list[dict[str, Any]] = []
        for line in (line for line in group.lines if line.rate != "0"):
            colour = COLOURS[group.methods.index(line.method)]
            marker = MARKERS[group.rates.index(line.rate) % len(MARKERS)]
            for axis, metric, direction in zip(axes[0], needs, ("random", "adversarial"), strict=True):
                values = mean_of(line, metric)
                style = {"color": colour, "marker": marker, "markersize": 4, "markevery": _every(values)}
                axis.plot(_epochs(values), values, label=f"{line.method}, rate {line.rate}", **style)
                rows += _rows(values, method=line.method, noise_rate=line.rate, direction=direction)
        for axis, direction in zip(axes[0], ("random point of the ε-ball", "one step of PGD"), strict=True):
            axis.set(title=direction, ylabel="mean entropy in nats")
            epochs_axis(axis, group.epochs)
        same_scale(axes[0])
        legend(figure, axes.flat)
        drawings.append(Drawing(f"neighbourhood-entropy_{group.name}", figure, rows))
    return drawings


class _Panels:
    """Rows of measures, a column per method."""

    def __init__(self, name: str, title: str, group: Group, rows: int):
        self.name, self.group, self.rows = name, group, []
        self.figure, self.axes = sheet(rows, len(group.methods), title, height=2.5)
        for axes in self.axes.T:
            for axis in axes:
                epochs_axis(axis, group.epochs)
        for method, axis in zip(group.methods, self.axes[0], strict=True):
            axis.set_title(method, parse_math=False)

    def axis(self, row: int, line: Line) -> Any:
        return self.axes[row, self.group.methods.index(line.method)]

    def add(self, row: int, line: Line, values: np.ndarray, label: str, style: dict, about: dict[str, Any]) -> None:
        if np.isnan(values).all():
            return
        self.axis(row, line).plot(_epochs(values), values, label=label, markevery=_every(values), **style)
        self.rows += _rows(values, method=line.method, noise_rate=line.rate, **about)

    def add_kinds(self, row: int, line: Line, measure: str, scale: float, what: str) -> None:
        """A measure on correct and on incorrect training data."""
        for name, text, colour, dash in KINDS:
            style = {"color": colour, "linestyle": dash, **_marked(self.group, line)}
            label = f"{text}, rate {line.rate}"
            values = mean_of(line, f"{name}_{measure}", scale)
            self.add(row, line, values, label, style, {"labels": text, "measure": what})

    def finish(self) -> Drawing:
        legend(self.figure, self.axes.flat, sort=True)
        return Drawing(self.name, self.figure, self.rows)


def _noisy(groups: list[Group]) -> list[Group]:
    noisy = [group for group in groups if group.noise != "none"]
    if not noisy:
        raise NotDrawn("the runs given have no label noise", COMMAND)
    return noisy


def _pgd(group: Group) -> str:
    return f"PGD-{group.recipe.track_steps}"


def _marked(group: Group, line: Line) -> dict[str, Any]:
    return {"marker": MARKERS[group.rates.index(line.rate) % len(MARKERS)], "markersize": 4, "linewidth": 1.4}


def _every(values: np.ndarray) -> int:
    return max(1, len(values) // 8)


def _epochs(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def _rows(values: np.ndarray, **about: Any) -> list[dict[str, Any]]:
    return [{**about, "epoch": epoch, "value": value} for epoch, value in enumerate(values.tolist(), 1)]
