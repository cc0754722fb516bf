"""`python -m eval.calibration --model … --target robust`: is this prediction right, and does it stay right within ε."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import clever, common, confidence_noise
from eval.confidence_measure import ATTACKS, MAIN, PGD, STEPS, measure, observed, own_verdicts
from eval.confidence_splits import (
    CHANCE,
    KEPT,
    METRICS,
    Shown,
    cell,
    check,
    halves,
    interval,
    kept,
    metrics,
    number,
    show,
)
from rb_noisy import measures
from rb_noisy.annotation import most_confident_accuracy
from rb_noisy.calibration import BLUE, GREEN, GREY, ORANGE, VERMILLION, fit_isotonic, fit_temperature
from rb_noisy.calibrators import SOFTMAX, TARGETED, WIDE, choose_calibrator, fit_calibrator
from rb_noisy.confidence import DEFAULT_FEATURES, DEFAULT_STEPS, WITHSTANDS
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path

LEAST_OUTCOMES = 10
KEPT_GAIN = {"kept_30_gain": "top 30%, less max-softmax's"}
PASSES = {"passes": "passes forth + back", "passes_to_the_end": "without early stop"}


@dataclass(frozen=True)
class Row:
    """A calibrator in the table: what it is called, fitted by and on, and the steps of its κ (0: takes no attack)."""

    text: str
    method: str
    features: tuple[str, ...]
    steps: int = 0


PLAIN = {
    "max_softmax": Row("max-softmax as it is", "softmax", ()),
    "isotonic_max_softmax": Row("isotonic on max-softmax", "isotonic", ("max_softmax",)),
    "temperature": Row("temperature scaling, T fitted on labels", "temperature", ()),
    "logistic": Row("logistic on softmax, margin, entropy", "logistic", SOFTMAX),
    "trees": Row("trees on softmax, margin, entropy", "trees", SOFTMAX),
}
"""What can be said without an attack; the best of them is what κ must beat."""

CLEVER = {"clever": Row("isotonic on CLEVER", "clever", ())}
ATTACKED = {
    "isotonic_kappa": Row("isotonic on κ", "isotonic", ("kappa",), MAIN),
    "logistic_kappa": Row("logistic on softmax, margin, entropy, κ", "logistic", (*SOFTMAX, "kappa"), MAIN),
    "logistic_attack": Row("the same and the attack's margin", "logistic", PGD, MAIN),
    "trees_attack": Row("trees on the same", "trees", PGD, MAIN),
    "logistic_targeted": Row("logistic, with those of a targeted attack", "logistic", (*PGD, *TARGETED), MAIN),
    "trees_targeted": Row("trees, with those of a targeted attack", "trees", (*PGD, *TARGETED), MAIN),
    "logistic_2eps": Row("logistic, with those at 2ε", "logistic", (*PGD, *WIDE), MAIN),
    "trees_2eps": Row("trees, with those at 2ε", "trees", (*PGD, *WIDE), MAIN),
    "auto": Row("rb_noisy.calibrate (chosen by cross-validation)", "auto", DEFAULT_FEATURES, DEFAULT_STEPS),
}
CURVE = {
    f"logistic{ending}@{steps}": Row(
        f"{steps} steps at ε{', and ' + ATTACKS[ending] if ending else ''}",
        "logistic",
        (*PGD, *(name + ending for name in ("kappa", "attack_margin") if ending)),
        steps,
    )
    for ending, steps in product(ATTACKS, STEPS)
}
ROWS = PLAIN | CLEVER | ATTACKED | CURVE


def passes(row: Row, arrays: dict[str, Tensor], *, early: bool = True) -> list[float]:
    """Mean passes of the network [forth, back] for one input; `early`: an attack ends where the prediction falls."""
    forth, back = 1.0, 0.0
    for ending in ATTACKS:
        if f"kappa{ending}" in row.features:
            kappa = arrays[f"kappa{ending}@{row.steps}"].double()
            kappa = kappa if early else torch.full_like(kappa, row.steps)
            # x⁽ᵗ⁾ is looked at for t = 0 … κ, at most up to n − 1, from which no step is taken.
            forth += (kappa + 1).clamp(max=row.steps).mean().item()
            back += (kappa + 1).clamp(max=row.steps - 1).mean().item()
    return [forth, back]


def study(
    y: Tensor, arrays: dict[str, Tensor], robust: Tensor, *, splits: int, seed: int
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Fit every calibrator on half the images and test it on the other half, `splits` times.

    Args:
        y, robust: labels (N,); bool (N,), what stood the attack.
        arrays: what `measure` returns; `clever` (N,) too where it was estimated.

    Returns:
        The figures by row (a few of them for `CURVE`), each {mean, interval}: the metrics, the robust accuracy of the
        most confident shares in `KEPT`, its gain over max-softmax's, and `brier_ratio`, to the one of `PLAIN`
        with the lowest mean Brier score; `passes` too. And (confidence, outcome) of all tested samples by row, split
        after split.
    """
    outcome = robust & (arrays["logits"].argmax(1) == y)
    fewest = min(int(outcome.sum()), int((~outcome).sum()))
    if fewest < LEAST_OUTCOMES:
        raise InputError(
            f"{int(outcome.sum())} of the {len(y)} images are right and stay right within ε, and a probability needs "
            f"{LEAST_OUTCOMES} of both outcomes at least; give another --eps or more images"
        )
    rows = {name: row for name, row in ROWS.items() if name != "clever" or "clever" in arrays}
    tested: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in rows}
    for fit, test in halves(len(y), splits, seed):
        for name, row in rows.items():
            if len(outcome[fit].unique()) > 1:
                tested[name].append((_fit(row, y, arrays, outcome, fit)(test), outcome[test]))
    scores = {
        name: np.array([[*metrics(*pair, split), *kept(*pair)] for split, pair in enumerate(pairs)])
        for name, pairs in tested.items()
    }
    columns = [*METRICS, *CHANCE, *KEPT]
    at = columns.index("brier")
    best = min(PLAIN, key=lambda name: scores[name][:, at].mean())
    figures: dict[str, Any] = {}
    for name, row in rows.items():
        shown = ("brier", "auroc") if name in CURVE else columns  # a card has no room for more
        figures[name] = {c: interval(scores[name][:, columns.index(c)], "mean", "interval") for c in shown}
        ratio = scores[name][:, at] / scores[best][:, at]
        figures[name] |= {
            "brier_ratio": interval(ratio, "mean", "interval"),
            "passes": passes(row, arrays) if name != "clever" else arrays["clever_passes"].double().mean(0).tolist(),
        }
        if name not in CURVE:
            gain = scores[name][:, columns.index("kept_30")] - scores["max_softmax"][:, columns.index("kept_30")]
            figures[name]["kept_30_gain"] = interval(gain, "mean", "interval")
        if row.steps:
            figures[name]["passes_to_the_end"] = passes(row, arrays, early=False)
    joined = {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in tested.items()}
    return {"best_without_attack": best, "rows": figures}, joined


def _fit(
    row: Row, y: Tensor, arrays: dict[str, Tensor], outcome: Tensor, fit: np.ndarray
) -> Callable[[np.ndarray], Tensor]:
    """Samples → confidence, fitted on the `fit` samples."""
    logits = arrays["logits"]
    if row.method in ("softmax", "temperature"):
        t = fit_temperature(logits[fit], y[fit]) if row.method == "temperature" else 1.0
        return lambda test: (logits[test].double() / t).softmax(1).amax(1)
    if row.method == "clever":
        isotonic = fit_isotonic(arrays["clever"][fit], outcome[fit])
        return lambda test: isotonic(arrays["clever"][test])
    given = observed(arrays, row.steps or MAIN)
    options = {"features": row.features, "kappa_steps": row.steps or MAIN}
    if row.method == "auto":
        calibrator, _ = choose_calibrator(given[fit], outcome[fit], **options)
    else:
        calibrator = fit_calibrator(given[fit], outcome[fit], method=row.method, **options)
    return lambda test: calibrator(given[test])


def tables(figures: dict[str, Any]) -> Shown:
    """The study as tables of text."""
    rows = figures["rows"]
    names = [name for name in rows if name not in CURVE]
    best = ROWS[figures["best_without_attack"]].text

    def cost(name: str, kind: str = "passes") -> str:
        return "{:.1f} + {:.1f}".format(*rows[name][kind]) if kind in rows[name] else number(None)

    def table(title: str, columns: dict[str, str], names: Iterable[str], *costs: str) -> None:
        header = ["confidence", *columns.values(), *(PASSES[kind] for kind in costs)]
        body = [[ROWS[n].text, *(cell(rows[n][c]) for c in columns), *(cost(n, kind) for kind in costs)] for n in names]
        shown.append((title, header, body))

    shown: Shown = []
    share = f"right, and right still within ε ({figures['target_source']}): {common.percent(figures['robust'])}"
    ratio = {"brier_ratio": f"Brier / that of {best}"}
    table(share, {name: text for name, text in (METRICS | CHANCE).items() if name != "adaptive_ece"}, names)
    shares = {name: f"robust accuracy of the top {part:.0%}" for name, part in KEPT.items()}
    table("what is kept, and what it costs", shares | KEPT_GAIN | ratio, names, "passes")
    table("what steps and attacks are worth", ratio | {"auroc": "AUROC"}, CURVE, "passes", "passes_to_the_end")
    return shown


DRAWN = {
    "isotonic_max_softmax": (VERMILLION, "o"),
    "logistic": (BLUE, "s"),
    "isotonic_kappa": (GREEN, "^"),
    "auto": (ORANGE, "D"),
}


def plot(figures: dict[str, Any], tested: dict[str, tuple[Tensor, Tensor]], path: Path, title: str) -> None:
    """Reliability, robust accuracy of what is kept, and Brier score against passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.2), dpi=130, layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize=13)
    reliability, coverage, cost = figure.subplots(1, 3)
    reliability.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for name, (colour, marker) in DRAWN.items():
        confidence, outcome = tested[name]
        bins = measures.reliability(confidence, outcome)
        some = bins.count > 0
        area = 8 + 150 * bins.count[some] / bins.count.sum()  # says how many samples stand behind it
        label = f"{ROWS[name].text}: ECE {figures['rows'][name]['ece']['mean']:.3f}"
        reliability.plot(bins.confidence[some], bins.accuracy[some], color=colour, linewidth=1.2, alpha=0.7)
        reliability.scatter(
            bins.confidence[some], bins.accuracy[some], s=area, color=colour, marker=marker, label=label, zorder=3
        )
        accuracy = most_confident_accuracy(confidence.numpy(), outcome.numpy())
        share = np.arange(1, len(accuracy) + 1) / len(accuracy)
        shown = share >= 0.02
        coverage.plot(share[shown], accuracy[shown], color=colour, linewidth=1.6, label=ROWS[name].text)
    rate = figures["robust"]["accuracy"]
    share = np.linspace(0.02, 1, 200)
    coverage.plot(share, np.minimum(1, rate / share), color=GREY, linestyle=":", label="who knew the verdicts")
    reliability.set(xlabel="confidence", ylabel="share right after attack", title="Reliability")
    coverage.set(
        xlabel="share kept, the most confident", ylabel="robust accuracy of what is kept", title="Risk–coverage"
    )
    for axis in (reliability, coverage):
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for (ending, attack), colour, marker in zip(ATTACKS.items(), (BLUE, ORANGE, GREEN), "sD^", strict=True):
        names = [f"logistic{ending}@{steps}" for steps in STEPS]
        at = [sum(figures["rows"][name]["passes"]) for name in names]
        brier = [figures["rows"][name]["brier"]["mean"] for name in names]
        cost.plot(at, brier, color=colour, marker=marker, label="PGD" + (f" and {attack}" if ending else ""))
    best = figures["rows"][figures["best_without_attack"]]["brier"]["mean"]
    cost.axhline(best, color=GREY, linestyle="--", label="best without attack")
    cost.set(
        xlabel="passes of the network per input (forth and back)",
        ylabel="Brier score",
        title=f"Cost (κ of {', '.join(map(str, STEPS))} steps)",
    )
    for axis in (reliability, coverage, cost):
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8.5, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def run(
    subject: common.Subject,
    verdicts: Tensor | None,
    *,
    seed: int,
    batch_size: int,
    out: Path,
    splits: int,
    with_clever: bool = False,
    label_noise: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure, study, show, draw; the figures by evaluation.

    Args:
        verdicts: (N,) bool, AutoAttack's, where it was run; else `withstands` is asked.
        with_clever: CLEVER too.
        label_noise: `confidence_noise.study` too, with this rate.
    """
    check(len(subject.x), splits)
    if label_noise is not None and not 0 < label_noise < 1:
        raise InputError(f"--label-noise is {label_noise}; give a rate above 0 and below 1")
    options = {"seed": seed, "batch_size": batch_size, "out": out}
    arrays = clever.measure(subject, **options) if with_clever else {}  # first: it may lack its package
    arrays |= measure(subject, **options)
    right = arrays["logits"].argmax(1) == subject.y
    source = WITHSTANDS if verdicts is None else "AutoAttack"
    robust = verdicts
    if robust is None:
        robust = own_verdicts(subject, subject.y, "withstands", **options)
    found, tested = study(subject.y, arrays, robust, splits=splits, seed=seed)
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "target": "right, and right still within ε",
        "target_source": source,
        "kappa": "PGD on the predicted label, α = 2.5·ε/steps, no random start",
        "splits": splits,
        "intervals": "95% over random half splits, Nadeau & Bengio 2003",
        "natural": common.rate(right),
        "robust": common.rate(robust & right),
        **found,
    }
    shown = tables(figures)
    if label_noise is not None:
        # What stays of the wrong answers AutoAttack has not been asked.
        predicted = arrays["logits"].argmax(1)
        stays = torch.where(right, robust, own_verdicts(subject, predicted, "stays", **options))
        rows = confidence_noise.study(subject.y, arrays, robust, stays, rate=label_noise, splits=splits, seed=seed)
        figures["noisy_calibration"] = {"noise": "symmetric", "rate": label_noise, "rows": rows}
        shown += confidence_noise.tables(figures)
    line = common.setting(subject, figures)
    folder = subject.folder(out)
    if subject.processes.main:
        heading = f"Robust confidence of {subject.label}: {line}, {splits} half splits (mean ± 95%)"
        show(heading, shown, folder / "confidence-robust.md")
        plot(figures, tested, folder / "confidence-robust.png", f"{subject.label}\n{line}, target: {source}")
    common.console.print(f"tables and plot: {folder}/confidence-robust.md and .png", soft_wrap=True)
    return {"confidence": figures}
