"""Images that lie in folders: which files are any, and how they are read.

What starts with a dot, and what systems put beside files (`NO_DATA`), is no data, folder or file, wherever it lies. Nor
is anything but a file: a folder may be called 0.png, and a named pipe would be waited for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rb_noisy.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Synology's and QNAP's indices and bins, macOS's archives, Windows' bin, what a file system check found.
NO_DATA = ("@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found")
BACKGROUND = "white"


def split_files(folder: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    """The images of folder/train/CLASS and folder/test/CLASS, {"train": [files by class], "test": …}; the class names.

    The classes are the folders of train; of these any may lack test images, but not all. Where there is no train there
    are test images alone, and the classes are the folders of test.
    """
    train, test = folder / "train", folder / "test"
    if test.is_dir() and not train.is_dir():
        names = tuple(c.name for c in _class_folders(test))
        files = {"train": [[] for _ in names], "test": [image_files(test / name) for name in names]}
    else:
        names = tuple(c.name for c in _class_folders(train))
        if odd := sorted({c.name for c in _class_folders(test)} - set(names)):
            raise InputError(f"test of {folder} has class folders that train has not, {odd}: add or remove them")
        files = {
            "train": [some_image_files(train / name) for name in names],
            "test": [image_files(test / name) if (test / name).is_dir() else [] for name in names],
        }
    if not any(files["test"]):
        raise InputError(f"there is no image in {test}: put some into its class folders")
    return files, names


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: an imagefolder has train/<class>/ and test/<class>/")
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and _is_data(p, folder))
    if not folders:
        raise InputError(f"{folder} has no class folders: put the images of each class into a folder of its own")
    return folders


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below, by name; perhaps none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    named = (p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and _is_data(p, folder))
    return sorted(p for p in named if p.is_file() or not p.exists())  # a link to nowhere is an image that is lost


def some_image_files(folder: Path) -> list[Path]:
    """`image_files`, or `InputError` where there is none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if files := image_files(folder):
        return files
    kinds = ", ".join(IMG_EXTENSIONS)
    raise InputError(f"folder {folder} has no image: add some ({kinds}), or remove it, of a class from test too")


def _is_data(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") or part in NO_DATA for part in path.relative_to(folder).parts)


def read_images(files: Sequence[Path]) -> np.ndarray:
    """(N, C, H, W) uint8 of one image at least: C = 1 where every image is greyscale, else 3.

    Raises `InputError`, which names the file, for an image that cannot be read, or of another size than the first.
    """
    images: list[np.ndarray] = []
    for file in files:
        images.append(read_image(file))
        if images[-1].shape[:2] != images[0].shape[:2]:
            (height, width), (h, w) = images[-1].shape[:2], images[0].shape[:2]
            raise InputError(f"{file} is {width}x{height} but {files[0]} is {w}x{h}: resize all images to one size")
    channels = max(image.shape[2] for image in images)
    stacked = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    return stacked.transpose(0, 3, 1, 2)


def read_image(file: Path) -> np.ndarray:
    """(H, W, 1) uint8 for a greyscale image, else (H, W, 3), the way up that its EXIF data say, on `BACKGROUND`.

    What is transparent would otherwise show the colour that a drawing program left beneath it.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):
                raise InputError(f"image {file} has more than 8 bits per channel (mode {opened.mode}): convert it")
            opened.load()
            grey, image = opened.mode == "L", _upright(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            return np.asarray(image.convert("L"))[..., None] if grey else np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {file} is damaged or in no known format ({error}): replace or remove it") from error


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):  # EXIF data that say nothing
        return image
