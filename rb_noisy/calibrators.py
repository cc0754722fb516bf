"""From what a model shows of an input to a probability: isotonic, beta and logistic regression, and boosted trees.

The features of a sample all rise with trust: κ against the *predicted* label and the least margin that its attack met;
the same of an attack that aims at the second likeliest class, and in the ball of twice the radius; the greatest softmax
value, the margin (greatest less second greatest logit) and the negated entropy of the softmax. A fitted calibrator is
nothing but numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy.calibration import fit_isotonic
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.measures import as_float64

TARGETED = ("kappa_targeted", "attack_margin_targeted")
WIDE = ("kappa_2eps", "attack_margin_2eps")
MEASURED = ("kappa", "attack_margin", *TARGETED, *WIDE)
SOFTMAX = ("max_softmax", "margin", "entropy")
FEATURES = (*SOFTMAX, *MEASURED)
METHODS = ("logistic", "isotonic", "beta", "trees")
# Softmax values nearer to 0 or 1 than this are all the same to a logarithm.
NEAREST = 1e-12
TREES = {"n_estimators": 60, "max_depth": 2, "learning_rate": 0.1, "min_samples_leaf": 10, "random_state": 0}
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Observed:
    """What a model shows of N inputs without their labels.

    Attributes:
        logits: (N, K).
        kappa: (N,) against the predicted label.
        attack_margin: (N,) the least margin on the way of that attack (`rb_noisy.geometry.Resistance.margin`).
        kappa_targeted, attack_margin_targeted: the same of the attack that raises the second likeliest class's logit
            less the predicted one's.
        kappa_2eps, attack_margin_2eps: the same in the ball of twice the radius, with steps of twice the length.
            None: not measured.
    """

    logits: Any
    kappa: Any
    attack_margin: Any = None
    kappa_targeted: Any = None
    attack_margin_targeted: Any = None
    kappa_2eps: Any = None
    attack_margin_2eps: Any = None

    def __getitem__(self, rows: Any) -> Observed:
        return Observed(*(None if values is None else values[rows] for values in vars(self).values()))


@dataclass(frozen=True)
class Calibrator:
    """A fitted map from what a model shows to confidence: numbers only, so that JSON holds all of it.

    Attributes:
        method: one of `METHODS`.
        features: names from `FEATURES`; one for isotonic and beta.
        kappa_steps: κ lies in 0..kappa_steps.
        parameters: isotonic: `score` (rising) and `probability` (not falling), linear between and constant beyond;
            logistic and beta: `centre`, `scale`, `weight` of each column and one `intercept`; the columns of beta are
            log s and −log(1 − s). Trees: the nodes of all trees one after another: the `feature` (a column) and the
            `threshold` at which it goes `left` (≤) or `right` (−1 at a leaf), the `value` of a leaf (log-odds); the
            `root` of each tree and one `intercept`.
    """

    method: str
    features: tuple[str, ...]
    kappa_steps: int
    parameters: dict[str, tuple[float, ...]]

    def __call__(self, observed: Observed) -> Tensor:
        """Confidence (N,) float64 in 0..1."""
        columns = _columns(self.method, self.features, self.kappa_steps, observed)
        given = {name: np.array(values) for name, values in self.parameters.items()}
        if self.method == "isotonic":
            return torch.from_numpy(np.interp(columns[:, 0], given["score"], given["probability"]))
        if self.method == "trees":
            return torch.from_numpy(_log_odds_of_trees(columns, given)).sigmoid()
        # Column by column: a matrix product would round differently for another number of samples.
        standard = (columns - given["centre"]) / given["scale"]
        total = given["intercept"][0] + sum(standard[:, i] * w for i, w in enumerate(given["weight"]))
        return torch.from_numpy(total).sigmoid()


def fit_calibrator(
    observed: Observed, outcome: Any, *, features: Sequence[str], method: str, kappa_steps: int
) -> Calibrator:
    """Fit the probability of `outcome` (N,) bool.

    Logistic and beta have scikit-learn's penalty of strength 1 on standardised columns, which keeps a few hundred
    samples from giving endless slopes; beta's two weights are not negative (Kull et al. 2017, §4). An isotonic
    probability is held to 1/(N + 2) .. (N + 1)/(N + 2) (Laplace), since N samples cannot show certainty. Trees are 60
    of depth 2 at most, by gradient boosting (Friedman 2001) at rate 0.1, with 10 samples in a leaf at least.

    Raises:
        InputError: unknown names, features that the method does not take or that were not measured, no sample of one
            outcome.
    """
    features = checked_features(features, method)
    columns = _columns(method, features, kappa_steps, observed)
    outcome = _both_outcomes(outcome, len(columns))
    if method == "isotonic":
        parameters = _fit_isotonic(columns[:, 0], outcome)
    elif method == "trees":
        parameters = _fit_trees(columns, outcome.numpy())
    else:
        parameters = _fit_logistic(columns, outcome.numpy(), rising=method == "beta")
    return Calibrator(method, features, kappa_steps, {name: tuple(map(float, v)) for name, v in parameters.items()})


def choose_calibrator(
    observed: Observed, outcome: Any, *, features: Sequence[str], kappa_steps: int
) -> tuple[Calibrator, dict[str, float]]:
    """The method of the least Brier score in stratified 5-fold cross-validation, fitted on all samples.

    In question are logistic regression and trees on all of the features, and isotonic regression on κ and on
    max-softmax where these are among them. Fewer than two samples of one outcome cannot be cross-validated; logistic
    regression, whose penalty then decides, is taken.

    Returns:
        The calibrator, and the Brier score (0 = good) of every method in question, such as {"isotonic on kappa": 0.09}.
    """
    from sklearn.model_selection import StratifiedKFold

    features = checked_features(features, "logistic")
    outcome = _both_outcomes(outcome, len(as_float64(observed.kappa)))
    candidates = {method: (method, features) for method in ("logistic", "trees")}
    candidates |= {f"isotonic on {f}": ("isotonic", (f,)) for f in ("kappa", "max_softmax") if f in features}
    folds = min(FOLDS, int(outcome.sum()), int((~outcome).sum()))
    if folds < 2:
        return fit_calibrator(observed, outcome, features=features, method="logistic", kappa_steps=kappa_steps), {}
    errors = {name: torch.zeros(len(outcome), dtype=torch.float64) for name in candidates}
    splits = StratifiedKFold(folds, shuffle=True, random_state=0).split(outcome, outcome)
    for fit, test in splits:
        for name, (method, names) in candidates.items():
            fitted = fit_calibrator(observed[fit], outcome[fit], features=names, method=method, kappa_steps=kappa_steps)
            errors[name][test] = (fitted(observed[test]) - outcome[test].double()).square()
    scores = {name: values.mean().item() for name, values in errors.items()}
    method, names = candidates[min(scores, key=scores.__getitem__)]
    return fit_calibrator(observed, outcome, features=names, method=method, kappa_steps=kappa_steps), scores


def checked_features(features: Sequence[str], method: str) -> tuple[str, ...]:
    features = (features,) if isinstance(features, str) else tuple(features)
    if method not in METHODS:
        raise unknown_name("calibration method", method, METHODS)
    for name in features:
        if name not in FEATURES:
            raise unknown_name("feature", name, FEATURES)
    if not features or len(set(features)) < len(features):
        raise InputError(f"features are {features}; name at least one of {', '.join(FEATURES)}, each once")
    if method in ("isotonic", "beta") and len(features) != 1:
        raise InputError(f"method {method!r} takes one feature, got {', '.join(features)}; or use method='logistic'")
    if method == "beta" and features[0] not in ("kappa", "max_softmax"):
        raise InputError(f"method 'beta' takes a feature within 0..1, kappa or max_softmax, got {features[0]}")
    return features


def _both_outcomes(outcome: Any, n: int) -> Tensor:
    outcome = torch.as_tensor(outcome).detach().cpu()
    if outcome.dtype != torch.bool or outcome.shape != (n,):
        raise InputError(f"outcome must be bool of shape ({n},), got {outcome.dtype} of shape {tuple(outcome.shape)}")
    positive = int(outcome.sum())
    if positive in (0, n):
        raise InputError(
            f"the target holds for {'all' if positive else 'none'} of the {n} calibration images, and a probability "
            f"needs both outcomes; give more images, or {'harder' if positive else 'easier'} ones"
        )
    return outcome


def _columns(method: str, features: tuple[str, ...], kappa_steps: int, observed: Observed) -> np.ndarray:
    """(N, columns) float64, what the method's regression sees."""
    logits, kappa = as_float64(observed.logits), as_float64(observed.kappa)
    if logits.ndim != 2 or logits.shape[1] < 2 or kappa.shape != logits.shape[:1]:
        raise InputError(
            f"logits must have shape (N, K) with K >= 2 and κ (N,), got {tuple(logits.shape)} and {tuple(kappa.shape)}"
        )
    if not logits.isfinite().all():
        raise InputError("some logits are not finite; look at the model")
    top = logits.topk(2, dim=1).values
    probability = logits.softmax(1)
    values = {
        "max_softmax": probability.amax(1),
        "margin": top[:, 0] - top[:, 1],
        "entropy": torch.special.entr(probability).sum(1).neg(),
    }
    for name in (*MEASURED[:1], *(name for name in MEASURED[1:] if name in features)):
        given = getattr(observed, name)
        if given is None:
            raise InputError(f"the feature {name} was not measured; leave it out, or measure it")
        values[name] = as_float64(given)
        if values[name].shape != kappa.shape or not values[name].isfinite().all():
            raise InputError(f"{name} must hold one finite number per sample, of shape {tuple(kappa.shape)}")
        if "kappa" in name and len(kappa) and not (values[name].min() >= 0 and values[name].max() <= kappa_steps):
            low, high = values[name].aminmax()
            raise InputError(f"κ must lie in 0..{kappa_steps}, got {low:g}..{high:g}")
    if method != "beta":
        return torch.stack([values[name] for name in features], dim=1).numpy()
    # Half a step from both ends, so that κ has finite logarithms.
    s = (kappa + 0.5) / (kappa_steps + 1) if features == ("kappa",) else values["max_softmax"]
    s = s.clamp(NEAREST, 1 - NEAREST)
    return torch.stack((s.log(), -(-s).log1p()), dim=1).numpy()


def _fit_isotonic(score: np.ndarray, outcome: Tensor) -> dict[str, np.ndarray]:
    knots = np.unique(score)
    least = 1 / (len(score) + 2)
    probability = fit_isotonic(score, outcome)(knots).numpy().clip(least, 1 - least)
    # A knot between two of its own height says nothing.
    inner = (probability[1:-1] == probability[:-2]) & (probability[1:-1] == probability[2:])
    keep = np.concatenate(([True], ~inner, [True]))[-len(knots) :]
    return {"score": knots[keep], "probability": probability[keep]}


def _fit_logistic(columns: np.ndarray, outcome: np.ndarray, *, rising: bool) -> dict[str, np.ndarray]:
    """Standardised logistic regression; where `rising`, columns of negative weight are left out, the worst first."""
    from sklearn.linear_model import LogisticRegression

    centre, scale = columns.mean(0), columns.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    standard = (columns - centre) / scale
    used, weight = list(range(columns.shape[1])), np.zeros(columns.shape[1])
    share = outcome.mean()
    intercept = np.array([math.log(share / (1 - share))])
    while used:
        regression = LogisticRegression(max_iter=1000, tol=1e-6).fit(standard[:, used], outcome)
        weight[:] = 0
        weight[used], intercept = regression.coef_[0], regression.intercept_
        if not rising or weight.min() >= 0:
            break
        used.remove(int(weight.argmin()))
        weight[:] = 0
        intercept = np.array([math.log(share / (1 - share))])
    return {"centre": centre, "scale": scale, "weight": weight, "intercept": intercept}


def _fit_trees(columns: np.ndarray, outcome: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.ensemble import GradientBoostingClassifier

    boosted = GradientBoostingClassifier(**TREES).fit(columns, outcome)
    trees = [estimator.tree_ for estimator in boosted.estimators_[:, 0]]
    root = np.cumsum([0, *(tree.node_count for tree in trees[:-1])])

    def children(name: str) -> np.ndarray:
        own = [getattr(tree, f"children_{name}") for tree in trees]
        return np.concatenate([np.where(c < 0, -1, c + first) for c, first in zip(own, root, strict=True)])

    left = children("left")
    leaf, share = left < 0, outcome.mean()

    def at_splits(values: list[np.ndarray]) -> np.ndarray:
        return np.where(leaf, 0, np.concatenate(values))

    value = np.concatenate([tree.value[:, 0, 0] for tree in trees]) * TREES["learning_rate"]
    return {
        "feature": at_splits([tree.feature for tree in trees]),
        "threshold": at_splits([tree.threshold for tree in trees]),
        "left": left,
        "right": children("right"),
        "value": np.where(leaf, value, 0),
        "root": root,
        "intercept": np.array([math.log(share / (1 - share))]),
    }


def _log_odds_of_trees(columns: np.ndarray, given: dict[str, np.ndarray]) -> np.ndarray:
    columns = columns.astype(np.float32)  # what scikit-learn's trees compare with their thresholds
    feature, left, right = (given[name].astype(np.int64) for name in ("feature", "left", "right"))
    total = np.full(len(columns), given["intercept"][0])
    rows = np.arange(len(columns))
    for root in given["root"].astype(np.int64):
        node = np.full(len(columns), root)
        while (split := left[node] >= 0).any():
            below = columns[rows, feature[node]] <= given["threshold"][node]
            node = np.where(split, np.where(below, left[node], right[node]), node)
        total += given["value"][node]
    return total


def check_parameters(method: str, features: tuple[str, ...], parameters: dict[str, tuple[float, ...]]) -> None:
    """A ValueError or KeyError that says what keeps these numbers from being a calibrator of this method."""
    columns = 2 if method == "beta" else len(features)
    if method == "isotonic":
        lengths = dict.fromkeys(("score", "probability"), max(1, len(parameters["score"])))
    elif method == "trees":
        nodes = max(1, len(parameters["feature"]))
        lengths = dict.fromkeys(("feature", "threshold", "left", "right", "value"), nodes)
        lengths |= {"root": max(1, len(parameters["root"])), "intercept": 1}
    else:
        lengths = {"centre": columns, "scale": columns, "weight": columns, "intercept": 1}
    if {name: len(values) for name, values in parameters.items()} != lengths:
        raise ValueError(f"parameters of {method} must be {lengths} numbers")
    if any(scale <= 0 for scale in parameters.get("scale", ())):
        raise ValueError("scale must be above 0")
    score, probability = parameters.get("score", ()), parameters.get("probability", ())
    if any(b <= a for a, b in pairwise(score)):
        raise ValueError("score must rise")
    if list(probability) != sorted(probability) or not all(0 <= p <= 1 for p in probability):
        raise ValueError("probability must lie in 0..1 and not fall")
    if method == "trees":
        _check_trees(columns, {name: np.array(values) for name, values in parameters.items()})


def _check_trees(columns: int, given: dict[str, np.ndarray]) -> None:
    whole = ("feature", "left", "right", "root")
    if any((given[name] != given[name].round()).any() for name in whole):
        raise ValueError(f"{', '.join(whole)} must be whole numbers")
    nodes = np.arange(len(given["feature"]))
    if not ((given["feature"] >= 0) & (given["feature"] < columns)).all():
        raise ValueError(f"feature must lie in 0..{columns - 1}")
    if not ((given["root"] >= 0) & (given["root"] < len(nodes))).all():
        raise ValueError("root must be a node")
    leaf = (given["left"] == -1) & (given["right"] == -1)
    for side in ("left", "right"):
        # Children come after their parent, so that no way through a tree is endless.
        if not (leaf | ((given[side] > nodes) & (given[side] < len(nodes)))).all():
            raise ValueError(f"{side} must be −1 at a leaf and a later node elsewhere")
