"""The κ-calibration report and its picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rb_noisy import calibration, measures
from rb_noisy.calibration import calibration_report, fit_isotonic, fit_temperature, plot_calibration
from rb_noisy.errors import InputError

# The first call imports what it needs, and a loaded machine is slow: no deadline for a single example.
relaxed = settings(deadline=None)


def made_inputs(n=300, classes=4, steps=6, seed=0):
    """Overconfident logits, and κ that grows with the logit margin."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), y] += 3 * torch.rand(n, generator=generator)
    worse = logits - 0.8 * torch.nn.functional.one_hot(y, classes)

    def kappa(values):
        top = values.topk(2, dim=1).values
        return (3 * (top[:, 0] - top[:, 1])).long().clamp(max=steps)

    return {
        "y": y,
        "natural_logits": 5 * logits,
        "adversarial_logits": 5 * worse,
        "natural_kappa": kappa(logits),
        "adversarial_kappa": kappa(worse),
        "steps": steps,
    }


@pytest.fixture(scope="module")
def inputs():
    return made_inputs()


@pytest.fixture(scope="module")
def report(inputs):
    robust = (inputs["natural_logits"].argmax(1) == inputs["y"]) & (inputs["natural_kappa"] >= 4)
    return calibration_report(**inputs, robust=robust, splits=4)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_temperature_scaling_finds_the_temperature_that_labels_were_drawn_at(true_temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    y = torch.multinomial((logits / true_temperature).softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, y) == pytest.approx(true_temperature, rel=0.05)


@relaxed
@given(st.integers(0, 1000))
def test_no_temperature_on_a_grid_beats_the_fitted_one(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, y = 4 * torch.randn(12, 3, generator=generator), torch.randint(3, (12,), generator=generator)
    best = measures.nll(logits / fit_temperature(logits, y), y)
    grid = np.geomspace(calibration.LOWEST_TEMPERATURE, calibration.HIGHEST_TEMPERATURE, 80)
    assert best <= min(measures.nll(logits / t, y) for t in grid) + 1e-6


def test_temperature_stays_finite_and_positive_where_nothing_or_all_is_right():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert 0 < fit_temperature(logits, torch.tensor([0, 1])) < 1
    assert 1 < fit_temperature(logits, torch.tensor([1, 0])) <= 100


def test_isotonic_calibration_pools_what_is_out_of_order_and_clips_beyond_the_fit():
    # Rates by score: 0 → 0, 1 → 1, 2 → ½. The last two are out of order and pool to ⅔.
    calibrate = fit_isotonic([0, 0, 1, 2, 2], [0, 0, 1, 0, 1])
    assert calibrate([-5, 0, 1, 2, 99]).tolist() == pytest.approx([0, 0, 2 / 3, 2 / 3, 2 / 3])


@relaxed
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_isotonic_calibration_never_falls_and_stays_a_probability(pairs):
    score, correct = zip(*pairs, strict=True)
    probability = fit_isotonic(score, correct)(torch.arange(-1, 8))
    assert (probability.diff() >= 0).all()
    assert probability.min() >= 0
    assert probability.max() <= 1


def test_report_gives_the_measures_of_each_kind_of_input(report, inputs):
    for kind, prefix in (("natural", "natural"), ("pgd-20", "adversarial")):
        logits, kappa, y = inputs[f"{prefix}_logits"], inputs[f"{prefix}_kappa"], inputs["y"]
        correct, part = logits.argmax(1) == y, report[kind]
        confidence, top = logits.double().softmax(1).amax(1), logits.double().topk(2, dim=1).values
        assert part["n"] == 300
        assert part["accuracy"] == pytest.approx(measures.accuracy(logits, y))
        assert part["interval"] == pytest.approx(measures.wilson_interval(int(correct.sum()), 300))
        assert part["ece"] == pytest.approx(measures.expected_calibration_error(confidence, correct))
        assert part["adaptive_ece"] == pytest.approx(measures.adaptive_ece(confidence, correct))
        assert part["nll"] == pytest.approx(measures.nll(logits, y))
        assert part["brier"] == pytest.approx(measures.brier(logits, y))
        for name, score in {"kappa": kappa, "max_softmax": confidence, "margin": top[:, 0] - top[:, 1]}.items():
            assert part["scores"][name]["auroc"] == pytest.approx(measures.auroc(score, correct))
            assert part["scores"][name]["aurc"] == pytest.approx(measures.aurc(score, correct))


def test_every_calibrator_mends_an_overconfident_network(report):
    for kind in ("natural", "pgd-20"):
        errors = {name: entry["ece"]["mean"] for name, entry in report[kind]["calibrated"].items()}
        plain = errors.pop("uncalibrated")
        assert set(errors) == {"temperature", "isotonic_kappa", "isotonic_max_softmax"}
        assert all(error < 0.75 * plain for error in errors.values())


def test_calibrators_never_see_the_half_they_are_tested_on(monkeypatch, inputs):
    seen = []
    real = calibration.fit_isotonic

    def spy(score, correct):
        calibrate = real(score, correct)

        def record(values):
            seen.append((len(score), len(values), set(score.tolist()) & set(values.tolist())))
            return calibrate(values)

        return record

    monkeypatch.setattr(calibration, "fit_isotonic", spy)
    # κ that names its sample, so that a shared sample would show.
    distinct = dict(inputs, natural_kappa=torch.arange(300), adversarial_kappa=torch.arange(300), steps=299)
    calibration_report(**distinct, splits=2, subsets=1)
    assert seen
    assert all(fitted == tested == 150 for fitted, tested, _ in seen)
    assert all(not shared for _, _, shared in seen[::2])


def test_reliability_covers_every_sample_once_and_explains_the_ece(report):
    for kind in ("natural", "pgd-20"):
        bins = report[kind]["reliability"]
        for diagram in bins.values():
            assert sum(diagram["count"]) == 300
            assert all((c == 0) == (a is None) for c, a in zip(diagram["count"], diagram["accuracy"], strict=True))
        rows = zip(*(bins["uncalibrated"][key] for key in ("count", "accuracy", "confidence")), strict=True)
        assert sum(c / 300 * abs(a - p) for c, a, p in rows if c) == pytest.approx(report[kind]["ece"])


def test_by_kappa_reports_the_whole_set_and_half_sized_subsets(report, inputs):
    by_kappa = report["natural"]["by_kappa"]
    whole = measures.accuracy_by_kappa(
        inputs["natural_kappa"], inputs["natural_logits"].argmax(1) == inputs["y"], inputs["steps"]
    )
    assert by_kappa["kappa"] == list(range(7))
    assert by_kappa["count"] == whole.count.tolist()
    assert by_kappa["right"] == whole.right.tolist()
    assert report["subset_size"] == 150
    assert sum(by_kappa["first_subset_right"]) + sum(by_kappa["first_subset_wrong"]) == 150
    assert max(std for std in by_kappa["subset_accuracy_std"] if std is not None) > 0.01  # the subsets differ
    for k in range(7):
        if whole.count[k] > 20:
            assert by_kappa["subset_accuracy_mean"][k] == pytest.approx(whole.accuracy[k].item(), abs=0.2)


def test_subsets_are_two_thousand_samples_at_most():
    report = calibration_report(**made_inputs(n=4200), splits=1, subsets=2)
    assert report["subset_size"] == 2000
    assert sum(report["pgd-20"]["by_kappa"]["first_subset_right"]) <= 2000


def test_kappa_is_scored_on_who_stays_right_where_verdicts_are_given(report):
    robust = report["natural"]["robust"]
    # The verdicts were made from κ ≥ 4, so κ alone ranks them better than it ranks right and wrong.
    assert robust["scores"]["kappa"]["auroc"] > report["natural"]["scores"]["kappa"]["auroc"]
    assert 0 < robust["share"] < report["natural"]["accuracy"]
    for name in ("isotonic_kappa", "isotonic_max_softmax"):
        assert 0.5 < robust[name]["auroc"]["mean"] <= 1
        assert 0 <= robust[name]["brier"]["mean"] < 0.25


def test_robust_part_is_none_without_verdicts_and_absent_on_attacked_inputs(inputs):
    report = calibration_report(**inputs, splits=1, subsets=1)
    assert report["natural"]["robust"] is None
    assert "robust" not in report["pgd-20"]


def test_same_seed_same_report_and_another_seed_another(inputs):
    first, again, other = (calibration_report(**inputs, splits=2, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["natural"]["calibrated"] != other["natural"]["calibrated"]
    assert first["natural"]["ece"] == other["natural"]["ece"]


def degenerate_sets():
    everything = made_inputs(n=9, classes=2)
    yield "tiny", made_inputs(n=2)
    yield "odd with two classes", everything
    right = {
        "natural_logits": torch.eye(2)[everything["y"]] * 9,
        "adversarial_logits": torch.eye(2)[everything["y"]] * 9,
    }
    yield "all right", everything | right
    yield "all wrong", everything | {name: -logits for name, logits in right.items()}
    zeros = torch.zeros(9, dtype=torch.long)
    yield "one κ", everything | {"natural_kappa": zeros, "adversarial_kappa": zeros}


@pytest.mark.parametrize(
    ("name", "given_inputs"), list(degenerate_sets()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_degenerate_sets_give_a_json_without_nan_and_a_picture(name, given_inputs, tmp_path):
    robust = torch.zeros(len(given_inputs["y"]), dtype=torch.bool)
    report = calibration_report(**given_inputs, robust=robust, splits=3)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    plot_calibration(report, tmp_path / "report.png", name)
    assert (tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in made_inputs().items()},
            "halve|one half",
        ),
        ({"natural_kappa": torch.full((300,), 7)}, r"0\.\.6"),
        ({"adversarial_kappa": torch.zeros(299)}, "kappa of the pgd-20 inputs"),
        ({"natural_logits": torch.full((300, 4), math.nan)}, "not finite"),
        ({"robust": torch.ones(300)}, "robust must be bool"),
        ({"splits": 0}, "splits"),
    ],
)
def test_unusable_input_is_named(inputs, change, message):
    with pytest.raises(InputError, match=message):
        calibration_report(**(inputs | change))


def test_picture_is_one_png_with_six_filled_axes(report, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k))[1])
    # A report that has been through a file must draw too, and a title is text, not TeX.
    plot_calibration(json.loads(json.dumps(report)), tmp_path / "new" / "report.png", "at_$x: κ")
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert len(figure.axes) == 6
    assert all(axis.has_data() and axis.get_legend() and axis.get_xlabel() and axis.get_title() for axis in figure.axes)
