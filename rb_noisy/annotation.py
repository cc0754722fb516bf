"""Labels for unlabelled images that may be under attack, each with κ and a confidence ([NL] §6), and how good they are.

Any model annotates. The one that [NL] trains for it (Algorithm 2, the robust annotator) is the method
`pgd-at+annotator`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rb_noisy.csv_files import write_csv
from rb_noisy.data import npz_images, open_npz, pixels
from rb_noisy.errors import InputError
from rb_noisy.files import user_path
from rb_noisy.forward import (
    ask,
    checked_images,
    device_of,
    image_shape_of,
    outside_inference,
    warn_of_attack,
)
from rb_noisy.geometry import resistance
from rb_noisy.image_files import folder_of_images, read_images
from rb_noisy.measures import wilson_interval
from rb_noisy.radius import radius, step_size, whole_number


@dataclass(frozen=True, eq=False)
class Annotations:
    """What a model says of N unlabelled images, on the CPU.

    Attributes:
        label: (N,) int64, the predicted class.
        kappa: (N,) int64 in 0..steps, against the predicted label. Small = easily attacked = do not trust the label.
        confidence: (N,) float64 in 0..1, the stated probability that the label is right; small = do not trust it.
            Max-softmax, which is *not calibrated*, unless a calibrator made it.
    """

    label: Tensor
    kappa: Tensor
    confidence: Tensor

    def to_csv(
        self,
        path: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        files: Sequence[str] | None = None,
    ) -> None:
        """Write one line per image, the whole file or nothing: index, label, class_name, kappa, confidence.

        Args:
            class_names: the K names; None leaves the column class_name out.
            files: N names that stand in a column `file` in the place of the index.

        Raises:
            InputError: a label beyond `class_names`, or another number of `files` than images.
        """
        n = len(self.label)
        if files is not None and len(files) != n:
            raise InputError(f"{len(files)} file names for {n} annotated images; give one for each")
        if class_names is not None and n and int(self.label.max()) >= len(class_names):
            raise InputError(f"label {int(self.label.max())} has no name: class_names holds {len(class_names)}")
        columns: dict[str, Sequence] = {"index": range(n)} if files is None else {"file": files}
        columns["label"] = self.label.tolist()
        if class_names is not None:
            columns["class_name"] = [class_names[label] for label in columns["label"]]
        columns["kappa"] = self.kappa.tolist()
        columns["confidence"] = [f"{value:.6f}" for value in self.confidence.tolist()]
        write_csv(path, list(columns), zip(*columns.values(), strict=True))


class Predictions(Protocol):
    """What a calibrator says of M images: each (M,)."""

    label: Tensor
    kappa: Tensor
    confidence: Tensor


class Calibrator(Protocol):
    """A calibrated model; `rb_noisy.confidence.calibrate` makes one."""

    def predict(self, x: Tensor) -> Predictions: ...


@outside_inference
def annotate(
    model: nn.Module,
    images: Tensor,
    *,
    eps: float | str,
    alpha: float | str | None = None,
    steps: int = 10,
    norm: str = "Linf",
    calibrator: Calibrator | None = None,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Annotations:
    """Label images, and say how far each label can be trusted.

    κ is taken against the predicted label and from the image itself, without a random start, so that the same images
    always get the same annotations. Without a calibrator the confidence is max-softmax, which is *not calibrated*:
    it ranks labels, and is no probability that they are right.

    Args:
        model: takes images in [0, 1] (N, C, H, W), returns logits (N, K); it is used in eval mode.
        images: (N, C, H, W) in [0, 1], perhaps under attack.
        eps: radius of the ball that κ is measured in, in units of the image range [0, 1].
        alpha: step size, same unit; None for 2.5·eps/steps [NL App. D.3].
        steps: n, the largest κ.
        norm: "Linf" or "L2".
        calibrator: the calibrated `model`, for the same ball; label, κ (with its own steps) and confidence are then
            its own.
        batch_size: images at a time.
        progress: called with the number of images finished since the last call.

    Raises:
        InputError: a setting out of range; images or answers of another kind than `rb_noisy.forward` says; a
            calibrator of another model, ε, α or norm.
    """
    steps, batch_size = whole_number(steps, "steps", least=1), whole_number(batch_size, "batch_size", least=1)
    eps = radius(eps, "eps", norm)
    step = 2.5 * eps / steps if alpha is None else step_size(alpha, eps, "alpha", norm)
    if calibrator is None:
        asked = ask(model, images, batch_size=batch_size)
        model, images, logits = asked.model, asked.x, asked.logits
    else:
        images = checked_images(images, image_shape_of(model))
        given = {} if alpha is None else {"alpha": step}
        _check_calibrator(calibrator, model, eps=eps, norm=norm, **given)
    device, parts = device_of(model, images), []
    hidden = spoiled = torch.zeros(0, dtype=torch.bool)
    for at in range(0, len(images), batch_size):
        x = images[at : at + batch_size].to(device)
        if calibrator is not None:
            found = calibrator.predict(x)
            part = (torch.as_tensor(found.label), torch.as_tensor(found.kappa), torch.as_tensor(found.confidence))
        else:
            answers = logits[at : at + batch_size].to(device)
            label = answers.argmax(1)
            ball = {"eps": eps, "alpha": step, "steps": steps, "norm": norm, "random_start": False}
            met = resistance(model, x, label, batch_size=batch_size, check=False, **ball)
            hidden, spoiled = torch.cat([hidden, met.masked.cpu()]), torch.cat([spoiled, met.spoiled.cpu()])
            # float64, because float32 rounds the confidence of many images to 1 and then cannot rank them.
            part = (label, met.kappa, answers.double().softmax(1).amax(1))
        parts.append(tuple(values.cpu() for values in part))
        if progress is not None:
            progress(len(x))
    warn_of_attack(hidden, spoiled)
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Annotations(none, none, none.double())
    label, measured, confidence = (torch.cat(values) for values in zip(*parts, strict=True))
    return Annotations(label.long(), measured.long(), confidence.double())


def _check_calibrator(calibrator: Calibrator, model: nn.Module, **settings: float | str) -> None:
    if getattr(calibrator, "model", model) is not model:
        raise InputError("the calibrator is one of another model; calibrate the model that annotates")
    for name, value in settings.items():
        own = getattr(calibrator, name, value)
        if own != value:
            raise InputError(
                f"the calibrator's κ has {name} = {own}, not {value}; annotate with the calibrator's settings"
            )


def load_images(source: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Unlabelled images (N, C, H, W) in [0, 1], and their file names if each has a file.

    * `npz:FILE`: the array `x`, else `x_test`, as `rb_noisy.load_data` takes them;
    * `imagefolder:DIR`: the images below DIR/test, whose class folders are not looked at;
    * a folder: the images in it and below, in the order of their names.
    Images in files are read as those of `rb_noisy.load_data`.

    Raises:
        InputError: nothing there, or images in another form.
    """
    kind, _, place = source.partition(":")
    if kind == "npz" and place:
        return _from_npz(user_path(place)), None
    folder = user_path(place) / "test" if kind == "imagefolder" and place else user_path(source)
    if not folder.is_dir():
        raise InputError(f"images {source!r}: {folder} is no folder; give a folder, npz:FILE or imagefolder:DIR")
    paths = folder_of_images(folder)
    return pixels(read_images(paths)).contiguous(), tuple(path.relative_to(folder).as_posix() for path in paths)


def _from_npz(path: Path) -> Tensor:
    with open_npz(path) as file:
        name = next((name for name in ("x", "x_test") if name in file), None)
        if name is None:
            raise InputError(f"{path} has no array 'x' or 'x_test': it holds {file.files}")
        images = np.asarray(file[name])
    return npz_images(f"{name} of {path}", images)


Answers = dict[str, np.ndarray]
"""What a model answers for N images, each (N,): `natural-right`, `natural-kappa`, `natural-confidence` on the images as
they are, the same three `attacked-…` on the attacked ones; and perhaps `…-right` for other attacks."""


def accuracy_by_share(
    models: Sequence[Answers], shares: Iterable[float], orders: Sequence[np.ndarray], kind: str = "attacked"
) -> list[dict[str, Any]]:
    """Label accuracy (0..1) with each share of the images under attack ([NL] Figure 9).

    Args:
        models: the answers of one or several models (seeds), about the same N images.
        orders: permutations of the N images, one per draw: of a share s, the first round(s·N) are under attack.
        kind: which attack.

    Returns:
        For each share `accuracy` (mean over models and draws), its 95% `interval` (see `_mean`), and `sd_over_draws`,
        the sample standard deviation over the draws of one model (None for a single draw).
    """
    lines = []
    for share in shares:
        values = np.array(
            [[_mixed(m["natural-right"], m[f"{kind}-right"], share, o).mean() for o in orders] for m in models]
        )
        deviation = float(np.sqrt(values.var(axis=1, ddof=1).mean())) if len(orders) > 1 else None
        lines.append({"share": share, **_mean(values.mean(axis=1), len(orders[0])), "sd_over_draws": deviation})
    return lines


def kept_accuracy(models: Sequence[Answers], share: float, orders: Sequence[np.ndarray], steps: int) -> dict[str, Any]:
    """Accuracy of the labels that are kept, with `share` of the images under attack; means over models and draws.

    Returns:
        `by_kappa`: for k = 0..steps, of the labels with κ ≥ k, the share `kept` and their accuracy `by_kappa`; the
        accuracy `by_confidence` of the equally many most confident labels, and the confidence that these have at
        least. `by_confidence`: the accuracy of the most confident 5%, 10%, … 100%. None where no label is kept.
    """
    n = len(orders[0])
    places = np.maximum(1, np.round(n * np.arange(1, 21) / 20).astype(int))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("kept", "kappa", "confidence", "least", "most")}
    for model in models:
        for order in orders:
            right, kappa_values, confidence = (
                _mixed(model[f"natural-{name}"], model[f"attacked-{name}"], share, order)
                for name in ("right", "kappa", "confidence")
            )
            count = np.array([(kappa_values >= k).sum() for k in range(steps + 1)])
            hits = np.array([right[kappa_values >= k].sum() for k in range(steps + 1)])
            best = most_confident_accuracy(confidence, right)
            last = np.maximum(count, 1) - 1
            columns["kept"].append(count / n)
            columns["kappa"].append(np.where(count > 0, hits / np.maximum(count, 1), np.nan))
            columns["confidence"].append(np.where(count > 0, best[last], np.nan))
            columns["least"].append(np.where(count > 0, -np.sort(-confidence)[last], np.nan))
            columns["most"].append(best[places - 1])
    by_model = {name: np.array(c).reshape(len(models), len(orders), -1) for name, c in columns.items()}
    kept, least = (by_model[name].mean(axis=(0, 1)) for name in ("kept", "least"))
    accuracy = {name: _mean_of_known(by_model[name], axis=1) for name in ("kappa", "confidence")}  # (models, k)
    lines = [
        {
            "kappa_at_least": k,
            "kept": float(kept[k]),
            "by_kappa": _mean(accuracy["kappa"][:, k], round(kept[k] * n)),
            "by_confidence": _mean(accuracy["confidence"][:, k], round(kept[k] * n)),
            "confidence_at_least": float(least[k]) if np.isfinite(least[k]) else None,
        }
        for k in range(steps + 1)
    ]
    most = zip(places / n, by_model["most"].mean(axis=(0, 1)), strict=True)
    return {
        "share": share,
        "by_kappa": lines,
        "by_confidence": [{"kept": float(part), "accuracy": float(value)} for part, value in most],
    }


def most_confident_accuracy(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,): the accuracy of the i most confident labels, i = 1..N; among ties, expected over random order."""
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    rate = np.bincount(group.reshape(-1), weights=right) / size
    return np.cumsum(np.repeat(rate, size)) / np.arange(1, len(right) + 1)


def _mixed(natural: np.ndarray, attacked: np.ndarray, share: float, order: np.ndarray) -> np.ndarray:
    chosen = order[: round(share * len(order))]
    result = natural.copy()
    result[chosen] = attacked[chosen]
    return result


def _mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    known = np.isfinite(values).sum(axis=axis)
    return np.where(known > 0, np.nansum(values, axis=axis) / np.maximum(known, 1), np.nan)


def _mean(of_models: np.ndarray, n: int) -> dict[str, Any]:
    """Mean accuracy and its 95% interval: Student's t over several models, Wilson's over the n images of one."""
    values = of_models[np.isfinite(of_models)]
    if not len(values):
        return {"accuracy": None, "interval": None, "interval_over": None}
    mean = float(values.mean())
    if len(values) == 1:
        interval = wilson_interval(round(mean * max(n, 1)), max(n, 1))
        return {"accuracy": mean, "interval": list(interval), "interval_over": "images"}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"accuracy": mean, "interval": [max(0.0, mean - half), min(1.0, mean + half)], "interval_over": "models"}
