import pytest
import torch

import rb_noisy
from rb_noisy.confidence import observe
from rb_noisy.confidence_attack import believed_attack


@pytest.fixture(scope="module")
def subject():
    model, data = rb_noisy.load_model("at_digits_sym40"), rb_noisy.load_data("digits")
    x, y = data.x_test[:40], data.y_test[:40]
    with torch.no_grad():
        target = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    return model, x, target


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 1.5)])
def test_points_stay_in_the_ball_and_are_the_same_for_the_same_seed(subject, norm, eps):
    model, x, target = subject
    options = {"eps": eps, "norm": norm, "steps": 7, "inner_steps": 2, "every": 3, "seed": 1}
    points = list(believed_attack(model, x, target, **options))
    assert len(points) == 3  # after 3, 6 and 7 steps
    for point, again in zip(points, believed_attack(model, x, target, **options), strict=True):
        assert torch.equal(point, again)
        length = (point - x).flatten(1).norm(dim=1, p=float("inf") if norm == "Linf" else 2)
        assert length.max() <= eps + 1e-5
        assert 0 <= point.min() <= point.max() <= 1


def test_the_joint_attack_raises_kappa_of_wrong_answers_where_the_softmax_attack_does_not(subject):
    model, x, target = subject
    ball = {"eps": 0.2, "norm": "Linf"}
    observed = {}
    for inner_steps in (0, 5):
        *_, point = believed_attack(model, x, target, steps=30, inner_steps=inner_steps, seed=0, **ball)
        found = observe(model, point, features=("kappa",), alpha=0.05, steps=10, **ball)
        observed[inner_steps] = found, found.logits.argmax(1) == target
    both = observed[0][1] & observed[5][1]
    assert both.sum() > 5
    softmax, joint = (observed[k][0].attack_margin[both].mean() for k in (0, 5))
    assert joint > softmax
    softmax, joint = (observed[k][0].kappa[both].double().mean() for k in (0, 5))
    assert joint > softmax
