"""How far a network's stated certainty can be believed, and whether κ tells right predictions from wrong ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy import measures
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path

KINDS = ("natural", "pgd-20")
SUBSET_SIZE = 2000  # [NL] App. E.2
# Temperatures are searched between these; a set without a mistake (or without a right answer) ends at one of them.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


def fit_temperature(logits: Any, y: Any) -> float:
    """The T in 0.01..100 that minimises the NLL of softmax(logits / T) (Guo et al. 2017): logits (N, K), labels (N,).

    T > 1 means that the network is too sure of itself.
    """
    from scipy.optimize import minimize_scalar

    logits, y = measures.logits_and_labels(logits, y)

    # The NLL is convex in 1/T, so it has one valley in log T too.
    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), y).item()

    bounds = (math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def fit_isotonic(score: Any, correct: Any) -> Callable[[Any], Tensor]:
    """A calibrator: a function from scores (M,) to the probability (M,), 0..1, that the prediction is right.

    It never falls as the score rises, is the least-squares fit to `correct` (N,) among such functions of `score` (N,)
    (Zadrozny & Elkan 2002), and is constant beyond the scores it was fitted on.
    """
    from sklearn.isotonic import IsotonicRegression

    score, correct = measures.as_float64(score), measures.as_float64(correct)
    if score.ndim != 1 or score.shape != correct.shape or not len(score):
        raise InputError(
            f"score and correct must be of one shape (N,), N >= 1, got {tuple(score.shape)} and {tuple(correct.shape)}"
        )
    regression = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(score.numpy(), correct.numpy())

    def calibrate(values: Any) -> Tensor:
        predicted = regression.predict(measures.as_float64(values).numpy())
        return torch.from_numpy(np.clip(predicted, 0.0, 1.0))

    return calibrate


def calibration_report(
    *,
    y: Tensor,
    natural_logits: Tensor,
    adversarial_logits: Tensor,
    natural_kappa: Tensor,
    adversarial_kappa: Tensor,
    steps: int,
    robust: Tensor | None = None,
    splits: int = 20,
    subsets: int = 5,
    seed: int = 0,
    n_bins: int = 15,
) -> dict[str, Any]:
    """The κ-calibration report as a plain dict for JSON: `report["natural"]` and `report["pgd-20"]`, None for nan.

    `y` (N,), logits (N, K) of the natural and the PGD-20 inputs, κ (N,) in 0..steps of each, taken against the
    *predicted* label: κ large = hard to attack = trustworthy, κ small = suspicious. `robust` (N,) bool: the natural
    prediction is right and no attack within ε turned it (AutoAttack's verdicts).

    For each kind of input:
    * `n`, `accuracy` with its 95% `interval`, `ece`, `adaptive_ece`, `nll`, `brier` of the plain softmax;
    * `scores`: for κ, max-softmax and margin (greatest less second greatest logit), AUROC and AURC of right against
      wrong predictions;
    * `calibrated`: the ECE's mean and standard deviation over `splits` random splits, fitted on one half and tested
      on the other, both of the same kind of input;
    * `reliability`: the bins of the plain and the calibrated confidences, the latter for every sample from a fit on
      the half of the first split that it is not in;
    * `by_kappa`: count, right and accuracy for κ = 0..steps, mean and standard deviation of the accuracy over
      `subsets` random subsets of min(2000, ⌊N/2⌋) samples, and the counts in the first of them ([NL] Figure 10);
    * `robust` (natural only, None without verdicts): the same scores and splits, where right means right and robust.
    Standard deviations are those of the population (divided by the number of splits or subsets).
    Raises `InputError` for shapes that do not fit, κ outside 0..steps and sets too small to halve.
    """
    y = torch.as_tensor(y).detach().cpu()
    n = len(y)
    if n < 2:
        raise InputError(
            f"a calibration report fits on one half and tests on the other, got {n} sample; give 2 or more"
        )
    if splits < 1 or subsets < 1:
        raise InputError(f"splits and subsets must be at least 1, got {splits} and {subsets}")
    generator = np.random.default_rng(seed)
    halves = [np.split(generator.permutation(n), [n // 2]) for _ in range(splits)]
    size = min(SUBSET_SIZE, n // 2)
    subset_indices = [generator.choice(n, size, replace=False) for _ in range(subsets)]

    report: dict[str, Any] = {"n": n, "steps": steps, "splits": splits, "subsets": subsets, "seed": seed}
    report |= {"n_bins": n_bins, "subset_size": size}
    given = ((natural_logits, natural_kappa), (adversarial_logits, adversarial_kappa))
    for kind, (logits, kappa) in zip(KINDS, given, strict=True):
        inputs = _Inputs.checked(kind, logits, y, kappa)
        report[kind] = _part(inputs, halves, n_bins) | {"by_kappa": _by_kappa(inputs, steps, subset_indices)}
        if kind == "natural":
            report[kind]["robust"] = None if robust is None else _robust_part(inputs, robust, halves)
    return _plain(report)


@dataclass(frozen=True)
class _Inputs:
    logits: Tensor
    y: Tensor
    kappa: Tensor

    @classmethod
    def checked(cls, kind: str, logits: Any, y: Tensor, kappa: Any) -> _Inputs:
        logits, y = measures.logits_and_labels(logits, y)
        kappa = measures.as_float64(kappa)
        if kappa.shape != y.shape:
            raise InputError(f"kappa of the {kind} inputs must have shape {tuple(y.shape)}, got {tuple(kappa.shape)}")
        return cls(logits, y, kappa)

    @cached_property
    def correct(self) -> Tensor:
        return self.logits.argmax(1) == self.y

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        top = self.logits.topk(2, dim=1).values
        return {
            "kappa": self.kappa,
            "max_softmax": self.logits.softmax(1).amax(1),
            "margin": top[:, 0] - top[:, 1],
        }


def _part(inputs: _Inputs, halves: list, n_bins: int) -> dict[str, Any]:
    n, right = len(inputs.y), int(inputs.correct.sum())
    confidence = inputs.scores["max_softmax"]
    errors: dict[str, list[float]] = {}
    for fit, test in halves:
        for name, calibrated in _calibrated(inputs, fit, test).items():
            error = measures.expected_calibration_error(calibrated, inputs.correct[test], n_bins)
            errors.setdefault(name, []).append(error)

    first, second = halves[0]
    forth, back = _calibrated(inputs, first, second), _calibrated(inputs, second, first)
    correct = torch.cat((inputs.correct[second], inputs.correct[first]))
    diagrams = {name: measures.reliability(torch.cat((forth[name], back[name])), correct, n_bins) for name in forth}
    return {
        "n": n,
        "accuracy": right / n,
        "interval": measures.wilson_interval(right, n),
        "ece": measures.expected_calibration_error(confidence, inputs.correct, n_bins),
        "adaptive_ece": measures.adaptive_ece(confidence, inputs.correct, n_bins),
        "nll": measures.nll(inputs.logits, inputs.y),
        "brier": measures.brier(inputs.logits, inputs.y),
        "scores": {
            name: {"auroc": measures.auroc(score, inputs.correct), "aurc": measures.aurc(score, inputs.correct)}
            for name, score in inputs.scores.items()
        },
        "calibrated": {name: {"ece": _mean_std(values)} for name, values in errors.items()},
        "reliability": {name: vars(diagram) for name, diagram in diagrams.items()},
    }


def _calibrated(inputs: _Inputs, fit: np.ndarray, test: np.ndarray) -> dict[str, Tensor]:
    """Confidences of the samples in `test`, plain and by calibrators fitted on the samples in `fit`."""
    temperature = fit_temperature(inputs.logits[fit], inputs.y[fit])
    kappa, softmax = inputs.scores["kappa"], inputs.scores["max_softmax"]
    return {
        "uncalibrated": softmax[test],
        "temperature": (inputs.logits[test] / temperature).softmax(1).amax(1),
        "isotonic_kappa": fit_isotonic(kappa[fit], inputs.correct[fit])(kappa[test]),
        "isotonic_max_softmax": fit_isotonic(softmax[fit], inputs.correct[fit])(softmax[test]),
    }


def _by_kappa(inputs: _Inputs, steps: int, subset_indices: list[np.ndarray]) -> dict[str, Any]:
    whole = measures.accuracy_by_kappa(inputs.kappa, inputs.correct, steps)
    parts = [measures.accuracy_by_kappa(inputs.kappa[i], inputs.correct[i], steps) for i in subset_indices]
    columns = torch.stack([part.accuracy for part in parts]).T.tolist()
    over_subsets = [_mean_std(column) for column in columns]
    return {
        "kappa": list(range(steps + 1)),
        **vars(whole),
        "subset_accuracy_mean": [entry["mean"] for entry in over_subsets],
        "subset_accuracy_std": [entry["std"] for entry in over_subsets],
        "first_subset_right": parts[0].right,
        "first_subset_wrong": parts[0].count - parts[0].right,
    }


def _robust_part(inputs: _Inputs, robust: Any, halves: list) -> dict[str, Any]:
    robust = torch.as_tensor(robust).detach().cpu()
    if robust.shape != inputs.y.shape or robust.dtype != torch.bool:
        raise InputError(
            f"robust must be bool of shape {tuple(inputs.y.shape)}, got {robust.dtype} of shape {tuple(robust.shape)}"
        )
    stands = robust & inputs.correct
    part: dict[str, Any] = {
        "share": stands.double().mean(),
        "interval": measures.wilson_interval(int(stands.sum()), len(stands)),
        "scores": {
            name: {"auroc": measures.auroc(score, stands), "aurc": measures.aurc(score, stands)}
            for name, score in inputs.scores.items()
        },
    }
    for name in ("kappa", "max_softmax"):
        score, aurocs, briers = inputs.scores[name], [], []
        for fit, test in halves:
            probability = fit_isotonic(score[fit], stands[fit])(score[test])
            aurocs.append(measures.auroc(probability, stands[test]))
            briers.append((probability - stands[test].double()).square().mean().item())
        part[f"isotonic_{name}"] = {"auroc": _mean_std(aurocs), "brier": _mean_std(briers)}
    return part


def _mean_std(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation of the values that are numbers; None where there is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(known)), "std": float(np.std(known))}


def _plain(value: Any) -> Any:
    """The same value in JSON's types, None for nan and infinity."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # Okabe & Ito 2008
CURVES = {
    "uncalibrated": ("uncalibrated", VERMILLION, "o"),
    "temperature": ("temperature", BLUE, "s"),
    "isotonic_kappa": ("isotonic on κ", GREEN, "^"),
}


def plot_calibration(report: dict[str, Any], path: str | os.PathLike, title: str) -> None:
    """Draw a `calibration_report` into one PNG: a row per kind of input with its reliability diagram before and after
    calibration, the accuracy by κ (mean and standard deviation over the subsets) and the counts by κ.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.6), dpi=150, layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize=14)
    axes = figure.subplots(2, 3)
    for row, kind in zip(axes, KINDS, strict=True):
        part = report[kind]
        name = "natural inputs" if kind == "natural" else "PGD-20 inputs"
        _draw_reliability(row[0], part, name)
        _draw_accuracy_by_kappa(row[1], part, name)
        _draw_counts_by_kappa(row[2], part, name)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_reliability(axis: Any, part: dict[str, Any], name: str) -> None:
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for curve, (label, colour, marker) in CURVES.items():
        bins = part["reliability"][curve]
        filled = [i for i, count in enumerate(bins["count"]) if count]
        confidence = [bins["confidence"][i] for i in filled]
        accuracy = [bins["accuracy"][i] for i in filled]
        # The area of a marker says how many samples stand behind it.
        area = [8 + 150 * bins["count"][i] / part["n"] for i in filled]
        axis.plot(confidence, accuracy, color=colour, linewidth=1.2, alpha=0.7)
        label = f"{label}\nECE {part['calibrated'][curve]['ece']['mean']:.3f}"
        axis.scatter(confidence, accuracy, s=area, color=colour, marker=marker, label=label, zorder=3)
    axis.set(xlabel="confidence", ylabel="accuracy", title=f"Reliability, {name}")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for handle in _legend_below(axis).legend_handles:
        handle.set_sizes([30])


def _draw_accuracy_by_kappa(axis: Any, part: dict[str, Any], name: str) -> None:
    by_kappa = part["by_kappa"]
    seen = [k for k, mean in zip(by_kappa["kappa"], by_kappa["subset_accuracy_mean"], strict=True) if mean is not None]
    means = [by_kappa["subset_accuracy_mean"][k] for k in seen]
    deviations = [by_kappa["subset_accuracy_std"][k] for k in seen]
    # An accuracy ends at 0 and 1, so its error bar does too.
    bars = [[min(d, m) for m, d in zip(means, deviations, strict=True)]]
    bars += [[min(d, 1 - m) for m, d in zip(means, deviations, strict=True)]]
    axis.axhline(
        part["accuracy"], color=GREY, linestyle="--", linewidth=1, label=f"whatever the κ\n{part['accuracy']:.3f}"
    )
    label = "at this κ\nmean ± standard deviation"
    axis.errorbar(seen, means, yerr=bars, color=BLUE, marker="o", markersize=5, capsize=3, label=label)
    axis.set(xlabel="κ", ylabel="accuracy", title=f"Accuracy by κ, {name}", ylim=(-0.03, 1.03))
    _whole_kappa(axis, by_kappa)
    _legend_below(axis)


def _draw_counts_by_kappa(axis: Any, part: dict[str, Any], name: str) -> None:
    by_kappa = part["by_kappa"]
    kappa = np.array(by_kappa["kappa"])
    right, wrong = by_kappa["first_subset_right"], by_kappa["first_subset_wrong"]
    axis.bar(kappa - 0.2, right, width=0.4, color=BLUE, label="right")
    axis.bar(kappa + 0.2, wrong, width=0.4, color=ORANGE, hatch="///", edgecolor="white", linewidth=0, label="wrong")
    # Most samples of a robust network have the greatest κ; linear bars would hide all others.
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="κ", ylabel="samples (logarithmic)", title=f"Right and wrong by κ, {name}", ylim=(0, None))
    _whole_kappa(axis, by_kappa)
    _legend_below(axis)


def _legend_below(axis: Any) -> Any:
    return axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8.5, frameon=False)


def _whole_kappa(axis: Any, by_kappa: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(-0.7, by_kappa["kappa"][-1] + 0.7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
