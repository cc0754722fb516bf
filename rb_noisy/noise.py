"""Label noise: by transition matrix, by image or from a file, and the record of what was done.

A new noise is one function from the rate and the number of classes to its matrix, with the noise's options as keyword
arguments, and one entry in `_MATRICES`. `instance` and `human` are the two kinds that no matrix describes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy.data import open_npz
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path
from rb_noisy.label_files import check_labels, check_num_classes, read_labels, split_label_file, stochastic_matrix
from rb_noisy.reading import parse_json

# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog (Patrini et al. 2017).
CIFAR10_CLASS_MAP = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
# The length of an image in instance noise, hence the standard deviation of its scores (ours): at 2, the likeliest of 9
# wrong classes gets about half of an image's flips; at 0 all get the same, at 10 one gets nearly all.
IMAGE_LENGTH = 2.0
# Images at a time: a chunk of 3x32x32 is 25 MB in double precision.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Given labels beside the true ones, and how they were made.

    `given`: (N,) int64. `true`: (N,) int64, or None where unknown. `kind`, `rate`, `seed`, `options`: the arguments of
    `corrupt` that make them again (`instance` needs the `images` besides); `rate` is None where the noise takes none,
    `seed` where nothing is drawn.
    """

    given: Tensor = field(repr=False)
    true: Tensor | None = field(repr=False)
    num_classes: int
    kind: str
    rate: float | None = None
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_wrong(self) -> Tensor:
        """(N,) bool: the given label is not the true one. Raises `InputError` where the true labels are unknown."""
        if self.true is None:
            raise InputError(
                f"which of these {len(self.given)} {self.kind!r} labels are wrong is unknown: true is None"
            )
        return self.given != self.true

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file: `given`, `true` where known, and `provenance`, a JSON string."""
        labels = {"given": self.given, "true": self.true}
        arrays = {key: tensor.cpu().numpy() for key, tensor in labels.items() if tensor is not None}
        how = {name: getattr(self, name) for name in ("num_classes", "kind", "rate", "seed", "options")}
        # Through JSON once, so that its digest is taken of what is read back.
        how = json.loads(json.dumps(how))
        provenance = json.dumps(how | {"sha256": _digest(arrays, how)})
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, provenance=np.array(provenance), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> NoisyLabels:
        """Read what `save` wrote. Raises `InputError` for a file that is missing, damaged, altered or another's."""
        with open_npz(Path(path)) as file:
            if not {"given", "provenance"} <= set(file.files):
                raise InputError(f"{path} holds {file.files}, not labels that NoisyLabels.save wrote: check the path")
            arrays = {key: file[key] for key in ("given", "true") if key in file}
            provenance = str(file["provenance"])
        try:
            how = parse_json(provenance, "it", "make the labels again")
            digest = how.pop("sha256")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} has a damaged provenance record ({error!r}): make the labels again") from error
        if digest != _digest(arrays, how):
            raise InputError(f"{path} was altered after it was saved (its SHA-256 differs): make the labels again")
        if "class_map" in how.get("options", {}):  # JSON keys are strings
            how["options"]["class_map"] = _class_map(how["options"]["class_map"])
        true = torch.from_numpy(arrays["true"]) if "true" in arrays else None
        try:
            return cls(torch.from_numpy(arrays["given"]), true, **how)
        except TypeError as error:
            raise InputError(f"{path} has a damaged provenance record ({error}): make the labels again") from error


def corrupt(
    labels: Any,
    noise: str | None,
    rate: float | None,
    num_classes: int,
    seed: int = 0,
    *,
    images: Tensor | None = None,
    **options: Any,
) -> NoisyLabels:
    """Corrupt labels by a named noise [NL §2, App. C.1; SGLR §4].

    `labels`: (N,) integers in 0..num_classes-1, as a tensor, an array or a list. `rate`: η in [0, 1].

    * `none` (or None): given = true.
    * `symmetric`: with probability η one of the K-1 other classes; the expected share of wrong labels is η.
    * `uniform`: with probability η redrawn from all K classes; the expected share of wrong labels is η(K-1)/K.
    * `pair`: with probability η class i becomes (i+1) mod K; η >= 0.5 only with `allow_majority=True`.
    * `asymmetric`: with probability η along `class_map={from: to}`; for 10 classes the default is CIFAR-10's
      truck->automobile, bird->airplane, deer->horse, cat<->dog (Patrini et al. 2017).
    * `matrix`: `matrix=`, a row-stochastic (K, K) array, or a .npy, .csv or .txt file of one.
    * `instance`: by the image, with a flip rate of each sample's own; see `instance_probabilities`. Needs `images`,
      (N, C, H, W) floats in [0, 1], of which only a digest, `images_sha256`, is kept among the options: given again, it
      must be that of the images.
    * `human`: `file=`, a .npy, .npz (`key=` names the array), .txt or .csv file of one integer per sample, in order;
      for short `human:FILE` or `human:FILE:KEY`. CIFAR-N's sets go by their names with or without `_label`: `aggre`,
      `worse`, `random1`, `noisy`. A `clean_label` in the file must be the labels given here.

    `none`, `matrix` and `human` take no rate: give None or 0. Every noise but `instance` ignores `images`. The result
    depends on nothing but the seed, the position of a label, its class and, for `instance`, its image; it is the same
    on every platform, but for what `instance_probabilities` says. Raises `InputError` for anything else.
    """
    kind, options = _kind(noise, options)
    true = check_labels(labels, num_classes, "labels")
    num_classes = int(num_classes)
    if kind == "human":
        _check_options(kind, read_labels, options)
        _rate(kind, rate)
        given, options = read_labels(true, num_classes, **options)
        return NoisyLabels(given, true, num_classes, kind, options=options)
    if kind == "instance":
        _check_options(kind, _instance, options)
        given, options = _instance(true, images, rate, num_classes, seed, **options)
    else:
        matrix = transition_matrix(kind, rate, num_classes, **options)
        given = _sample(true.numpy(), matrix.numpy(), _check_seed(seed))
        if "matrix" in options:
            options["matrix"] = matrix.tolist()
        if "class_map" in options:
            options["class_map"] = _class_map(options["class_map"])
    return NoisyLabels(torch.from_numpy(given), true, num_classes, kind, _rate(kind, rate), int(seed), options)


def transition_matrix(noise: str | None, rate: float | None, num_classes: int, **options: Any) -> Tensor:
    """The (K, K) float64 row-stochastic matrix T of a noise, T[i, j] = P(given = j | true = i).

    Arguments and errors as for `corrupt`; `human` and `instance` noise have no matrix.
    """
    kind, options = _kind(noise, options)
    if kind == "human":
        raise InputError("noise 'human' is read from a file and has no transition matrix: use corrupt")
    if kind == "instance":
        raise InputError("noise 'instance' has no transition matrix, each image has a row: use instance_probabilities")
    check_num_classes(num_classes)
    _check_options(kind, _MATRICES[kind], options)
    return torch.from_numpy(_MATRICES[kind](_rate(kind, rate), int(num_classes), **options))


def instance_probabilities(
    labels: Any, images: Tensor | None, rate: float, num_classes: int, seed: int = 0, std: float = 0.1
) -> Tensor:
    """What `instance` noise draws from: (N, K) float64, P(given = j) of each sample (Xia et al. 2020, part-dependent).

    `labels`: (N,) true classes; `images`: (N, C, H, W) floats in [0, 1]. Sample i of class y has a flip rate q_i from
    the normal distribution N(`rate`, `std`²) truncated to [0, 1]. It keeps its label with probability 1 - q_i and gets
    class j ≠ y with probability q_i · softmax(x_i W_y)_j, W_y ~ N(0, 1) of shape (CHW, K), the own class left out.

    The expected share of wrong labels is the mean of the truncated normal, rate + std·(φ(a) - φ(b)) / (Φ(b) - Φ(a))
    with a = -rate/std and b = (1 - rate)/std: at std 0.1, for rates 0.05, 0.1, 0.2, 0.3, 0.4, 0.5 it is 0.101, 0.129,
    0.206, 0.300, 0.400, 0.500. Two cases are ours: rate 0 flips nothing (truncation would make it 0.080), and std 0
    gives every sample the rate itself.

    x_i is the image minus its own mean, scaled to length `IMAGE_LENGTH`, so that over W the scores have that standard
    deviation whatever the data set (ours; the published code leaves the pixels as they are, and nearly all flips of an
    image go to one class). Nothing but a sample's own image and class, its position (for q_i) and the seed enters.

    All random words are the same everywhere. Logarithms, sums and products may differ in their last bits between
    processors and library versions, and the probabilities with them by about 1e-14: a drawn label differs only where
    its uniform number lies that close to an edge, about once in 1e13 labels.
    """
    true = check_labels(labels, num_classes, "labels").numpy()
    pixels = _pixels(images, len(true))
    flip = _flip_rates(len(true), _rate("instance", rate), std, _check_seed(seed))
    probabilities = np.empty((len(true), num_classes))
    for c in np.unique(true):
        # A stream of its own for each class, so that W_y does not depend on which classes there are.
        weights = torch.special.ndtri(_open_uniform(seed, pixels[0].size * num_classes, stream=2 + int(c)))
        weights = weights.reshape(-1, num_classes).numpy()
        mine = np.flatnonzero(true == c)
        for rows in np.split(mine, range(_CHUNK, len(mine), _CHUNK)):
            x = pixels[rows].reshape(len(rows), -1).astype(np.float64)
            x -= x.mean(axis=1, keepdims=True)
            # An image of one colour has length 0 and stays 0: all its wrong classes are as likely.
            x *= IMAGE_LENGTH / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            scores = x @ weights
            scores[:, c] = -np.inf
            target = np.exp(scores - scores.max(axis=1, keepdims=True))
            probabilities[rows] = target * (flip[rows, None] / target.sum(axis=1, keepdims=True))
            probabilities[rows, c] = 1 - flip[rows]
    return torch.from_numpy(probabilities)


def _flip_rates(n: int, rate: float, std: float, seed: int) -> np.ndarray:
    """(N,) the flip rates q_i."""
    if not (isinstance(std, Real) and 0 <= std < math.inf):
        raise InputError(f"std {std!r} of noise 'instance' is no number from 0 up")
    if rate == 0 or std == 0:
        return np.full(n, rate)
    low, high = torch.special.ndtr(torch.tensor([-rate / std, (1 - rate) / std], dtype=torch.float64))
    normal = torch.special.ndtri(low + (high - low) * _open_uniform(seed, n, stream=1))
    return (rate + std * normal).clamp(0, 1).numpy()


def _open_uniform(seed: int, n: int, stream: int) -> Tensor:
    """(n,) float64 uniform numbers in (0, 1), both ends left out. Stream 0 is the one that labels are drawn from."""
    words = np.random.PCG64(int(seed)).jumped(stream).random_raw(n)
    return torch.from_numpy(((words >> np.uint64(12)) + 0.5) * 2.0**-52)


def _instance(
    true: Tensor,
    images: Tensor | None,
    rate: float,
    num_classes: int,
    seed: int,
    *,
    std: float = 0.1,
    images_sha256: str | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    pixels = _pixels(images, len(true))
    digest = hashlib.sha256(f"{pixels.shape} ".encode())
    digest.update(pixels)
    digest = digest.hexdigest()[:16]
    if images_sha256 not in (None, digest):
        raise InputError(f"images have SHA-256 {digest}, not {images_sha256}: give those that the labels were made for")
    cumulative = _cumulative(instance_probabilities(true, images, rate, num_classes, seed, std).numpy())
    given = (cumulative <= _label_draws(len(true), int(seed))[:, None]).sum(axis=1)  # as in `_sample`, row by row
    return given, {"std": float(std), "images_sha256": digest}


def _pixels(images: Tensor | None, n: int) -> np.ndarray:
    """`images` as a contiguous (N, C, H, W) float32 array, without a copy where it is one."""
    if images is None:
        raise InputError("noise 'instance' depends on the images: give images=, (N, C, H, W) floats in [0, 1]")
    if not (isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4 and images[:1].numel()):
        what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images are {what}, but noise 'instance' needs a tensor of (N, C, H, W) floats in [0, 1]")
    if len(images) != n:
        raise InputError(f"noise 'instance' was given {len(images)} images for {n} labels: one each")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise InputError(f"images range over {float(low)}..{float(high)}: noise 'instance' needs floats in [0, 1]")
    return images.detach().cpu().float().contiguous().numpy()


def _sample(true: np.ndarray, matrix: np.ndarray, seed: int) -> np.ndarray:
    uniform, cumulative = _label_draws(len(true), seed), _cumulative(matrix)
    given = np.empty_like(true)
    for c in np.unique(true):
        mine = true == c
        # side="right": the first class whose sum is above u; an impossible class repeats the sum before it.
        given[mine] = np.searchsorted(cumulative[c], uniform[mine], side="right")
    return given


def _label_draws(n: int, seed: int) -> np.ndarray:
    # Raw PCG64 words are the same in every NumPy version; the top 53 bits are a uniform number in [0, 1).
    return (np.random.PCG64(seed).random_raw(n) >> np.uint64(11)) * 2.0**-53


def _cumulative(probabilities: np.ndarray) -> np.ndarray:
    # A running sum, not .sum(), whose order depends on the processor. Divided by its own end it ends at exactly 1 from
    # the last possible class on, so that no uniform number falls behind it.
    cumulative = np.cumsum(probabilities, axis=1)
    return cumulative / cumulative[:, -1:]


def _none(rate: None, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)


def _symmetric(rate: float, num_classes: int) -> np.ndarray:
    matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def _uniform(rate: float, num_classes: int) -> np.ndarray:
    return (1 - rate) * np.eye(num_classes) + rate / num_classes


def _pair(rate: float, num_classes: int, *, allow_majority: bool = False) -> np.ndarray:
    if rate >= 0.5 and not allow_majority:
        raise InputError(
            f"pair rate {rate} makes wrong labels as likely as true ones: go below 0.5 or give allow_majority=True"
        )
    eye = np.eye(num_classes)
    return (1 - rate) * eye + rate * np.roll(eye, 1, axis=1)


def _asymmetric(rate: float, num_classes: int, *, class_map: Mapping[int, int] | None = None) -> np.ndarray:
    if class_map is None and num_classes != 10:
        raise InputError(f"asymmetric noise has no default class map for {num_classes} classes: give class_map")
    matrix = np.eye(num_classes)
    for source, target in (CIFAR10_CLASS_MAP if class_map is None else _class_map(class_map)).items():
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise InputError(f"class_map entry {source}: {target} is outside classes 0..{num_classes - 1}")
        matrix[source] *= 1 - rate
        matrix[source, target] += rate
    return matrix


def _matrix(rate: None, num_classes: int, *, matrix: Any = None) -> np.ndarray:
    if matrix is None:
        raise InputError("noise 'matrix' needs matrix=, a row-stochastic array or a .npy, .csv or .txt file of one")
    return stochastic_matrix(matrix, num_classes)


_MATRICES = {
    "none": _none,
    "symmetric": _symmetric,
    "uniform": _uniform,
    "pair": _pair,
    "asymmetric": _asymmetric,
    "matrix": _matrix,
}
_WITHOUT_RATE = ("none", "matrix", "human")


def _kind(noise: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of noise and its options, those within a `human:FILE:KEY` among them; None is no option."""
    kind, colon, text = ("none" if noise is None else str(noise)).partition(":")
    options = {name: value for name, value in options.items() if value is not None}
    if (colon and kind != "human") or kind not in (*_MATRICES, "instance", "human"):
        raise unknown_name("noise", str(noise), [*_MATRICES, "instance", "human"])
    if colon:
        file, key = split_label_file(text)
        named = {"file": file} | ({} if key is None else {"key": key})
        if twice := named.keys() & options.keys():
            raise InputError(f"noise {noise!r} and {min(twice)}={options[min(twice)]!r} name two: give one of them")
        options |= named
    return kind, options


def _rate(kind: str, rate: float | None) -> float | None:
    """The rate as a float, None for a noise that takes none. Raises `InputError` for any other."""
    if kind in _WITHOUT_RATE:
        # 0 counts as no rate, for recipes and command lines whose rate is always a number.
        if rate is not None and rate != 0:
            raise InputError(f"noise {kind!r} takes no rate and was given {rate!r}: leave it at None or 0")
        return None
    if rate is None:
        raise InputError(f"noise {kind!r} needs a rate: give one in [0, 1]")
    if not (isinstance(rate, Real) and 0 <= rate <= 1):
        raise InputError(f"rate {rate!r} of noise {kind!r} is no number in [0, 1]")
    return float(rate)  # a float32 would make a float32 matrix


def _check_seed(seed: int) -> int:
    if not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed {seed!r} is no whole number from 0 up")
    return int(seed)


def _check_options(kind: str, function: Any, options: dict[str, Any]) -> None:
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of noise {kind!r}:", name, known)


def _class_map(class_map: Mapping[Any, Any]) -> dict[int, int]:
    try:
        return {int(source): int(target) for source, target in class_map.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"class_map {class_map!r} is no map from class to class, such as {{9: 1}}") from error


def _digest(arrays: Mapping[str, np.ndarray], how: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for key, values in arrays.items():
        digest.update(f"{key} {values.dtype.str} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()
