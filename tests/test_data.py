"""Data sets arrive whole and right, or one sentence says why not; augmentation is a crop and a flip, no more."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rb_noisy import data
from rb_noisy.data import augment, data_root, from_bytes, load_data, pixels, to_bytes
from rb_noisy.errors import InputError

RNG = np.random.default_rng(0)


# --- files in the official forms, but small ---------------------------------------------------------------------------


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _records(n: int, label_columns: list[np.ndarray]) -> tuple[bytes, np.ndarray]:
    pixels = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    labels = np.stack(label_columns, 1).astype(np.uint8)
    return np.concatenate([labels, pixels.reshape(n, -1)], 1).tobytes(), pixels


def _cifar10() -> tuple[dict[str, bytes], dict]:
    names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    batches = [_records(2, [np.array([i, i + 4])]) for i in range(1, 6)]
    test, x_test = _records(2, [np.array([9, 0])])
    members = {f"cifar-10-batches-bin/data_batch_{i}.bin": b for i, (b, _) in enumerate(batches, 1)}
    members |= {"cifar-10-batches-bin/test_batch.bin": test, "cifar-10-batches-bin/batches.meta.txt": names}
    x_train, y_train = np.concatenate([x for _, x in batches]), [1, 5, 2, 6, 3, 7, 4, 8, 5, 9]
    expected = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": [9, 0]}
    return {"cifar-10-binary.tar.gz": _tar(members)}, expected | {"classes": (10, "airplane", "truck")}


def _cifar100() -> tuple[dict[str, bytes], dict]:
    coarse = np.array([19, 0, 4])
    train, x_train = _records(3, [coarse, np.array([99, 0, 42])])
    test, x_test = _records(3, [coarse, np.array([7, 8, 9])])
    names = "\n".join(f"fine_{i}" for i in range(100)).encode() + b"\n"
    folder = "cifar-100-binary"
    coarse_names = "\n".join(f"coarse_{i}" for i in range(20)).encode() + b"\n"
    archive = _tar(
        {
            f"{folder}/train.bin": train,
            f"{folder}/test.bin": test,
            f"{folder}/fine_label_names.txt": names,
            f"{folder}/coarse_label_names.txt": coarse_names,
        }
    )
    expected = {"x_train": x_train, "y_train": [99, 0, 42], "x_test": x_test, "y_test": [7, 8, 9]}
    return {"cifar-100-binary.tar.gz": archive}, expected | {"classes": (100, "fine_0", "fine_99")}


def _mnist() -> tuple[dict[str, bytes], dict]:
    files, expected = {}, {"classes": (10, "0", "9")}
    for split, prefix, labels in (("train", "train", [5, 0, 4]), ("test", "t10k", [7, 2])):
        x = RNG.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        files[f"MNIST/raw/{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 2051, len(x), 28, 28) + x.tobytes()
        files[f"MNIST/raw/{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, len(x)) + bytes(labels)
        expected |= {f"x_{split}": x[:, None], f"y_{split}": labels}
    return files, expected


FABRICATED = {"cifar10": _cifar10, "cifar100": _cifar100, "mnist": _mnist}


@pytest.fixture(params=sorted(FABRICATED))
def fabricated(request, monkeypatch, tmp_path):
    """(name, files by path, what they hold, an empty data folder), with the MD5 table turned to these files."""
    files, expected = FABRICATED[request.param]()
    table = tuple(
        dataclasses.replace(file, md5=hashlib.md5(files[file.path]).hexdigest()) for file in data.FILES[request.param]
    )
    monkeypatch.setitem(data.FILES, request.param, table)
    return request.param, files, expected, tmp_path / "root"


@pytest.fixture
def mirror(fabricated, monkeypatch, tmp_path):
    """A folder served on this machine as the only mirror of the fabricated files; returns (folder, requested paths)."""
    name, files, _, _ = fabricated
    folder, requests = tmp_path / "mirror", []
    folder.mkdir()
    for path, content in files.items():
        packed = content if path.endswith(".gz") else gzip.compress(content)
        (folder / (Path(path).name.removesuffix(".gz") + ".gz")).write_bytes(packed)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(
        data.FILES,
        name,
        tuple(dataclasses.replace(f, urls=(url + Path(f.urls[0]).name,)) for f in data.FILES[name]),
    )
    yield folder, requests
    server.shutdown()
    server.server_close()


def _fill(root: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def _check(dataset, expected) -> None:
    for split in ("train", "test"):
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert torch.equal(x, torch.from_numpy(expected[f"x_{split}"]).float() / 255)
        assert y.dtype == torch.int64
        assert y.tolist() == list(expected[f"y_{split}"])
    classes = expected["classes"]
    assert (dataset.num_classes, dataset.class_names[0], dataset.class_names[-1]) == classes


def _files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- named data sets --------------------------------------------------------------------------------------------------


def test_digits_split_every_image_once_and_in_proportion():
    from sklearn.datasets import load_digits

    digits = load_data("digits", download=False)
    assert (len(digits.y_train), len(digits.y_test)) == (1257, 540)
    assert digits.y_test.bincount().tolist() == [54] * 10
    assert (digits.num_classes, digits.in_chans, digits.image_size) == (10, 1, (8, 8))
    assert (float(digits.x_train.min()), float(digits.x_train.max())) == (0, 1)
    ours = torch.cat([digits.x_train, digits.x_test]).reshape(-1, 64) * 16
    x, y = load_digits(return_X_y=True)
    rows = np.column_stack([ours.numpy(), torch.cat([digits.y_train, digits.y_test]).numpy()])
    assert sorted(rows.tolist()) == sorted(np.column_stack([x, y]).tolist())


def test_digits_split_never_changes():
    digits = load_data("digits")
    images = hashlib.sha256((digits.x_test * 16).to(torch.uint8).numpy().tobytes()).hexdigest()
    assert images.startswith("c75467668935ac0c")


def test_repr_says_what_there_is():
    assert repr(load_data("digits")) == "Dataset('digits': 1257 train, 540 test, 1x8x8, 10 classes)"


def test_official_files_are_read(fabricated):
    name, files, expected, root = fabricated
    _fill(root, files)
    _check(load_data(name, root, download=False), expected)
    assert _files_in(root) == set(files)  # nothing is unpacked beside them


def test_folder_comes_from_the_argument_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RB_NOISY_DATA", raising=False)
    assert data_root() == tmp_path / ".cache/rb_noisy/data"
    monkeypatch.setenv("RB_NOISY_DATA", "~/elsewhere")
    assert data_root() == tmp_path / "elsewhere"
    assert data_root(tmp_path / "here") == tmp_path / "here"


def test_missing_data_are_downloaded_once(fabricated, mirror):
    name, files, expected, root = fabricated
    _, requests = mirror
    _check(load_data(name, root), expected)
    assert _files_in(root) == set(files)
    asked = len(requests)
    assert asked
    _check(load_data(name, root), expected)
    assert len(requests) == asked


def test_download_false_never_asks_the_network(fabricated, mirror):
    name, files, _, root = fabricated
    with pytest.raises(InputError) as error:
        load_data(name, root, download=False)
    assert mirror[1] == []
    message = str(error.value)
    for part in (repr(name), str(root), "RB_NOISY_DATA", "npz:FILE", "digits", *(Path(path).name for path in files)):
        assert part in message
    assert "\n" not in message


def test_no_network_is_the_same_sentence_with_the_reason(fabricated, monkeypatch):
    name, _, _, root = fabricated
    closed = tuple(dataclasses.replace(f, urls=("http://127.0.0.1:9/x.gz",)) for f in data.FILES[name])
    monkeypatch.setitem(data.FILES, name, closed)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        InputError, match=r"refused.*put .* there, set RB_NOISY_DATA .* npz:FILE or the built-in digits"
    ):
        load_data(name, root)
    assert _files_in(root) == set()


def test_next_mirror_is_tried(fabricated, mirror, monkeypatch):
    name, _, expected, root = fabricated
    table = tuple(dataclasses.replace(f, urls=("http://127.0.0.1:9/x.gz", *f.urls)) for f in data.FILES[name])
    monkeypatch.setitem(data.FILES, name, table)
    _check(load_data(name, root), expected)


@pytest.mark.parametrize("harm", [lambda c: c[: len(c) // 2], lambda c: c[:-9] + bytes([c[-9] ^ 1]) + c[-8:]])
def test_damaged_download_leaves_nothing(fabricated, mirror, harm):
    name, _, _, root = fabricated
    for file in mirror[0].iterdir():
        file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(InputError, match=f"data set '{name}' is not in"):
        load_data(name, root)
    assert _files_in(root) == set()


def test_interrupted_download_leaves_nothing(fabricated, monkeypatch):
    def interrupted(url, folder, filename):
        Path(folder, filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_url", interrupted)
    name, _, _, root = fabricated
    with pytest.raises(KeyboardInterrupt):
        load_data(name, root)
    assert _files_in(root) == set()


@pytest.mark.parametrize("harm", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:-1] + bytes([c[-1] ^ 1])])
def test_damaged_file_is_named_and_kept(fabricated, mirror, harm):
    name, files, _, root = fabricated
    for path in files:
        _fill(root, files | {path: harm(files[path])})
        with pytest.raises(InputError, match=f"{path} of data set '{name}' is half-written or damaged.*delete it"):
            load_data(name, root)
        assert _files_in(root) == set(files)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(InputError, match=r"unknown data set 'cifar11'; did you mean .*cifar10"):
        load_data("cifar11")
    with pytest.raises(InputError, match="npz:FILE"):
        load_data("npz:")


# --- npz:FILE ---------------------------------------------------------------------------------------------------------


def _arrays(**changes) -> dict[str, np.ndarray]:
    arrays = {
        "x_train": RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
        "x_test": RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8),
        "y_test": np.array([2, 1, 0]),
    }
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_npz_greyscale_and_column_labels(tmp_path):
    arrays = _arrays(y_train=np.array([[0], [1], [2], [0], [1], [2]]))
    dataset = load_data(_save(tmp_path / "a.npz", arrays))
    assert torch.equal(dataset.x_train, torch.from_numpy(arrays["x_train"])[:, None].float() / 255)
    assert dataset.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.image_size == (5, 4)


def test_a_relative_file_is_looked_for_here_first_then_among_the_data_sets(tmp_path, monkeypatch):
    here, root = tmp_path / "here", tmp_path / "root"
    for folder in (here, root):
        folder.mkdir()
    _save(root / "a.npz", _arrays())
    monkeypatch.chdir(here)
    assert len(load_data("npz:a.npz", root).x_train) == 6
    monkeypatch.setenv("RB_NOISY_DATA", str(root))
    assert len(load_data("npz:a.npz").x_train) == 6
    _save(here / "a.npz", _arrays(x_train=_arrays()["x_train"][:3], y_train=np.array([0, 1, 2])))
    assert len(load_data("npz:a.npz").x_train) == 3
    with pytest.raises(InputError, match=r"there is no file b\.npz"):
        load_data("npz:b.npz")


def test_images_that_are_bytes_come_back_from_bytes_as_they_were():
    levels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    images = pixels(levels.numpy())
    assert torch.equal(to_bytes(images), levels)
    assert torch.equal(from_bytes(levels), images)
    other = images + 1e-3
    assert to_bytes(other) is other


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
def test_npz_colour_of_any_kind_becomes_channels_first_in_unit_range(tmp_path, dtype):
    pixels = RNG.integers(0, 256, (9, 5, 4, 3))
    x = pixels.astype(np.uint8) if dtype is np.uint8 else (pixels / 255).astype(dtype)
    names = np.array(["cat", "dog", "owl", "fox"])
    dataset = load_data(_save(tmp_path / "a.npz", _arrays(x_train=x[:6], x_test=x[6:], class_names=names)))
    assert dataset.x_train.shape == (6, 3, 5, 4)
    assert dataset.x_train.dtype == torch.float32
    assert dataset.x_train.is_contiguous()
    got = torch.cat([dataset.x_train, dataset.x_test]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(got, pixels / 255, atol=1e-3 if dtype is np.float16 else 1e-6)
    assert dataset.class_names == ("cat", "dog", "owl", "fox")


F = np.float32
BAD_NPZ = {
    "missing key": ({"y_test": None}, r"no array 'y_test'.*x_train"),
    "image shape": ({"x_train": np.zeros((6, 5), np.uint8)}, r"x_train .* \(6, 5\).*\(N, H, W\)"),
    "five channels": ({"x_train": np.zeros((6, 8, 8, 5), np.uint8)}, r"\(6, 8, 8, 5\).*C up to 4"),
    "no images": ({"x_test": np.zeros((0, 5, 4), np.uint8)}, r"x_test .*\(0, 5, 4\)"),
    "lengths": ({"y_train": np.arange(3)}, "6 images in x_train but 3 labels in y_train"),
    "float labels": ({"y_train": np.array([0, 1, 2, 0, 1, 2.5])}, "y_train .*float64.*integers"),
    "one-hot labels": ({"y_train": np.eye(6, dtype=int)}, r"y_train .*\(6, 6\).*\(N,\)"),
    "negative label": ({"y_test": np.array([0, -1, 0])}, r"y_test .*-1\.\.0"),
    "huge label": ({"y_test": np.array([0, 2**62, 0])}, "y_test .*classes 0..K-1"),
    "classes from 1": ({"y_train": np.array([1, 2, 3, 1, 2, 3])}, "y_train .* has no label 0.*0..K-1"),
    "unknown test class": ({"y_test": np.array([0, 1, 3])}, "label 3"),
    "too few names": ({"class_names": np.array(["a", "b"])}, r"label 2 but class_names of shape \(2,\)"),
    "train and test differ": ({"x_test": np.zeros((3, 5, 5), np.uint8)}, r"\[1, 5, 4\].*\[1, 5, 5\]"),
    "integers as images": ({"x_train": np.zeros((6, 5, 4), int)}, "x_train .*int64.*uint8"),
    "floats up to 255": ({"x_train": np.full((6, 5, 4), 255, F)}, r"x_train .*255.*scale floats to \[0, 1\]"),
    "negative floats": ({"x_test": np.full((3, 5, 4), -0.1, F)}, "x_test .*-0.1"),
    "NaN": ({"x_train": np.where(np.arange(20).reshape(5, 4) == 3, np.nan, np.zeros((6, 5, 4), F))}, "x_train .*nan"),
    "pickle": ({"y_train": np.array([0, 1, None], dtype=object)}, "cannot be read .*Object arrays"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_npz_in_another_form_is_refused(tmp_path, case):
    changes, message = BAD_NPZ[case]
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match=message) as error:
        load_data(_save(path, _arrays(**changes)))
    assert str(path) in str(error.value)


def test_npz_missing_or_no_zip_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone\.npz"):
        load_data(f"npz:{tmp_path / 'gone.npz'}")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npy is no \.npz file"):
        load_data(f"npz:{tmp_path / 'a.npy'}")


def test_npz_damage_is_never_trained_on(tmp_path):
    path = tmp_path / "a.npz"
    arrays = _arrays()
    whole = load_data(_save(path, arrays))
    content, messages = path.read_bytes(), []
    for at in range(0, len(content), 7):
        for harmed in (content[:at], content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]):
            path.write_bytes(harmed)
            try:
                dataset = load_data(f"npz:{path}")
            except InputError as error:
                messages.append(str(error))
            else:  # a harmless byte, such as a date
                assert torch.equal(dataset.x_train, whole.x_train)
                assert torch.equal(dataset.y_test, whole.y_test)
    assert len(messages) > len(content) / 7
    assert all(str(path) in message for message in messages)


# --- imagefolder:DIR --------------------------------------------------------------------------------------------------


def _image_folder(root: Path, modes: tuple[str, ...] = ("RGB",), size: tuple[int, int] = (6, 4)) -> str:
    for split, n in (("train", 3), ("test", 2)):
        for c, label in enumerate(("bee", "ant")):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                grey = Image.fromarray(np.full(size[::-1], 100 * c + 10 * i, np.uint8))
                grey.convert(modes[i % len(modes)]).save(root / split / label / f"{i}.png")
    return f"imagefolder:{root}"


@pytest.mark.parametrize(("modes", "channels"), [(("L",), 1), (("RGB",), 3), (("L", "RGB"), 3), (("P", "RGBA"), 3)])
def test_imagefolder_is_read_in_class_and_file_order(tmp_path, modes, channels):
    dataset = load_data(_image_folder(tmp_path, modes))
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    assert dataset.class_names == ("ant", "bee")
    assert dataset.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.y_test.tolist() == [0, 0, 1, 1]
    assert dataset.x_train.shape == (6, channels, 4, 6)
    assert dataset.x_train.is_contiguous()
    shades = torch.tensor([100, 110, 120, 0, 10, 20]) / 255
    assert torch.equal(dataset.x_train, shades[:, None, None, None].expand(6, channels, 4, 6))


def test_imagefolder_errors_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*train"):
        load_data(f"imagefolder:{tmp_path / 'gone'}")
    name = _image_folder(tmp_path)
    odd = tmp_path / "test/bee/1.png"
    whole = odd.read_bytes()
    Image.new("RGB", (7, 4)).save(odd)
    with pytest.raises(InputError, match=r"test/bee/1\.png is 7x4 but .*train/ant/0\.png is 6x4: resize"):
        load_data(name)
    for harmed in (whole[:50], b"", b"no image"):
        odd.write_bytes(harmed)
        with pytest.raises(InputError, match=r"test/bee/1\.png is damaged"):
            load_data(name)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(odd)
    with pytest.raises(InputError, match=r"test/bee/1\.png has more than 8 bits"):
        load_data(name)
    odd.write_bytes(whole)
    (tmp_path / "test/cat").mkdir()
    with pytest.raises(InputError, match=r"test of .* has class folders that train has not, \['cat'\]"):
        load_data(name)
    (tmp_path / "train/cat").mkdir()
    with pytest.raises(InputError, match="train/cat has no image"):
        load_data(name)


# --- augmentation -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    crop=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_image_is_some_crop_and_flip_of_itself(shape, crop, flip, seed):
    n, _, height, width = shape
    # Unique positive values: a place in the output tells its place in the input.
    x = torch.arange(1.0, 1 + int(np.prod(shape))).reshape(shape)
    got = augment(x, crop=crop, flip=flip, generator=torch.Generator().manual_seed(seed))
    assert got.shape == x.shape
    padded = torch.nn.functional.pad(x, (crop,) * 4)
    for i in range(n):
        windows = [
            padded[i, :, row : row + height, column : column + width]
            for row in range(2 * crop + 1)
            for column in range(2 * crop + 1)
        ]
        windows += [window.flip(2) for window in windows] if flip else []
        assert any(torch.equal(got[i], window) for window in windows)


def test_images_of_a_batch_get_all_offsets_and_flips_evenly():
    n, crop = 8000, 1
    x = torch.arange(1.0, 10).reshape(1, 1, 3, 3).expand(n, 1, 3, 3)
    got = augment(x, crop=crop, generator=torch.Generator().manual_seed(0))
    outcomes, counts = got.unique(dim=0, return_counts=True)
    assert len(outcomes) == 3 * 3 * 2
    assert (counts - n / 18).abs().max() < 5 * (n / 18) ** 0.5


def test_augment_repeats_with_its_generator_and_not_otherwise():
    x = torch.rand(64, 3, 8, 8)
    first, again = (augment(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(x, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(augment(x, crop=0, flip=False), x)


def test_negative_crop_is_refused():
    with pytest.raises(InputError, match=r"crop .*-1"):
        augment(torch.zeros(1, 1, 2, 2), crop=-1)
