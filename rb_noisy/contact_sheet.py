"""A grid of captioned images in one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path

COLUMNS = 8
CELL = (1.5, 1.9)  # inches, the caption included
HEAD = 0.4  # inches for the title
DPI = 110


def contact_sheet(
    images: Tensor, captions: Sequence[str], path: str | Path, title: str, columns: int = COLUMNS
) -> None:
    """Draw images (M, C, H, W) in [0, 1] with a caption above each, row by row, into a PNG.

    One channel is drawn in grey, of more than three the first three; each of the ⌈M / columns⌉ rows is 1.9 inches high
    and each column 1.5 inches wide at 110 dots an inch. Raises `InputError` for no image or a missing caption.
    """
    from matplotlib.figure import Figure

    if images.ndim != 4 or not len(images) or len(images) != len(captions):
        raise InputError(
            f"give images (M, C, H, W) and as many captions, got {tuple(images.shape)} and {len(captions)} captions"
        )
    if columns < 1:
        raise InputError(f"columns is {columns}; give at least 1")
    rows = math.ceil(len(images) / columns)
    width, height = columns * CELL[0], rows * CELL[1] + HEAD
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(0.1 / width, 1 - 0.2 / height, title, va="center", fontsize=11, parse_math=False)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * CELL[0], height - HEAD - row * CELL[1]
        # The image keeps a square of 1.3 inches, the two lines of its caption stand above it.
        axes = figure.add_axes(((left + 0.1) / width, (top - 1.8) / height, 1.3 / width, 1.3 / height))
        pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(caption, fontsize=7, pad=3, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
