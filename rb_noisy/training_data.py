"""What a recipe trains on: the images, and the labels it gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rb_noisy.data import Dataset, load_data, local_path, to_bytes
from rb_noisy.errors import InputError
from rb_noisy.files import tensors_digest
from rb_noisy.image_files import split_files
from rb_noisy.noise import NoisyLabels, corrupt
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run
from rb_noisy.same_data import check_classes, check_digest
from rb_noisy.subsets import subset


def training_set(recipe: Recipe, data_root: str | Path | None = None) -> tuple[Dataset, NoisyLabels]:
    """The data that a recipe trains on, and the labels it has there: `train_size` images at most.

    Raises:
        InputError: the data set or the label noise cannot be had, or has fewer training images than `train_size`.
    """
    data = load_data(recipe.data, data_root)
    check_training_images(data)
    # Before the cut, because label files and part-dependent noise are for the whole training set.
    labels = noisy_labels(recipe, data)
    count = recipe.train_size
    if count is None:
        return data, labels
    if count > len(data.x_train):
        raise InputError(f"train_size is {count} but {data.name} has {len(data.x_train)} training images")
    index = subset(data.name, data.y_train, count, kind=recipe.train_images).index
    data = replace(data, x_train=data.x_train[index], y_train=data.y_train[index], train_index=index)
    return data, replace(labels, given=labels.given[index], true=labels.true[index])


def data_digest(x_train: Tensor, given: Tensor, x_test: Tensor, y_test: Tensor) -> str:
    """SHA-256 of the images and labels that a run is on, in hexadecimal; bytes or the floats that they stand for."""
    images = {"x_train": x_train, "given": given, "x_test": x_test, "y_test": y_test}
    return tensors_digest((name, to_bytes(v) if v.is_floating_point() else v) for name, v in images.items())


def digest_of(data: Dataset, labels: NoisyLabels) -> str:
    """`data_digest` of what `training_set` returns."""
    return data_digest(data.x_train, labels.given, data.x_test, data.y_test)


def same_training_set(
    recipe: Recipe,
    class_names: Sequence[str],
    digest: str | None,
    who: str,
    data_root: str | Path | None = None,
    count: int | None = None,
) -> tuple[Dataset, NoisyLabels]:
    """`training_set`, which has to be the one that something was trained on.

    Args:
        class_names, digest: what it was then; no digest in what an earlier version wrote.
        who: what was trained, as the message calls it.
        count: how many samples it saw; None if that is not known.

    Raises:
        InputError: its classes, images, labels or their number are others now.
    """
    data, labels = training_set(recipe, data_root)
    if count not in (None, len(labels.given)):
        raise InputError(f"{who} saw {count} samples but {data.name} has {len(labels.given)} now; put them back")
    if digest is not None:
        check_digest(digest, digest_of(data, labels), data.name, who)
    check_classes(class_names, data.class_names, who, data.name, "give them their names and order back")
    return data, labels


def run_data(run: Run, data_root: str | Path | None = None, count: int | None = None) -> tuple[Dataset, NoisyLabels]:
    """What a run was trained on, in the order of its history's samples; see `same_training_set`."""
    return same_training_set(run.recipe, run.class_names, run.data_digest(), str(run.path), data_root, count)


def check_training_images(data: Dataset) -> None:
    """Raise `InputError` where a data set has test images alone."""
    if not len(data.x_train):
        raise InputError(
            f"{data.name} has test images alone, enough to evaluate on: add training images (x_train and y_train of an "
            ".npz file, the folder train of an image folder)"
        )


def noisy_labels(recipe: Recipe, data: Dataset) -> NoisyLabels:
    """The labels that a recipe gives to all (N,) training images of a data set."""
    return corrupt(
        data.y_train,
        recipe.noise,
        recipe.noise_rate,
        data.num_classes,
        recipe.noise_seed,
        images=data.x_train,
        **recipe.noise_options,
    )


def training_files(data: str, data_root: str | Path | None = None) -> tuple[Path, list[str]] | None:
    """The folder of an image folder's training images, and their names in it, in the order of the samples.

    None for other data than `imagefolder:DIR`. The names are posix paths, CLASS/…
    """
    kind, _, place = data.partition(":")
    if kind != "imagefolder":
        return None
    folder = local_path(place, data_root)
    files, train = split_files(folder)[0]["train"], folder / "train"
    return train, [file.relative_to(train).as_posix() for of_class in files for file in of_class]
