"""[NL] Figure 9: accuracy of the labels that four annotators assign, against the share of the images under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rb_noisy.annotation import Answers, accuracy_by_share
from rb_noisy.attacks import pgd
from rb_noisy.calibration import BLUE, ORANGE, VERMILLION
from rb_noisy.data import load_data
from rb_noisy.figures.base import Context, Drawing, NotDrawn, Source, data_title, noise_title
from rb_noisy.subsets import subset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, colour, line and marker: [NL]'s colours from a palette that everybody can tell apart (Okabe & Ito 2008).
ANNOTATORS = {
    "standard": ("standard, clean labels", BLUE, "-", "o"),
    "oracle": ("PGD-based, clean labels (oracle)", "black", "--", "s"),
    "noisy": ("PGD-based, noisy labels", ORANGE, "-", "^"),
    "robust": ("robust annotator, noisy labels", VERMILLION, "-", "D"),
}
STEPS = 20  # with α = ε/4 [NL App. E.1]
SHARES = np.arange(11) / 10
SAMPLES, BATCH, DRAWS = 2000, 250, 10


def annotators(context: Context) -> list[Drawing]:
    """[NL] Figure 9, one for each kind of label noise that the robust annotator or a PGD-based one was trained with.

    2000 test images at most (the first, of one's own data drawn by class), each annotator attacked with its own
    gradients (PGD-20, α = ε/4, random start); mean over 10 random choices of the attacked images, and over runs that
    differ in their seed.
    """
    clean: dict[tuple, dict[str, list[Source]]] = {}
    noisy: dict[tuple, dict[str, list[Source]]] = {}
    for source in context.sources:
        role, recipe = _role(source), source.recipe
        if role is not None:
            where = clean if role in ("standard", "oracle") else noisy
            data = (recipe.data, recipe.train_size, recipe.train_images, str(recipe.backbone))
            key = (*data, recipe.noise, recipe.noise_rate) if source.noisy else data
            where.setdefault(key, {}).setdefault(role, []).append(source)
    drawings = []
    for key, found in noisy.items():
        roles = clean.get(key[:4], {}) | found
        if len(roles) == len(ANNOTATORS):
            drawings.append(_drawing({role: roles[role] for role in ANNOTATORS}, context))
    if not drawings:
        raise NotDrawn(
            "it compares st and pgd-at trained on clean labels with pgd-at and pgd-at+annotator trained on noisy ones, "
            "each with its weights",
            "rb-noisy sweep --grid nl-annotator --data DATA --out RUNS",
        )
    return drawings


def _role(source: Source) -> str | None:
    recipe = source.recipe
    if source.load is None:
        return None
    if source.noisy:
        return {"pgd-at": "noisy", "pgd-at+annotator": "robust"}.get(recipe.method)
    return {"st": "standard", "pgd-at": "oracle"}.get(recipe.method)


def _drawing(roles: Mapping[str, Sequence[Source]], context: Context) -> Drawing:
    recipe = roles["robust"][0].recipe
    data = load_data(recipe.data, context.data_root)
    for source in (source for sources in roles.values() for source in sources):
        source.check_classes(data)
    part = subset(recipe.data, data.y_test, min(SAMPLES, len(data.y_test)), context.seed)
    x, y = data.x_test[part.index], data.y_test[part.index]
    draw = np.random.default_rng(context.seed)
    orders = [draw.permutation(len(x)) for _ in range(DRAWS)]
    lines = {}
    for role, sources in roles.items():
        answers = []
        for source in sources:
            context.progress(f"annotators, {source.name}")
            answers.append(_answers(source.load(), x, y, recipe, context.seed))
        lines[role] = accuracy_by_share(answers, SHARES.tolist(), orders)
    heading = f"{data_title(recipe)}, {noise_title(recipe)}, {recipe.backbone}; test set, {part.words}, PGD-{STEPS}"
    rows = [
        {"annotator": role, "runs": len(roles[role]), "share": point["share"], "accuracy": point["accuracy"]}
        | dict(zip(("low", "high"), point["interval"], strict=True))
        for role, points in lines.items()
        for point in points
    ]
    name = f"annotators-{data_title(recipe)}-{noise_title(recipe).replace('%', '').replace(' ', '-')}"
    return Drawing(name, shares_figure(lines, heading), rows)


def _answers(model: Any, x: torch.Tensor, y: torch.Tensor, recipe: Any, seed: int) -> Answers:
    right: dict[str, list[torch.Tensor]] = {"natural-right": [], "attacked-right": []}
    ball = {"eps": recipe.eps, "alpha": recipe.eps / 4, "steps": STEPS, "norm": recipe.norm}
    generator = torch.Generator().manual_seed(seed)
    for xb, yb in zip(x.split(BATCH), y.split(BATCH), strict=True):
        attack = pgd(model, xb, yb, generator=generator, evaluate_final=True, **ball)
        right["natural-right"].append(attack.natural.argmax(1) == yb)
        right["attacked-right"].append(attack.final_correct)
    return {name: torch.cat(parts).numpy() for name, parts in right.items()}


def shares_figure(lines: Mapping[str, Sequence[Mapping[str, Any]]], heading: str) -> Figure:
    """What `accuracy_by_share` gives of each annotator; beside it, where there is a standard one, the others larger."""
    from matplotlib.figure import Figure

    zoom = [role for role in lines if role != "standard"]
    panels = [list(lines)] + ([zoom] if 0 < len(zoom) < len(lines) else [])
    figure = Figure(figsize=(5.5 * len(panels), 5), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(f"Accuracy of the labels assigned (band: 95% interval)\n{heading}", fontsize=11, parse_math=False)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, roles in zip(axes, panels, strict=True):
        for role in roles:
            name, colour, line, marker = ANNOTATORS[role]
            shares, right = [p["share"] for p in lines[role]], [100 * p["accuracy"] for p in lines[role]]
            low, high = zip(*([100 * end for end in p["interval"]] for p in lines[role]), strict=True)
            axis.plot(shares, right, color=colour, linestyle=line, marker=marker, markersize=5, label=name)
            axis.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(xlabel="share of the unlabelled images under attack", ylabel="label accuracy (%)")
    axes[0].set(ylim=(-3, 103), title="all annotators")
    if len(panels) > 1:
        right = [100 * point["accuracy"] for role in zoom for point in lines[role]]
        # Fitted to the lines: an interval over two or three models can fill the panel.
        axes[1].set(ylim=(min(right) - 6, max(right) + 3), title="without the standard annotator")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
