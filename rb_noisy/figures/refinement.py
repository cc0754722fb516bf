"""[SGLR]'s curves over the epochs: gradient norm, label assignments, confidence, memorisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from rb_noisy.analysis import confidence_trajectory, information_in_weights
from rb_noisy.figures.base import (
    COLOURS,
    CORRECT,
    GREY,
    INCORRECT,
    MARKERS,
    Context,
    Drawing,
    NotDrawn,
    Source,
    epochs_axis,
    file_part,
    legend,
    percent_axis,
    sheet,
    title,
)
from rb_noisy.figures.groups import grouped, mean_of
from rb_noisy.training_data import training_set

TRAIN = "rb-noisy train --data DATA --method pgd-at --out RUN"
GREEN, ORANGE, BLUE = COLOURS[0], COLOURS[1], COLOURS[2]


def gradient_norm(context: Context) -> list[Drawing]:
    """[SGLR] Figure 1: gradient norm of training; training and test PGD accuracy with the information in weights.

    The gradient norm is the mean over an epoch's steps of ‖∇_w L(x̃, y)‖₂. The information in weights is an estimate,
    see `rb_noisy.analysis.information_in_weights`; for a run without it the rest is drawn.
    """
    drawings = []
    for source in _attacked(context):
        figure, axes = sheet(1, 2, title(source), 4.6, 3.2)
        first, second = axes[0]
        information = _information(source, context)
        norms = [line["gradient_norm"] for line in source.metrics]
        wrong = _wrong_share(source, context)
        train = [100 * _whole(line, "pgd_acc", wrong) for line in source.metrics]
        test = [100 * line["test_pgd_acc"] for line in source.metrics]
        epochs = np.arange(1, len(norms) + 1)
        first.plot(epochs, norms, color="black", label="gradient norm")
        first.set(ylabel="gradient norm", ylim=(0, None), title="(a)")
        attack = f"PGD-{source.recipe.track_steps}"
        second.plot(epochs, train, color=ORANGE, label=f"training accuracy, {attack}")
        second.plot(epochs, test, color=BLUE, linestyle="--", label=f"test accuracy, {attack}")
        percent_axis(second, f"{attack} accuracy in %")
        second.set_title("(b)")
        known = None not in information
        drawn = [first, second]
        if known:
            third = second.twinx()
            third.plot(epochs, information, color=GREEN, linestyle=":", linewidth=2, label="information in weights")
            third.set(ylabel="information in weights (estimate, nats)", ylim=(0, None))
            third.tick_params(labelsize=8)
            drawn.append(third)
        for axis in axes[0]:
            for milestone in source.recipe.milestones if source.recipe.schedule == "multistep" else ():
                axis.axvline(milestone + 0.5, color=GREY, linewidth=1, linestyle=(0, (1, 2)), label="learning rate ÷10")
            epochs_axis(axis, len(norms))
        legend(figure, drawn)
        names = ("epoch", "gradient_norm", "train_pgd_accuracy", "test_pgd_accuracy", "information_in_weights")
        columns = zip(epochs.tolist(), norms, train, test, information, strict=True)
        rows = [dict(zip(names, row, strict=True)) for row in columns]
        drawings.append(Drawing(f"gradient-norm_{file_part(source)}", figure, rows))
    return drawings


def label_assignment(context: Context) -> list[Drawing]:
    """[SGLR] Figure 2: training and test PGD accuracy over the epochs, a panel for each way to assign labels."""
    drawings = []
    for group in grouped(context.sources):
        lines = [line for line in group.lines if all(source.attacks for source in line.sources)]
        targets = {line.sources[0].recipe.targets_name for line in lines}
        if len(targets) < 2:
            continue
        for rate in group.rates:
            chosen = [line for line in lines if line.rate == rate]
            if not chosen:
                continue
            heading = f"PGD-{group.recipe.track_steps} accuracy by label assignment: {group.title}, noise rate {rate}"
            figure, axes = sheet(1, len(chosen), heading)
            rows: list[dict[str, Any]] = []
            for axis, line in zip(axes[0], chosen, strict=True):
                wrong = _wrong_share(line.sources[0], context)
                train = 100 * line.values(lambda m, wrong=wrong: _whole(m, "pgd_acc", wrong))
                test = mean_of(line, "test_pgd_acc", 100)
                for values, what, colour, dash in ((train, "training", ORANGE, "-"), (test, "test", BLUE, "--")):
                    axis.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=dash, label=what)
                    rows += [
                        {"method": line.method, "data": what, "epoch": epoch, "value": value}
                        for epoch, value in enumerate(values.tolist(), 1)
                    ]
                axis.set_title(line.method, parse_math=False)
                percent_axis(axis, "PGD accuracy in %")
                epochs_axis(axis, group.epochs)
            legend(figure, axes.flat)
            drawings.append(Drawing(f"label-assignment_{group.name}-{rate}", figure, rows))
    if not drawings:
        raise NotDrawn(
            "the runs given do not attack by at least two label assignments on the same data",
            "rb-noisy sweep --data DATA --method pgd-at,pgd-at+ls,pgd-at+sglr --out RUNS",
        )
    return drawings


def confidence(context: Context) -> list[Drawing]:
    """[SGLR] Figure 3: mean confidence in right (across) and wrong (up) predictions over training, on test data.

    Left natural, right under PGD. Dots darken and grow with the epochs; a dashed line runs where both are the same; a
    ring marks the epoch of the best accuracy; the star is the ideal, sure where it is right and only there.
    """
    drawings = []
    for source in context.sources:
        tracks = [confidence_trajectory(source.metrics, kind) for kind in ("natural", "pgd")]
        if None in tracks:
            continue
        figure, axes = sheet(1, 2, title(source), 4.2, 3.6)
        rows: list[dict[str, Any]] = []
        for axis, track, kind in zip(axes[0], tracks, ("natural", f"PGD-{source.recipe.track_steps}"), strict=True):
            share = np.linspace(0, 1, len(track.right))
            axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="equally sure")
            dots = axis.scatter(track.right, track.wrong, c=share, s=12 + 60 * share, cmap="cividis_r", zorder=3)
            best = int(np.nanargmax(track.accuracy))
            ring = {"s": 150, "facecolors": "none", "edgecolors": "black", "linewidths": 1.4, "zorder": 4}
            axis.scatter(track.right[best], track.wrong[best], label="best accuracy", **ring)
            axis.scatter(1, 0, marker="*", s=140, color=INCORRECT, label="ideal", zorder=4, clip_on=False)
            axis.set(xlabel="mean confidence in right predictions", ylabel="mean confidence in wrong predictions")
            axis.set(xlim=(0, 1.02), ylim=(-0.02, 1), title=f"{kind} test data")
            rows += [
                {"attack": kind, "epoch": epoch, "right": right, "wrong": wrong, "accuracy": accuracy}
                for epoch, (right, wrong, accuracy) in enumerate(
                    zip(track.right.tolist(), track.wrong.tolist(), track.accuracy.tolist(), strict=True), 1
                )
            ]
        bar = figure.colorbar(dots, ax=axes[0].tolist(), ticks=[0, 1], fraction=0.04)
        bar.ax.set_yticklabels(["first\nepoch", "last\nepoch"], fontsize=8)
        legend(figure, axes.flat)
        drawings.append(Drawing(f"confidence_{file_part(source)}", figure, rows))
    if not drawings:
        raise NotDrawn("the runs given recorded no confidence (they are older, or zoo models)", TRAIN)
    return drawings


def memorisation(context: Context) -> list[Drawing]:
    """[SGLR] Figure 4: natural accuracy over the epochs, training (whole, untouched, corrupted portion) and test.

    A column for each method, a figure for each noise rate. The dashed horizontal line is the share of untouched labels:
    training accuracy above it is memorised noise.
    """
    drawings = []
    for group in grouped(context.sources):
        for rate in (rate for rate in group.rates if rate != "0"):
            lines = [line for line in group.lines if line.rate == rate]
            heading = f"Natural accuracy: {group.title}, noise rate {rate}"
            figure, axes = sheet(1, len(lines), heading)
            rows: list[dict[str, Any]] = []
            for axis, line in zip(axes[0], lines, strict=True):
                wrong = _wrong_share(line.sources[0], context)
                untouched = mean_of(line, "train_correct_natural_acc", 100)
                corrupted = mean_of(line, "train_incorrect_natural_acc", 100)
                whole = (1 - wrong) * untouched + wrong * corrupted
                curves = (
                    (whole, "training, whole", "black", "-"),
                    (untouched, "training, untouched portion", CORRECT, "-"),
                    (corrupted, "training, corrupted portion", INCORRECT, "--"),
                    (mean_of(line, "test_natural_acc", 100), "test", GREEN, "-."),
                )
                axis.axhline(
                    100 * (1 - wrong), color=GREY, linestyle=":", linewidth=1.2, label="share of untouched labels"
                )
                for number, (values, what, colour, dash) in enumerate(curves):
                    style = {"color": colour, "linestyle": dash, "marker": MARKERS[number], "markersize": 4}
                    every = max(1, len(values) // 8)
                    axis.plot(np.arange(1, len(values) + 1), values, label=what, markevery=every, **style)
                    rows += [
                        {"method": line.method, "curve": what, "epoch": epoch, "value": value}
                        for epoch, value in enumerate(values.tolist(), 1)
                    ]
                axis.set_title(line.method, parse_math=False)
                percent_axis(axis, "accuracy in %")
                epochs_axis(axis, group.epochs)
            legend(figure, axes.flat)
            drawings.append(Drawing(f"memorisation_{group.name}-{rate}", figure, rows))
    if not drawings:
        raise NotDrawn(
            "the runs given have no label noise",
            "rb-noisy sweep --data DATA --method pgd-at,pgd-at+sglr --noise uniform --noise-rate 0.4 --out RUNS",
        )
    return drawings


def _attacked(context: Context) -> list[Source]:
    sources = [source for source in context.sources if source.metrics and source.attacks]
    if not sources:
        raise NotDrawn("no run with metrics is given whose method attacks", TRAIN)
    return sources


def _wrong_share(source: Source, context: Context) -> float:
    """The share of wrong training labels, 0..1: the expected one where the noise says it, else counted in the data."""
    recipe = source.recipe
    if not source.noisy:
        return 0.0
    if recipe.noise in ("symmetric", "pair"):
        return recipe.noise_rate
    if recipe.noise == "uniform":
        return recipe.noise_rate * (1 - 1 / len(source.class_names))
    return training_set(recipe, context.data_root)[1].is_wrong.double().mean().item()


def _whole(line: dict[str, Any], measure: str, wrong: float) -> float | None:
    """A measure on all training data, by their given labels, from that on both kinds."""
    right, incorrect = line[f"train_correct_{measure}"], line[f"train_incorrect_{measure}"]
    return right if not wrong or incorrect is None else (1 - wrong) * right + wrong * incorrect


def _information(source: Source, context: Context) -> list[float | None]:
    if not all("train_correct_slope_squared" in line for line in source.metrics):
        return [None] * len(source.metrics)
    recipe, wrong = source.recipe, _wrong_share(source, context)
    size = recipe.train_size or len(training_set(recipe, context.data_root)[0].x_train)
    squares = (_whole(line, "slope_squared", wrong) for line in source.metrics)
    return [None if value is None else information_in_weights(value, size - recipe.validation) for value in squares]
