"""Sample-wise calibration: how likely one prediction is right, or right and staying right within ε, from κ and logits.

The features of a sample all rise with trust: κ against the *predicted* label, the greatest softmax value, the margin
(greatest less second greatest logit) and the negated entropy of the softmax. A calibrator turns them into a
probability: by isotonic regression (Zadrozny & Elkan 2002) or beta calibration (Kull et al. 2017) of one feature, or
by logistic regression on any number of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rb_noisy.attacks import NORMS
from rb_noisy.calibration import fit_isotonic
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import tensors_digest, write_json
from rb_noisy.geometry import device_of, kappa, stands
from rb_noisy.measures import as_float64

FEATURES = ("kappa", "max_softmax", "margin", "entropy")
METHODS = ("logistic", "isotonic", "beta")
TARGETS = ("right", "robust")
FORMAT = "rb-noisy confidence 1"
# Softmax values nearer to 0 or 1 than this are all the same to a logarithm.
NEAREST = 1e-12


@dataclass(frozen=True)
class Calibrator:
    """A fitted map from logits and κ to confidence: numbers only, so that JSON holds all of it.

    Attributes:
        method: one of `METHODS`.
        features: names from `FEATURES`; one for isotonic and beta.
        kappa_steps: κ lies in 0..kappa_steps.
        parameters: isotonic: `score` (rising) and `probability` (not falling), linear between and constant beyond;
            logistic and beta: `centre`, `scale`, `weight` of each column and one `intercept`; the columns of beta are
            log s and −log(1 − s).
    """

    method: str
    features: tuple[str, ...]
    kappa_steps: int
    parameters: dict[str, tuple[float, ...]]

    def __call__(self, logits: Any, kappa: Any) -> Tensor:
        """Confidence (N,) float64 in 0..1 from logits (N, K) and κ (N,)."""
        columns = _columns(self.method, self.features, self.kappa_steps, logits, kappa)
        given = {name: np.array(values) for name, values in self.parameters.items()}
        if self.method == "isotonic":
            return torch.from_numpy(np.interp(columns[:, 0], given["score"], given["probability"]))
        # Column by column: a matrix product would round differently for another number of samples.
        standard = (columns - given["centre"]) / given["scale"]
        total = given["intercept"][0] + sum(standard[:, i] * w for i, w in enumerate(given["weight"]))
        return torch.from_numpy(total).sigmoid()


def fit_calibrator(
    logits: Any, kappa: Any, outcome: Any, *, features: Sequence[str], method: str, kappa_steps: int
) -> Calibrator:
    """Fit the probability of `outcome` (N,) bool from logits (N, K) and κ (N,) against the prediction.

    Logistic and beta have scikit-learn's penalty of strength 1 on standardised columns, which keeps a few hundred
    samples from giving endless slopes; beta's two weights are not negative (Kull et al. 2017, §4). An isotonic
    probability is held to 1/(N + 2) .. (N + 1)/(N + 2) (Laplace), since N samples cannot show certainty.

    Raises:
        InputError: unknown names, features that the method does not take, no sample of one outcome.
    """
    features = _checked_features(features, method)
    outcome = torch.as_tensor(outcome).detach().cpu()
    columns = _columns(method, features, kappa_steps, logits, kappa)
    if outcome.dtype != torch.bool or outcome.shape != columns.shape[:1]:
        raise InputError(
            f"outcome must be bool of shape {columns.shape[:1]}, got {outcome.dtype} of shape {tuple(outcome.shape)}"
        )
    n, positive = len(outcome), int(outcome.sum())
    if positive in (0, n):
        raise InputError(
            f"{'all' if positive else 'none'} of the {n} calibration images count as right, and a probability needs "
            f"both outcomes; give more images, or {'harder' if positive else 'easier'} ones"
        )
    if method == "isotonic":
        parameters = _fit_isotonic(columns[:, 0], outcome)
    else:
        parameters = _fit_logistic(columns, outcome.numpy(), rising=method == "beta")
    return Calibrator(method, features, kappa_steps, {name: tuple(map(float, v)) for name, v in parameters.items()})


def _checked_features(features: Sequence[str], method: str) -> tuple[str, ...]:
    features = (features,) if isinstance(features, str) else tuple(features)
    if method not in METHODS:
        raise unknown_name("calibration method", method, METHODS)
    for name in features:
        if name not in FEATURES:
            raise unknown_name("feature", name, FEATURES)
    if not features or len(set(features)) < len(features):
        raise InputError(f"features are {features}; name at least one of {', '.join(FEATURES)}, each once")
    if method != "logistic" and len(features) != 1:
        raise InputError(f"method {method!r} takes one feature, got {', '.join(features)}; or use method='logistic'")
    if method == "beta" and features[0] not in ("kappa", "max_softmax"):
        raise InputError(f"method 'beta' takes a feature within 0..1, kappa or max_softmax, got {features[0]}")
    return features


def _columns(method: str, features: tuple[str, ...], kappa_steps: int, logits: Any, kappa: Any) -> np.ndarray:
    """(N, columns) float64, what the method's regression sees."""
    logits, kappa = as_float64(logits), as_float64(kappa)
    if logits.ndim != 2 or logits.shape[1] < 2 or kappa.shape != logits.shape[:1]:
        raise InputError(
            f"logits must have shape (N, K) with K >= 2 and κ (N,), got {tuple(logits.shape)} and {tuple(kappa.shape)}"
        )
    if not logits.isfinite().all():
        raise InputError("some logits are not finite; look at the model")
    if len(kappa) and not (kappa.min() >= 0 and kappa.max() <= kappa_steps):
        raise InputError(f"κ must lie in 0..{kappa_steps}, got {kappa.min():g}..{kappa.max():g}")
    top = logits.topk(2, dim=1).values
    probability = logits.softmax(1)
    values = {
        "kappa": kappa,
        "max_softmax": probability.amax(1),
        "margin": top[:, 0] - top[:, 1],
        "entropy": torch.special.entr(probability).sum(1).neg(),
    }
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


@dataclass(frozen=True, eq=False)
class Confidence:
    """Of N inputs, on the CPU: `label` (N,) int64 predicted, `confidence` (N,) float64 in 0..1 (small = do not trust),
    `kappa` (N,) int64 in 0..steps against that label (small = easily attacked)."""

    label: Tensor
    confidence: Tensor
    kappa: Tensor


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with a calibrated confidence for every single prediction; see `calibrate`.

    Attributes:
        model: in eval mode, returns logits (N, K).
        calibrator: what was fitted.
        target: "right" or "robust": what the confidence is a probability of.
        target_source: where the outcomes of the calibration images come from, in words.
        eps, norm, alpha: of the attack that κ counts the steps of.
        n, positive: calibration images, and how many of them the target holds for.
        batch_size: inputs taken at a time.
    """

    model: nn.Module
    calibrator: Calibrator
    target: str
    target_source: str
    eps: float
    norm: str
    alpha: float
    n: int
    positive: int
    batch_size: int = 256

    def predict(self, x: Tensor, *, progress: Callable[[int], None] | None = None) -> Confidence:
        """Label, confidence and κ of images (N, C, H, W) in [0, 1]; costs kappa_steps passes forth and back at most."""
        attack = {"eps": self.eps, "norm": self.norm, "alpha": self.alpha, "steps": self.calibrator.kappa_steps}
        logits, values = _measured(self.model, x, self.batch_size, progress, **attack)
        return Confidence(logits.argmax(1), self.calibrator(logits, values), values)

    def save(self, path: str | os.PathLike) -> None:
        """Write all but the model as JSON, whole or not at all."""
        fields = {name: value for name, value in vars(self).items() if name not in ("model", "calibrator")}
        content = {"format": FORMAT, "weights_sha256": _weights(self.model), **fields, **asdict(self.calibrator)}
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> Calibrated:
        """What `save` wrote, for the same model; predictions are the same to the last bit.

        Raises:
            InputError: no such file, not what `save` writes, or the weights of `model` are not those calibrated.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            calibrated = _parsed(content, model)
        except OSError as error:
            raise InputError(f"the calibration {path} cannot be read ({error.strerror}); check the path") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"{path} holds no calibration ({reason}); write one with Calibrated.save") from error
        if content["weights_sha256"] != _weights(model):
            raise InputError(f"{path} was fitted on a model of other weights; load that model or calibrate this one")
        _check_mode(model)
        return calibrated


def calibrate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    target: str = "right",
    verdicts: Any = None,
    features: Sequence[str] = FEATURES,
    method: str = "logistic",
    kappa_steps: int = 10,
    alpha: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Calibrated:
    """Fit on held-out images how far every single prediction of `model` can be trusted.

    The calibration holds for inputs of the kind it was fitted on. Fitted on natural images, it is off by about 0.2
    (ECE) on attacked ones, whatever its features, because the two look alike to it; fitted on natural and attacked
    images together it is off less on each, but on both. So choose x as what the model will meet: natural images, images
    under attack (`pgd(model, x, y, …).x_adv`), or both concatenated, with their labels. Never the training images.

    Args:
        model: in eval mode, takes images in [0, 1], returns logits (N, K).
        x, y: images (N, C, H, W) in [0, 1], labels (N,); 200 of them will do.
        eps, norm: the ball, in units of [0, 1]; "Linf" or "L2".
        target: the confidence is the probability that the prediction on this input is "right", or is "robust": right,
            and nothing within ε of this input changes it.
        verdicts: for "robust": (N,) bool, what stood a strong attack (AutoAttack's `robust`). None: what stands all
            iterates of PGD-20 (α = ε/4, one random start), which says yes more often than AutoAttack would.
        features: from "kappa", "max_softmax", "margin", "entropy"; exactly one for isotonic and beta.
        method: "logistic", "isotonic" or "beta"; see `fit_calibrator`.
        kappa_steps, alpha: of κ, taken without a random start; alpha None is 2.5·ε/kappa_steps ([NL] App. D.3).
        seed: of PGD-20's start.
        batch_size: images taken at a time.
        progress: called with the number of images finished since the last call.

    Raises:
        InputError: a setting out of range, shapes that do not fit, or no image of one outcome.
    """
    features = _checked_features(features, method)
    if target not in TARGETS:
        raise unknown_name("calibration target", target, TARGETS)
    if verdicts is not None and target != "robust":
        raise InputError("verdicts say what stays right under attack; give them with target='robust'")
    if not 0 < eps < math.inf:
        raise InputError(f"eps is {eps}; give a number above 0, in units of the image range [0, 1]")
    if kappa_steps < 1 or batch_size < 1:
        raise InputError(f"kappa_steps and batch_size must be at least 1, got {kappa_steps} and {batch_size}")
    alpha = 2.5 * eps / kappa_steps if alpha is None else alpha
    y = torch.as_tensor(y).cpu()
    if y.shape != x.shape[:1] or not len(y) or y.is_floating_point():
        raise InputError(f"{tuple(y.shape)} labels for {len(x)} images; give one integer label per image")

    attack = {"eps": eps, "norm": norm, "alpha": alpha, "steps": kappa_steps}
    logits, values = _measured(model, x, batch_size, progress, **attack)
    outcome, source = logits.argmax(1) == y, "labels"
    if target == "robust" and verdicts is not None:
        verdicts = torch.as_tensor(verdicts).detach().cpu()
        if verdicts.dtype != torch.bool or verdicts.shape != y.shape:
            raise InputError(
                f"verdicts must be bool of shape {tuple(y.shape)}, got {verdicts.dtype} of {tuple(verdicts.shape)}"
            )
        outcome, source = outcome & verdicts, "given verdicts"
    elif target == "robust":
        ball = {"eps": eps, "alpha": eps / 4, "steps": 20, "norm": norm}
        standing = stands(model, x, y, seed=seed, batch_size=batch_size, **ball).cpu()
        outcome, source = outcome & standing, "PGD-20, any iterate"
    calibrator = fit_calibrator(logits, values, outcome, features=features, method=method, kappa_steps=kappa_steps)
    counts = {"n": len(y), "positive": int(outcome.sum())}
    return Calibrated(model, calibrator, target, source, eps, norm, alpha, **counts, batch_size=batch_size)


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise InputError("the model is in training mode, whose predictions depend on the batch; call model.eval()")


def _measured(
    model: nn.Module, x: Tensor, batch_size: int, progress: Callable[[int], None] | None, **attack: Any
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and κ (N,) against the predicted label, on the CPU."""
    _check_mode(model)
    values = kappa(model, x, random_start=False, batch_size=batch_size, progress=progress, **attack)
    device = device_of(model, x)
    with torch.no_grad():
        logits = [model(part.to(device)).cpu() for part in x.split(batch_size)]
    return torch.cat(logits), values.cpu()


def _weights(model: nn.Module) -> str:
    return tensors_digest(chain(model.named_parameters(), model.named_buffers()))


def _parsed(content: dict[str, Any], model: nn.Module) -> Calibrated:
    """The calibration in a file's content, or a ValueError, KeyError or TypeError that says what is wrong with it."""
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']!r}, not {FORMAT!r}")
    method, features = content["method"], _checked_features(content["features"], content["method"])
    parameters = {name: tuple(map(_number, values)) for name, values in content["parameters"].items()}
    columns = 2 if method == "beta" else len(features)
    if method == "isotonic":
        lengths = {"score": max(1, len(parameters["score"])), "probability": max(1, len(parameters["score"]))}
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
    counts = {name: content[name] for name in ("kappa_steps", "n", "positive", "batch_size")}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    eps, alpha = _number(content["eps"]), _number(content["alpha"])
    if eps <= 0 or alpha < 0 or content["norm"] not in NORMS or content["target"] not in TARGETS:
        raise ValueError("eps, alpha, norm or target is out of range")
    calibrator = Calibrator(method, features, counts.pop("kappa_steps"), parameters)
    source = str(content["target_source"])
    return Calibrated(model, calibrator, content["target"], source, eps, content["norm"], alpha, **counts)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
