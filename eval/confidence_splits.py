"""What both studies of confidence share: fit on a random half, test on the other, many times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from eval import common
from eval.batches import Measured, in_batches
from rb_noisy import measures
from rb_noisy.annotation import most_confident_accuracy
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path

METRICS = {"ece": "ECE", "adaptive_ece": "adaptive ECE", "brier": "Brier", "nll": "NLL"}
METRICS |= {"auroc": "AUROC", "aurc": "AURC"}
# The ECE of a perfectly calibrated confidence is not 0 on a few hundred samples; one of few values has less of it.
CHANCE = {"ece_by_chance": "ECE by chance"}
KEPT = {"kept_30": 0.3, "kept_40": 0.4}
LEAST_IMAGES, LEAST_SPLITS, SPLITS = 20, 2, 20
Shown = list[tuple[str, list[str], list[list[str]]]]
"""Tables as (title, header, rows) of text."""


def check(n: int, splits: int) -> None:
    if splits < LEAST_SPLITS:
        raise InputError(f"--splits is {splits}; give at least {LEAST_SPLITS}, for an interval")
    if n < LEAST_IMAGES:
        raise InputError(f"{n} images are too few to fit on half of them; give --n {LEAST_IMAGES} or more")


def measured(
    subject: common.Subject,
    name: str,
    settings: dict[str, Any],
    batch_size: int,
    out: Path,
    compute: Callable[[Tensor, Tensor, int], Measured],
) -> Measured:
    """As `in_batches`; kept as NAME.npz, from which a later run of the same weights, images and settings takes it."""
    key = json.dumps({**settings, "eps": subject.eps, "batch_size": batch_size})
    saved = common.saved_verdicts(out, name, subject)
    if saved is not None and str(saved.pop("key", "")) == key:
        return {array: torch.from_numpy(values) for array, values in saved.items()}
    arrays = in_batches(subject, name, settings, batch_size, out, compute)
    common.save_verdicts(out, name, subject, key=np.array(key), **arrays)
    return arrays


def halves(n: int, splits: int, seed: int) -> list[list[np.ndarray]]:
    """Index arrays (fit, test) for each split."""
    generator = np.random.default_rng(seed)
    return [np.split(generator.permutation(n), [n // 2]) for _ in range(splits)]


def metrics(confidence: Tensor | None, outcome: Tensor, seed: int) -> list[float]:
    """In the order of `METRICS` and `CHANCE`; Brier and NLL are those of two classes, the outcome and its opposite."""
    if confidence is None:
        return [math.nan] * len(METRICS | CHANCE)
    drawn = torch.bernoulli(confidence, generator=torch.Generator().manual_seed(seed))
    hit, held = outcome.double(), confidence.clamp(1e-12, 1 - 1e-12)
    return [
        measures.expected_calibration_error(confidence, outcome),
        measures.adaptive_ece(confidence, outcome),
        (confidence - hit).square().mean().item(),
        torch.nn.functional.binary_cross_entropy(held, hit).item(),
        measures.auroc(confidence, outcome),
        measures.aurc(confidence, outcome),
        measures.expected_calibration_error(confidence, drawn),
    ]


def interval(values: np.ndarray, mean_name: str, interval_name: str) -> dict[str, Any]:
    """Mean and 95% interval over random half splits, None for what the numbers do not give.

    The splits share their images, so the spread of the mean is not sd/√splits: its variance is taken as
    (1/splits + n_test/n_fit)·sd² (Nadeau & Bengio 2003), n_test = n_fit here, with Student's t.
    """
    from scipy.stats import t

    known = values[~np.isnan(values)]
    if len(known) < LEAST_SPLITS:
        return {mean_name: None, interval_name: None}
    mean = float(known.mean())
    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) * math.sqrt(1 / len(known) + 1))
    return {mean_name: mean, interval_name: [mean - half, mean + half]}


def number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def kept(confidence: Tensor, outcome: Tensor) -> list[float]:
    """Robust accuracy of the most confident shares of `KEPT`."""
    accuracy = most_confident_accuracy(confidence.numpy(), outcome.numpy())
    return [accuracy[max(1, round(share * len(accuracy))) - 1] for share in KEPT.values()]


def cell(figure: dict[str, Any], name: str = "mean") -> str:
    """Mean and half the width of its interval; differences with their sign."""
    bounds, sign = (figure["interval"], "") if name == "mean" else (figure[f"{name}_interval"], "+")
    width = "" if bounds is None else f" ± {(bounds[1] - bounds[0]) / 2:.3f}"
    return number(figure[name], sign) + width


def show(heading: str, shown: Shown, file: Path) -> None:
    """On the terminal, and as Markdown in `file`."""
    common.console.print(f"\n{heading}", soft_wrap=True)
    for title, header, body in shown:
        table = Table()
        for column_number, column in enumerate(header):
            table.add_column(column, justify="right" if column_number else "left", no_wrap=not column_number)
        for row in body:
            table.add_row(*row)
        common.show(title, table)
    with atomic_path(file) as temporary:
        temporary.write_text(_markdown(heading, shown), encoding="utf-8")


def _markdown(heading: str, shown: Shown) -> str:
    blocks = [f"# {heading}"]
    for title, header, body in shown:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        blocks.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks) + "\n"
