"""Figures of finished networks side by side: loss landscapes [NL 17], penultimate features [SGLR 5]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rb_noisy.analysis import filter_normalised_direction, loss_landscape, penultimate_features
from rb_noisy.figures.base import COLOURS, Context, Drawing, NotDrawn, Source, data_title, legend, noise_title
from rb_noisy.figures.base import sheet as new_sheet
from rb_noisy.figures.groups import order, rate_order
from rb_noisy.training_data import training_set

SAMPLES = 500
STEPS = torch.linspace(-1, 1, 15)
MOST = 6
CLASSES = 10


def loss_landscapes(context: Context) -> list[Drawing]:
    """[NL] Figure 17: natural training loss (given labels) in two filter-normalised random directions of weight space.

    Networks trained on the same labels stand side by side on one scale of colour: 15 × 15 points on 500 training
    images, one pair of random directions each, final weights. A flatter landscape is the smoother network.
    """
    groups: dict[tuple, list[Source]] = {}
    for source in _with_weights(context):
        r = source.recipe
        key = (r.data, r.train_size, r.train_images, r.noise, r.noise_rate, r.noise_seed)
        groups.setdefault(key, []).append(source)
    drawings: list[Drawing] = []
    for sources in groups.values():
        sources = sorted(sources, key=lambda s: (order(s.recipe.method), s.name))
        for at in range(0, len(sources), MOST):
            drawings.append(_landscapes(sources[at : at + MOST], context, at // MOST))
    return drawings


def _landscapes(sources: list[Source], context: Context, part: int) -> Drawing:
    from matplotlib.colors import LogNorm

    recipe = sources[0].recipe
    for source in sources:
        data, labels = source.trained_on(context.data_root)  # the same of all
    index = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(context.seed))[:SAMPLES]
    found = []
    for source in sources:
        context.progress(f"loss landscape, {source.name}")
        model, drawn = source.load(), torch.Generator().manual_seed(context.seed)
        directions = [filter_normalised_direction(model, drawn) for _ in range(2)]
        found.append(
            loss_landscape(model, data.x_train[index], labels.given[index], directions=directions, steps=STEPS)
        )
    whole = torch.stack(found).clamp_min(1e-3)
    networks = list(dict.fromkeys(str(source.recipe.backbone) for source in sources))
    title = f"Training loss around the final weights: {data_title(recipe)}, {noise_title(recipe)}, "
    title += " and ".join(networks)
    figure, axes = new_sheet(1, len(sources), title, width=3.3, height=2.9)
    scale = {"norm": LogNorm(whole.min().item(), whole.max().item()), "cmap": "cividis"}
    levels = np.geomspace(whole.min().item(), whole.max().item() * 1.0001, 16)
    rows: list[dict[str, Any]] = []
    for axis, source, values in zip(axes[0], sources, whole, strict=True):
        surface = STEPS.numpy(), STEPS.numpy(), values.T.numpy()
        shading = axis.contourf(*surface, levels=levels, **scale)
        axis.contour(*surface, levels=levels, colors="white", linewidths=0.4)
        axis.plot(0, 0, marker="*", markersize=11, color="#D55E00", linestyle="none", label="the network")
        axis.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        own = f"{source.recipe.method}, {source.recipe.backbone}" if len(networks) > 1 else source.recipe.method
        axis.set_title(own, parse_math=False)
        rows += [
            {"run": source.name, "a": a, "b": b, "loss": values[i, j].item()}
            for i, a in enumerate(STEPS.tolist())
            for j, b in enumerate(STEPS.tolist())
        ]
    bar = figure.colorbar(shading, ax=axes[0].tolist(), label="mean cross entropy", format="%.3g", fraction=0.04)
    bar.set_ticks(levels[::3])
    bar.ax.minorticks_off()
    legend(figure, axes[0])
    name = f"{data_title(recipe)}-{noise_title(recipe).replace('%', '').replace(' ', '-')}"
    return Drawing(f"loss-landscape_{name}{f'-{part + 1}' if part else ''}", figure, rows)


def features(context: Context) -> list[Drawing]:
    """[SGLR] Figure 5: penultimate features of test data in two dimensions, a row per method, a column per noise rate.

    t-SNE of 500 test images of the first 10 classes, final weights (of several runs of one method and noise rate, the
    first); UMAP too where `umap-learn` is installed. Distances
    between clusters mean little in either.
    """
    groups: dict[tuple, dict[tuple[str, str], Source]] = {}
    for source in _with_weights(context):
        kind = source.recipe.noise if source.noisy else "none"
        data = source.recipe.data, source.recipe.train_size, source.recipe.train_images
        groups.setdefault((data, kind), {}).setdefault((source.recipe.method, source.rate), source)
    drawings = []
    for (data, kind), own in groups.items():
        if kind == "none" and any(other == data and noise != "none" for other, noise in groups):
            continue  # clean networks stand beside the noisy ones, as rate 0
        networks = groups.get((data, "none"), {}) | own
        for name, embed in _embeddings(context.seed).items():
            drawings.append(_draw_features(networks, kind, name, embed, context))
    return drawings


def _draw_features(
    networks: dict[tuple[str, str], Source], kind: str, name: str, embed: Callable, context: Context
) -> Drawing:
    recipe = next(iter(networks.values())).recipe
    data = training_set(recipe, context.data_root)[0]
    for source in networks.values():
        source.check_classes(data)
    drawn = torch.randperm(len(data.x_test), generator=torch.Generator().manual_seed(context.seed))
    index = drawn[data.y_test[drawn] < CLASSES][:SAMPLES]
    x, y = data.x_test[index], data.y_test[index].numpy()
    methods = sorted({method for method, _ in networks}, key=order)
    rates = sorted({rate for _, rate in networks}, key=rate_order)
    noise = "clean labels" if kind == "none" else f"{kind} noise"
    backbones = " and ".join(dict.fromkeys(str(s.recipe.backbone) for s in networks.values()))
    heading = f"Penultimate features of test data, {name}: {data_title(recipe)}, {noise}, {backbones}"
    figure, axes = new_sheet(len(methods), len(rates), heading, width=2.7, height=2.5)
    rows: list[dict[str, Any]] = []
    for i, method in enumerate(methods):
        for j, rate in enumerate(rates):
            axis, source = axes[i, j], networks.get((method, rate))
            if source is None:
                axis.remove()
                continue
            context.progress(f"features, {source.name}")
            places = embed(penultimate_features(source.load(), x).double().numpy())
            for label in range(min(CLASSES, data.num_classes)):
                own = places[y == label]
                style = {"color": COLOURS[label % 5], "marker": "o^"[label // 5], "s": 9, "linewidths": 0}
                axis.scatter(*own.T, label=data.class_names[label], **style)
            axis.grid(False)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{method}, noise rate {rate}", parse_math=False)
            rows += [
                {"method": method, "noise_rate": rate, "class": data.class_names[label], "a": a, "b": b}
                for label, (a, b) in zip(y.tolist(), places.tolist(), strict=True)
            ]
    legend(figure, figure.axes, markerscale=2)
    return Drawing(f"features-{name}_{data_title(recipe)}-{kind}".lower(), figure, rows)


def _embeddings(seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    from sklearn.manifold import TSNE

    def tsne(values: np.ndarray) -> np.ndarray:
        perplexity = min(30.0, (len(values) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)

    try:
        from umap import UMAP
    except ImportError:
        return {"t-SNE": tsne}
    return {"t-SNE": tsne, "UMAP": lambda values: UMAP(random_state=seed).fit_transform(values)}


def _with_weights(context: Context) -> list[Source]:
    sources = [source for source in context.sources if source.load is not None]
    if not sources:
        raise NotDrawn(
            "no run or model with weights is given",
            "rb-noisy sweep --data DATA --method st,pgd-at,pgd-at+sglr --noise symmetric --noise-rate 0,0.2,0.4,0.6 "
            "--out RUNS",
        )
    return sources
