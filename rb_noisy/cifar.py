"""CIFAR-10 and CIFAR-100 as they lie on people's disks: the binary archive, its folder, and torchvision's folder.

Every file is read only if it has the MD5 of the official release, so its bytes are known before anything is made of
them. torchvision's folders hold pickles; `_Plain` builds nothing of them but arrays, lists, strings and numbers.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rb_noisy.errors import InputError
from rb_noisy.files import md5_of

Read = Callable[[str], bytes]
"""File name → its content, checked."""


@dataclass(frozen=True)
class Images:
    """One half of a CIFAR data set: `x` (N, 3, 32, 32) uint8, and int64 labels (N,) by the kind of class."""

    x: np.ndarray
    labels: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cifar:
    """A CIFAR data set: its halves, and the class names by the kind of class ("fine", for CIFAR-100 "coarse" too)."""

    train: Images
    test: Images
    names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Form:
    """A folder of official files.

    Attributes:
        folder: its name, under the data folder or within the archive.
        train, test, names: the files of each half, and those with the class names, by the kind of class.
        md5: of every file; empty where only the archive's is known.
        pickled: torchvision's form, else the binary one.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    names: Mapping[str, str]
    md5: Mapping[str, str] = field(default_factory=dict)
    pickled: bool = False


_TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVED = {  # in the archive that is downloaded
    "cifar10": Form(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        {},  # the names are constants here: the file of them has no published MD5
        {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        },
    ),
    "cifar100": Form(
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        {"fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"},
    ),
}
PICKLED = {  # what torchvision extracts
    "cifar10": Form(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        {"fine": "batches.meta"},
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        pickled=True,
    ),
    "cifar100": Form(
        "cifar-100-python",
        ("train",),
        "test",
        {"fine": "meta", "coarse": "meta"},
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        pickled=True,
    ),
}


def folders(name: str) -> list[Form]:
    """The extracted folders that "cifar10" or "cifar100" is read from."""
    return [form for form in (ARCHIVED[name], PICKLED[name]) if form.md5]


def read_extracted(name: str, root: Path) -> Cifar | None:
    """The first of the extracted folders in `root` that has all its files; None if none has.

    Raises:
        InputError: a file of it is damaged.
    """
    for form in folders(name):
        if all((root / form.folder / file).is_file() for file in form.md5):
            return _read(form, lambda file, form=form: _checked(name, root / form.folder / file, form.md5[file]))
    return None


def incomplete(name: str, root: Path) -> str:
    """What the folders that are in `root` lack, as part of a sentence; "" where there are none."""
    lacking = []
    for form in folders(name):
        missing = [file for file in form.md5 if not (root / form.folder / file).is_file()]
        if (root / form.folder).is_dir() and missing:
            lacking.append(f"{form.folder} there lacks {', '.join(missing)}")
    if not ARCHIVED[name].md5 and (root / ARCHIVED[name].folder).is_dir():
        lacking.append(f"the files of {ARCHIVED[name].folder} have no published MD5s and are not read")
    return "; ".join(lacking)


def read_archive(name: str, archive: bytes) -> Cifar:
    """The data set in its binary archive, which has been checked as a whole."""
    form = ARCHIVED[name]
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        return _read(form, lambda file: tar.extractfile(f"{form.folder}/{file}").read())


def _checked(name: str, path: Path, md5: str) -> bytes:
    content = path.read_bytes()
    if md5_of(content) != md5:
        raise InputError(
            f"{path} of data set {name!r} is damaged or not the official file (its MD5 is not {md5}): extract it "
            "again, or move its folder away"
        )
    return content


def _read(form: Form, read: Read) -> Cifar:
    half = _pickled_half if form.pickled else _binary_half
    train = [half(read(file), len(form.names)) for file in form.train]
    joined = Images(
        np.concatenate([part.x for part in train]),
        {kind: np.concatenate([part.labels[kind] for part in train]) for kind in train[0].labels},
    )
    names = {"fine": _TEN}
    for kind, file in form.names.items():
        content = read(file)
        names[kind] = tuple(_names(content, kind) if form.pickled else content.decode().split())
    return Cifar(joined, half(read(form.test), len(form.names)), names)


def _binary_half(content: bytes, kinds: int) -> Images:
    """Records of one label (of two: coarse, then fine) and the planes of one image."""
    labels = max(1, kinds)
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
    found = dict(zip(("fine", "coarse"), records[:, :labels].astype(np.int64).T[::-1], strict=False))
    return Images(records[:, labels:].reshape(-1, 3, 32, 32), found)


def _pickled_half(content: bytes, kinds: int) -> Images:
    batch = unpickle(content)
    keys = {"fine": "labels"} if "labels" in batch else {"fine": "fine_labels", "coarse": "coarse_labels"}
    labels = {kind: np.array(batch[key], np.int64) for kind, key in keys.items()}
    return Images(np.asarray(batch["data"]).reshape(-1, 3, 32, 32), labels)


def _names(content: bytes, kind: str) -> list[str]:
    meta = unpickle(content)
    return meta["label_names"] if "label_names" in meta else meta[f"{kind}_label_names"]


def unpickle(content: bytes) -> Any:
    """What a pickle of Python 2 holds, if that is arrays, lists, dicts, strings and numbers.

    For bytes that are known by their MD5; the restriction is a second lock, not the first.

    Raises:
        pickle.UnpicklingError: it asks for anything else.
    """
    return _Plain(io.BytesIO(content), encoding="latin1").load()


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # its home differs by version
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]
