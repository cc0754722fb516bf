"""What a recipe trains on: the images, and the labels it gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rb_noisy.data import Dataset, class_folders, image_files, load_data, local_path
from rb_noisy.errors import InputError
from rb_noisy.noise import NoisyLabels, corrupt
from rb_noisy.recipes import Recipe


def training_set(recipe: Recipe, data_root: str | Path | None = None) -> tuple[Dataset, NoisyLabels]:
    """The data that a recipe trains on, and the labels it has there: `train_size` images at most.

    Raises:
        InputError: the data set or the label noise cannot be had, or is smaller than `train_size`.
    """
    data = load_data(recipe.data, data_root)
    # Before the cut, because label files and part-dependent noise are for the whole training set.
    labels = noisy_labels(recipe, data)
    count = recipe.train_size
    if count is None:
        return data, labels
    if count > len(data.x_train):
        raise InputError(f"train_size is {count} but {data.name} has {len(data.x_train)} training images")
    data = replace(data, x_train=data.x_train[:count], y_train=data.y_train[:count])
    return data, replace(labels, given=labels.given[:count], true=labels.true[:count])


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
    folder = local_path(place, data_root) / "train"
    return folder, [
        file.relative_to(folder).as_posix() for group in class_folders(folder) for file in image_files(group)
    ]
