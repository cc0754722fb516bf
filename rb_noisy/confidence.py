"""Sample-wise calibration: how likely one prediction is right, or right and stays right within ε, from κ and logits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rb_noisy.attacks import NORMS, check_attack
from rb_noisy.calibrators import (
    SOFTMAX,
    TARGETED,
    WIDE,
    Calibrator,
    Observed,
    check_parameters,
    checked_features,
    choose_calibrator,
    fit_calibrator,
)
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import tensors_digest, write_json
from rb_noisy.forward import (
    ask,
    checked_classes,
    checked_labels,
    in_training,
    outside_inference,
    warn_of_attack,
)
from rb_noisy.geometry import resistance, stands
from rb_noisy.radius import radius, step_size
from rb_noisy.reading import parse_json, read_bytes

TARGETS = ("right", "robust", "stays")
# Where the curve of Brier score against passes bends, on digits and CIFAR-10 (README, Is it right and does it stay so).
DEFAULT_STEPS = 5
DEFAULT_FEATURES = (*SOFTMAX, "kappa", "attack_margin", *TARGETED)
FORMAT = "rb-noisy confidence 2"


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
        target: "right", "robust" or "stays": what the confidence is a probability of.
        target_source: where the outcomes of the calibration images come from, in words.
        eps, norm, alpha: of the attack that κ counts the steps of.
        n, positive: calibration images, and how many of them the target holds for.
        cross_validated: where the method was chosen, the Brier score of each in question; see `choose_calibrator`.
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
    cross_validated: dict[str, float]
    batch_size: int = 256

    def predict(self, x: Tensor, *, progress: Callable[[int], None] | None = None) -> Confidence:
        """Label, confidence and κ of images (N, C, H, W) in [0, 1].

        Costs kappa_steps + 1 passes forth and kappa_steps − 1 back at most, fewer where a prediction soon falls; nearly
        as many again for each further attack that the features need.
        """
        observed = observe(
            self.model,
            x,
            features=self.calibrator.features,
            eps=self.eps,
            norm=self.norm,
            alpha=self.alpha,
            steps=self.calibrator.kappa_steps,
            batch_size=self.batch_size,
            progress=progress,
            warn=False,  # `calibrate` has
        )
        return Confidence(observed.logits.argmax(1), self.calibrator(observed), observed.kappa)

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
        way_out = "write one with Calibrated.save"
        text = read_bytes(Path(path), "the calibration", "check the path")
        content = parse_json(text, f"{path} holds no calibration: it", way_out)
        try:
            calibrated = _parsed(content, model)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"{path} holds no calibration ({reason}); {way_out}") from error
        if content["weights_sha256"] != _weights(model):
            raise InputError(f"{path} was fitted on a model of other weights; load that model or calibrate this one")
        _check_mode(model)
        return calibrated


@outside_inference
def calibrate(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | str,
    norm: str = "Linf",
    target: str = "right",
    verdicts: Any = None,
    features: Sequence[str] = DEFAULT_FEATURES,
    method: str = "auto",
    kappa_steps: int = DEFAULT_STEPS,
    alpha: float | str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Calibrated:
    """Fit on held-out images how far every single prediction of `model` can be trusted.

    The calibration holds for inputs of the kind it was fitted on. Fitted on natural images, it is off by 0.05 to 0.2
    (ECE) on those of PGD-20 and by more on stronger attacks', because the two look alike to it; fitted on natural and
    attacked images together it is off less on each, but on both. So choose x as what the model will meet: natural
    images, images under attack (`pgd(model, x, y, …).x_adv`), or both concatenated, with their labels. Never the
    training images.

    Args:
        model: in eval mode, takes images in [0, 1], returns logits (N, K).
        x, y: images (N, C, H, W) in [0, 1], labels (N,); 200 of them will do. y may be None for "stays".
        eps, norm: the ball, in units of [0, 1]; "Linf" or "L2".
        target: the confidence is the probability that the prediction on this input is "right", or is "robust": right,
            and nothing within ε of this input changes it, or "stays": nothing within ε changes it, right or wrong,
            which takes no labels.
        verdicts: for "robust": (N,) bool, what stood a strong attack (AutoAttack's `robust`). None: what `withstands`
            says, which is a little more often yes than AutoAttack would be.
        features: from `rb_noisy.calibrators.FEATURES`; exactly one for isotonic and beta. Those that end in
            "_targeted" and those that end in "_2eps" each take an attack of their own.
        method: "auto" (chosen by cross-validation, `choose_calibrator`), "logistic", "trees", "isotonic" or "beta".
        kappa_steps, alpha: of κ, taken without a random start; alpha None is 2.5·ε/kappa_steps ([NL] App. D.3).
        seed: of the random starts of `withstands`.
        batch_size: images taken at a time.
        progress: called with the number of images finished since the last call.

    Raises:
        InputError: a setting out of range, shapes that do not fit, or no image of one outcome.
    """
    features = checked_features(features, "logistic" if method == "auto" else method)
    if target not in TARGETS:
        raise unknown_name("calibration target", target, TARGETS)
    if verdicts is not None and target != "robust":
        raise InputError("verdicts say what stays right under attack; give them with target='robust'")
    eps = radius(eps, "eps", norm, above_zero=True)
    if kappa_steps < 1 or batch_size < 1:
        raise InputError(f"kappa_steps and batch_size must be at least 1, got {kappa_steps} and {batch_size}")
    if y is None and target != "stays":
        raise InputError(f"target {target!r} needs labels; give y, or take target='stays'")
    alpha = 2.5 * eps / kappa_steps if alpha is None else step_size(alpha, eps, "alpha", norm)
    if y is not None:
        y = torch.as_tensor(y).cpu()
        y = checked_labels(y if y.is_floating_point() else y.long(), x)
    if not len(x):
        raise InputError("there are no calibration images; give 200 or more")

    attack = {"eps": eps, "norm": norm, "alpha": alpha, "steps": kappa_steps}
    observed = observe(model, x, features=features, batch_size=batch_size, progress=progress, **attack)
    if y is not None:
        checked_classes(y, observed.logits.shape[1])
    label = observed.logits.argmax(1)
    outcome, source = (label == y if y is not None else torch.ones_like(label, dtype=torch.bool)), "labels"
    if target == "robust" and verdicts is not None:
        verdicts = torch.as_tensor(verdicts).detach().cpu()
        if verdicts.dtype != torch.bool or verdicts.shape != label.shape:
            raise InputError(
                f"verdicts must be bool of shape {tuple(label.shape)}, got {verdicts.dtype} of {tuple(verdicts.shape)}"
            )
        outcome, source = outcome & verdicts, "given verdicts"
    elif target != "right":
        if target == "stays":
            outcome = torch.ones_like(outcome)
        asked = outcome.nonzero().flatten()
        outcome[asked] = withstands(
            model, x[asked], label[asked].to(x.device), eps=eps, norm=norm, seed=seed, batch_size=batch_size
        ).cpu()
        source = WITHSTANDS
    chosen, fitting = {}, {"features": features, "kappa_steps": kappa_steps}
    if method == "auto":
        calibrator, chosen = choose_calibrator(observed, outcome, **fitting)
    else:
        calibrator = fit_calibrator(observed, outcome, method=method, **fitting)
    counts = {"n": len(label), "positive": int(outcome.sum())}
    return Calibrated(
        model, calibrator, target, source, eps, norm, alpha, **counts, cross_validated=chosen, batch_size=batch_size
    )


WITHSTANDS = "PGD-20 and targeted PGD-20, any iterate"


@outside_inference
def withstands(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Whether x (N, C, H, W) stays y (N,) under PGD-20 on the cross entropy and, of what is left, under PGD-20 on the
    margin of each of the nine likeliest other classes: α = ε/4, a random start each, any iterate counts.

    Returns:
        (N,) bool on the device of x. A few hundred passes for what stands, a few for what does not.
    """
    eps = radius(eps, "eps", norm)
    asked = ask(model, x, y, batch_size=batch_size)
    model, x, y = asked.model, asked.x, asked.y
    ball = {"eps": eps, "alpha": eps / 4, "steps": 20, "norm": norm, "batch_size": batch_size, "check": False}
    left = stands(model, x, y, seed=seed, **ball)
    rows = left.nonzero().flatten()
    if not len(rows):
        return left
    order = asked.logits[rows].cpu().scatter(1, y[rows].cpu()[:, None], -torch.inf).argsort(1, descending=True)
    for rank in range(min(9, order.shape[1] - 1)):
        rows = left.nonzero().flatten()
        target = order[:, rank].to(y.device)
        left[rows] = stands(model, x[rows], y[rows], seed=seed, target=target, **ball)
        order = order[left[rows].cpu()]
    return left


def _check_mode(model: nn.Module) -> None:
    if in_training(model):
        raise InputError("the model is in training mode, whose predictions depend on the batch; call model.eval()")


@outside_inference
def observe(
    model: nn.Module,
    x: Tensor,
    *,
    features: Sequence[str],
    eps: float | str,
    norm: str,
    alpha: float | str,
    steps: int,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
    warn: bool = True,
) -> Observed:
    """What `features` need, on the CPU: logits (N, K), κ against the predicted label, and the rest where asked for.

    Without `warn` nothing is said of what speaks against them, which takes four passes of the first few images.
    """
    _check_mode(model)
    eps, alpha = check_attack(eps=eps, alpha=alpha, steps=steps, norm=norm)
    asked = ask(model, x, batch_size=batch_size, warn=warn)
    model, x, logits = asked.model, asked.x, asked.logits.cpu()
    label = asked.logits.argmax(1)
    attack = {"norm": norm, "steps": steps, "random_start": False, "batch_size": batch_size, "check": False}
    near = resistance(model, x, label, eps=eps, alpha=alpha, progress=progress, **attack)
    if warn:
        warn_of_attack(near.masked, near.spoiled)
    found = Observed(logits, near.kappa.cpu(), near.margin.cpu())
    if set(TARGETED) & set(features):
        target = logits.topk(2, dim=1).indices[:, 1].to(x.device)
        met = resistance(model, x, label, eps=eps, alpha=alpha, target=target, **attack)
        found = replace(found, kappa_targeted=met.kappa.cpu(), attack_margin_targeted=met.margin.cpu())
    if set(WIDE) & set(features):
        # A ball of the whole image range is as large as any.
        wide = 2 * eps if norm != "Linf" else min(2 * eps, 1.0)
        met = resistance(model, x, label, eps=wide, alpha=2 * alpha, **attack)
        found = replace(found, kappa_2eps=met.kappa.cpu(), attack_margin_2eps=met.margin.cpu())
    return found


def _weights(model: nn.Module) -> str:
    return tensors_digest(chain(model.named_parameters(), model.named_buffers()))


def _parsed(content: dict[str, Any], model: nn.Module) -> Calibrated:
    """The calibration in a file's content, or a ValueError, KeyError or TypeError that says what is wrong with it."""
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']!r}, not {FORMAT!r}")
    method, features = content["method"], checked_features(content["features"], content["method"])
    parameters = {name: tuple(map(_number, values)) for name, values in content["parameters"].items()}
    check_parameters(method, features, parameters)
    scores = {str(name): _number(value) for name, value in content["cross_validated"].items()}
    counts = {name: content[name] for name in ("kappa_steps", "n", "positive", "batch_size")}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    norm = content["norm"]
    eps = radius(_number(content["eps"]), "eps", norm, above_zero=True)
    alpha = step_size(_number(content["alpha"]), eps, "alpha", norm)
    if content["norm"] not in NORMS or content["target"] not in TARGETS:
        raise ValueError("eps, alpha, norm or target is out of range")
    calibrator = Calibrator(method, features, counts.pop("kappa_steps"), parameters)
    if not isinstance(source := content["target_source"], str):
        raise ValueError(f"target_source is {source!r}, not text")
    return Calibrated(
        model, calibrator, content["target"], source, eps, content["norm"], alpha, **counts, cross_validated=scores
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
