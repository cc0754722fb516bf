"""Corrected labels back into the data: what the page of `rb-noisy label-issues` hands out as corrections.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rb_noisy.csv_files import from_cell
from rb_noisy.data import Dataset, to_bytes
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, only_changer
from rb_noisy.training_data import check_training_images

NEEDED = ("index", "given", "label")


def apply_corrections(data: Dataset, path: str | Path, files: Sequence[str] | None = None) -> Dataset:
    """`data` with the training labels that a CSV file of corrections gives it; the test labels are left alone.

    The file has a row for each sample that it corrects, with its `index` (0..N-1 in the training set), the `given`
    label that it has and the `label` that it is to have, both as class names. Where there is a column `file`, it is
    compared with `files`, the N file names of the training images. Other columns are not read.

    Raises:
        InputError: the file cannot be used, or was not made for these labels in this order; nothing is corrected then.
    """
    check_training_images(data)
    path, names = Path(path), data.class_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{data.name} has two classes called {twice!r}: give every class a name of its own")
    label_of = {name: label for label, name in enumerate(names)}
    labels, seen = data.y_train.clone(), {}
    for line, row in _rows(path):
        place = f"line {line} of {path}"
        for column in ("given", "label"):
            if row[column] not in label_of:
                raise InputError(f"{column} in {place}: {unknown_name('class', row[column], names)}")
        index = _index(row["index"], len(labels), data.name, place)
        if index in seen:
            raise InputError(f"{place} corrects sample {index}, as line {seen[index]} does: leave one of them out")
        seen[index] = line
        now = names[int(data.y_train[index])]
        if now != row["given"]:
            raise InputError(
                f"{place} corrects {row['given']!r} of sample {index}, which is {now!r} in {data.name}: give the data "
                "that the corrections were made on, without label noise of a recipe, and not corrected yet"
            )
        # The ranking's CSV has the folder of the data before it.
        if files is not None and not f"/{row.get('file', files[index])}".endswith(f"/{files[index]}"):
            raise InputError(
                f"{place} corrects {row['file']!r}, but sample {index} of {data.name} is {files[index]!r}: files were "
                "added or removed since; put them back as they were"
            )
        labels[index] = label_of[row["label"]]
    return replace(data, y_train=labels)


def save_npz(data: Dataset, path: str | Path) -> None:
    """Write a data set as `npz:FILE` reads it, whole or not at all: x_train, y_train, x_test, y_test, class_names.

    Images are (N, H, W, C), uint8 where that loses nothing and else float32 in [0, 1]. Raises `InputError` where there
    is such a file already, or the name does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path} is to be an .npz file: give it a name that ends in .npz")
    images = {"x_train": data.x_train, "x_test": data.x_test}
    arrays = {name: to_bytes(x).permute(0, 2, 3, 1).numpy() for name, x in images.items()}
    arrays |= {"y_train": data.y_train.numpy(), "y_test": data.y_test.numpy()}
    with only_changer(path):
        if path.exists():
            raise InputError(f"{path} is there already and is not overwritten: give another name, or remove it")
        with atomic_path(path) as temporary:
            np.savez(temporary, class_names=np.array(data.class_names), **arrays)


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file whose columns have names; one row at least."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}): check the path") from error
    if len(columns) == 1 and ";" in columns[0]:
        raise InputError(f"{path} is separated by semicolons: save it with commas")
    if missing := [name for name in NEEDED if name not in columns]:
        raise InputError(
            f"{path} has no column {missing[0]!r} but {list(columns)}: give the corrections.csv of the page that "
            "label-issues --html writes"
        )
    if not rows:
        raise InputError(f"{path} holds no corrections: make some in the page that label-issues --html writes")
    for line, row in rows:
        if None in row or None in row.values():
            raise InputError(f"line {line} of {path} has more or fewer cells than columns: download the file again")
    return [(line, {name: from_cell(cell) for name, cell in row.items()}) for line, row in rows]


def _index(text: str, count: int, name: str, place: str) -> int:
    try:
        index = int(text)
    except ValueError:
        index = -1
    if not 0 <= index < count:
        raise InputError(f"index {text!r} in {place} is no training sample of {name}: they are 0 to {count - 1}")
    return index
