"""Robust confidence whose calibration labels are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from eval.confidence_measure import MAIN, PGD, observed
from eval.confidence_splits import CHANCE, KEPT, METRICS, Shown, cell, halves, interval, kept, metrics
from rb_noisy.calibrators import SOFTMAX, fit_calibrator
from rb_noisy.noise import corrupt

NOISY = {
    "logistic": ("softmax, margin, entropy", "robust", SOFTMAX),
    "logistic_attack": ("the same, κ and the attack's margin", "robust", PGD),
    "stays": ("the same, for whether it stays: no labels", "stays", PGD),
}


def study(
    y: Tensor, arrays: dict[str, Tensor], robust: Tensor, stays: Tensor, *, rate: float, splits: int, seed: int
) -> dict[str, dict[str, Any]]:
    """What is left of a calibrator whose labels were wrong, tested on true ones.

    In each fitting half the labels are drawn anew, with symmetric noise of `rate`.

    Args:
        robust, stays: (N,) bool, right and stands; stands, whether right or wrong.

    Returns:
        By row of `NOISY` and " on true labels" or " on noisy labels" (but for what takes none) the metrics and the
        robust accuracy of the most confident shares, {mean, interval}.
    """
    prediction = arrays["logits"].argmax(1)
    outcome = robust & (prediction == y)
    given = observed(arrays, MAIN)
    tested: dict[str, list[list[float]]] = {}
    for split, (fit, test) in enumerate(halves(len(y), splits, seed)):
        noisy = corrupt(y[fit], "symmetric", rate, num_classes=arrays["logits"].shape[1], seed=seed + split).given
        targets = {
            "robust on true labels": outcome[fit],
            "robust on noisy labels": stays[fit] & (prediction[fit] == noisy),
            "stays": stays[fit],
        }
        for name, (_, kind, features) in NOISY.items():
            for target, held in targets.items():
                if target.startswith(kind) and len(held.unique()) > 1:
                    options = {"features": features, "method": "logistic", "kappa_steps": MAIN}
                    confidence = fit_calibrator(given[fit], held, **options)(given[test])
                    values = [*metrics(confidence, outcome[test], split), *kept(confidence, outcome[test])]
                    tested.setdefault(name + target.removeprefix(kind), []).append(values)
    columns = [*METRICS, *CHANCE, *KEPT]
    return {
        name: {c: interval(np.array(values)[:, i], "mean", "interval") for i, c in enumerate(columns)}
        for name, values in tested.items()
    }


def tables(figures: dict[str, Any]) -> Shown:
    columns = {"brier": "Brier", "ece": "ECE", "auroc": "AUROC", "kept_30": "robust accuracy of the top 30%"}
    body = []
    for name, row in figures["noisy_calibration"]["rows"].items():
        kind, _, labels = name.partition(" on ")
        body.append([NOISY[kind][0], labels or "none", *(cell(row[c]) for c in columns)])
    rate = figures["noisy_calibration"]["rate"]
    title = f"fitted on labels of which {rate:.0%} are wrong (symmetric), tested on true ones (logistic)"
    return [(title, ["confidence", "fitted on", *columns.values()], body)]
