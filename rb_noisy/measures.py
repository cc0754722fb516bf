"""Measures on plain tensors: accuracy with its interval, calibration error, ranking of right above wrong, κ's accuracy.

Every function takes tensors, arrays or lists on any device, computes in float64 on the CPU and keeps no state.
`confidence` is the stated probability (0..1) that a prediction is right, `correct` says (bool or 0/1) whether it is,
and a `score` is any number that is *high where the prediction can be trusted* (κ: small = suspicious).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy.errors import InputError


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high), both 0..1, for the rate behind `successes` out of `n` (Wilson 1927)."""
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"an interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie strictly between 0 and 1, got {confidence}; 0.95 is usual")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 and 1; rounding must not.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def accuracy(logits: Any, y: Any) -> float:
    """Share (0..1) of the samples whose greatest logit, of (N, K), is at the label, of (N,)."""
    logits, y = logits_and_labels(logits, y)
    return (logits.argmax(1) == y).double().mean().item()


def expected_calibration_error(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """ECE, 0 (calibrated) .. 1 (bad): mean |accuracy − confidence| over equal-width bins, weighted by their counts.

    Bin b holds b/n_bins ≤ confidence < (b+1)/n_bins; confidence 1 belongs to the last bin. Source: Guo et al. 2017,
    eq. 3. Confidences outside 0..1 raise `InputError`.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = _confidence_and_correct(confidence, correct)
    _check_bins(n_bins)
    # torchmetrics 1.9 opens an extra bin for confidence exactly 1.
    below_one = confidence.clamp(max=math.nextafter(1.0, 0.0))
    return binary_calibration_error(below_one, correct.long(), n_bins=n_bins).item()


def adaptive_ece(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Adaptive ECE, 0 (calibrated) .. 1 (bad): as the ECE, but over bins of equal *mass* (Nixon et al. 2019).

    A sample is in bin ⌊n_bins · r / N⌋, r = number of samples with strictly smaller confidence. So bin sizes differ by
    one at most where no confidences tie, tied samples are never parted, and the order of the samples does not matter.
    """
    confidence, correct = _confidence_and_correct(confidence, correct)
    _check_bins(n_bins)
    rank = torch.searchsorted(confidence.sort().values, confidence)
    bins = rank * n_bins // len(confidence)
    gaps = torch.zeros(n_bins, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram's bins: `confidence` and `accuracy` (B,) in 0..1, nan where `count` (B,) is 0."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability(confidence: Any, correct: Any, n_bins: int = 15) -> Reliability:
    """Mean confidence, accuracy and count in each of the ECE's equal-width bins."""
    confidence, correct = _confidence_and_correct(confidence, correct)
    _check_bins(n_bins)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=n_bins - 1)
    count = torch.bincount(bins, minlength=n_bins)
    sums = torch.zeros(2, n_bins, dtype=torch.float64).index_add(1, bins, torch.stack((confidence, correct)))
    return Reliability(sums[0] / count, sums[1] / count, count)


def nll(logits: Any, y: Any) -> float:
    """Mean negative log-likelihood of the labels (N,) under softmax of the logits (N, K): nats, 0 .. ∞ (bad)."""
    logits, y = logits_and_labels(logits, y)
    return torch.nn.functional.cross_entropy(logits, y).item()


def brier(logits: Any, y: Any) -> float:
    """Multi-class Brier score of softmax of the logits (N, K): squared error against the one-hot label (N,), *summed*
    over the classes and averaged over the samples: 0 .. 2 (bad), as in Brier 1950.
    """
    logits, y = logits_and_labels(logits, y)
    return (logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1])).square().sum(1).mean().item()


def auroc(score: Any, correct: Any) -> float:
    """Probability (0 .. 1, 0.5 = chance) that a right prediction scores above a wrong one; ties count half.

    nan where there is no right or no wrong prediction.
    """
    from sklearn.metrics import roc_auc_score

    score, correct = _score_and_correct(score, correct)
    if correct.min() == correct.max():
        return math.nan
    return float(roc_auc_score(correct.numpy(), score.numpy()))


def aurc(score: Any, correct: Any) -> float:
    """Area under the risk–coverage curve, 0 .. 1 (bad): the error rate among the i best-scored samples, averaged over
    i = 1 .. N (Geifman et al. 2019). Tied samples count as their expectation over random order, so a constant score
    gives the plain error rate.
    """
    score, correct = _score_and_correct(score, correct)
    values, group, size = torch.unique(-score, sorted=True, return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(values), dtype=torch.float64).index_add(0, group, 1 - correct)
    # In random order every place within a group of ties is wrong with the group's error rate.
    expected = torch.repeat_interleave(wrong / size, size)
    return (expected.cumsum(0) / torch.arange(1, len(score) + 1)).mean().item()


@dataclass(frozen=True)
class ByKappa:
    """For κ = 0 .. steps: `count` and `right` (steps+1,) int64, `accuracy` (steps+1,) 0..1, nan where `count` is 0."""

    count: Tensor
    right: Tensor
    accuracy: Tensor


def accuracy_by_kappa(kappa: Any, correct: Any, steps: int) -> ByKappa:
    """How many samples have each κ in 0..steps and how many of them are right ([NL] Figure 10).

    `kappa` (N,) holds whole numbers in 0..steps, `correct` (N,) is bool; anything else raises `InputError`.
    """
    kappa, correct = _score_and_correct(kappa, correct)
    if kappa.min() < 0 or kappa.max() > steps or (kappa != kappa.round()).any():
        raise InputError(f"kappa must hold whole numbers in 0..{steps}, got {kappa.min():g}..{kappa.max():g}")
    kappa = kappa.long()
    count = torch.bincount(kappa, minlength=steps + 1)
    right = torch.bincount(kappa[correct == 1], minlength=steps + 1)
    return ByKappa(count, right, right / count.double())


def as_float64(values: Any) -> Tensor:
    """A float64 tensor on the CPU, without a gradient, of a tensor, array or list."""
    # By way of NumPy, because torch would round a list of Python floats to float32.
    tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))
    return tensor.double()


def logits_and_labels(logits: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Finite logits (N, K ≥ 2) as float64 and labels (N,) in 0..K−1 as int64, both on the CPU, or `InputError`."""
    logits = as_float64(logits)
    y = torch.as_tensor(y).detach().cpu()
    if logits.ndim != 2 or logits.shape[1] < 2 or y.shape != logits.shape[:1] or not len(y):
        raise InputError(
            f"logits must have shape (N, K) with K >= 2 and labels (N,), got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    if not logits.isfinite().all():
        raise InputError(f"logits of sample {_first(~logits.isfinite().all(1))} are not finite; look at the model")
    if y.is_floating_point() or y.min() < 0 or y.max() >= logits.shape[1]:
        raise InputError(f"labels must be whole numbers in 0..{logits.shape[1] - 1}, got {y.min()}..{y.max()}")
    return logits, y.long()


def _score_and_correct(score: Any, correct: Any, name: str = "score") -> tuple[Tensor, Tensor]:
    score, correct = as_float64(score), as_float64(correct)
    if score.ndim != 1 or score.shape != correct.shape or not len(score):
        raise InputError(
            f"{name} and correct must be of one shape (N,), N >= 1, got {tuple(score.shape)} and {tuple(correct.shape)}"
        )
    if not score.isfinite().all():
        raise InputError(f"{name} of sample {_first(~score.isfinite())} is not finite")
    if not ((correct == 0) | (correct == 1)).all():
        raise InputError("correct must hold only True and False (or 1 and 0); pass `prediction == label`")
    return score, correct


def _confidence_and_correct(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:
    confidence, correct = _score_and_correct(confidence, correct, "confidence")
    if confidence.min() < 0 or confidence.max() > 1:
        worst = confidence[(confidence - 0.5).abs().argmax()]
        raise InputError(f"confidence must lie in 0..1, got {worst:g}; pass probabilities, not logits")
    return confidence, correct


def _check_bins(n_bins: int) -> None:
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1, got {n_bins}")


def _first(mask: Tensor) -> int:
    return int(mask.int().argmax())
