"""The labels follow the matrix, the same everywhere for one seed; whatever cannot be meant is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rb_noisy.errors import InputError
from rb_noisy.noise import NoisyLabels, corrupt, transition_matrix

LABELS = np.arange(40_000) % 10
MATRIX = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]
CASES = [
    ("none", None, 10, {}),
    ("symmetric", 0.4, 10, {}),
    ("symmetric", 1.0, 10, {}),
    ("uniform", 0.4, 10, {}),
    ("uniform", 1.0, 10, {}),
    ("pair", 0.45, 10, {}),
    ("pair", 0.7, 10, {"allow_majority": True}),
    ("asymmetric", 0.3, 10, {"class_map": None}),
    ("asymmetric", 0.3, 10, {"class_map": {0: 9}}),
    ("matrix", None, 3, {"matrix": MATRIX}),
]


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "rate", "k", "options"), CASES)
def test_matrix_is_row_stochastic(noise, rate, k, options):
    matrix = transition_matrix(noise, rate, k, **options)
    assert matrix.shape == (k, k)
    assert matrix.dtype == torch.float64
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-12)


def test_matrices_are_the_definitions():
    def t(noise, rate, k, **options):
        return transition_matrix(noise, rate, k, **options).numpy()

    np.testing.assert_allclose(t("symmetric", 0.4, 3), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(t("uniform", 0.3, 3), [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(t("pair", 0.3, 3), [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]])
    np.testing.assert_allclose(t("asymmetric", 0.3, 3, class_map={"2": 0}), [[1, 0, 0], [0, 1, 0], [0.3, 0, 0.7]])
    np.testing.assert_array_equal(t(None, None, 3), np.eye(3))
    cifar = t("asymmetric", 0.4, 10)
    moves = {(i, j): round(float(cifar[i, j]), 12) for i, j in zip(*np.nonzero(cifar), strict=True) if i != j}
    assert moves == {(9, 1): 0.4, (2, 0): 0.4, (4, 7): 0.4, (3, 5): 0.4, (5, 3): 0.4}


def test_expected_shares_of_wrong_labels():
    for k in (2, 10, 100):
        assert float(1 - transition_matrix("symmetric", 0.4, k).diagonal().mean()) == pytest.approx(0.4)
        assert float(1 - transition_matrix("uniform", 0.4, k).diagonal().mean()) == pytest.approx(0.4 * (k - 1) / k)


def test_matrix_of_a_float32_rate_is_still_double():
    assert transition_matrix("symmetric", np.float32(0.4), 10).dtype == torch.float64


# --- the sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "rate", "k", "options"), CASES)
def test_labels_follow_the_matrix(noise, rate, k, options):
    true = torch.from_numpy(LABELS % k)
    labels = corrupt(true, noise, rate, k, seed=1, **options)
    matrix = transition_matrix(noise, rate, k, **options).numpy()
    counts = np.zeros((k, k))
    np.add.at(counts, (true.numpy(), labels.given.numpy()), 1)
    expected = matrix * counts.sum(1, keepdims=True)
    assert (counts[matrix == 0] == 0).all()
    possible = matrix > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - k
    assert chi_square <= freedom + 4 * np.sqrt(2 * freedom)
    assert torch.equal(labels.is_wrong, labels.given != true)
    assert torch.equal(labels.true, true)


def test_labels_never_change_for_a_seed():
    def given(noise, rate, **options):
        return corrupt([0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, noise, rate, 10, seed=7, **options).given.tolist()

    assert given("symmetric", 0.4) == [1, 7, 4, 3, 4, 7, 0, 7, 8, 9, 0, 1, 2, 3, 4, 5, 9, 7, 8, 9]
    assert given("pair", 0.4) == [1, 2, 3, 3, 4, 6, 6, 8, 9, 9, 0, 1, 2, 3, 4, 5, 7, 8, 9, 9]
    assert given("asymmetric", 0.9) == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1, 0, 1, 0, 5, 7, 3, 6, 7, 8, 9]


def test_frozen_labels_are_those_of_a_literal_inverse_cdf():
    true = LABELS[:500]
    matrix = transition_matrix("uniform", 0.7, 10).numpy()
    uniform = np.random.Generator(np.random.PCG64(5)).random(len(true))
    literal = []
    for u, c in zip(uniform, true, strict=True):
        total = 0.0
        for j in range(10):
            total += matrix[c, j]
            if u < total:
                break
        literal.append(j)
    assert corrupt(true, "uniform", 0.7, 10, seed=5).given.tolist() == literal


@st.composite
def stochastic_matrices(draw):
    k = draw(st.integers(2, 8))
    weights = draw(hnp.arrays(np.float64, (k, k), elements=st.sampled_from([0.0, 0.0, 1e-12, 0.1, 1 / 3, 0.7, 5.0])))
    weights[np.arange(k), draw(hnp.arrays(np.int64, k, elements=st.integers(0, k - 1)))] += 0.3
    # Off by as much as is let through, to both sides.
    return weights / weights.sum(1, keepdims=True) * (1 + draw(st.sampled_from([0.0, -9e-7, 9e-7])))


@settings(max_examples=60, deadline=None)
@given(matrix=stochastic_matrices(), seed=st.integers(0, 2**64))
def test_any_row_stochastic_matrix_gives_only_possible_classes(matrix, seed):
    k = len(matrix)
    labels = corrupt(np.repeat(np.arange(k), 50), "matrix", None, k, seed=seed, matrix=matrix)
    assert (matrix[labels.true.numpy(), labels.given.numpy()] > 0).all()


@pytest.mark.parametrize("word", [0, 2**64 - 1])
@pytest.mark.parametrize("scale", [1 - 9e-7, 1, 1 + 9e-7])
def test_the_ends_of_the_uniform_draw_stay_inside(monkeypatch, word, scale):
    class Extreme:
        def __init__(self, seed):
            pass

        def random_raw(self, n):
            return np.full(n, word, np.uint64)

    monkeypatch.setattr(np.random, "PCG64", Extreme)
    matrix = np.array([[0, 0.1, 0.2, 0.7, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0.5, 0, 0, 0, 0.5]])
    given = corrupt([0, 1, 2, 3, 4], "matrix", None, 5, matrix=matrix * scale).given.tolist()
    assert given == ([1, 1, 4, 0, 0] if word == 0 else [3, 1, 4, 0, 4])


@settings(max_examples=40, deadline=None)
@given(
    true=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    other=st.lists(st.integers(0, 4), min_size=60, max_size=60),
    seed=st.integers(0, 1000),
    cut=st.integers(1, 60),
)
def test_a_label_depends_on_seed_position_and_class_alone(true, other, seed, cut):
    whole = corrupt(true, "symmetric", 0.5, 5, seed=seed).given
    assert torch.equal(corrupt(true[:cut], "symmetric", 0.5, 5, seed=seed).given, whole[:cut])
    neighbour = corrupt(other[: len(true)], "symmetric", 0.5, 5, seed=seed).given
    same = torch.tensor(true) == torch.tensor(other[: len(true)])
    assert torch.equal(whole[same], neighbour[same])


def test_seeds_differ():
    first, second = (corrupt(LABELS, "symmetric", 0.5, 10, seed=s).given for s in (0, 1))
    assert (first != second).float().mean() > 0.3


@pytest.mark.parametrize("form", [list, torch.tensor, lambda v: np.array(v, np.uint8), lambda v: torch.tensor(v).int()])
def test_labels_of_any_form(form):
    true = [2, 0, 1, 1]
    labels = corrupt(form(true), "none", None, 3)
    assert labels.given.dtype == labels.true.dtype == torch.int64
    assert labels.given.tolist() == true


def test_the_given_array_is_not_changed():
    true = np.arange(1000) % 10
    corrupt(true, "symmetric", 1.0, 10).given.zero_()
    assert (true == np.arange(1000) % 10).all()


@pytest.mark.parametrize("suffix", ["npy", "csv", "txt"])
def test_matrix_from_a_file_is_the_matrix(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    if suffix == "npy":
        np.save(path, MATRIX)
    else:
        np.savetxt(path, MATRIX, delimiter="," if suffix == "csv" else " ")
    np.testing.assert_allclose(transition_matrix("matrix", None, 3, matrix=path), MATRIX)
    assert corrupt([0, 1, 2], "matrix", 0, 3, matrix=str(path)).options["matrix"] == MATRIX


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


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "unknown noise": ([0], "symetric", 0.1, 3, {}, "unknown noise 'symetric'; did you mean symmetric"),
    "no rate": ([0], "symmetric", None, 3, {}, "'symmetric' needs a rate"),
    "rate below 0": ([0], "symmetric", -0.1, 3, {}, "rate -0.1"),
    "rate above 1": ([0], "uniform", 1.1, 3, {}, "rate 1.1"),
    "rate NaN": ([0], "pair", float("nan"), 3, {}, "rate nan"),
    "rate no number": ([0], "pair", "0.1", 3, {}, "rate '0.1'"),
    "rate for none": ([0], None, 0.4, 3, {}, "'none' takes no rate"),
    "rate for a matrix": ([0], "matrix", 0.4, 3, {"matrix": MATRIX}, "'matrix' takes no rate"),
    "rate for a file": ([0], "human", 0.4, 3, {"file": "x.txt"}, "'human' takes no rate"),
    "pair majority": ([0], "pair", 0.5, 3, {}, "pair rate 0.5.*allow_majority=True"),
    "unknown option": ([0], "pair", 0.1, 3, {"alow_majority": True}, "option of noise 'pair'.*mean allow_majority"),
    "option of another noise": ([0], "symmetric", 0.1, 3, {"class_map": {0: 1}}, "option of noise 'symmetric'"),
    "unknown human option": ([0], "human", None, 3, {"path": "x.txt"}, "option of noise 'human'.*'path'"),
    "no file": ([0], "human", None, 3, {}, "needs file="),
    "no map": ([0], "asymmetric", 0.1, 3, {}, "no default class map for 3 classes"),
    "map out of range": ([0], "asymmetric", 0.1, 3, {"class_map": {0: 3}}, r"0: 3 is outside classes 0\.\.2"),
    "no map at all": ([0], "asymmetric", 0.1, 3, {"class_map": [(0, 1)]}, "class_map .* is no map"),
    "label too large": ([0, 1, 3, 5], "symmetric", 0.1, 3, {}, "label 3 at index 2"),
    "label negative": ([0, -2], "symmetric", 0.1, 3, {}, "label -2 at index 1"),
    "float labels": ([0.0, 1.0], "symmetric", 0.1, 3, {}, "dtype float64"),
    "bool labels": ([True], "symmetric", 0.1, 3, {}, "dtype bool"),
    "labels of two dimensions": (np.zeros((3, 1), int), "symmetric", 0.1, 3, {}, r"shape \(3, 1\)"),
    "ragged labels": ([[0], [0, 1]], "symmetric", 0.1, 3, {}, "no array of integers"),
    "no labels": ([], "symmetric", 0.1, 3, {}, r"shape \(0,\)"),
    "one class": ([0], "symmetric", 0.1, 1, {}, "num_classes 1"),
    "half a class": ([0], "symmetric", 0.1, 2.5, {}, "num_classes 2.5"),
    "no matrix": ([0], "matrix", None, 3, {}, "needs matrix="),
    "matrix shape": ([0], "matrix", None, 4, {"matrix": MATRIX}, r"shape \(3, 3\).*\(4, 4\)"),
    "matrix ragged": ([0], "matrix", None, 2, {"matrix": [[1], [0, 1]]}, "no array of numbers"),
    "matrix negative": ([0], "matrix", None, 2, {"matrix": [[1, 0], [1.5, -0.5]]}, "row 1 .*-0.5"),
    "matrix NaN": ([0], "matrix", None, 2, {"matrix": [[1, 0], [np.nan, 1]]}, "row 1 .*nan"),
    "matrix row sum": ([0], "matrix", None, 2, {"matrix": [[0.5, 0.25], [0, 1]]}, "row 0 .* sums to 0.75"),
    "matrix by column": ([0], "matrix", None, 2, {"matrix": [[0.5, 1], [0.5, 0]]}, "row 0 .* sums to 1.5"),
    "matrix file": ([0], "matrix", None, 2, {"matrix": "gone.npy"}, r"gone\.npy"),
    "matrix file kind": ([0], "matrix", None, 2, {"matrix": "t.mat"}, r"t\.mat is of no known kind"),
    "seed negative": ([0], "symmetric", 0.1, 3, {"seed": -1}, "seed -1"),
    "seed a float": ([0], "symmetric", 0.1, 3, {"seed": 0.5}, "seed 0.5"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_cannot_be_meant_is_refused(case):
    labels, noise, rate, k, options, message = BAD_CALLS[case]
    with pytest.raises(InputError, match=message):
        corrupt(labels, noise, rate, k, **options)


def test_matrix_file_with_text_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,0\n0,one\n")
    with pytest.raises(InputError, match=r"t\.csv has something else than numbers"):
        transition_matrix("matrix", None, 2, matrix=path)


def test_human_noise_has_no_matrix():
    with pytest.raises(InputError, match=r"'human' .* no transition matrix"):
        transition_matrix("human", None, 3)


def test_is_wrong_needs_the_true_labels():
    with pytest.raises(InputError, match="unknown"):
        NoisyLabels(torch.tensor([0, 1]), None, 2, "human").is_wrong  # noqa: B018


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "rate", "k", "options"), CASES)
def test_saved_labels_come_back_and_can_be_made_again(tmp_path, noise, rate, k, options):
    labels = corrupt(LABELS[:200] % k, noise, rate, k, seed=3, **options)
    path = tmp_path / "labels.npz"
    labels.save(path)
    back = NoisyLabels.load(path)
    assert torch.equal(back.given, labels.given)
    assert torch.equal(back.true, labels.true)
    assert repr(back) == repr(labels)
    again = corrupt(back.true, back.kind, back.rate, back.num_classes, seed=back.seed, **back.options)
    assert torch.equal(again.given, labels.given)


def test_unknown_true_labels_stay_unknown(tmp_path):
    NoisyLabels(torch.tensor([0, 1]), None, 2, "human").save(tmp_path / "labels.npz")
    assert NoisyLabels.load(tmp_path / "labels.npz").true is None


def test_repr_shows_how_the_labels_were_made():
    text = repr(corrupt([0, 1], "pair", 0.6, 2, seed=4, allow_majority=True))
    for part in ("'pair'", "0.6", "seed=4", "allow_majority", "num_classes=2"):
        assert part in text


def _rewrite(path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})


def _provenance(path, **changes) -> np.ndarray:
    with np.load(path) as file:
        return np.array(json.dumps(json.loads(str(file["provenance"])) | changes))


def test_altered_labels_are_refused(tmp_path):
    path = tmp_path / "labels.npz"
    labels = corrupt(LABELS[:50], "symmetric", 0.4, 10)
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
