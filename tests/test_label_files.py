"""Labels and matrices come from files as they stand there; a damaged or unmeant file is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rb_noisy.errors import InputError
from rb_noisy.noise import NoisyLabels, corrupt, transition_matrix

MATRIX = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]


# --- human labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h.npy", "h.npz", "h.txt", "h.csv"])
def test_human_labels_are_read(tmp_path, name):
    path, human = tmp_path / name, np.array([2, 0, 1, 2], np.uint8)
    if name == "h.npy":
        np.save(path, human)
    elif name == "h.npz":
        np.savez(path, human)
    else:
        path.write_text("2\n0\n1\n2\n")
    labels = corrupt([2, 1, 1, 0], "human", None, 3, file=path)
    assert labels.given.tolist() == [2, 0, 1, 2]
    assert labels.is_wrong.tolist() == [False, True, False, True]
    assert (labels.rate, labels.seed, labels.options) == (None, None, {"file": str(path)})


def test_human_labels_by_key(tmp_path):
    path = tmp_path / "h.npz"
    np.savez(path, clean=[0, 1], worse=[1, 1])
    assert corrupt([0, 1], "human", None, 2, file=path, key="worse").given.tolist() == [1, 1]
    for key, problem in ((None, "several arrays"), ("best", "no array 'best'")):
        with pytest.raises(InputError, match=rf"h\.npz .*{problem}.*clean, worse"):
            corrupt([0, 1], "human", None, 2, file=path, key=key)


def test_bad_label_files_are_named(tmp_path):
    def refused(name, content, message, **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(InputError, match=message) as error:
            corrupt([0, 1, 2, 0], "human", None, 3, file=path, **options)
        assert name in str(error.value)

    refused("a.txt", b"0\n1\n2\n", "3 labels for 4 samples")
    refused("a.txt", b"0\n1\n3\n7\n", r"label 3 at index 2 is outside classes 0\.\.2")
    refused("a.txt", b"0\n-1\n0\n0\n", "label -1 at index 1")
    refused("a.csv", b"label\n0\n1\n2\n", "line 1 .*'label'")
    refused("a.csv", b"0\n1\n\n2\n", "line 3 .*''")
    refused("a.txt", b"", "integers of shape")
    refused("a.txt", b"\xff\xfe0", "cannot be read as text")
    refused("b.npy", np.array([0.0, 1, 2, 0]), "dtype float64")
    refused("b.npy", np.zeros((4, 1), int), r"shape \(4, 1\)")
    refused("b.npy", np.array([0, None], object), "cannot be read as .npy")
    refused("b.npy", b"\x93NUMPY half", "cannot be read as .npy")
    refused("c.npz", b"PK half", "damaged")
    refused("gone.npz", None, "no file")
    refused("gone.npy", None, "No such file")
    refused("gone.txt", None, "No such file")
    refused("d.pt", b"", "no pickle is read")
    refused("a.txt", b"0\n", "key 'x'", key="x")


# --- CIFAR-N's files --------------------------------------------------------------------------------------------------

CLEAN = np.array([0, 1, 2, 1, 0], np.uint8)
SETS = {
    "clean_label": CLEAN,
    "aggre_label": np.array([0, 1, 2, 1, 1], np.uint8),
    "worse_label": np.array([2, 1, 2, 2, 0], np.uint8),
    "random_label1": np.array([0, 1, 0, 1, 0], np.uint8),
    "random_label2": np.array([0, 2, 0, 1, 0], np.uint8),
    "noisy_label": np.array([1, 1, 1, 1, 1], np.uint8),
}
SHORT = ("clean", "aggre", "worse", "random1", "random2", "noisy")


@pytest.fixture
def cifar_n(tmp_path):
    np.savez(tmp_path / "cifar_n.npz", **SETS)
    return tmp_path / "cifar_n.npz"


@pytest.mark.parametrize(("name", "short"), list(zip(SETS, SHORT, strict=True)))
def test_every_set_by_either_name_and_either_way(cifar_n, tmp_path, name, short):
    for key in (name, short):
        labels = corrupt(CLEAN, f"human:{cifar_n}:{key}", None, 3)
        assert labels.given.tolist() == SETS[name].tolist()
        assert (labels.kind, labels.options) == ("human", {"file": str(cifar_n), "key": name})
        again = corrupt(CLEAN, "human", None, 3, file=cifar_n, key=key, images=torch.rand(1))
        assert torch.equal(again.given, labels.given)
    labels.save(tmp_path / "saved.npz")
    back = NoisyLabels.load(tmp_path / "saved.npz")
    assert torch.equal(corrupt(back.true, back.kind, back.rate, 3, **back.options).given, labels.given)


def test_an_array_of_the_very_name_comes_first(tmp_path):
    np.savez(tmp_path / "h.npz", worse_label=[0, 0], worse=[1, 1])
    for key, given in (("worse", [1, 1]), ("worse_label", [0, 0])):
        assert corrupt([0, 1], f"human:{tmp_path / 'h.npz'}:{key}", None, 2).given.tolist() == given


def test_the_shorthand_needs_no_set_for_one_array(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez("one.npz", [1, 1])
    (tmp_path / "one.txt").write_text("1\n1\n")
    for file in ("one.npz", "one.txt", "~/one.npz"):
        labels = corrupt([0, 1], f"human:{file}", 0, 2)
        assert (labels.given.tolist(), labels.options) == ([1, 1], {"file": file})
    assert corrupt([0, 1], "human:one.npz", None, 2, key="arr_0").given.tolist() == [1, 1]


def test_colons_belong_to_a_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:\\labels.npz", "a:b.npz"):
        with open(name, "wb") as file:
            np.savez(file, worse=[1, 1], clean=[0, 1])
        for key in ("worse", "clean"):
            labels = corrupt([0, 1], f"human:{name}:{key}", None, 2)
            assert labels.options == {"file": name, "key": key}
        with pytest.raises(InputError, match="holds several arrays"):
            corrupt([0, 1], f"human:{name}", None, 2)
    for missing in ("D:\\labels.npz", "d:/labels.npz"):
        with pytest.raises(InputError) as error:
            corrupt([0, 1], f"human:{missing}", None, 2)
        assert f"no file {missing}" in str(error.value)


def test_another_order_of_samples_is_found(cifar_n):
    with pytest.raises(
        InputError, match=r"clean_label of .*cifar_n\.npz is 2 at index 2 .* has 1 \(2 of 5 differ\).*TFDS"
    ):
        corrupt([0, 1, 1, 2, 0], f"human:{cifar_n}:worse", None, 3)


def test_clean_labels_of_another_length_are_refused(tmp_path):
    np.savez(tmp_path / "h.npz", clean_label=[0, 1, 0], worse_label=[1, 1])
    with pytest.raises(InputError, match=r"clean_label of .*h\.npz has 3 labels for 2 samples"):
        corrupt([0, 1], f"human:{tmp_path / 'h.npz'}:worse", None, 2)


@pytest.mark.parametrize("noise", ["human:CIFAR-10_human.pt:worse_label", "human:CIFAR-10_human.pt"])
def test_a_pickle_is_not_read_but_can_be_converted(tmp_path, monkeypatch, noise):
    monkeypatch.chdir(tmp_path)
    torch.save(SETS, "CIFAR-10_human.pt")
    with pytest.raises(InputError, match=r"no pickle is read.*at your own risk") as error:
        corrupt(CLEAN, noise, None, 3)
    conversion = str(error.value).split("`")[1]
    exec(conversion, {})
    assert corrupt(CLEAN, "human:CIFAR-10_human.npz:worse_label", None, 3).given.tolist() == [2, 1, 2, 2, 0]


@pytest.mark.parametrize(
    ("noise", "options", "message"),
    [
        ("human:", {}, "needs file="),
        ("human:gone.npz:worse", {}, "no file gone.npz"),
        ("human:gone.npz", {"file": "other.npz"}, "file='other.npz' name two"),
        ("human:gone.npz:worse", {"key": "clean"}, "key='clean' name two"),
        ("human:gone.txt:worse", {}, "key 'worse' chooses an array of a .npz file"),
    ],
)
def test_shorthands_that_cannot_be_meant_are_refused(noise, options, message):
    with pytest.raises(InputError, match=message):
        corrupt([0, 1], noise, None, 2, **options)


def test_an_unknown_set_is_answered_with_those_there_are(cifar_n):
    with pytest.raises(InputError, match=r"has no array 'worst'.*aggre_label, worse_label"):
        corrupt(CLEAN, f"human:{cifar_n}:worst", None, 3)


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "csv", "txt"])
def test_matrix_from_a_file_is_the_matrix(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    if suffix == "npy":
        np.save(path, MATRIX)
    else:
        np.savetxt(path, MATRIX, delimiter="," if suffix == "csv" else " ")
    np.testing.assert_allclose(transition_matrix("matrix", None, 3, matrix=path), MATRIX)
    assert corrupt([0, 1, 2], "matrix", 0, 3, matrix=str(path)).options["matrix"] == MATRIX


def test_matrix_file_with_text_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,0\n0,one\n")
    with pytest.raises(InputError, match=r"t\.csv has something else than numbers"):
        transition_matrix("matrix", None, 2, matrix=path)


# --- labels that were saved -------------------------------------------------------------------------------------------


def test_unknown_true_labels_stay_unknown(tmp_path):
    NoisyLabels(torch.tensor([0, 1]), None, 2, "human").save(tmp_path / "labels.npz")
    assert NoisyLabels.load(tmp_path / "labels.npz").true is None


def _rewrite(path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})


def _provenance(path, **changes) -> np.ndarray:
    with np.load(path) as file:
        return np.array(json.dumps(json.loads(str(file["provenance"])) | changes))


def test_altered_labels_are_refused(tmp_path):
    path = tmp_path / "labels.npz"
    labels = corrupt(np.arange(50) % 10, "symmetric", 0.4, 10)
    for changes in (
        lambda: {"given": labels.true.numpy()},
        lambda: {"given": labels.given.numpy().astype(float)},
        lambda: {"true": None},
        lambda: {"provenance": _provenance(path, rate=0.2)},
    ):
        labels.save(path)
        _rewrite(path, **changes())
        with pytest.raises(InputError, match=r"labels\.npz was altered"):
            NoisyLabels.load(path)
    for changes in ({"provenance": np.array("{")}, {"provenance": np.array("{}")}, {"provenance": np.array("[]")}):
        labels.save(path)
        _rewrite(path, **changes)
        with pytest.raises(InputError, match=r"labels\.npz has a damaged provenance"):
            NoisyLabels.load(path)
    _rewrite(path, provenance=None)
    with pytest.raises(InputError, match=r"labels\.npz holds .* not labels that NoisyLabels\.save wrote"):
        NoisyLabels.load(path)


def test_damage_anywhere_is_found(tmp_path):
    path = tmp_path / "labels.npz"
    labels = corrupt([0, 1, 2, 0], "symmetric", 0.4, 3)
    labels.save(path)
    content, messages = path.read_bytes(), []
    for at in range(0, len(content), 3):
        for harmed in (content[:at], content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]):
            path.write_bytes(harmed)
            try:
                back = NoisyLabels.load(path)
            except InputError as error:
                messages.append(str(error))
            else:  # a harmless byte, such as a date
                assert torch.equal(back.given, labels.given)
                assert repr(back) == repr(labels)
    assert len(messages) > len(content) / 3
    assert all(str(path) in message for message in messages)
