"""[NL]'s figures of κ sample by sample: densities, κ against loss, galleries, accuracy by κ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import logits_of
from rb_noisy.data import Dataset
from rb_noisy.figures.base import (
    CORRECT,
    INCORRECT,
    Context,
    Drawing,
    NotDrawn,
    Source,
    evenly,
    file_part,
    legend,
    percent_axis,
    same_scale,
    sheet,
    title,
    wrapped,
)
from rb_noisy.forward import ask, in_mode
from rb_noisy.geometry import kappa
from rb_noisy.measures import accuracy_by_kappa as by_kappa
from rb_noisy.runs import history_file
from rb_noisy.training_data import run_data

SAMPLES = 500  # of the training data, drawn by the seed
BANDWIDTH = 0.05  # of the densities, in units of the normalised range
KINDS = ((False, "correct labels", CORRECT), (True, "incorrect labels", INCORRECT))
GALLERY_CLASSES, GALLERY_EACH, GALLERY_JUDGED = 10, 2, 60
SUBSETS, SUBSET = 5, 2000
TRAIN = "rb-noisy train --data DATA --noise symmetric --noise-rate 0.2 --method pgd-at --out RUN"


def densities(context: Context) -> list[Drawing]:
    """[NL] Figures 7, 23, 24: densities of loss and κ of correct and incorrect training data at five epochs.

    Both are min-max normalised in each epoch. κ is that of the training attack, and the loss that of the training pass,
    on x̃ (the paper takes the loss of natural data at checkpoints); both are in every run folder's history.
    """
    drawings = []
    for source in context.sources:
        epochs = len(source.metrics)
        if not (source.noisy and source.attacks and epochs and history_file(source.run.path, epochs - 1).is_file()):
            continue
        context.progress(f"densities, {source.name}")
        history = source.run.history()
        labels = run_data(source.run, context.data_root, history.loss.shape[1])[1]
        chosen = evenly(range(epochs), 5)
        figure, axes = sheet(2, len(chosen), title(source), width=2.4, height=2.2)
        rows: list[dict[str, Any]] = []
        x = np.linspace(-0.25, 1.25, 151)
        for row, (name, values) in enumerate((("loss on x̃", history.loss), ("κ", history.kappa))):
            for axis, epoch in zip(axes[row], chosen, strict=True):
                seen = history.kappa[epoch] >= 0
                scaled = _min_max(values[epoch][seen].double().numpy())
                for wrong, text, colour in KINDS:
                    part = scaled[labels.is_wrong[seen].numpy() == wrong]
                    density = _density(part, x)
                    axis.plot(x, density, color=colour, linestyle="--" if wrong else "-", label=text)
                    axis.fill_between(x, density, color=colour, alpha=0.15, linewidth=0)
                    rows += [
                        {"epoch": epoch + 1, "measure": name, "labels": text, "x": at, "density": value}
                        for at, value in zip(x.tolist(), density.tolist(), strict=True)
                    ]
                axis.set(xlabel=f"normalised {name}", title=f"epoch {epoch + 1}" if not row else None)
            axes[row, 0].set_ylabel("density")
            same_scale(axes[row])
        legend(figure, axes.flat)
        drawings.append(Drawing(f"densities_{file_part(source)}", figure, rows))
    if not drawings:
        raise NotDrawn("no run folder is given with label noise, an attack, and its history/ of every sample", TRAIN)
    return drawings


def kappa_against_loss(context: Context) -> list[Drawing]:
    """[NL] Figures 6, 27, 28: κ against the natural loss of training data, final weights.

    The first figure takes the training attack; the second PGD-n with α = 2.5·ε/n for n = 8, 12, 16, 20 at ε (App. D.3),
    then n = 8 at ε, 1.5·ε, 2·ε, 2.5·ε (8, 12, 16, 20 of 255 in the paper).
    """
    drawings = []
    for source in _networks(context):
        model, recipe = source.load(), source.recipe
        sample = _sample(source, model, context)
        eps = recipe.eps
        settings = [("n", eps, n) for n in (8, 12, 16, 20)] + [("ε", factor * eps, 8) for factor in (1, 1.5, 2, 2.5)]
        single, (first,) = sheet(1, 1, title(source), width=5.0, height=3.6)
        several, axes = sheet(2, 4, title(source), width=2.9, height=2.6)
        rows: list[list[dict[str, Any]]] = [[], []]
        attacks = [(0, first[0], recipe.eps, recipe.alpha, recipe.steps)]
        attacks += [(1, axis, e, 2.5 * e / n, n) for axis, (_, e, n) in zip(axes.flat, settings, strict=True)]
        for which, axis, radius, alpha, steps in attacks:
            context.progress(f"κ against loss, {source.name}, ε {radius:.3g}, n {steps}")
            found = _kappa(model, sample.x, sample.y, source, context, eps=radius, alpha=alpha, steps=steps)
            _scatter(axis, sample, found, steps, context.seed)
            axis.set_title(f"n = {steps}, ε = {radius:.3g}, α = {alpha:.3g}")
            rows[which] += [
                {"steps": steps, "eps": radius, "alpha": alpha, **values, "kappa": value}
                for values, value in zip(sample.rows(), found.tolist(), strict=True)
            ]
        for number, (figure, own) in enumerate(((single, first), (several, axes.flat))):
            legend(figure, own)
            drawings.append(Drawing(f"kappa-against-loss{'-pgd' * number}_{file_part(source)}", figure, rows[number]))
    return drawings


def gallery(context: Context) -> list[Drawing]:
    """[NL] Figures 8, 25, 26: training images by given class and κ, from κ = 0 to κ = n (typical), final weights.

    Of each of up to 10 classes 60 images are judged and two of each range of κ shown; a mislabeled one has a frame and
    its true class.
    """
    drawings = []
    for source in _networks(context):
        context.progress(f"gallery, {source.name}")
        data, labels = source.trained_on(context.data_root)
        random = np.random.default_rng(context.seed)
        classes = range(min(GALLERY_CLASSES, data.num_classes))
        index = [random.permutation(np.flatnonzero(labels.given.numpy() == c))[:GALLERY_JUDGED] for c in classes]
        chosen = torch.from_numpy(np.concatenate(index))
        found = _kappa(source.load(), data.x_train[chosen], labels.given[chosen], source, context).numpy()
        drawings.append(_draw_gallery(source, data, labels, chosen.numpy(), found, list(classes)))
    return drawings


def _draw_gallery(
    source: Source, data: Dataset, labels: Any, index: np.ndarray, found: np.ndarray, classes: list[int]
) -> Drawing:
    from matplotlib.figure import Figure

    steps, names = source.recipe.steps, source.class_names
    middle = steps // 2
    bins = [("κ = 0", 0, 0), (f"κ 1–{middle}", 1, middle), (f"κ {middle + 1}–{steps - 1}", middle + 1, steps - 1)]
    bins = [b for b in [*bins, (f"κ = {steps}", steps, steps)] if b[1] <= b[2]]
    cell, left, head = 0.75, 1.1, 0.75
    width, height = left + (len(bins) * (GALLERY_EACH * cell + 0.15)), head + len(classes) * (cell + 0.12)
    figure = Figure(figsize=(width, height), facecolor="white")
    heading = f"{title(source)}: training images by given label and κ (framed: mislabeled, true class)"
    figure.text(0.5, 1 - 0.08 / height, wrapped(heading, int(width * 12)), ha="center", va="top", fontsize=9.5)
    rows = []
    for column, (text, low, high) in enumerate(bins):
        at = left + column * (GALLERY_EACH * cell + 0.15)
        figure.text((at + GALLERY_EACH * cell / 2) / width, 1 - (head - 0.1) / height, text, ha="center", fontsize=9)
        for row, label in enumerate(classes):
            top = height - head - row * (cell + 0.12)
            if not column:
                figure.text((left - 0.1) / width, (top - cell / 2) / height, names[label], ha="right", fontsize=9)
            own = index[(labels.given.numpy()[index] == label) & (found >= low) & (found <= high)]
            if not len(own):
                figure.text(
                    (at + GALLERY_EACH * cell / 2) / width,
                    (top - cell / 2) / height,
                    "none",
                    ha="center",
                    fontsize=8,
                    color="#777777",
                )
            for place, sample in enumerate(own[:GALLERY_EACH].tolist()):
                true, wrong = int(labels.true[sample]), bool(labels.is_wrong[sample])
                box = ((at + place * cell + 0.03) / width, (top - cell) / height, (cell - 0.06) / width, cell / height)
                axis = figure.add_axes(box, xticks=[], yticks=[])
                image = data.x_train[sample]
                pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
                axis.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                for spine in axis.spines.values():
                    spine.set(color=INCORRECT if wrong else "#BBBBBB", linewidth=2.2 if wrong else 0.5)
                if wrong:
                    plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                    axis.text(
                        0.96,
                        0.05,
                        names[true],
                        transform=axis.transAxes,
                        ha="right",
                        va="bottom",
                        fontsize=7,
                        color=INCORRECT,
                        bbox=plate,
                    )
                kappa_ = int(found[index == sample][0])
                number = int(data.train_numbers[sample])
                rows.append(
                    {"index": number, "given": names[label], "true": names[true], "kappa": kappa_, "range": text}
                )
    return Drawing(f"gallery_{file_part(source)}", figure, rows)


def accuracy_by_kappa(context: Context) -> list[Drawing]:
    """[NL] Figure 10: accuracy and number of right and wrong predictions on unlabelled test data by κ, final weights.

    κ is against the predicted label. Mean and standard deviation over five random subsets of 2,000 test images (half of
    them where there are fewer than 4,000); the counts are of the first.
    """
    drawings = []
    for source in _networks(context):
        context.progress(f"accuracy by κ, {source.name}")
        data = source.trained_on(context.data_root)[0]
        random, steps = np.random.default_rng(context.seed), source.recipe.steps
        size = min(SUBSET, max(1, len(data.x_test) // 2))
        subsets = [torch.from_numpy(random.permutation(len(data.x_test))[:size]) for _ in range(SUBSETS)]
        used = torch.cat(subsets).unique()
        model = source.load()
        found, right = (torch.zeros(len(data.x_test), dtype=torch.int64) for _ in range(2))
        prediction = ask(model, data.x_test[used]).logits.argmax(1)
        right[used] = (prediction == data.y_test[used]).long()
        found[used] = _kappa(model, data.x_test[used], prediction, source, context)
        parts = [by_kappa(found[subset], right[subset].bool(), steps) for subset in subsets]
        table = np.array([_numbers(part.accuracy) for part in parts])
        seen = ~np.isnan(table).all(0)
        mean, deviation = (f(table[:, seen], axis=0) for f in (np.nanmean, np.nanstd))
        kappas = np.arange(steps + 1)
        figure, axes = sheet(1, 2, title(source), 4.6, 3.2)
        first, second = axes[0]
        # An accuracy ends at 0 and 100%, so its error bar does too.
        bars = np.stack([np.minimum(deviation, mean), np.minimum(deviation, 1 - mean)]) * 100
        label = f"mean ± standard deviation of {SUBSETS} subsets"
        first.errorbar(kappas[seen], 100 * mean, bars, color="black", marker="o", markersize=4, capsize=3, label=label)
        percent_axis(first, "accuracy in %")
        count = np.array(_numbers(parts[0].count))
        ok = np.array(_numbers(parts[0].right))
        second.bar(kappas - 0.2, ok, 0.4, color=CORRECT, label="right")
        second.bar(kappas + 0.2, count - ok, 0.4, color=INCORRECT, hatch="///", edgecolor="white", label="wrong")
        second.set_yscale("symlog", linthresh=1)
        second.yaxis.set_major_formatter("{x:g}")
        second.set(ylabel="test images (logarithmic)", ylim=(0, None))
        for axis in axes[0]:
            axis.set(xlabel=f"κ (PGD-{steps}, against the prediction)", xlim=(-0.7, steps + 0.7))
        legend(figure, axes[0])
        over = dict(zip(kappas[seen].tolist(), zip(mean.tolist(), deviation.tolist(), strict=True), strict=True))
        names = ("kappa", "accuracy_mean", "accuracy_std", "right", "wrong")
        rows = [
            dict(zip(names, (k, *over.get(k, (None, None)), int(ok[k]), int(count[k] - ok[k])), strict=True))
            for k in kappas.tolist()
        ]
        drawings.append(Drawing(f"accuracy-by-kappa_{file_part(source)}", figure, rows))
    return drawings


@dataclass(frozen=True)
class _Sample:
    """Training samples: index in the whole data set, image, given label, whether it is wrong, natural loss."""

    index: Tensor
    x: Tensor
    y: Tensor
    wrong: Tensor
    loss: Tensor

    def rows(self) -> list[dict[str, Any]]:
        columns = (self.index.tolist(), self.wrong.int().tolist(), self.loss.tolist())
        return [dict(zip(("index", "mislabeled", "loss"), row, strict=True)) for row in zip(*columns, strict=True)]


def _sample(source: Source, model: nn.Module, context: Context) -> _Sample:
    data, labels = source.trained_on(context.data_root)
    drawn = torch.Generator().manual_seed(context.seed)
    index = torch.randperm(len(data.x_train), generator=drawn)[:SAMPLES].sort().values
    x, y = data.x_train[index], labels.given[index]
    with in_mode(model, "eval"):
        loss = torch.cat(
            [
                F.cross_entropy(logits_of(model, xb).float(), yb, reduction="none")
                for xb, yb in zip(x.split(500), y.split(500), strict=True)
            ]
        )
    return _Sample(data.train_numbers[index], x, y, labels.is_wrong[index], loss)


def _kappa(model: nn.Module, x: Tensor, y: Tensor, source: Source, context: Context, **changes: Any) -> Tensor:
    """κ by the run's own training attack, but for the changes."""
    recipe = source.recipe
    attack = {"eps": recipe.eps, "alpha": recipe.alpha, "steps": recipe.steps, "norm": recipe.norm} | changes
    return kappa(model, x, y, seed=context.seed, **attack)


def _networks(context: Context) -> list[Source]:
    sources = [source for source in context.sources if source.load is not None and source.attacks]
    if not sources:
        raise NotDrawn("no run or model with weights is given whose method attacks", TRAIN)
    return sources


def _scatter(axis: Any, sample: _Sample, found: Tensor, steps: int, seed: int) -> None:
    from matplotlib.ticker import MaxNLocator

    # κ is whole: without a little spread many points would be one.
    spread = np.random.default_rng(seed).uniform(-0.3, 0.3, len(found))
    for wrong, text, colour in KINDS:
        own = (sample.wrong == wrong).numpy()
        if own.any():
            marker = {"marker": "x" if wrong else "o", "s": 14 if wrong else 10, "alpha": 0.6, "linewidths": 0.9}
            axis.scatter(sample.loss.numpy()[own], (found.numpy() + spread)[own], color=colour, label=text, **marker)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set(xlabel="natural loss", ylabel="κ", ylim=(-0.06 * steps - 0.3, 1.06 * steps + 0.3))


def _min_max(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _density(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gaussian kernel density (n,) → (len(x),); zero for no value."""
    if not len(values):
        return np.zeros_like(x)
    # Few distinct values of many samples (κ) make this cheap.
    distinct, weight = np.unique(np.round(values, 3), return_counts=True)
    kernel = np.exp(-0.5 * ((x[:, None] - distinct) / BANDWIDTH) ** 2) / (BANDWIDTH * np.sqrt(2 * np.pi))
    return kernel @ weight / len(values)


def _numbers(values: Any) -> list[float]:
    return [np.nan if value is None else float(value) for value in values]
