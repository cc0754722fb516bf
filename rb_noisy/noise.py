"""Label noise: one sampler on a transition matrix, labels read from a file, and the record of what was done.

A new noise is one function from the rate and the number of classes to its matrix, with the noise's options as keyword
arguments, and one entry in `_MATRICES`.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
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

ROW_SUM_TOLERANCE = 1e-6
# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog (Patrini et al. 2017).
CIFAR10_CLASS_MAP = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Given labels beside the true ones, and how they were made.

    `given`: (N,) int64. `true`: (N,) int64, or None where unknown. `kind`, `rate`, `seed`, `options`: the arguments of
    `corrupt` that make them again; `rate` is None where the noise takes none, `seed` where nothing is drawn.
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
            how = json.loads(provenance)
            digest = how.pop("sha256")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} has a damaged provenance record ({error!r}): make the labels again") from error
        if digest != _digest(arrays, how):
            raise InputError(f"{path} was altered after it was saved (its SHA-256 differs): make the labels again")
        if "class_map" in how["options"]:  # JSON keys are strings
            how["options"]["class_map"] = _class_map(how["options"]["class_map"])
        true = torch.from_numpy(arrays["true"]) if "true" in arrays else None
        return cls(torch.from_numpy(arrays["given"]), true, **how)


def corrupt(
    labels: Any, noise: str | None, rate: float | None, num_classes: int, seed: int = 0, **options: Any
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
    * `human`: `file=`, a .npy, .npz (`key=` names the array), .txt or .csv file of one integer per sample, in order.

    `none`, `matrix` and `human` take no rate: give None or 0. The result depends on nothing but the seed, the position
    of a label and its class, and is the same on every platform. Raises `InputError` for anything else.
    """
    kind = _kind(noise)
    true = _labels(labels, num_classes, "labels")
    num_classes = int(num_classes)
    options = {name: value for name, value in options.items() if value is not None}
    if kind == "human":
        _check_options(kind, _read_human, options)
        _no_rate(kind, rate)
        given = _read_human(num_classes, **options)
        if len(given) != len(true):
            raise InputError(f"label file {options['file']} has {len(given)} labels for {len(true)} samples: one each")
        return NoisyLabels(given, true, num_classes, kind, options={k: str(v) for k, v in options.items()})
    matrix = transition_matrix(kind, rate, num_classes, **options)
    if not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed {seed!r} is no whole number from 0 up")
    given = _sample(true.numpy(), matrix.numpy(), int(seed))
    if "matrix" in options:
        options["matrix"] = matrix.tolist()
    if "class_map" in options:
        options["class_map"] = _class_map(options["class_map"])
    rate = None if kind in _WITHOUT_RATE else float(rate)
    return NoisyLabels(torch.from_numpy(given), true, num_classes, kind, rate, int(seed), options)


def transition_matrix(noise: str | None, rate: float | None, num_classes: int, **options: Any) -> Tensor:
    """The (K, K) float64 row-stochastic matrix T of a noise, T[i, j] = P(given = j | true = i).

    Arguments and errors as for `corrupt`; `human` noise has no matrix.
    """
    kind = _kind(noise)
    if kind == "human":
        raise InputError("noise 'human' is read from a file and has no transition matrix: use corrupt")
    _check_num_classes(num_classes)
    _check_options(kind, _MATRICES[kind], options)
    if kind in _WITHOUT_RATE:
        _no_rate(kind, rate)
    elif rate is None:
        raise InputError(f"noise {kind!r} needs a rate: give one in [0, 1]")
    elif not (isinstance(rate, Real) and 0 <= rate <= 1):
        raise InputError(f"rate {rate!r} of noise {kind!r} is no number in [0, 1]")
    else:
        rate = float(rate)  # a float32 would make a float32 matrix
    return torch.from_numpy(_MATRICES[kind](rate, int(num_classes), **options))


def _sample(true: np.ndarray, matrix: np.ndarray, seed: int) -> np.ndarray:
    # Raw PCG64 words are the same in every NumPy version; the top 53 bits are a uniform number in [0, 1).
    uniform = (np.random.PCG64(seed).random_raw(len(true)) >> np.uint64(11)) * 2.0**-53
    # A running sum, not .sum(), whose order depends on the processor. Divided by its own end it ends at exactly 1 from
    # the last possible class on, so that no uniform number falls behind it.
    cumulative = np.cumsum(matrix, axis=1)
    cumulative /= cumulative[:, -1:]
    given = np.empty_like(true)
    for c in np.unique(true):
        mine = true == c
        # side="right": the first class whose sum is above u; an impossible class repeats the sum before it.
        given[mine] = np.searchsorted(cumulative[c], uniform[mine], side="right")
    return given


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
    where = f"matrix {matrix}" if isinstance(matrix, (str, os.PathLike)) else "matrix"
    matrix = _read_matrix(Path(matrix)) if isinstance(matrix, (str, os.PathLike)) else matrix
    try:
        values = np.array(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no array of numbers ({error}): give ({num_classes}, {num_classes})") from error
    if values.shape != (num_classes, num_classes):
        raise InputError(f"{where} has shape {values.shape}: {num_classes} classes need ({num_classes}, {num_classes})")
    for row, (lowest, total) in enumerate(zip(values.min(axis=1), values.sum(axis=1), strict=True)):
        if not lowest >= 0:
            raise InputError(f"row {row} of {where} holds {lowest}: probabilities are numbers from 0 to 1")
        if not abs(total - 1) <= ROW_SUM_TOLERANCE:
            raise InputError(f"row {row} of {where} sums to {total}: every row must sum to 1")
    return values


_MATRICES = {
    "none": _none,
    "symmetric": _symmetric,
    "uniform": _uniform,
    "pair": _pair,
    "asymmetric": _asymmetric,
    "matrix": _matrix,
}
_WITHOUT_RATE = ("none", "matrix", "human")


def _read_matrix(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix in (".csv", ".txt"):
        try:
            return np.loadtxt(io.StringIO(_read_text(path).replace(",", " ")), ndmin=2)
        except ValueError as error:
            raise InputError(f"matrix file {path} has something else than numbers in rows ({error})") from error
    raise InputError(f"matrix file {path} is of no known kind: give .npy, .csv or .txt")


def _read_human(num_classes: int, *, file: str | os.PathLike | None = None, key: str | None = None) -> Tensor:
    """The labels of a file, (N,) int64."""
    if file is None:
        raise InputError("noise 'human' needs file=, a .npy, .npz, .txt or .csv file of one label per sample")
    path = Path(file)
    if key is not None and path.suffix != ".npz":
        raise InputError(f"key {key!r} chooses an array of a .npz file: leave it out for {path}")
    if path.suffix == ".npz":
        with open_npz(path) as arrays:
            if key is None and len(arrays.files) == 1:
                key = arrays.files[0]
            if key not in arrays.files:
                problem = "holds several arrays" if key is None else f"has no array {key!r}"
                raise InputError(f"label file {path} {problem}: give key= one of {', '.join(arrays.files)}")
            values = arrays[key]
    elif path.suffix == ".npy":
        values = _read_npy(path)
    elif path.suffix in (".txt", ".csv"):
        values = []
        for number, line in enumerate(_read_text(path).rstrip().splitlines(), start=1):
            try:
                values.append(int(line))
            except ValueError:
                raise InputError(f"line {number} of label file {path} is {line!r}: one integer per line") from None
    else:
        raise InputError(f"label file {path} is of no known kind: give .npy, .npz, .txt or .csv (no pickle is read)")
    return _labels(values, num_classes, f"label file {path}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as .npy ({error}): write it again with numpy.save") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): check the path") from error


def _labels(labels: Any, num_classes: int, what: str) -> Tensor:
    """`labels` as a new (N,) int64 CPU tensor, all of them in 0..num_classes-1."""
    _check_num_classes(num_classes)
    try:
        values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    except ValueError as error:
        raise InputError(f"{what}: no array of integers ({error})") from error
    if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
        raise InputError(
            f"{what}: shape {values.shape}, dtype {values.dtype}, but labels are integers of shape (N,), N > 0"
        )
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        raise InputError(
            f"{what}: label {values[wrong[0]]} at index {wrong[0]} is outside classes 0..{num_classes - 1}"
        )
    return torch.from_numpy(values.astype(np.int64))


def _kind(noise: str | None) -> str:
    kind = "none" if noise is None else str(noise)
    if kind != "human" and kind not in _MATRICES:
        raise unknown_name("noise", kind, [*_MATRICES, "human"])
    return kind


def _no_rate(kind: str, rate: float | None) -> None:
    # 0 counts as no rate, for recipes and command lines whose rate is always a number.
    if rate is not None and rate != 0:
        raise InputError(f"noise {kind!r} takes no rate and was given {rate!r}: leave it at None or 0")


def _check_num_classes(num_classes: int) -> None:
    if not isinstance(num_classes, Integral) or num_classes < 2:
        raise InputError(f"num_classes {num_classes!r} is no whole number from 2 up")


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
