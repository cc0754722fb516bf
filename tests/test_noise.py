"""The labels follow the matrix, the same everywhere for one seed; whatever cannot be meant is refused by name."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rb_noisy.errors import InputError
from rb_noisy.noise import NoisyLabels, corrupt, instance_probabilities, transition_matrix

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


# --- noise by image ---------------------------------------------------------------------------------------------------


def _images(n: int, seed: int = 0, side: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_instance_probabilities_are_those_of_a_literal_loop():
    true, x, seed, k, rate, std = [2, 0, 2, 1], _images(4), 11, 3, 0.35, 0.2
    normal = NormalDist()

    def uniform(stream, n):
        words = np.random.PCG64(seed).jumped(stream).random_raw(n)
        return [(int(word) // 2**12 + 0.5) / 2**52 for word in words]

    low, high = normal.cdf(-rate / std), normal.cdf((1 - rate) / std)
    rates = uniform(1, len(true))
    expected = np.zeros((len(true), k))
    for i, y in enumerate(true):
        q = rate + std * normal.inv_cdf(low + (high - low) * rates[i])
        image = x[i].flatten().tolist()
        mean = sum(image) / len(image)
        length = math.sqrt(sum((v - mean) ** 2 for v in image))
        w = [normal.inv_cdf(u) for u in uniform(2 + y, len(image) * k)]
        scores = [sum(2 * (v - mean) / length * w[p * k + j] for p, v in enumerate(image)) for j in range(k)]
        total = sum(math.exp(scores[j]) for j in range(k) if j != y)
        for j in range(k):
            expected[i, j] = 1 - q if j == y else q * math.exp(scores[j]) / total
    actual = instance_probabilities(true, x, rate, k, seed, std)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
def test_wrong_share_of_instance_noise_is_the_mean_of_the_truncated_normal(rate):
    labels = corrupt(LABELS, "instance", rate, 10, seed=1, images=_images(len(LABELS), side=2))
    normal, a, b = NormalDist(), -rate / 0.1, (1 - rate) / 0.1
    expected = rate + 0.1 * (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
    assert float(labels.is_wrong.double().mean()) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(len(LABELS)))
    if 0.2 <= rate <= 0.7:
        assert expected == pytest.approx(rate, abs=0.006)


def test_instance_labels_follow_their_probabilities():
    x = _images(1).expand(20_000, -1, -1, -1)
    true = torch.zeros(20_000, dtype=torch.int64)
    given = corrupt(true, "instance", 0.5, 5, images=x).given
    expected = instance_probabilities(true, x, 0.5, 5).sum(0)
    chi_square = float(((torch.bincount(given, minlength=5) - expected) ** 2 / expected).sum())
    assert chi_square < 4 + 4 * math.sqrt(8)


def test_the_image_decides_where_a_label_goes():
    true = torch.zeros(500, dtype=torch.int64)
    first, second = (instance_probabilities(true, _images(500, seed), 0.4, 10) for seed in (0, 1))
    torch.testing.assert_close(first[:, 0], second[:, 0])  # the flip rate is the position's
    assert (first - second).abs().sum(1).median() > 0.2
    target = first[:, 1:] / first[:, 1:].sum(1, keepdim=True)
    assert 0.3 < float(target.max(1).values.mean()) < 0.8  # neither uniform, 1/9, nor one-hot
    brighter = instance_probabilities(true, _images(500) * 0.5 + 0.25, 0.4, 10)
    torch.testing.assert_close(brighter, first, rtol=0, atol=1e-5)


def test_an_image_takes_its_target_along():
    true, x = torch.arange(60) % 3, _images(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = instance_probabilities(true[order], x[order], 0.4, 3, std=0)
    torch.testing.assert_close(moved, instance_probabilities(true, x, 0.4, 3, std=0)[order], rtol=0, atol=1e-12)
    head = corrupt(true[:20], "instance", 0.4, 3, images=x[:20]).given
    assert torch.equal(head, corrupt(true, "instance", 0.4, 3, images=x).given[:20])


def test_instance_noise_at_its_edges():
    x = torch.cat([torch.full((2, 1, 5, 5), 0.3), _images(2, side=5)[:, :1]])
    plain = instance_probabilities([0, 1, 0, 1], x, 0.3, 3, std=0.0)
    torch.testing.assert_close(plain[:2], torch.tensor([[0.7, 0.15, 0.15], [0.15, 0.7, 0.15]]).double())
    assert not corrupt(LABELS[:2000], "instance", 0, 10, images=_images(2000, side=2)).is_wrong.any()
    assert corrupt([0, 1, 0, 1], "instance", 1, 3, images=x, std=0).is_wrong.all()
    assert not torch.equal(*(instance_probabilities([0, 1, 0, 1], x, 0.3, 3, seed=s) for s in (0, 1)))


def test_instance_labels_never_change_for_a_seed():
    x = torch.arange(20 * 16).remainder(7).reshape(20, 1, 4, 4) / 7
    given = corrupt([0, 1, 2, 3, 4] * 4, "instance", 0.5, 5, seed=7, images=x).given.tolist()
    assert given == [1, 4, 2, 3, 2, 4, 0, 3, 3, 2, 0, 1, 0, 2, 3, 0, 4, 3, 3, 4]


def test_saved_instance_labels_know_their_images(tmp_path):
    x = _images(50)
    labels = corrupt(LABELS[:50], "instance", 0.4, 10, seed=3, images=x, std=0.05)
    assert labels.options.keys() == {"std", "images_sha256"}
    labels.save(tmp_path / "labels.npz")
    back = NoisyLabels.load(tmp_path / "labels.npz")
    assert repr(back) == repr(labels)
    arguments = (back.true, back.kind, back.rate, back.num_classes, back.seed)
    assert torch.equal(corrupt(*arguments, images=x.double(), **back.options).given, labels.given)
    with pytest.raises(InputError, match=r"images have SHA-256 .* not " + back.options["images_sha256"]):
        corrupt(*arguments, images=x.flip(0), **back.options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, r"'instance' depends on the images: give images="),
        (_images(3), "3 images for 2 labels"),
        (_images(2).flatten(1), r"images are \(2, 48\) torch.float32"),
        (_images(2).mul(255).byte(), "torch.uint8.* needs a tensor of"),
        (_images(2).numpy(), "images are ndarray"),
        (_images(2)[:, :0], r"images are \(2, 0, 4, 4\)"),
        (_images(2) * 3 - 1, r"images range over -0\.9.*\[0, 1\]"),
        (_images(2) + 0.5, r"images range over 0\.5.*\.\.1\.4.*\[0, 1\]"),
        (_images(2) * torch.nan, "images range over nan"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_instance_noise_alone(images, message):
    with pytest.raises(InputError, match=message):
        corrupt([0, 1], "instance", 0.4, 3, images=images)
    assert corrupt([0, 1], "symmetric", 0.4, 3, images=images).options == {}


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
    "no rate by image": ([0], "instance", None, 3, {"images": torch.rand(1, 1, 2, 2)}, "'instance' needs a rate"),
    "rate by image": ([0], "instance", 1.1, 3, {"images": torch.rand(1, 1, 2, 2)}, "rate 1.1"),
    "std": ([0], "instance", 0.1, 3, {"images": torch.rand(1, 1, 2, 2), "std": -0.1}, "std -0.1"),
    "seed by image": ([0], "instance", 0.1, 3, {"images": torch.rand(1, 1, 2, 2), "seed": -1}, "seed -1"),
    "unknown option by image": ([0], "instance", 0.1, 3, {"sdt": 0.1}, "option of noise 'instance'.*mean std"),
    "argument to a noise": ([0], "pair:0.4", None, 3, {}, "unknown noise 'pair:0.4'; did you mean pair"),
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


@pytest.mark.parametrize("noise", ["human", "human:labels.npz:worse", "instance"])
def test_noise_without_a_matrix_says_so(noise):
    with pytest.raises(InputError, match=rf"'{noise.partition(':')[0]}' .* no transition matrix"):
        transition_matrix(noise, None, 3)


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


def test_repr_shows_how_the_labels_were_made():
    text = repr(corrupt([0, 1], "pair", 0.6, 2, seed=4, allow_majority=True))
    for part in ("'pair'", "0.6", "seed=4", "allow_majority", "num_classes=2"):
        assert part in text
