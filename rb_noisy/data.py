"""Named data sets as tensors in memory, and batched augmentation on the device.

Every image is float32 in [0, 1] and every label an int64 class index. Official files are checked by MD5 each time they
are read, and no pickle of other bytes is ever opened.
"""

from __future__ import annotations

import gzip
import http.client
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rb_noisy import cifar
from rb_noisy.device import to_device
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import UNREADABLE, atomic_path, md5_of, user_path
from rb_noisy.image_files import read_images, split_files
from rb_noisy.pickles import holds_pickle, pickle_advice
from rb_noisy.reading import is_text


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A data set in memory.

    `x_train`, `x_test`: (N, C, H, W) float32 in [0, 1]; x_train may be empty. `y_train`, `y_test`: (N,) int64 in
    0..K-1. `class_names`: the K names, in label order. `train_index`: (N,) int64, which of all its training images
    x_train are; None for all.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    train_index: Tensor | None = None

    @property
    def train_numbers(self) -> Tensor:
        """(N,) int64, the number of each of x_train among all training images."""
        return torch.arange(len(self.x_train)) if self.train_index is None else self.train_index

    def __post_init__(self) -> None:
        for name in self.class_names:
            if not is_text(name):  # from a folder's name, say; it could be shown and saved nowhere
                raise InputError(f"class name {name!a} of {self.name} is no UTF-8 text: give the class another name")

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """C, the number of image channels."""
        return self.x_train.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return tuple(self.x_train.shape[2:])

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.x_train.shape[1:])
        sizes = f"{len(self.x_train)} train, {len(self.x_test)} test"
        return f"Dataset({self.name!r}: {sizes}, {shape}, {self.num_classes} classes)"


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded: its place under the data folder, the MD5 it must have there, and its mirrors."""

    path: str
    md5: str
    urls: tuple[str, ...]


_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def _mnist_file(name: str, md5: str) -> RemoteFile:
    # torchvision's own layout, so that a folder it filled is found.
    return RemoteFile(f"MNIST/raw/{name}", md5, tuple(f"{mirror}{name}.gz" for mirror in _MNIST_MIRRORS))


def _cifar_file(name: str, md5: str) -> RemoteFile:
    return RemoteFile(name, md5, (f"https://www.cs.toronto.edu/~kriz/{name}",))


# What is downloaded; `rb_noisy.cifar` has the other forms that are read.
FILES: dict[str, tuple[RemoteFile, ...]] = {
    "mnist": (
        _mnist_file("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        _mnist_file("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
        _mnist_file("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        _mnist_file("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ),
    "cifar10": (_cifar_file("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    "cifar100": (_cifar_file("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
}


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The folder of downloaded data: `root`, else $RB_NOISY_DATA, else ~/.cache/rb_noisy/data."""
    return user_path(root or os.environ.get("RB_NOISY_DATA") or "~/.cache/rb_noisy/data")


def local_path(place: str, root: str | os.PathLike | None = None) -> Path:
    """The file or folder of a data set: `place`, or, where it is relative and not there, that of `data_root(root)`."""
    path, shared = user_path(place), data_root(root) / place
    return shared if os.path.exists(shared) and not path.exists() else path


# (C, H, W) of the images of the data sets that always have the same.
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}
SHAPES |= dict.fromkeys(("cifar10", "cifar100", "cifar100-coarse"), (3, 32, 32))


def load_data(name: str, root: str | os.PathLike | None = None, *, download: bool = True) -> Dataset:
    """Load a data set by name, whole, into memory.

    * `digits`: the 1,797 handwritten 8x8 digits inside scikit-learn, pixel values divided by 16. **The split into
      1,257 training and 540 test images is ours**: scikit-learn has none, so 54 images of every class are drawn with a
      fixed seed. Writers are not known, so the same hand may be on both sides.
    * `mnist`, `cifar10`, `cifar100` (fine labels), `cifar100-coarse` (its 20 superclasses): downloaded to
      `data_root(root)` unless there already. The CIFARs are also read from a folder that others extracted there:
      torchvision's `cifar-10-batches-py` or `cifar-100-python`, or `cifar-10-batches-bin`.
    * `npz:FILE`: arrays x_train, y_train, x_test, y_test as Keras writes them: x uint8, or float in [0, 1], of shape
      (N, H, W), (N, H, W, C) or (N, C, H, W); y integers 0..K-1 of shape (N,) or (N, 1); `class_names` (K,) if there.
    * `imagefolder:DIR`: 8-bit images of one size in train/<class>/ and test/<class>/, classes in the order of their
      folder names, of which some may have no test images; one channel if every image is greyscale, else RGB. They are
      turned the way up that their EXIF data say; what is transparent is put on white. Hidden files and folders are left
      out, links to folders are followed, see `rb_noisy.image_files`.

    x_test and y_test alone, or the folder test alone, do for evaluation: x_train is then empty, (0, C, H, W).

    A relative FILE or DIR is looked for in the working folder first, then in `data_root(root)`.
    With `download=False` the network is never touched.
    Raises `InputError` for an unknown name, for data that are missing and cannot be downloaded, and for a file that is
    damaged or in another form.
    """
    kind, _, argument = name.partition(":")
    if kind in _FROM_PATH and argument:
        return _FROM_PATH[kind](name, local_path(argument, root))
    if name not in _NAMED:
        raise unknown_name("data set", name, [*_NAMED, "npz:FILE", "imagefolder:DIR"])
    return _NAMED[name](name, data_root(root), download)


def augment(x: Tensor, *, crop: int = 4, flip: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Random crop with `crop` pixels of zero padding, then a horizontal flip with probability 1/2, for a whole batch.

    `x`: (N, C, H, W), any range; returns the same shape, dtype and device. Each image has its own offset and flip.
    `generator` lives on the CPU, also for images on another device, so that a seed means the same everywhere.
    """
    if crop < 0:
        raise InputError(f"crop is the padding in pixels and cannot be {crop}: give 0 for no crop")
    n, channels, height, width = x.shape
    offsets = to_device(torch.randint(0, 2 * crop + 1, (2, n, 1), generator=generator), x.device)
    rows = offsets[0] + torch.arange(height, device=x.device)
    columns = offsets[1] + torch.arange(width, device=x.device)
    if flip:
        flipped = to_device(torch.rand(n, 1, generator=generator) < 0.5, x.device)
        columns = torch.where(flipped, columns.flip(1), columns)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return F.pad(x, (crop,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz file without pickle; whatever is wrong with it, also while it is read, is an `InputError`."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    if path.suffix == ".npy" and holds_pickle(path):
        raise InputError(pickle_advice(path))
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz file or is damaged: write it again with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise InputError(f"{path} is damaged ({error}): write it again with numpy.savez") from error
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({error}): write it again with numpy.savez, arrays only") from error


def pixels(images: np.ndarray) -> Tensor:
    """uint8 0..255 to a float32 tensor in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32)).div_(255)


def to_bytes(images: Tensor) -> Tensor:
    """float32 images in [0, 1] as uint8 0..255 where that loses nothing, a quarter of the memory; else as they are."""
    levels = torch.cat([(part * 255).round().to(torch.uint8) for part in images.split(1000)])
    parts = zip(levels.split(1000), images.split(1000), strict=True)
    return levels if all(torch.equal(from_bytes(a), b) for a, b in parts) else images


def from_bytes(images: Tensor) -> Tensor:
    """The float32 images in [0, 1] that `to_bytes` was given."""
    if images.dtype != torch.uint8:
        return images
    # By a tensor, because a GPU multiplies by the reciprocal of a number, which is off by a bit for half of the values.
    return images.float().div_(torch.full((), 255.0, device=images.device))


def _digits(name: str, root: Path, download: bool) -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((images / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    # Raw PCG64 words are the same in every NumPy version; its distributions need not be.
    order = np.argsort(np.random.PCG64(0).random_raw(len(y)), kind="stable")
    test = np.zeros(len(y), dtype=bool)
    for c in range(10):
        test[order[labels[order] == c][:54]] = True
    return Dataset(name, x[~test], y[~test], x[test], y[test], tuple("0123456789"))


def _mnist(name: str, root: Path, download: bool) -> Dataset:
    arrays = [_idx(content) for content in _contents(name, root, download)]
    x_train, x_test = (pixels(images[:, None]) for images in arrays[::2])
    y_train, y_test = (torch.from_numpy(labels.astype(np.int64)) for labels in arrays[1::2])
    return Dataset(name, x_train, y_train, x_test, y_test, tuple("0123456789"))


def _idx(content: bytes) -> np.ndarray:
    """An idx file of bytes: two zeros, the type 8, the number of dimensions, the dimensions, the values."""
    ndim = content[3]
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _cifar(name: str, root: Path, download: bool) -> Dataset:
    """`name`: "cifar10", "cifar100" or "cifar100-coarse". The archive, or else an extracted folder, or a download."""
    base, _, kind = name.partition("-")
    (archive,) = FILES[base]
    found = None if (root / archive.path).is_file() else cifar.read_extracted(base, root)
    if found is None:
        found = cifar.read_archive(base, *_contents(base, root, download))
    kind = kind or "fine"
    halves = ((pixels(half.x), torch.from_numpy(half.labels[kind].copy())) for half in (found.train, found.test))
    return Dataset(name, *(tensor for half in halves for tensor in half), tuple(found.names[kind]))


def _contents(name: str, root: Path, download: bool) -> list[bytes]:
    """The bytes of all files of a data set, fetched if they are missing, each with the MD5 it should have."""
    contents = []
    for file in FILES[name]:
        path = root / file.path
        if not path.is_file():
            _fetch(name, file, root, download)
        content = path.read_bytes()
        if md5_of(content) != file.md5:
            raise InputError(
                f"{path} of data set {name!r} is half-written or damaged (its MD5 is not {file.md5}): delete it and it "
                "is downloaded again"
            )
        contents.append(content)
    return contents


def _fetch(name: str, file: RemoteFile, root: Path, download: bool) -> None:
    reason = "download is off"
    for url in file.urls if download else ():
        try:
            return _download(url, root / file.path, file.md5)
        except (OSError, RuntimeError, http.client.HTTPException, EOFError, zlib.error) as error:
            reason = f"{url}: {error}"
    folder = (root / file.path).parent
    missing = " and ".join(Path(f.path).name for f in FILES[name] if not (root / f.path).is_file())
    if name in cifar.ARCHIVED:
        missing = " or ".join([missing, *(form.folder for form in cifar.folders(name))])
        reason = "; ".join(filter(None, (reason, cifar.incomplete(name, root))))
    raise InputError(
        f"data set {name!r} is not in {folder} ({reason}): put {missing} there, set RB_NOISY_DATA to a folder that has "
        f"{file.path}, or use npz:FILE or the built-in digits"
    )


def _download(url: str, path: Path, md5: str) -> None:
    """Download to a temporary name, unpack a lone .gz, and take `path` only with the right MD5."""
    from torchvision.datasets.utils import download_url

    with atomic_path(path) as temporary:
        download_url(url, temporary.parent, temporary.name)
        content = temporary.read_bytes()
        if url.endswith(".gz") and path.suffix != ".gz":
            content = gzip.decompress(content)
            temporary.write_bytes(content)
        if md5_of(content) != md5:
            raise RuntimeError("the download arrived damaged")


def _npz(name: str, path: Path) -> Dataset:
    with open_npz(path) as file:
        splits = [split for split in ("train", "test") if split == "test" or {"x_train", "y_train"} & set(file.files)]
        keys = [f"{kind}_{split}" for split in splits for kind in ("x", "y")]
        if missing := [key for key in keys if key not in file]:
            raise InputError(
                f"{path} has no array {missing[0]!r}: it holds {file.files}, and needs x_test and y_test, for training "
                "also x_train and y_train"
            )
        # A zip member that is no array comes back as bytes.
        arrays = {key: np.asarray(file[key]) for key in (*keys, "class_names") if key in file}
    x = {split: npz_images(f"x_{split} of {path}", arrays[f"x_{split}"]) for split in splits}
    y = {split: _npz_labels(f"y_{split} of {path}", arrays[f"y_{split}"]) for split in splits}
    for split in splits:
        if len(x[split]) != len(y[split]):
            raise InputError(f"{path} has {len(x[split])} images in x_{split} but {len(y[split])} labels in y_{split}")
    shapes = [list(x[split].shape[1:]) for split in splits]
    if shapes[0] != shapes[-1]:
        raise InputError(f"{path} has train images of (C, H, W) {shapes[0]} but test images of {shapes[1]}: one size")
    names = _npz_names(path, y, arrays.get("class_names"))
    x_train, y_train = x.get("train", x["test"][:0]), y.get("train", y["test"][:0])
    return Dataset(name, x_train, y_train, x["test"], y["test"], names)


def _npz_names(path: Path, y: dict[str, Tensor], names: np.ndarray | None) -> tuple[str, ...]:
    """The names of the classes that all labels, {split: (N,)}, are of; their numbers where the file has none."""
    largest = max(int(labels.max()) for labels in y.values())
    if names is None:
        names = np.arange(largest + 1)
        split = next(iter(y))  # a class that only the test images have is rather an error in their numbers
        if absent := set(names.tolist()) - set(y[split].tolist()):
            raise InputError(
                f"y_{split} of {path} has no label {min(absent)}: number the classes 0..K-1 or add class_names"
            )
    if names.ndim != 1 or largest >= len(names):
        raise InputError(f"{path} has label {largest} but class_names of shape {names.shape}: give one name per class")
    return tuple(n.decode(errors="surrogateescape") if isinstance(n, bytes) else str(n) for n in names.tolist())


def _npz_labels(what: str, y: np.ndarray) -> Tensor:
    if y.dtype.kind not in "iu" or (y.ndim != 1 and y.shape[1:] != (1,)):
        raise InputError(f"{what} has shape {y.shape} and dtype {y.dtype}: labels are integers of shape (N,) or (N, 1)")
    if y.size and not 0 <= y.min() <= y.max() < 2**20:
        raise InputError(f"{what} ranges over {y.min()}..{y.max()}: labels are classes 0..K-1")
    return torch.from_numpy(y.reshape(-1).astype(np.int64))


def npz_images(what: str, x: np.ndarray) -> Tensor:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float in [0, 1], as (N, C, H, W) float32.

    Raises `InputError`, which calls them `what`, for anything else, and where either axis may be that of the channels.
    """
    channels_last = x.ndim == 3 or (x.ndim == 4 and 1 <= x.shape[3] <= 4)
    # An axis of 4 is rather the height than RGBA beside one of fewer channels.
    channels_first = x.ndim == 4 and x.shape[1] in ((1, 3) if channels_last else (1, 3, 4))
    if not (channels_last or channels_first) or x.size == 0:
        raise InputError(f"{what} has shape {x.shape}: give (N, H, W), or (N, H, W, C) or (N, C, H, W) with C up to 4")
    if channels_last and channels_first:
        raise InputError(
            f"{what} has shape {x.shape}, whose channels may be the second axis or the last: if they are the second, "
            "give x.transpose(0, 2, 3, 1); if they are the last, images this small cannot be read, so pad them"
        )
    if channels_last:
        x = (x[..., None] if x.ndim == 3 else x).transpose(0, 3, 1, 2)
    x = np.ascontiguousarray(x)  # before the copy to float, so that the result is contiguous
    if x.dtype == np.uint8:
        return pixels(x)
    if x.dtype.kind != "f":
        raise InputError(f"{what} has dtype {x.dtype}: give uint8 0..255 or float in [0, 1]")
    if not (x.min() >= 0 and x.max() <= 1):
        raise InputError(f"{what} ranges over {x.min()}..{x.max()}: scale floats to [0, 1] or give uint8 0..255")
    return torch.from_numpy(x.astype(np.float32))


def _imagefolder(name: str, folder: Path) -> Dataset:
    files, names = split_files(folder)
    paths = [file for of_class in (*files["train"], *files["test"]) for file in of_class]
    x = pixels(read_images(paths))
    y_train, y_test = (
        torch.tensor([c for c, of_class in enumerate(files[split]) for _ in of_class], dtype=torch.int64)
        for split in ("train", "test")
    )
    n = len(y_train)
    return Dataset(name, x[:n].contiguous(), y_train, x[n:].contiguous(), y_test, names)


_NAMED = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar, "cifar100": _cifar, "cifar100-coarse": _cifar}
_FROM_PATH = {"npz": _npz, "imagefolder": _imagefolder}
