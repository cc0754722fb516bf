"""`python -m eval.calibration --model … --target right`: is this prediction right, and where does κ help to tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import common
from eval.confidence_splits import (
    CHANCE,
    METRICS,
    Shown,
    cell,
    check,
    halves,
    interval,
    measured,
    metrics,
    number,
    show,
)
from rb_noisy import measures
from rb_noisy.attacks import pgd
from rb_noisy.calibration import BLUE, GREEN, GREY, ORANGE, VERMILLION, fit_temperature
from rb_noisy.calibrators import SOFTMAX, Observed, fit_calibrator
from rb_noisy.files import atomic_path, write_json
from rb_noisy.geometry import kappa, to_target

INPUTS = {
    "natural": "natural",
    "pgd-20": "PGD-20",
    "margin": "targeted margin",
    "pgd-20-half": "PGD-20, 0.5ε",
    "pgd-20-more": "PGD-20, 1.5ε",
}
FITTED_ON = {"same": "the same kind of input", "natural": "natural inputs", "mixed": "natural and PGD-20 inputs"}
# Text, method and features of what `fit_calibrator` fits.
CALIBRATORS = {
    "isotonic_max_softmax": ("isotonic on max-softmax", "isotonic", ("max_softmax",)),
    "isotonic_kappa": ("isotonic on κ", "isotonic", ("kappa",)),
    "beta_max_softmax": ("beta on max-softmax", "beta", ("max_softmax",)),
    "beta_kappa": ("beta on κ", "beta", ("kappa",)),
    "logistic": ("logistic on softmax, margin, entropy", "logistic", SOFTMAX),
    "logistic_kappa": ("the same and κ", "logistic", (*SOFTMAX, "kappa")),
}
PLAIN = {"isotonic_kappa": "isotonic_max_softmax", "beta_kappa": "beta_max_softmax", "logistic_kappa": "logistic"}
TEXTS = {"uncalibrated": "softmax as it is", "temperature": "temperature scaling"}
TEXTS |= {name: text for name, (text, _, _) in CALIBRATORS.items()}
STEPS, FACTORS = (5, 10, 20), (0.5, 1.0, 2.0)
MAIN = "10×1"
# Settings of κ by name; all of them are only taken where `GRID` compares them.
KAPPAS = {f"{steps}×{factor:g}": (steps, factor) for steps in STEPS for factor in FACTORS}
GRID = [f"{name}@{at}" for at in KAPPAS for name in ("isotonic_kappa", "logistic_kappa") if at != MAIN]
# What the tables show whole.
RESULTS = ("natural", "pgd-20")
Case = tuple[str, str]  # kind of input, what the calibrators were fitted on
Tensors = dict[str, Tensor]


def targeted_margin(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """z_t − z_y, t the likeliest wrong class of the natural image, for `pgd` to raise."""
    return to_target(natural.scatter(1, y[:, None], -torch.inf).argmax(1), logits, natural, y)


def measure(subject: common.Subject, *, seed: int, batch_size: int, out: Path) -> Tensors:
    """All that needs the model, per sample, from the file of an earlier run where there is one.

    For every kind of input its logits and κ, `KIND.logits` (N, K) and `KIND.kappa@STEPS×FACTOR` (N,).
    """

    def attack(x: Tensor, y: Tensor, factor: float, **options: Any) -> Tensor:
        eps = factor * subject.eps
        return pgd(subject.fast, x, y, eps=eps, alpha=eps / 4, steps=20, norm=subject.norm, **options).x_adv

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> Tensors:
        given = {
            "natural": x,
            "pgd-20": attack(x, y, 1.0, seed=batch_seed),
            "margin": attack(x, y, 1.0, seed=batch_seed, loss=targeted_margin),
            "pgd-20-half": attack(x, y, 0.5, seed=batch_seed),
            "pgd-20-more": attack(x, y, 1.5, seed=batch_seed),
        }
        found = {}
        for kind, images in given.items():
            with torch.no_grad():
                found[f"{kind}.logits"] = subject.fast(images)
            for name in KAPPAS if kind in ("natural", "pgd-20") else [MAIN]:
                steps, factor = KAPPAS[name]
                eps = factor * subject.eps
                ball = {"eps": eps, "alpha": 2.5 * eps / steps, "steps": steps, "norm": subject.norm}
                values = kappa(subject.fast, images, random_start=False, batch_size=batch_size, **ball)
                found[f"{kind}.kappa@{name}"] = values
        return found

    settings = {"seed": seed, "kappas": KAPPAS}
    return measured(subject, "confidence-right", settings, batch_size, out, compute)


def study(y: Tensor, arrays: Tensors, *, splits: int, seed: int) -> dict[str, Any]:
    """Fit every calibrator on half the images and test it on the other half, `splits` times.

    `arrays` as `measure` returns them. Returns {kind of input: {fitted on: {calibrator: row}}}, a row being {metric:
    {mean, interval, difference, difference_interval}} with the difference from temperature scaling in the same split,
    and "reliability" of the confidences of all splits; a calibrator with κ has `kappa_adds` and `kappa_adds_interval`
    too, the difference from the same without κ. None: no split had both outcomes to fit on.
    """
    right = {kind: arrays[f"{kind}.logits"].argmax(1) == y for kind in INPUTS}
    cases: list[Case] = [(kind, on) for kind in INPUTS for on in FITTED_ON if (kind, on) != ("natural",) * 2]
    values: dict[Case, dict[str, list]] = {case: {} for case in cases}
    for fit, test in halves(len(y), splits, seed):
        fits: dict[tuple, Any] = {}
        for (kind, on), rows in values.items():
            sources = {"same": (kind,), "natural": ("natural",), "mixed": ("natural", "pgd-20")}[on]
            for name in [*TEXTS, *(GRID if on == "same" and kind in ("natural", "pgd-20") else [])]:
                key = (sources, name)
                if key not in fits:
                    fits[key] = _fit(name, y, arrays, right, sources, fit)
                confidence = fits[key](kind, test) if fits[key] else None
                rows.setdefault(name, []).append((confidence, right[kind][test]))
    result: dict[str, Any] = {}
    for (kind, on), rows in values.items():
        result.setdefault(kind, {})[on] = _summaries(rows)
    return result


def _fit(
    name: str, y: Tensor, arrays: Tensors, right: Tensors, sources: tuple[str, ...], fit: np.ndarray
) -> Callable[[str, np.ndarray], Tensor] | None:
    """(kind of input, samples) → confidence, fitted on the `fit` samples of the sources; None if one outcome lacks."""

    def joined(what: Tensors, form: str) -> Tensor:
        return torch.cat([what[form.format(kind)][fit] for kind in sources])

    logits, outcome = joined(arrays, "{}.logits"), joined(right, "{}")
    if name in ("uncalibrated", "temperature"):
        t = 1.0 if name == "uncalibrated" else fit_temperature(logits, torch.cat([y[fit]] * len(sources)))
        return lambda kind, test: (arrays[f"{kind}.logits"][test].double() / t).softmax(1).amax(1)
    if len(outcome.unique()) < 2:
        return None
    name, _, setting = name.partition("@")
    column, steps = f"kappa@{setting or MAIN}", KAPPAS[setting or MAIN][0]
    _, method, features = CALIBRATORS[name]
    calibrator = fit_calibrator(
        Observed(logits, joined(arrays, "{}." + column)), outcome, features=features, method=method, kappa_steps=steps
    )
    return lambda kind, test: calibrator(Observed(arrays[f"{kind}.logits"][test], arrays[f"{kind}.{column}"][test]))


def _summaries(rows: dict[str, list]) -> dict[str, Any]:
    """The rows of `study` from the confidences and outcomes of each split."""
    scores = {
        name: np.array([metrics(*pair, seed) for seed, pair in enumerate(tested)]) for name, tested in rows.items()
    }
    summaries: dict[str, Any] = {}
    for name, tested in rows.items():
        without = PLAIN.get(name.partition("@")[0])
        known = [pair for pair in tested if pair[0] is not None]
        row: dict[str, Any] = {}
        for place, metric in enumerate(METRICS | CHANCE):
            row[metric] = interval(scores[name][:, place], "mean", "interval")
            pairs = {"difference": "temperature"} | ({"kappa_adds": without} if without else {})
            for what, other in pairs.items():
                difference = scores[name][:, place] - scores[other][:, place]
                row[metric] |= interval(difference, what, f"{what}_interval")
        row["splits"] = len(known)
        diagram = measures.reliability(*map(torch.cat, zip(*known, strict=True))) if known else None
        # None for the mean of an empty bin: JSON has no nan.
        row["reliability"] = diagram and {
            k: [None if v != v else v for v in t.tolist()] for k, t in vars(diagram).items()
        }
        summaries[name] = row
    return summaries


def tables(figures: dict[str, Any]) -> Shown:
    """The study as tables of text."""
    result = figures["study"]
    body = [[INPUTS[kind], common.percent(rate)] for kind, rate in figures["inputs"].items()]
    shown = [("what is right", ["inputs", "right (95% interval)"], body)]
    for kind in RESULTS:
        rows = result[kind]["same"]
        title = f"{INPUTS[kind]} inputs, fitted on {FITTED_ON['same']}"
        for figure, names, text, columns in (
            ("mean", TEXTS, "", METRICS | CHANCE),
            ("difference", CALIBRATORS, "less temperature scaling, ", METRICS),
            ("kappa_adds", PLAIN, "with κ less without κ, ", METRICS),
        ):
            body = [[TEXTS[name], *(cell(rows[name][m], figure) for m in columns)] for name in names]
            shown.append((text + title, ["confidence", *columns.values()], body))
    for metric in ("ece", "aurc"):
        body = []
        for name, text in TEXTS.items():
            for on, source in FITTED_ON.items():
                # On natural inputs, natural inputs are the same kind.
                cells = [kinds.get(on, kinds["same"])[name][metric]["mean"] for kinds in result.values()]
                body.append([text, source, *map(number, cells)])
        header = ["confidence", "fitted on", *INPUTS.values()]
        shown.append((f"{METRICS[metric]} by the kind of input tested on", header, body))
    parts = [(k, m) for k in RESULTS for m in ("ece", "brier", "aurc")]
    header = ["κ", *(f"{INPUTS[kind]}: {METRICS[m]}" for kind, m in parts)]
    body = []
    for at, (steps, factor) in KAPPAS.items():
        for name, text in (("isotonic_kappa", "isotonic on κ"), ("logistic_kappa", "logistic with κ")):
            row = name if at == MAIN else f"{name}@{at}"
            numbers = [number(result[kind]["same"][row][m]["mean"]) for kind, m in parts]
            body.append([f"{text}, {steps} steps, {factor:g}ε", *numbers])
    shown.append(("κ by its steps and its ball, fitted on the same kind of input", header, body))
    return shown


CURVES = {"uncalibrated": (VERMILLION, "o"), "temperature": (BLUE, "s")}
CURVES |= {"isotonic_kappa": (GREEN, "^"), "logistic_kappa": (ORANGE, "D")}


def plot(figures: dict[str, Any], path: Path, title: str) -> None:
    """Reliability before and after: on natural and PGD-20 inputs, by what the calibrators were fitted on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.6), dpi=130, layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize=13)
    panels = [("natural", "same"), ("natural", "mixed"), None, *(("pgd-20", on) for on in ("same", "mixed", "natural"))]
    for axis, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        if panel is None:
            axis.axis("off")
            continue
        kind, on = panel
        rows = figures["study"][kind][on]
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for name, (colour, marker) in CURVES.items():
            bins, error = rows[name]["reliability"], rows[name]["ece"]["mean"]
            if bins is None:
                continue
            filled = [i for i, count in enumerate(bins["count"]) if count]
            confidence, share = ([bins[k][i] for i in filled] for k in ("confidence", "accuracy"))
            # The area of a marker says how many samples stand behind it.
            area = [8 + 150 * bins["count"][i] / sum(bins["count"]) for i in filled]
            axis.plot(confidence, share, color=colour, linewidth=1.2, alpha=0.7)
            label = f"{TEXTS[name] if name != 'logistic_kappa' else 'logistic with κ'}: ECE {error:.3f}"
            axis.scatter(confidence, share, s=area, color=colour, marker=marker, label=label, zorder=3)
        axis.set(xlabel="confidence", ylabel="share right", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axis.set_title(f"{INPUTS[kind]} inputs,\nfitted on {FITTED_ON[on]}", fontsize=10)
        legend = axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def run(subject: common.Subject, *, seed: int, batch_size: int, out: Path, splits: int) -> dict[str, Any]:
    """Measure, study, show, draw; the figures."""
    check(len(subject.x), splits)
    arrays = measure(subject, seed=seed, batch_size=batch_size, out=out)
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": "PGD-20 and targeted margin PGD-20 (α = a quarter of the radius, one random start), eval mode",
        "kappa": f"PGD-{KAPPAS[MAIN][0]} on the predicted label, α = 2.5·ε/steps, no random start",
        "splits": splits,
        "intervals": "95% over random half splits, Nadeau & Bengio 2003",
        "inputs": {k: common.rate(arrays[f"{k}.logits"].argmax(1) == subject.y) for k in INPUTS},
        "study": study(subject.y, arrays, splits=splits, seed=seed),
    }
    heading = f"Confidence of {subject.label}: {common.setting(subject, figures)}, {splits} half splits (mean ± 95%)"
    folder = subject.folder(out)
    if subject.processes.main:
        show(heading, tables(figures), folder / "confidence-right.md")
        plot(figures, folder / "confidence-right.png", f"{subject.label}\n{common.setting(subject, figures)}")
        # A study of thousands of figures has no place in a card.
        write_json(folder / "confidence-right.json", {"model": subject.label, "confidence-right": figures})
    common.console.print(f"tables, plot and figures: {folder}/confidence-right.md, .png and .json", soft_wrap=True)
    return figures
