import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rb_noisy
from rb_noisy.attacks import pgd
from rb_noisy.calibrators import Observed, fit_calibrator
from rb_noisy.confidence import WITHSTANDS, Calibrated, calibrate, observe, withstands
from rb_noisy.errors import InputError
from rb_noisy.geometry import kappa
from rb_noisy.measures import auroc, expected_calibration_error

STEPS = 10
ONE_FEATURE = [("isotonic", "kappa"), ("isotonic", "max_softmax"), ("isotonic", "entropy"), ("isotonic", "margin")]
ONE_FEATURE += [("beta", "kappa"), ("beta", "max_softmax")]
SOME = ("kappa", "max_softmax", "margin", "entropy")
EVERY_METHOD = [("logistic", SOME), ("trees", SOME), *((method, (name,)) for method, name in ONE_FEATURE)]
EPS = 0.1


def samples(n, seed=0):
    """Two-class logits and κ, either of which decides about half of whether the prediction is right."""
    random = np.random.default_rng(seed)
    margin = random.exponential(2.0, n)
    kappa = random.integers(0, STEPS + 1, n)
    truth = 1 / (1 + np.exp(-(0.6 * margin + 0.4 * kappa - 3)))
    logits = torch.tensor(np.stack((margin, np.zeros(n)), axis=1))
    outcome = torch.tensor(random.random(n) < truth)
    return logits, torch.tensor(kappa), outcome, torch.tensor(truth)


class Ramp(nn.Module):
    """Two classes by the mean brightness b: logits ±slope·(b − ½)."""

    def __init__(self, slope=8.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x):
        z = self.slope * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack((-z, z), dim=1)


@pytest.fixture
def images():
    """Grey images whose label is 1 with the probability that a sigmoid of the brightness says."""
    random = np.random.default_rng(1)
    brightness = random.uniform(0.05, 0.95, 400)
    y = torch.tensor(random.random(400) < 1 / (1 + np.exp(-10 * (brightness - 0.5)))).long()
    return torch.tensor(brightness, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), y


def test_a_logistic_calibrator_recovers_the_probability_that_made_the_outcomes():
    logits, kappa, outcome, truth = samples(20000)
    fitted = fit_calibrator(
        Observed(logits, kappa), outcome, features=("kappa", "margin"), method="logistic", kappa_steps=STEPS
    )
    assert (fitted(Observed(logits, kappa)) - truth).abs().max() < 0.03


@pytest.mark.parametrize(("method", "features"), EVERY_METHOD)
def test_200_samples_give_something_sane(method, features):
    errors = []
    for seed in range(5):
        logits, kappa, outcome, _ = samples(200, seed)
        fitted = fit_calibrator(Observed(logits, kappa), outcome, features=features, method=method, kappa_steps=STEPS)
        logits, kappa, outcome, _ = samples(5000, 99)
        confidence = fitted(Observed(logits, kappa))
        errors.append(expected_calibration_error(confidence, outcome))
        assert (confidence - outcome.double()).square().mean() < 0.25, "better than saying a half"
    assert np.mean(errors) < 0.08


@pytest.mark.parametrize(("method", "feature"), ONE_FEATURE)
def test_one_feature_recovers_the_rate_of_right_predictions_at_each_of_its_values(method, feature):
    logits, kappa, outcome, _ = samples(20000)
    fitted = fit_calibrator(Observed(logits, kappa), outcome, features=(feature,), method=method, kappa_steps=STEPS)
    fresh_logits, fresh_kappa, fresh_outcome, _ = samples(20000, seed=1)
    confidence = fitted(Observed(fresh_logits, fresh_kappa))
    # Beta has three parameters, which do not hold every shape.
    assert expected_calibration_error(confidence, fresh_outcome) < 0.04
    score = fresh_kappa if feature == "kappa" else fresh_logits[:, 0]
    assert auroc(confidence, fresh_outcome) == pytest.approx(auroc(score, fresh_outcome), abs=0.005)


def test_beta_calibration_is_the_identity_where_softmax_is_calibrated_already():
    random = np.random.default_rng(2)
    s = random.uniform(0.5, 1, 30000)
    logits = torch.tensor(np.stack((np.log(s / (1 - s)), np.zeros(len(s))), axis=1))
    outcome = torch.tensor(random.random(len(s)) < s)
    none = torch.zeros(len(s))
    fitted = fit_calibrator(
        Observed(logits, none), outcome, features=("max_softmax",), method="beta", kappa_steps=STEPS
    )
    assert (fitted(Observed(logits, none)) - torch.tensor(s)).abs().max() < 0.03


@given(st.integers(2, 200), st.integers(0, 1000), st.sampled_from(EVERY_METHOD))
def test_few_samples_give_probabilities_and_isotonic_ones_no_certainty(n, seed, chosen):
    method, features = chosen
    logits, kappa, outcome, _ = samples(n, seed)
    outcome[0], outcome[1] = True, False
    fitted = fit_calibrator(Observed(logits, kappa), outcome, features=features, method=method, kappa_steps=STEPS)
    confidence = fitted(Observed(*samples(300, seed + 1)[:2]))
    assert ((confidence >= 0) & (confidence <= 1)).all()
    if method == "isotonic":
        least = 1 / (n + 2)
        assert confidence.min() >= least
        assert confidence.max() <= 1 - least


@given(st.integers(0, 1000), st.sampled_from(ONE_FEATURE))
def test_isotonic_and_beta_confidence_never_falls_as_the_score_rises(seed, chosen):
    method, feature = chosen
    logits, kappa, outcome, _ = samples(60, seed)
    # The worse the score, the oftener right: the opposite of what the methods may say.
    outcome = logits[:, 0] < logits[:, 0].median() if feature != "kappa" else kappa < 5
    outcome[0] = ~outcome[1]
    fitted = fit_calibrator(Observed(logits, kappa), outcome, features=(feature,), method=method, kappa_steps=STEPS)
    order = (kappa if feature == "kappa" else logits[:, 0]).argsort(stable=True)
    assert (fitted(Observed(logits, kappa))[order].diff() >= -1e-12).all()


def test_confidence_does_not_depend_on_what_else_is_in_the_batch(images):
    x, y = images
    fitted = calibrate(Ramp().eval(), x, y, eps=EPS, kappa_steps=STEPS)
    whole = fitted.predict(x).confidence
    assert torch.equal(whole[7:8], fitted.predict(x[7:8]).confidence)


def test_prediction_gives_label_confidence_and_kappa_of_the_predicted_label(images):
    x, y = images
    model = Ramp().eval()
    found = calibrate(model, x[:200], y[:200], eps=EPS, kappa_steps=STEPS).predict(x[200:])
    assert torch.equal(found.label, model(x[200:]).argmax(1))
    expected = kappa(model, x[200:], eps=EPS, alpha=2.5 * EPS / STEPS, steps=STEPS, random_start=False)
    assert torch.equal(found.kappa, expected)
    assert found.kappa.min() < STEPS == found.kappa.max()
    right = found.label == y[200:]
    assert expected_calibration_error(found.confidence, right, 5) < 0.12
    assert auroc(found.confidence, right) > 0.7


def test_robust_means_right_and_no_perturbation_within_eps_changes_it(images):
    x, y = images
    model = Ramp().eval()
    stands = (model(x).argmax(1) == y) & ((x.mean((1, 2, 3)) - 0.5).abs() > EPS)
    own = calibrate(model, x, y, eps=EPS, target="robust", method="isotonic", features="kappa")
    assert (own.positive, own.n) == (int(stands.sum()), 400)
    assert own.target_source == WITHSTANDS
    given = calibrate(model, x, y, eps=EPS, target="robust", method="isotonic", features="kappa", verdicts=stands)
    assert given.target_source == "given verdicts"
    assert torch.equal(own.predict(x).confidence, given.predict(x).confidence)
    turned = own.predict(x).kappa < 5
    assert own.predict(x).confidence[turned].max() < 0.01, "what κ's attack turns is not robust"


def test_stays_takes_no_labels_and_does_not_look_at_them(images):
    x, y = images
    model = Ramp().eval()
    fitted = calibrate(model, x, eps=EPS, target="stays")
    stays = (x.mean((1, 2, 3)) - 0.5).abs() > EPS
    assert (fitted.positive, fitted.target_source) == (int(stays.sum()), WITHSTANDS)
    confidence = fitted.predict(x).confidence
    assert auroc(confidence, stays) > 0.999
    assert torch.equal(confidence, calibrate(model, x, 1 - y, eps=EPS, target="stays").predict(x).confidence)
    with pytest.raises(InputError, match="needs labels"):
        calibrate(model, x, eps=EPS, target="robust")


def test_wrong_calibration_labels_lower_the_confidence_in_what_is_robust_and_not_in_what_stays(images):
    x, y = images
    model = Ramp().eval()
    noisy = torch.where(torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.4, 1 - y, y)
    stays = (x.mean((1, 2, 3)) - 0.5).abs() > EPS
    options = {"eps": EPS, "method": "isotonic", "features": "kappa"}
    means = {}
    for target in ("robust", "stays"):
        for name, labels in (("true", y), ("noisy", noisy)):
            found = calibrate(model, x, labels, target=target, **options).predict(x)
            means[target, name] = found.confidence[stays].mean().item()
    right = (model(x).argmax(1) == y)[stays].double().mean().item()
    assert means["robust", "true"] == pytest.approx(right, abs=0.02)
    # A right prediction is called right with probability 0.6, a wrong one with 0.4.
    assert means["robust", "noisy"] == pytest.approx(0.6 * right + 0.4 * (1 - right), abs=0.06)
    assert means["stays", "noisy"] == means["stays", "true"] > 0.99


def test_what_withstands_is_what_no_attack_towards_any_class_breaks():
    model, data = rb_noisy.load_model("at_digits_sym40"), rb_noisy.load_data("digits")
    x, y = data.x_test[:40], data.y_test[:40]
    with torch.no_grad():
        order = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    attack = {"eps": 0.2, "alpha": 0.05, "steps": 20, "seed": 3}
    expected = ~pgd(model, x, y, evaluate_final=True, **attack).broken
    untargeted = expected.clone()
    for target in order[:, :9].unbind(1):
        # One after another, so that the random starts are those of the samples that are left.
        left = expected.nonzero().flatten()
        aim = target[left]

        def loss(logits, natural, labels, aim=aim):
            return (logits.gather(1, aim[:, None]) - logits.gather(1, labels[:, None])).sum()

        expected[left] = ~pgd(model, x[left], y[left], loss=loss, evaluate_final=True, **attack).broken
    assert expected.sum() < untargeted.sum()
    assert torch.equal(withstands(model, x, y, eps=0.2, seed=3), expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_model_that_is_never_right_or_falls_at_once_withstands_nothing(norm):
    model, data = rb_noisy.load_model("st_digits"), rb_noisy.load_data("digits")
    x, y = data.x_test[:30], data.y_test[:30]
    assert withstands(model, x[:0], y[:0], eps=1.0, norm=norm).tolist() == []
    eps = 1.0 if norm == "Linf" else 3.0
    assert not withstands(model, x, y, eps=eps, norm=norm).any()
    with pytest.raises(InputError, match="holds for none of the 30"):
        calibrate(model, x, (y + 1) % 10, eps=eps, norm=norm, target="robust")


def test_features_of_further_attacks_are_measured_where_they_are_asked_for(images):
    x, y = images
    model = Ramp().eval()
    attack = {"norm": "Linf", "steps": 10}
    found = observe(model, x, features=("kappa_2eps",), eps=EPS, alpha=0.02, **attack)
    wide = observe(model, x, features=("kappa",), eps=2 * EPS, alpha=0.04, **attack)
    assert torch.equal(found.kappa_2eps, wide.kappa)
    assert torch.equal(found.attack_margin_2eps, wide.attack_margin)
    assert (found.kappa > found.kappa_2eps).any()
    assert found.kappa_targeted is wide.kappa_2eps is None
    # There are two classes, so that the attack towards the second likeliest goes the same way.
    targeted = calibrate(model, x, y, eps=EPS, features=("kappa_targeted", "attack_margin_targeted"), method="trees")
    plain = calibrate(model, x, y, eps=EPS, features=("kappa", "attack_margin"), method="trees")
    assert torch.allclose(targeted.predict(x).confidence, plain.predict(x).confidence, atol=1e-6)


def test_verdicts_of_wrong_predictions_do_not_count_as_robust(images):
    x, y = images
    fitted = calibrate(Ramp().eval(), x, y, eps=EPS, target="robust", verdicts=torch.ones(400, dtype=torch.bool))
    assert fitted.positive == int((Ramp()(x).argmax(1) == y).sum())


@pytest.mark.parametrize(("method", "features"), EVERY_METHOD)
def test_saved_and_loaded_it_predicts_the_same_bits(images, tmp_path, method, features):
    x, y = images
    model = Ramp().eval()
    fitted = calibrate(model, x[:200], y[:200], eps=0.1 + 0.2, method=method, features=features, batch_size=64)
    fitted.save(tmp_path / "c.json")
    loaded = Calibrated.load(tmp_path / "c.json", model)
    assert torch.equal(loaded.predict(x).confidence, fitted.predict(x).confidence)
    assert {**vars(loaded), "model": None} == {**vars(fitted), "model": None}


def test_a_calibration_of_other_weights_is_refused(images, tmp_path):
    calibrate(Ramp().eval(), *images, eps=EPS).save(tmp_path / "c.json")
    with pytest.raises(InputError, match="other weights"):
        Calibrated.load(tmp_path / "c.json", Ramp(slope=9.0).eval())


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "something else"},
        {"method": "forest"},
        {"method": "logistic"},
        {"features": ["colour"]},
        {"features": []},
        {"parameters": {"score": [1, 2], "probability": [0.5]}},
        {"parameters": {"score": [2, 1], "probability": [0.5, 0.6]}},
        {"parameters": {"score": [1, 2], "probability": [0.6, 0.5]}},
        {"parameters": {"score": [1, 2], "probability": [0.5, 1.5]}},
        {"parameters": {"score": [1, 2], "probability": [0.5, math.nan]}},
        {"parameters": {"score": [1, 2], "probability": [0.5, "0.6"]}},
        {"parameters": [1, 2]},
        {"kappa_steps": 2.5},
        {"eps": -1},
        {"norm": "L7"},
        {"target": "best"},
        {"n": None},
        {"cross_validated": [1]},
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(images, tmp_path, damage):
    file = tmp_path / "c.json"
    model = Ramp().eval()
    calibrate(model, *images, eps=EPS, method="isotonic", features="kappa").save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | damage))
    with pytest.raises(InputError, match=r"c\.json holds no calibration"):
        Calibrated.load(file, model)
    del content["alpha"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="'alpha' is missing"):
        Calibrated.load(file, model)


def test_files_that_are_no_json_or_absent_are_refused(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\x80\x04no")
    with pytest.raises(InputError, match="holds no calibration"):
        Calibrated.load(tmp_path / "c.json", Ramp().eval())
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(InputError, match="holds no calibration"):
        Calibrated.load(tmp_path / "c.json", Ramp().eval())
    with pytest.raises(InputError, match="cannot be read"):
        Calibrated.load(tmp_path / "none.json", Ramp().eval())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "rihgt"}, "right"),
        ({"method": "isotonc"}, "isotonic"),
        ({"features": ("kapa",)}, "kappa"),
        ({"features": ()}, "at least one"),
        ({"features": ("kappa", "kappa")}, "each once"),
        ({"method": "isotonic"}, "takes one feature"),
        ({"method": "beta", "features": "margin"}, "within 0..1"),
        ({"eps": 0.0}, "eps is 0"),
        ({"eps": math.inf}, "eps is inf"),
        ({"norm": "L1"}, "norm"),
        ({"kappa_steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"verdicts": torch.ones(400, dtype=torch.bool)}, "target='robust'"),
        ({"target": "robust", "verdicts": torch.ones(3, dtype=torch.bool)}, r"shape \(400,\)"),
        ({"target": "robust", "verdicts": torch.ones(400)}, "bool"),
    ],
)
def test_bad_settings_are_named(images, options, message):
    with pytest.raises(InputError, match=message):
        calibrate(Ramp().eval(), *images, **{"eps": EPS, **options})


def test_bad_labels_a_missing_outcome_and_training_mode_are_named(images):
    x, y = images
    model = Ramp().eval()
    with pytest.raises(InputError, match="labels for 400 images"):
        calibrate(model, x, y[:3], eps=EPS)
    with pytest.raises(InputError, match="all of the 400 calibration images"):
        calibrate(model, x, model(x).argmax(1), eps=EPS)
    with pytest.raises(InputError, match="none of the 400 calibration images"):
        calibrate(model, x, 1 - model(x).argmax(1), eps=EPS)
    with pytest.raises(InputError, match=r"model\.eval"):
        calibrate(Ramp(), x, y, eps=EPS)
    fitted = calibrate(model, x, y, eps=EPS)
    with pytest.raises(InputError, match=r"0\.\.5"):
        fitted.calibrator(Observed(torch.zeros(1, 2), torch.tensor([11]), *torch.zeros(3, 1)))
