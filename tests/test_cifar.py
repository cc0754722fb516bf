"""The CIFARs in the forms that others left on the disk: read if they are the official files, and else nothing is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

from rb_noisy import cifar
from rb_noisy.data import FILES, load_data
from rb_noisy.errors import InputError

RNG = np.random.default_rng(0)
NAMES = {
    "cifar10": {"fine": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]},
    "cifar100": {"fine": [f"fine_{i}" for i in range(100)], "coarse": [f"coarse_{i}" for i in range(20)]},
}


def python2_pickle(value) -> bytes:
    """A pickle as Python 2 and the NumPy of its time wrote the official files: byte strings, no bytes type."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def emit(value) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(emit, value)) + b"e"
        if isinstance(value, np.ndarray):
            rows, columns = value.shape
            kind = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|") + b"NNN"
            kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"tR"
            shape = b"J" + struct.pack("<i", rows) + b"J" + struct.pack("<i", columns) + b"\x86"
            return empty + b"(K\x01" + shape + kind + b"\x89" + string(value.tobytes()) + b"tb"
        return string(value.encode()) if isinstance(value, str) else b"J" + struct.pack("<i", value)

    return b"\x80\x02" + emit(value) + b"."


def binary(x, *labels) -> bytes:
    return np.concatenate([np.stack(labels, 1).astype(np.uint8), x], 1).tobytes()


def fabricate(name: str, form: cifar.Form) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Small files of a form, and what they hold."""
    files, parts = {}, {}
    for file in (*form.train, form.test):
        x = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
        labels = {kind: RNG.integers(0, len(names), 2) for kind, names in NAMES[name].items()}
        parts[file] = {"x": x.reshape(-1, 3, 32, 32), **labels}
        if not form.pickled:
            files[file] = binary(x, *list(labels.values())[::-1])
            continue
        keys = {"fine": "labels"} if name == "cifar10" else {"fine": "fine_labels", "coarse": "coarse_labels"}
        batch = {"batch_label": file, "data": x, "filenames": ["a.png", "b.png"]}
        files[file] = python2_pickle(batch | {keys[kind]: values.tolist() for kind, values in labels.items()})
    if form.pickled:
        names = {"label_names" if name == "cifar10" else f"{k}_label_names": v for k, v in NAMES[name].items()}
        (file,) = set(form.names.values())
        files[file] = python2_pickle(names | {"num_vis": 3072})
    train = [parts[file] for file in form.train]
    expected = {f"{key}_train": np.concatenate([part[key] for part in train]) for key in train[0]}
    return files, expected | {f"{key}_test": value for key, value in parts[form.test].items()}


FORMS = {form.folder: name for name in NAMES for form in cifar.folders(name)}


@pytest.fixture(params=sorted(FORMS))
def folder(request, monkeypatch, tmp_path):
    """(data set, folder, what its files hold): small files of a form, with the table of MD5s turned to them."""
    name = FORMS[request.param]
    table = next(t for t in (cifar.ARCHIVED, cifar.PICKLED) if t[name].folder == request.param)
    files, expected = fabricate(name, table[name])
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(table, name, dataclasses.replace(table[name], md5=md5))
    folder = tmp_path / request.param
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return name, folder, expected


def test_the_forms_are_those_that_people_have():
    assert set(FORMS) == {"cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-python"}
    for name, theirs in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        form = cifar.PICKLED[name]
        meta = [theirs.meta["filename"], theirs.meta["md5"]]
        assert form.folder == theirs.base_folder
        assert form.md5 == dict([*theirs.train_list, *theirs.test_list, meta])
        assert (list(form.train), form.test) == ([f for f, _ in theirs.train_list], theirs.test_list[0][0])


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_an_extracted_folder_is_read(folder, kind):
    name, path, expected = folder
    if kind not in NAMES[name]:
        pytest.skip("CIFAR-10 has one kind of label")
    data = load_data(name if kind == "fine" else f"{name}-coarse", path.parent, download=False)
    assert data.class_names == tuple(NAMES[name][kind])
    for half in ("train", "test"):
        x, y = getattr(data, f"x_{half}"), getattr(data, f"y_{half}")
        assert torch.equal(x, torch.from_numpy(expected[f"x_{half}"]).float() / 255)
        assert x.is_contiguous()
        assert y.dtype == torch.int64
        assert y.tolist() == expected[f"{kind}_{half}"].tolist()


def test_torchvision_reads_the_same(folder, monkeypatch):
    name, path, _ = folder
    theirs = {"cifar-10-batches-py": datasets.CIFAR10, "cifar-100-python": datasets.CIFAR100}.get(path.name)
    if theirs is None:
        pytest.skip("torchvision does not read the binary form")
    form = cifar.PICKLED[name]
    monkeypatch.setattr(theirs, "train_list", [[file, form.md5[file]] for file in form.train])
    monkeypatch.setattr(theirs, "test_list", [[form.test, form.md5[form.test]]])
    monkeypatch.setattr(theirs, "meta", theirs.meta | {"md5": form.md5[theirs.meta["filename"]]})
    ours = load_data(name, path.parent, download=False)
    for train, x, y in ((True, ours.x_train, ours.y_train), (False, ours.x_test, ours.y_test)):
        found = theirs(path.parent, train=train)
        assert torch.equal(torch.from_numpy(found.data).permute(0, 3, 1, 2).float() / 255, x)
        assert found.targets == y.tolist()
        assert tuple(found.classes) == ours.class_names


def test_one_changed_byte_and_nothing_is_read(folder):
    name, path, _ = folder
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(InputError, match=rf"{file} of data set '{name}' is damaged .*extract it again"):
            load_data(name, path.parent, download=False)
        file.write_bytes(content)


def test_an_incomplete_folder_is_named(folder):
    name, path, _ = folder
    (
        missing := path / cifar.PICKLED[name].test if path.name.endswith(("py", "python")) else path / "test_batch.bin"
    ).unlink()
    with pytest.raises(InputError, match=rf"{path.name} there lacks {missing.name}.*or {path.name}"):
        load_data(name, path.parent, download=False)


def test_files_without_a_published_md5_are_not_read(tmp_path):
    (tmp_path / "cifar-100-binary").mkdir()
    with pytest.raises(InputError, match="cifar-100-binary have no published MD5s and are not read"):
        load_data("cifar100", tmp_path, download=False)


def test_the_archive_comes_first(folder):
    name, path, _ = folder
    (path.parent / FILES[name][0].path).write_bytes(b"half")
    with pytest.raises(InputError, match="half-written or damaged"):
        load_data(name, path.parent, download=False)


class Hostile:
    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def test_a_hostile_pickle_is_not_even_opened(folder, tmp_path, monkeypatch):
    name, path, _ = folder
    witness, opened = tmp_path / "it ran", []
    monkeypatch.setattr(cifar, "unpickle", lambda content: opened.append(content))
    for file in path.iterdir():
        file.write_bytes(pickle.dumps(Hostile(witness), protocol=2))
    with pytest.raises(InputError, match="is damaged or not the official file"):
        load_data(name, path.parent, download=False)
    assert opened == []
    assert not witness.exists()


def test_the_reader_builds_nothing_but_data(tmp_path):
    witness = tmp_path / "it ran"
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir"):
        cifar.unpickle(pickle.dumps(Hostile(witness), protocol=2))
    assert not witness.exists()
    for forbidden in (b"c__builtin__\neval\n.", b"cnumpy.core.multiarray\nscalar\n.", b"cbuiltins\ngetattr\n."):
        with pytest.raises(pickle.UnpicklingError, match="it asks for"):
            cifar.unpickle(forbidden)
    assert cifar.unpickle(python2_pickle({"a": [1, "b"], "d": np.eye(2, dtype=np.uint8)}))["d"].tolist() == [
        [1, 0],
        [0, 1],
    ]
