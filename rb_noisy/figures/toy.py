"""The two-dimensional toy of [NL]: what adversarial training does to small clusters around wrong labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import pgd
from rb_noisy.figures.base import CORRECT, INCORRECT, Context, Drawing, legend, sheet

EPS, ALPHA, ITERATIONS, WIDTH = 0.08, 0.02, 1000, 100
POINTS, APART, MARGIN, DEEP = 23, 0.1, 0.06, 0.13
GRID = 61


def toy(context: Context) -> list[Drawing]:
    """[NL] Figures 1, 11: standard training and PGD-1..4 on 23 points of (0, 1)², two of them mislabeled.

    ε = 0.08, α = 0.02, an MLP of 5 linear layers and 4 ReLU, Adam at 1e-3 for 1000 iterations, as in App. B. Where the
    points lie and how wide the layers are (100) the paper does not print: here the true classes are the two sides of a
    diagonal, the points are drawn by the seed, and of each class the most central of those away from the diagonal is
    mislabeled.
    """
    x, y, wrong = points(context.seed)
    heading = "Two-dimensional toy, 2 of 23 labels wrong, MLP: confidence under standard and adversarial training"
    figure, axes = sheet(1, 5, heading, width=3.0, height=2.9)
    rows = [
        {"panel": "points", "a": a, "b": b, "label": label, "mislabeled": int(bad), "probability": None}
        for (a, b), label, bad in zip(x.tolist(), y.tolist(), wrong.tolist(), strict=True)
    ]
    ticks = torch.linspace(0, 1, GRID)
    grid = torch.cartesian_prod(ticks, ticks)
    for steps, axis in enumerate(axes[0]):
        panel = f"AT (PGD-{steps})" if steps else "ST"
        context.progress(f"toy, {panel}")
        model = train_toy(x, y, steps, context.seed)
        with torch.no_grad():
            probability = model(grid[..., None, None]).softmax(1)[:, 1].view(GRID, GRID)
        place = {"origin": "lower", "extent": (0, 1, 0, 1), "interpolation": "bilinear"}
        shading = axis.imshow(probability.T.numpy(), cmap="PuOr", vmin=-0.3, vmax=1.3, **place)
        axis.grid(False)
        axis.set(title=panel, xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
        _draw_points(axis, x, y, wrong, boxes=steps > 0)
        rows += [
            {"panel": panel, "a": a, "b": b, "label": None, "mislabeled": None, "probability": p}
            for (a, b), p in zip(grid.tolist(), probability.flatten().tolist(), strict=True)
        ]
    bar = figure.colorbar(shading, ax=axes[0].tolist(), label="probability of class 1", fraction=0.02)
    bar.ax.set_ylim(0, 1)
    legend(figure, axes[0])
    return [Drawing("toy", figure, rows)]


def points(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """23 points (N, 2) in (0, 1)², their given labels (N,) and which two are wrong (N,)."""
    random = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    while len(chosen) < POINTS:
        point = random.uniform(EPS, 1 - EPS, 2)
        if abs(point.sum() - 1) / 2 < MARGIN or any(np.abs(point - other).max() < APART for other in chosen):
            continue
        chosen.append(point)
    x = np.array(chosen)
    true = (x.sum(1) > 1).astype(np.int64)
    wrong = np.zeros(POINTS, bool)
    for label in (0, 1):
        own = np.flatnonzero(true == label)
        inner = own[np.abs(x[own].sum(1) - 1) / 2 > DEEP]
        wrong[inner[np.abs(x[inner] - x[own].mean(0)).max(1).argmin()]] = True
    given = np.where(wrong, 1 - true, true)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(given), torch.tensor(wrong)


def train_toy(x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """The MLP trained on points (N, 2) with labels (N,) by PGD with so many steps; by standard training for none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(2, WIDTH), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, starts = x[..., None, None], torch.Generator().manual_seed(seed)
    for _ in range(ITERATIONS):
        inputs = images
        if steps:
            attack = {"eps": EPS, "alpha": ALPHA, "steps": steps, "random_start": False, "generator": starts}
            attack |= {"check": False}  # for the thousandth time
            inputs = pgd(model, images, y, **attack).x_adv
        loss = F.cross_entropy(model(inputs), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _draw_points(axis: Any, x: Tensor, y: Tensor, wrong: Tensor, boxes: bool) -> None:
    from matplotlib.patches import Rectangle

    for bad, marker, colour, kind in ((False, "o", CORRECT, "correct"), (True, "s", INCORRECT, "mislabeled")):
        for label, fill in ((0, "white"), (1, "black")):
            chosen = x[(wrong == bad) & (y == label)]
            style = {"s": 46 if bad else 26, "marker": marker, "edgecolors": colour, "linewidths": 1.6, "zorder": 3}
            axis.scatter(*chosen.T.numpy(), color=fill, label=f"{kind}, given class {label}", **style)
    for corner, bad in zip((x - EPS).tolist(), wrong.tolist(), strict=True) if boxes else ():
        colour = INCORRECT if bad else CORRECT
        axis.add_patch(Rectangle(corner, 2 * EPS, 2 * EPS, fill=False, edgecolor=colour, linewidth=0.7))
