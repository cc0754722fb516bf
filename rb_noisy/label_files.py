"""Labels and transition matrices from files. No pickle is read."""

from __future__ import annotations

import io
import os
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_noisy.data import open_npz
from rb_noisy.errors import InputError
from rb_noisy.files import UNREADABLE, refuse_streams, user_path
from rb_noisy.pickles import holds_pickle, pickle_advice

ROW_SUM_TOLERANCE = 1e-6
_PICKLES = (".pt", ".pth", ".pkl", ".pickle")


def check_labels(labels: Any, num_classes: int, what: str) -> Tensor:
    """`labels` as a new (N,) int64 CPU tensor, all of them in 0..num_classes-1.

    Raises `InputError`, which calls them `what`, for anything else.
    """
    check_num_classes(num_classes)
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


def check_num_classes(num_classes: int) -> None:
    if not isinstance(num_classes, Integral) or num_classes < 2:
        raise InputError(f"num_classes {num_classes!r} is no whole number from 2 up")


def split_label_file(text: str) -> tuple[str, str | None]:
    """`FILE` or `FILE:SET` as the file and the set's name (None without one).

    A file that is there is never split, nor is a Windows path: no set's name holds a slash.
    """
    file, colon, name = text.rpartition(":")
    if not colon or "/" in name or "\\" in name or user_path(text).is_file():
        return text, None
    return file, name


def read_labels(
    true: Tensor, num_classes: int, *, file: str | os.PathLike | None = None, key: str | None = None
) -> tuple[Tensor, dict[str, str]]:
    """The labels that a file gives to samples whose true labels are `true` (N,), in the same order.

    `key` may leave out CIFAR-N's `_label`: `worse` finds worse_label, `random1` finds random_label1.
    Returns (N,) int64 labels and the options that name them again, `key` in full.
    Raises `InputError` for a file that cannot be used, and where its `clean_label` (of CIFAR-100N's coarse labels its
    `clean_coarse_label`) differs from `true`: CIFAR-N exists in the order of torchvision (also that of the official
    binary files) and in that of TFDS.
    """
    if not file or not isinstance(file, str | os.PathLike) or not isinstance(key, str | None):
        raise InputError("noise 'human' needs file=, a .npy, .npz, .txt or .csv file of one label per sample")
    path = user_path(file)
    refuse_streams(path)
    if key is not None and path.suffix not in (".npz", *_PICKLES):
        raise InputError(f"key {key!r} chooses an array of a .npz file: leave it out for {path}")
    clean = None
    if path.suffix == ".npz":
        with open_npz(path) as arrays:
            chosen = _array_name(path, key, arrays.files)
            values = arrays[chosen]
            if clean_name := _find("clean_coarse_label" if "coarse" in chosen else "clean_label", arrays.files):
                clean = arrays[clean_name]
        key = key and chosen
    elif path.suffix == ".npy":
        values = _read_npy(path)
    elif path.suffix in (".txt", ".csv"):
        values = []
        for number, line in enumerate(_read_text(path).rstrip().splitlines(), start=1):
            try:
                values.append(int(line))
            except ValueError:
                raise InputError(f"line {number} of label file {path} is {line!r}: one integer per line") from None
    elif path.suffix in _PICKLES:
        raise InputError(f"label file {pickle_advice(path)}")
    else:
        raise InputError(f"label file {path} is of no known kind: give .npy, .npz, .txt or .csv (no pickle is read)")
    given = check_labels(values, num_classes, f"label file {path}")
    if len(given) != len(true):
        raise InputError(f"label file {path} has {len(given)} labels for {len(true)} samples: one each")
    if clean is not None:
        _check_order(path, clean_name, check_labels(clean, num_classes, f"{clean_name} of {path}"), true)
    return given, {"file": str(file)} | ({"key": key} if key else {})


def stochastic_matrix(matrix: Any, num_classes: int) -> np.ndarray:
    """`matrix`, an array or a .npy, .csv or .txt file of one, as a (K, K) float64 array.

    Raises `InputError` where it has another shape or a row is no distribution.
    """
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


def _read_matrix(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix in (".csv", ".txt"):
        try:
            return np.loadtxt(io.StringIO(_read_text(path).replace(",", " ")), ndmin=2)
        except ValueError as error:
            raise InputError(f"matrix file {path} has something else than numbers in rows ({error})") from error
    raise InputError(f"matrix file {path} is of no known kind: give .npy, .csv or .txt")


def _find(key: str, names: list[str]) -> str | None:
    """The array called `key`, else the one so called when `_label` is left out of both."""
    if key in names:
        return key
    return next((name for name in names if name.replace("_label", "") == key.replace("_label", "")), None)


def _array_name(path: Path, key: str | None, names: list[str]) -> str:
    if key is None and len(names) == 1:
        return names[0]
    name = None if key is None else _find(key, names)
    if name is None:
        problem = "holds several arrays" if key is None else f"has no array {key!r}"
        raise InputError(f"label file {path} {problem}: give key= (FILE:SET) one of {', '.join(names)}")
    return name


def _check_order(path: Path, name: str, clean: Tensor, true: Tensor) -> None:
    if len(clean) != len(true):
        raise InputError(f"{name} of {path} has {len(clean)} labels for {len(true)} samples: give the set it is of")
    different = (clean != true).nonzero()
    if len(different):
        first = int(different[0])
        raise InputError(
            f"{name} of {path} is {int(clean[first])} at index {first} where the data set has {int(true[first])} "
            f"({len(different)} of {len(true)} differ), so its samples are in another order (CIFAR-N exists in "
            "torchvision's and in TFDS's) or its classes are others (CIFAR-100N has fine and coarse ones): give the "
            "file in the order of the data set, and the set of its classes"
        )


def _read_npy(path: Path) -> np.ndarray:
    if holds_pickle(path):
        raise InputError(pickle_advice(path))
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as .npy ({error}): write it again with numpy.save") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): check the path") from error
