"""Measures against literal references, ties and degenerate sets included."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from rb_noisy import measures
from rb_noisy.errors import InputError

# The first call imports what it needs, and a loaded machine is slow: no deadline for a single example.
relaxed = settings(deadline=None)

# Coarse numbers beside fine ones, so that ties and bin edges come up often.
PROBABILITY = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.95, 1.0]), st.floats(0, 1))
PREDICTIONS = st.lists(st.tuples(PROBABILITY, st.booleans()), min_size=1, max_size=40)


def unzip(pairs):
    return tuple(list(column) for column in zip(*pairs, strict=True))


@relaxed
@given(st.integers(1, 500), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_interval_agrees_with_scipy(n, data, confidence):
    successes = data.draw(st.integers(0, n))
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert measures.wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 540, 10_000])
def test_wilson_interval_ends_exactly_at_zero_and_one(n):
    assert measures.wilson_interval(0, n)[0] == 0.0
    assert measures.wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("successes", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_interval_rejects_impossible_counts(successes, n, confidence):
    with pytest.raises(InputError, match=r"interval needs|confidence must"):
        measures.wilson_interval(successes, n, confidence)


def test_accuracy_counts_the_greatest_logit_at_the_label():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert measures.accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75


def literal_ece(confidence, correct, n_bins):
    # torch and NumPy round the edges differently (seven tenths), so a confidence on an edge needs torch's.
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64).tolist()
    total = 0.0
    for b in range(n_bins):
        last = b == n_bins - 1
        members = [
            i for i, c in enumerate(confidence) if edges[b] <= c and (c < edges[b + 1] or (last and c <= edges[b + 1]))
        ]
        if members:
            mean_confidence = sum(confidence[i] for i in members) / len(members)
            rate = sum(correct[i] for i in members) / len(members)
            total += len(members) / len(confidence) * abs(rate - mean_confidence)
    return total


def test_confidence_one_is_in_the_last_bin_of_the_ece():
    # Both in the last bin: |0.5 − 0.975|; torchmetrics alone opens an eleventh bin and says 0.525.
    assert measures.expected_calibration_error([0.95, 1.0], [1, 0], n_bins=10) == pytest.approx(0.475)


@relaxed
@given(PREDICTIONS, st.integers(1, 20))
@example([(0.95, True), (1.0, False)], 10)
def test_ece_agrees_with_a_literal_loop(pairs, n_bins):
    confidence, correct = unzip(pairs)
    found = measures.expected_calibration_error(confidence, correct, n_bins)
    assert found == pytest.approx(literal_ece(confidence, correct, n_bins), abs=1e-9)


@relaxed
@given(PREDICTIONS, st.integers(1, 20))
def test_reliability_bins_add_up_to_the_ece(pairs, n_bins):
    confidence, correct = unzip(pairs)
    bins = measures.reliability(confidence, correct, n_bins)
    assert bins.count.sum() == len(pairs)
    assert torch.equal(bins.accuracy.isnan(), bins.count == 0)
    filled = bins.count > 0
    gaps = (bins.accuracy - bins.confidence)[filled].abs() * bins.count[filled] / len(pairs)
    assert gaps.sum().item() == pytest.approx(
        measures.expected_calibration_error(confidence, correct, n_bins), abs=1e-9
    )


def literal_adaptive_ece(confidence, correct, n_bins):
    n = len(confidence)
    bins = {}
    for c, right in zip(confidence, correct, strict=True):
        below = sum(other < c for other in confidence)
        bins.setdefault(n_bins * below // n, []).append((c, right))
    return sum(abs(sum(right for _, right in b) - sum(c for c, _ in b)) for b in bins.values()) / n


@relaxed
@given(PREDICTIONS, st.integers(1, 20), st.randoms())
def test_adaptive_ece_agrees_with_a_literal_loop_in_any_order(pairs, n_bins, random):
    confidence, correct = unzip(pairs)
    expected = literal_adaptive_ece(confidence, correct, n_bins)
    assert measures.adaptive_ece(confidence, correct, n_bins) == pytest.approx(expected, abs=1e-9)
    random.shuffle(pairs)
    assert measures.adaptive_ece(*unzip(pairs), n_bins) == pytest.approx(expected, abs=1e-9)


def test_adaptive_ece_has_bins_of_equal_mass():
    # Halves {.1, .2} and {.8, .9}, all wrong but .9: gaps |0 − .15| and |.5 − .85|.
    assert measures.adaptive_ece([0.9, 0.1, 0.8, 0.2], [1, 0, 0, 0], n_bins=2) == pytest.approx((0.15 + 0.35) / 2)


@pytest.mark.parametrize("measure", [measures.expected_calibration_error, measures.adaptive_ece, measures.reliability])
def test_calibration_errors_reject_logits_and_empty_bins(measure):
    with pytest.raises(InputError, match=r"must lie in 0\.\.1, got 3; pass probabilities"):
        measure([0.5, 3.0], [1, 0])
    with pytest.raises(InputError, match="n_bins"):
        measure([0.5], [1], n_bins=0)


def test_nll_and_brier_agree_with_literal_sums():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 5
    nll = brier = 0.0
    for row, label in zip(logits.double().tolist(), y.tolist(), strict=True):
        p = [math.exp(z) / sum(math.exp(other) for other in row) for z in row]
        nll -= math.log(p[label]) / 20
        brier += sum((p[k] - (k == label)) ** 2 for k in range(5)) / 20
    assert measures.nll(logits, y) == pytest.approx(nll)
    assert measures.brier(logits, y) == pytest.approx(brier)


def test_brier_of_certain_mistakes_is_two_and_their_nll_is_finite():
    logits = torch.tensor([[1000.0, 0.0, 0.0]])
    assert measures.brier(logits, torch.tensor([1])) == pytest.approx(2.0)
    assert measures.nll(logits, torch.tensor([1])) == pytest.approx(1000.0)


@relaxed
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=25))
def test_auroc_is_the_share_of_pairs_in_order_with_ties_half(pairs):
    score, correct = unzip(pairs)
    good = [s for s, right in pairs if right]
    bad = [s for s, right in pairs if not right]
    found = measures.auroc(score, correct)
    if not good or not bad:
        assert math.isnan(found)
    else:
        order = sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))
        assert found == pytest.approx(order)


def literal_aurc(pairs):
    """The mean over every order of the samples that is descending in score."""
    areas = []
    for order in itertools.permutations(pairs):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            risks = [sum(not right for _, right in order[:i]) / i for i in range(1, len(order) + 1)]
            areas.append(sum(risks) / len(risks))
    return sum(areas) / len(areas)


@relaxed
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_expectation_over_every_order_of_ties(pairs):
    assert measures.aurc(*unzip(pairs)) == pytest.approx(literal_aurc(pairs))


def test_aurc_of_a_constant_score_is_the_error_rate():
    assert measures.aurc([3] * 8, [1, 0, 1, 1, 0, 1, 1, 1]) == pytest.approx(0.25)


def test_accuracy_by_kappa_counts_every_value_up_to_steps():
    found = measures.accuracy_by_kappa([0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 1, 0], steps=4)
    assert found.count.tolist() == [2, 0, 1, 3, 0]
    assert found.right.tolist() == [1, 0, 1, 2, 0]
    assert found.accuracy.tolist() == pytest.approx([0.5, math.nan, 1.0, 2 / 3, math.nan], nan_ok=True)


@pytest.mark.parametrize("kappa", [[0, 5], [-1, 0], [0.5, 1]])
def test_accuracy_by_kappa_rejects_values_that_no_attack_gives(kappa):
    with pytest.raises(InputError, match=r"whole numbers in 0\.\.4"):
        measures.accuracy_by_kappa(kappa, [1, 0], steps=4)


@pytest.mark.parametrize(
    ("logits", "y", "message"),
    [
        ([[1.0, 2.0]], [0, 1], "must have shape"),
        ([[1.0], [2.0]], [0, 0], "K >= 2"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "must have shape"),
        ([[1.0, 2.0], [math.nan, 0.0]], [0, 1], "sample 1 are not finite"),
        ([[1.0, 2.0]], [2], r"in 0\.\.1, got 2"),
    ],
)
def test_unusable_logits_and_labels_are_named(logits, y, message):
    for measure in (measures.accuracy, measures.nll, measures.brier):
        with pytest.raises(InputError, match=message):
            measure(logits, y)


def test_unusable_scores_are_named():
    with pytest.raises(InputError, match="one shape"):
        measures.auroc([1.0, 2.0], [1])
    with pytest.raises(InputError, match="sample 1 is not finite"):
        measures.aurc([1.0, math.inf], [1, 0])
    with pytest.raises(InputError, match="True and False"):
        measures.auroc([1.0, 2.0], [1, 7])
