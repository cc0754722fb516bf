import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rb_noisy.criteria import (
    SymmetricCrossEntropy,
    cross_entropy,
    make_criterion,
    normalized_and_reverse,
    reverse_cross_entropy,
)
from rb_noisy.errors import InputError

K = 5


def draw(seed, n=6):
    """Random logits, distributions and one-hot labels, in double precision."""
    g = torch.Generator().manual_seed(seed)
    z, other = (2 * torch.randn(n, K, generator=g, dtype=torch.float64) for _ in range(2))
    return z, other.softmax(1), F.one_hot(torch.randint(K, (n,), generator=g), K).double()


def literal_terms(z, q):
    """CE, reverse CE and NCE of one sample, in plain Python."""
    p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
    ce = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
    rce = -sum(max(a, 1e-7) * math.log(max(b, 1e-4)) for a, b in zip(p, q, strict=True))
    return ce, rce, ce / -sum(math.log(a) for a in p)


@given(seed=st.integers(0, 999), soft=st.booleans(), alpha=st.floats(0, 6), beta=st.floats(0, 2))
def test_criteria_match_their_formulas_sample_by_sample(seed, soft, alpha, beta):
    logits, distribution, hard = draw(seed)
    target = distribution if soft else hard
    expected = [literal_terms(z, q) for z, q in zip(logits.tolist(), target.tolist(), strict=True)]
    ce, rce, nce = (torch.tensor(values, dtype=torch.float64) for values in zip(*expected, strict=True))
    torch.testing.assert_close(cross_entropy(logits, target), ce)
    torch.testing.assert_close(reverse_cross_entropy(logits, target), rce)
    torch.testing.assert_close(SymmetricCrossEntropy(alpha, beta)(logits, target), alpha * ce + beta * rce)
    torch.testing.assert_close(normalized_and_reverse(logits, target), nce + rce)


def test_symmetric_cross_entropy_of_a_hand_computed_case():
    # p = (3/4, 1/4), label 0: CE = log(4/3), reverse CE = −¼·log(1e-4)
    loss = SymmetricCrossEntropy(alpha=2.0, beta=1.0)(torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(2 * math.log(4 / 3) + math.log(1e4) / 4)


def test_certain_and_wrong_stays_finite_under_the_reverse_terms():
    logits, target = torch.tensor([[-200.0, 200.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert reverse_cross_entropy(logits, target).item() == pytest.approx(-math.log(1e-4), rel=1e-4)
    assert normalized_and_reverse(logits, target).isfinite()


@given(seed=st.integers(0, 999), r=st.floats(0, 1))
def test_sglr_is_symmetric_cross_entropy_less_reverse_kl_when_the_weights_sum_to_one(seed, r):
    """[SGLR Prop. 1] and the general identity behind it, see `SymmetricCrossEntropy`."""
    logits, average, hard = draw(seed)
    p, log_hard = logits.softmax(1), hard.clamp_min(1e-4).log()

    def sglr(refined):
        return cross_entropy(logits, r * refined + (1 - r) * hard)

    def reverse_kl(refined):
        return (refined * (refined.log() - log_hard)).sum(1)

    sce = SymmetricCrossEntropy(alpha=1 - r, beta=r)
    # Prop. 1: the refined label is the prediction itself.
    torch.testing.assert_close(sglr(p), sce(logits, hard) - r * reverse_kl(p))
    # With a running average p̄ instead, KL(p̄ ‖ p) remains, and the reverse term is p̄'s.
    reverse = -(average * log_hard).sum(1)
    remainder = (average * (average / p).log()).sum(1)
    expected = (1 - r) * cross_entropy(logits, hard) + r * (reverse - reverse_kl(average) + remainder)
    torch.testing.assert_close(sglr(average), expected)


def test_prop_1_is_not_an_identity_of_gradients():
    logits, _, hard = draw(0)
    logits.requires_grad_()
    fixed = 0.5 * logits.detach().softmax(1) + 0.5 * hard
    (gradient,) = torch.autograd.grad(cross_entropy(logits, fixed).sum(), logits)
    torch.testing.assert_close(gradient, 0.5 * (logits.softmax(1) - hard))  # the refined half pulls nowhere


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_criterion("sec"), "did you mean"),
        (lambda: make_criterion("ce", alpha=1), "does not take"),
        (lambda: make_criterion("sce", alpha=-1), "alpha is -1"),
        (lambda: make_criterion("sce", beta=float("nan")), "beta is nan"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_criteria_are_made_by_name():
    assert make_criterion("ce") is cross_entropy
    assert make_criterion("sce") == SymmetricCrossEntropy(alpha=0.1, beta=1.0)
    assert make_criterion("sce", alpha=6.0).alpha == 6.0
