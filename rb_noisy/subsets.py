"""Which images n of a data set are: the first n of a standard benchmark, of one's own data n drawn by class.

The benchmarks come in random order, and the first n are what RobustBench and the papers take. One's own data come as
they were filed, an image folder class by class: its first n would be of one class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rb_noisy.errors import InputError

FIRST, DRAWN = "first", "drawn"


@dataclass(frozen=True, eq=False)
class Subset:
    """`index` (n,) int64, ascending: which images; `words`: which these are, for whoever reads a figure."""

    index: Tensor
    words: str


def kind_of(data: str) -> str:
    """`FIRST` for a data set that has a name of its own, `DRAWN` for npz:FILE and imagefolder:DIR."""
    return DRAWN if ":" in data else FIRST


def subset(data: str, y: Tensor, n: int | None = None, seed: int = 0, kind: str | None = None) -> Subset:
    """`n` of the images of a data set, whose labels are `y` (N,); all of them for None.

    A draw is stratified by class, without replacement, depends on nothing but `y` and `seed`, and is the same on every
    machine; those drawn for a smaller `n` are among those for a larger one.

    Args:
        data: the data set's name, see `rb_noisy.load_data`.
        kind: `FIRST` or `DRAWN`; None for what `data` says.

    Raises:
        InputError: there are not so many images.
    """
    total = len(y)
    n = total if n is None else n
    if not 0 <= n <= total:
        raise InputError(f"{n} images are asked for but {data} has {total}; give 1 to {total}")
    if n == total or (kind or kind_of(data)) == FIRST:
        return Subset(torch.arange(n), in_words(n, total))
    return Subset(stratified_order(y, seed)[:n].sort().values, in_words(n, total, seed))


def in_words(n: int, total: int, seed: int | None = None) -> str:
    """What `Subset.words` says: "all 18 images", "the first 6 of 18 images", with a seed "6 of 18 images, drawn …"."""
    if n == total:
        return f"all {n} images"
    return f"the first {n} of {total} images" if seed is None else f"{n} of {total} images, drawn by class, seed {seed}"


def images_of(figures: dict) -> str:
    """Which images published figures are of. Those that do not say it are from before there was a draw."""
    return figures.get("images") or in_words(figures["n"], figures["of"])


def stratified_order(y: Tensor, seed: int) -> Tensor:
    """(N,) the samples in random order, every class as often in any beginning of it as its share of y (N,) allows."""
    # Raw PCG64 words are the same in every NumPy version; its distributions need not be.
    shuffle, offset = np.random.PCG64(seed).random_raw(2 * len(y)).reshape(2, -1)
    labels = np.asarray(y)
    order = np.lexsort((shuffle, labels))  # class by class, within each in random order
    _, begins, counts = np.unique(labels[order], return_index=True, return_counts=True)
    number = np.arange(len(y)) - np.repeat(begins, counts)
    # Random places in equal strides: one sample of a class in every 1/count of the way.
    place = (number + (offset >> np.uint64(11)) * 2.0**-53) / np.repeat(counts, counts)
    return torch.from_numpy(order[np.argsort(place, kind="stable")])
