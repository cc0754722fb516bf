import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier

from rb_noisy.calibrators import (
    FEATURES,
    TREES,
    Calibrator,
    Observed,
    check_parameters,
    choose_calibrator,
    fit_calibrator,
)
from rb_noisy.errors import InputError

STEPS = 10


def observed(n, seed=0):
    """Logits of three classes, κ and margins that have to do with each other, and nothing with the outcome yet."""
    random = np.random.default_rng(seed)
    logits = torch.tensor(random.normal(0, 2, (n, 3)))
    kappa, targeted, wide = (torch.tensor(random.integers(0, STEPS + 1, n)) for _ in range(3))
    margins = [torch.tensor(random.normal(0, 1, n)) for _ in range(3)]
    return Observed(logits, kappa, margins[0], targeted, margins[1], wide, margins[2])


def island(found, seed=0):
    """True with probability 0.9 where κ and the attack's margin are both high or both low, else 0.1: no line can."""
    random = np.random.default_rng(seed)
    both = (found.kappa > 5) == (found.attack_margin > 0)
    return torch.tensor(random.random(len(both)) < np.where(both, 0.9, 0.1))


def test_the_trees_say_what_scikit_learn_says():
    found = observed(300)
    outcome = island(found)
    fitted = fit_calibrator(found, outcome, features=FEATURES, method="trees", kappa_steps=STEPS)
    top, p = found.logits.topk(2, dim=1).values, found.logits.softmax(1)
    columns = [p.amax(1), top[:, 0] - top[:, 1], (p * p.log()).sum(1), *list(vars(found).values())[1:]]
    columns = np.stack([column.numpy() for column in columns], axis=1)
    expected = GradientBoostingClassifier(**TREES).fit(columns, outcome.numpy()).predict_proba(columns)[:, 1]
    assert np.allclose(fitted(found).numpy(), expected, atol=1e-9)
    assert len(np.unique(expected.round(6))) > 50


def test_trees_hold_what_no_line_can_and_are_chosen_for_it():
    found = observed(600)
    outcome, fresh = island(found), observed(2000, 7)
    features = ("kappa", "attack_margin")
    chosen, scores = choose_calibrator(found, outcome, features=features, kappa_steps=STEPS)
    assert chosen.method == "trees"
    assert min(scores, key=scores.get) == "trees"
    assert scores.keys() == {"logistic", "trees", "isotonic on kappa"}
    assert scores["trees"] == pytest.approx(0.09, abs=0.04)  # 0.9·0.1 of the best there can be
    assert scores["logistic"] == pytest.approx(0.25, abs=0.02)
    error = (chosen(fresh) - island(fresh, 8).double()).square().mean()
    assert error < 0.13


def test_where_a_line_is_the_truth_the_simple_method_is_chosen():
    found = observed(200, 3)
    truth = torch.sigmoid(2.0 * (found.logits.topk(2, dim=1).values @ torch.tensor([1.0, -1.0]).double()) - 2)
    outcome = torch.tensor(np.random.default_rng(4).random(200) < truth.numpy())
    chosen, scores = choose_calibrator(found, outcome, features=("margin", "kappa"), kappa_steps=STEPS)
    assert chosen.method == "logistic"
    assert scores["logistic"] < scores["trees"] < scores["isotonic on kappa"]


def test_one_sample_of_an_outcome_is_too_few_to_cross_validate_and_enough_to_fit():
    found, outcome = observed(50), torch.zeros(50, dtype=torch.bool)
    outcome[3] = True
    chosen, scores = choose_calibrator(found, outcome, features=("kappa", "margin"), kappa_steps=STEPS)
    assert (chosen.method, scores) == ("logistic", {})
    assert 0 < chosen(found).min() <= chosen(found).max() < 0.5


def test_the_choice_is_the_same_every_time_and_the_fit_is_on_all_samples():
    found = observed(200)
    outcome = island(found)
    options = {"features": ("kappa", "attack_margin"), "kappa_steps": STEPS}
    one, other = (choose_calibrator(found, outcome, **options) for _ in range(2))
    assert one == other
    assert one[0] == fit_calibrator(found, outcome, method=one[0].method, **options)


def test_json_keeps_every_bit_of_the_trees():
    found = observed(200)
    fitted = fit_calibrator(found, island(found), features=FEATURES, method="trees", kappa_steps=STEPS)
    content = json.loads(json.dumps(asdict(fitted)))
    check_parameters("trees", FEATURES, content["parameters"])
    content["parameters"] = {name: tuple(values) for name, values in content["parameters"].items()}
    again = Calibrator(**content | {"features": FEATURES})
    assert torch.equal(again(found), fitted(found))
    assert len(json.dumps(content)) < 60_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"left": lambda v: (0.0, *v[1:])}, "later node"),  # round and round
        ({"right": lambda v: (1e9, *v[1:])}, "later node"),
        ({"left": lambda v: (1.5, *v[1:])}, "whole numbers"),
        ({"feature": lambda v: (9.0, *v[1:])}, r"0\.\.1"),
        ({"root": lambda v: (-1.0, *v[1:])}, "root"),
        ({"threshold": lambda v: v[1:]}, "parameters of trees"),
        ({"intercept": lambda v: ()}, "parameters of trees"),
    ],
)
def test_trees_that_lead_nowhere_are_refused(damage, message):
    found = observed(100)
    features = ("kappa", "attack_margin")
    fitted = fit_calibrator(found, island(found), features=features, method="trees", kappa_steps=STEPS)
    parameters = fitted.parameters | {name: change(fitted.parameters[name]) for name, change in damage.items()}
    with pytest.raises(ValueError, match=message):
        check_parameters("trees", features, parameters)


def test_a_feature_that_was_not_measured_or_does_not_fit_is_named():
    found, outcome = observed(20), torch.arange(20) < 9
    fit = {"method": "logistic", "kappa_steps": STEPS}
    with pytest.raises(InputError, match="kappa_2eps was not measured"):
        fit_calibrator(Observed(found.logits, found.kappa), outcome, features=("kappa_2eps",), **fit)
    bad = Observed(found.logits, found.kappa, torch.full((20,), torch.inf))
    with pytest.raises(InputError, match="attack_margin must hold one finite number"):
        fit_calibrator(bad, outcome, features=("attack_margin",), **fit)
    with pytest.raises(InputError, match=r"κ must lie in 0\.\.3"):
        fit_calibrator(found, outcome, features=("kappa_targeted",), method="logistic", kappa_steps=3)
