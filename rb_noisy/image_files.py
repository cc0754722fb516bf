"""Images that lie in folders: which files are any, and how they are read.

What starts with a dot, and what systems put beside files (`NO_DATA`), is no data, folder or file, wherever it lies. Nor
is anything but a file: a folder may be called 0.png, and a named pipe would be waited for. Links to
folders are followed, each folder is read once. What else is left out, because it is no image, a `DataWarning` says.
"""

from __future__ import annotations

import functools
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rb_noisy.errors import DataWarning, InputError
from rb_noisy.files import UNREADABLE

if TYPE_CHECKING:
    from PIL.Image import Image

# Synology's and QNAP's indices and bins, macOS's archives, Windows' bin, what a file system check found.
NO_DATA = ("@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found")
BESIDE_IMAGES = ("thumbs.db", "desktop.ini")  # Windows' own files
BACKGROUND = "white"
# Of what Pillow opens: stubs for other libraries, films, and pages that another program draws.
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
ONE_PICTURE = ("MPO", "PSD")  # further frames are previews and other exposures; layers


def split_files(folder: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    """The images of folder/train/CLASS and folder/test/CLASS, {"train": [files by class], "test": …}; the class names.

    The classes are the folders of train; of these any may lack test images, but not all. Where there is no train there
    are test images alone, and the classes are the folders of test.
    """
    train, test = folder / "train", folder / "test"
    if test.is_dir() and not train.is_dir():
        names = tuple(c.name for c in _class_folders(test))
        files = {"train": [[] for _ in names], "test": [image_files(test / name) for name in names]}
        places = [test]
    else:
        names = tuple(c.name for c in _class_folders(train))
        if odd := sorted({c.name for c in _class_folders(test)} - set(names)):
            raise InputError(f"test of {folder} has class folders that train has not, {odd}: add or remove them")
        files = {
            "train": [some_image_files(train / name) for name in names],
            "test": [image_files(test / name) if (test / name).is_dir() else [] for name in names],
        }
        places = [train, test]
    if not any(files["test"]):
        raise InputError(f"there is no image in {test}: put some into its class folders")
    _say_left_out(folder, [file for place in places for file in _left_out(place, names)])
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
    named = (path for path in _below(folder) if path.suffix.lower() in extensions())
    return sorted(path for path in named if path.is_file() or not path.exists())  # a link to nowhere is a lost image


def some_image_files(folder: Path) -> list[Path]:
    """`image_files`, or `InputError` where there is none."""
    if files := image_files(folder):
        return files
    kinds = ", ".join(sorted(extensions()))
    raise InputError(f"folder {folder} has no image: add some ({kinds}), or remove it, of a class from test too")


def folder_of_images(folder: Path) -> list[Path]:
    """`some_image_files` of a folder without classes; what is left out in it is said."""
    files = some_image_files(folder)
    _say_left_out(folder, [path for path in _below(folder) if _is_left_out(path)])
    return files


@functools.cache
def extensions() -> frozenset[str]:
    """How the names of images end, in small letters: those of Pillow's formats that are pictures."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(end for end, kind in known.items() if kind in Image.OPEN and kind not in NO_IMAGES)


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, also behind links; every folder is read once, and none that `folder` is in."""
    seen, tops = {path.resolve() for path in folder.resolve().parents}, [folder]
    while tops:  # what is there itself goes first, so that links to it change no name
        top = tops.pop(0)
        for place, folders, files in os.walk(top, onerror=_refuse):
            if (real := Path(place).resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if _is_data(Path(place, name), folder))
            tops += (Path(place, name) for name in folders if Path(place, name).is_symlink())
            yield from (path for path in (Path(place, name) for name in sorted(files)) if _is_data(path, folder))


def _refuse(error: OSError) -> None:
    raise InputError(
        f"folder {error.filename} cannot be read ({error.strerror}): give yourself the right to, or move it"
    )


def _is_left_out(path: Path) -> bool:
    return path.suffix.lower() not in extensions() and path.name.lower() not in BESIDE_IMAGES and path.is_file()


def _left_out(split: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split that no class has: those that are no images, and whatever lies beside the class folders."""
    beside = (
        sorted(path for path in split.iterdir() if path.is_file() and _is_data(path, split)) if split.is_dir() else []
    )
    of_classes = (path for name in names if (split / name).is_dir() for path in _below(split / name))
    return [path for path in beside if path.name.lower() not in BESIDE_IMAGES] + list(filter(_is_left_out, of_classes))


def _say_left_out(folder: Path, files: Sequence[Path]) -> None:
    if not files:
        return
    kinds = Counter(path.suffix.lower() or "without an ending" for path in files)
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    warnings.warn(
        f"of {folder} files are left out, which are no images that can be read or lie in no class folder: {counted}; "
        f"the first is {files[0]}",
        DataWarning,
        stacklevel=3,
    )


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
    from PIL import Image, UnidentifiedImageError

    try:
        # By a handle: by its name Pillow maps a plain TIFF into memory, and turns it wrongly.
        with open(file, "rb") as handle, Image.open(handle) as opened:
            if opened.mode.startswith(("I", "F")):
                raise InputError(f"image {file} has more than 8 bits per channel (mode {opened.mode}): convert it")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format not in ONE_PICTURE:
                raise InputError(
                    f"image {file} has {frames} frames or pages: save those you mean as files of their own"
                )
            opened.load()
            grey, image = opened.mode == "L", _upright(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            return np.asarray(image.convert("L"))[..., None] if grey else np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"image {file} is damaged or in no known format ({reason}): replace or remove it") from error


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):  # EXIF data that say nothing
        return image
