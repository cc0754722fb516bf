import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rb_noisy.attacks import ATTACK_LOSSES
from rb_noisy.criteria import SymmetricCrossEntropy, cross_entropy, normalized_and_reverse
from rb_noisy.errors import InputError
from rb_noisy.objectives import MART, NRAT, OBJECTIVES, PGDAT, make_objective

K = 4


def draw(seed=0, n=6, soft=True):
    g = torch.Generator().manual_seed(seed)
    natural, adversarial, other = (2 * torch.randn(n, K, generator=g, dtype=torch.float64) for _ in range(3))
    hard = F.one_hot(torch.randint(K, (n,), generator=g), K).double()
    return natural, adversarial, (0.3 * other.softmax(1) + 0.7 * hard) if soft else hard


def softmax(z):
    return [math.exp(v) / sum(math.exp(u) for u in z) for v in z]


def literal(name, natural, adversarial, target, weight, beta):
    """Each objective by its formula, in plain Python, one sample at a time."""
    supervised, compared = [], []
    for z, z_adv, q in zip(natural.tolist(), adversarial.tolist(), target.tolist(), strict=True):
        p, p_adv = softmax(z), softmax(z_adv)
        judged = p if name in ("st", "trades", "nrat") else p_adv
        ce = -sum(b * math.log(a) for a, b in zip(judged, q, strict=True))
        kl = sum(a * math.log(a / b) for a, b in zip(p, p_adv, strict=True))
        back = sum(b * math.log(b / a) for a, b in zip(p, p_adv, strict=True))
        y = q.index(max(q))
        if name == "mart":
            ce -= math.log(1.0001 - max(v for k, v in enumerate(p_adv) if k != y))
            kl *= 1 - sum(a * b for a, b in zip(p, q, strict=True))
        if name == "nrat":
            ce = ce / -sum(math.log(a) for a in p)
            ce -= sum(a * math.log(max(b, 1e-4)) for a, b in zip(p, q, strict=True))
            kl = (kl + back) / 2
        supervised.append(ce)
        compared.append(kl if name in ("trades", "mart", "nrat") else 0.0)
    loss = sum(w * v for w, v in zip(weight, supervised, strict=True)) / sum(weight)
    return loss + beta * sum(compared) / len(compared)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 99), soft=st.booleans(), weighted=st.booleans(), beta=st.floats(0, 8))
def test_objectives_match_a_literal_loop_with_and_without_weights(name, seed, soft, weighted, beta):
    natural, adversarial, target = draw(seed, soft=soft)
    objective = make_objective(name, **({"beta": beta} if name in ("trades", "mart", "nrat") else {}))
    weight = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = literal(name, natural, adversarial, target, weight.tolist() if weighted else [1.0] * 6, beta)
    # What an objective says it does not take, it does not get.
    given_natural = natural if objective.uses_natural else None
    given_adversarial = adversarial if objective.attack_loss else None
    loss = objective(given_natural, given_adversarial, target, weight if weighted else None)
    assert loss.item() == pytest.approx(expected)


def test_mart_of_a_hand_computed_case():
    # p(x) = (1/2, 1/2), p(x̃) = (1/4, 3/4), y = 0: BCE = log 4 − log(1.0001 − 3/4), KL = ½·log(2·2/3), 1 − p_y = ½
    natural, adversarial = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    expected = math.log(4) - math.log(1.0001 - 0.75) + 5 * 0.5 * 0.5 * math.log(4 / 3)
    assert MART(beta=5.0)(natural, adversarial, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_criterion_takes_the_place_of_the_cross_entropy_on_the_supervised_logits(name):
    natural, adversarial, target = draw()
    objective, sce = make_objective(name), SymmetricCrossEntropy(0.5, 2.0)
    judged = natural if objective.supervises == "natural" else adversarial
    own = normalized_and_reverse if name == "nrat" else cross_entropy
    difference = objective(natural, adversarial, target, criterion=sce) - objective(natural, adversarial, target)
    torch.testing.assert_close(difference, (sce(judged, target) - own(judged, target)).mean())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_of_no_weight_teaches_nothing_about_its_label(name):
    natural, adversarial, target = draw()
    weight = torch.tensor([1.0, 0, 1, 1, 1, 1], dtype=torch.float64)
    objective = make_objective(name)
    changed = target.clone()
    changed[1] = changed[1].roll(1)
    if name != "mart":  # whose KL is scaled by how far the label is believed
        assert objective(natural, adversarial, changed, weight) == objective(natural, adversarial, target, weight)
    assert objective(natural, adversarial, changed) != objective(natural, adversarial, target)
    assert torch.isfinite(objective(natural, adversarial, target, torch.zeros(6, dtype=torch.float64)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_finite_with_finite_gradients_at_certainty(name):
    natural, adversarial = (torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True) for _ in range(2))
    for label in range(3):
        loss = make_objective(name)(natural, adversarial, F.one_hot(torch.tensor([label]), 3).float())
        gradients = torch.autograd.grad(loss, [natural, adversarial], allow_unused=True)
        assert loss.isfinite()
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_every_objective_says_what_training_must_know():
    for name, make in OBJECTIVES.items():
        objective = make()
        assert objective.attack_loss is None or objective.attack_loss in ATTACK_LOSSES, name
        assert objective.supervises in ("natural", "adversarial"), name
        assert objective.uses_natural or objective.supervises == "adversarial", name
        fast = (objective.steps, objective.alpha_ratio, objective.start_ratio, objective.project)
        expected = {"fgsm-rs": (1, 1.25, 1.0, True), "n-fgsm": (1, 1.0, 2.0, False), "liet": (1, 1.0, 1.0, True)}
        assert fast == expected.get(name, (None, None, 1.0, True)), name
    assert isinstance(make_objective("fgsm-rs"), PGDAT)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_objective("matr"), "did you mean mart"),
        (lambda: make_objective("n-fgsm", beta=1), "does not take"),
        (lambda: MART(beta=-1), "beta is -1"),
        (lambda: NRAT(beta=math.inf), "beta is inf"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()
