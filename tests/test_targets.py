import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rb_noisy.errors import InputError
from rb_noisy.objectives import PGDAT, TRADES, StandardTraining, make_objective
from rb_noisy.record import SampleRecord
from rb_noisy.targets import Batch, Hard, LabelSmoothing, SelfGuided, make_targets

K = 5


def batch(seed=0, n=6):
    torch.manual_seed(seed)
    return torch.randn(n, K, dtype=torch.float64), torch.randn(n, K, dtype=torch.float64), torch.randint(0, K, (n,))


def assign(targets, record, index, y, natural=None, adversarial=None, epoch=0, **more):
    """What `targets` assigns to the samples `index` with these logits."""
    given = Batch(index=index, x=None, y=y, hard=F.one_hot(y, K).float(), epoch=epoch, share=0.0, **more)
    given.natural, given.adversarial = natural, adversarial
    return targets(given, record)


def refine(targets, record, index, y, natural, adversarial, epoch):
    return assign(targets, record, index, y, natural, adversarial, epoch).target


def literal_softmax(z, temperature):
    e = [math.exp(v / temperature) for v in z]
    return [v / sum(e) for v in e]


def test_label_smoothing_is_equation_5():
    target = assign(LabelSmoothing(r=0.2), None, None, torch.tensor([2])).target
    torch.testing.assert_close(target[0], torch.tensor([0.04, 0.04, 0.84, 0.04, 0.04]))


@settings(max_examples=25, deadline=None)
@given(
    r=st.floats(0, 1),
    temperature=st.floats(0.5, 3),
    momentum=st.floats(0, 1),
    weight=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_sglr_matches_equations_6_to_8_computed_sample_by_sample(r, temperature, momentum, weight, seed):
    labels = torch.randint(0, K, (10,), generator=torch.Generator().manual_seed(seed))
    record = SampleRecord(labels, K)
    average = {i: [float(k == labels[i]) for k in range(K)] for i in range(10)}
    targets = SelfGuided(r=r, temperature=temperature, momentum=momentum, adversarial_weight=weight)
    for step in range(3):
        natural, adversarial, _ = batch(seed + step)
        index = torch.randperm(10, generator=torch.Generator().manual_seed(step))[:6]
        target = refine(targets, record, index, labels[index], natural, adversarial, epoch=0)
        for row, i in enumerate(index.tolist()):
            p = literal_softmax(natural[row].tolist(), temperature)
            p_adv = literal_softmax(adversarial[row].tolist(), temperature)
            for k in range(K):
                mixed = weight * p_adv[k] + (1 - weight) * p[k]
                average[i][k] = momentum * average[i][k] + (1 - momentum) * mixed
                expected = r * average[i][k] + (1 - r) * float(k == labels[i])
                assert target[row, k].item() == pytest.approx(expected, abs=1e-5)
    untouched = {i: row for i, row in average.items() if row.count(0.0) == K - 1}
    for i, row in untouched.items():
        assert record.average[i].tolist() == row


def test_proposition_1_sglr_is_symmetric_cross_entropy_less_reverse_kl():
    """L_sglr = L_sce − r·L_rkl with L_sce = (1−r)·CE + r·RCE, whose weights sum to 1 [SGLR Prop. 1]."""
    r = 0.3
    _, adversarial, y = batch()
    record = SampleRecord(y, K)
    targets = SelfGuided(r=r, temperature=1.0, momentum=0.0, adversarial_weight=1.0)
    target = refine(targets, record, torch.arange(len(y)), y, adversarial, adversarial, epoch=0)
    sglr = PGDAT()(None, adversarial, target.double())

    p, hard = adversarial.softmax(1), F.one_hot(y, K).double()
    log_label = hard.clamp_min(1e-4).log()
    cross_entropy = -(hard * p.log()).sum(1).mean()
    reverse_cross_entropy = -(p * log_label).sum(1).mean()
    reverse_kl = (p * (p.log() - log_label)).sum(1).mean()
    sce = (1 - r) * cross_entropy + r * reverse_cross_entropy
    assert sglr.item() == pytest.approx((sce - r * reverse_kl).item(), abs=1e-6)


def test_no_gradient_flows_into_a_target():
    natural, adversarial, y = batch()
    for targets in (Hard(), LabelSmoothing(), SelfGuided(momentum=0.0, r=1.0)):
        natural.requires_grad_()
        adversarial.requires_grad_()
        target = refine(targets, SampleRecord(y, K), torch.arange(len(y)), y, natural, adversarial, epoch=0)
        assert not target.requires_grad
        # The gradient is that of a constant target: softmax(z) − target, over the batch size.
        (gradient,) = torch.autograd.grad(PGDAT()(natural, adversarial, target.double()), adversarial)
        torch.testing.assert_close(gradient, (adversarial.softmax(1) - target) / len(y))


def test_extremes_of_r_are_the_hard_label_and_the_running_average():
    natural, adversarial, y = batch()
    index = torch.arange(len(y))
    hard = refine(SelfGuided(r=0.0), SampleRecord(y, K), index, y, natural, adversarial, epoch=0)
    assert torch.equal(hard, F.one_hot(y, K).float())
    record = SampleRecord(y, K)
    soft = refine(SelfGuided(r=1.0), record, index, y, natural, adversarial, epoch=0)
    assert torch.equal(soft, record.average)


def test_before_the_start_epoch_the_label_is_hard_and_the_average_waits():
    natural, adversarial, y = batch()
    record = SampleRecord(y, K)
    before = record.average.clone()
    targets = make_targets("sglr-released", start_epoch=9)
    assert (targets.r, targets.temperature, targets.momentum, targets.adversarial_weight) == (1.0, 1.0, 0.9, 0.8)
    index = torch.arange(len(y))
    early = refine(targets, record, index, y, natural, adversarial, epoch=targets.start_epoch - 1)
    assert torch.equal(early, F.one_hot(y, K).float())
    assert torch.equal(record.average, before)
    refine(targets, record, index, y, natural, adversarial, epoch=targets.start_epoch)
    assert not torch.equal(record.average, before)


def test_standard_training_averages_the_natural_prediction_alone():
    natural, _, _ = batch()
    torch.testing.assert_close(SelfGuided(temperature=2.0).mix(natural, None), (natural.float() / 2).softmax(1))


def test_record_is_restored_and_refuses_other_data():
    _, _, y = batch()
    record, other = SampleRecord(y, K), SampleRecord(y, K)
    record.update_average(torch.tensor([1]), torch.full((1, K), 0.2), 0.5)
    record.kappa[2], record.loss[3] = 7, 1.5
    other.load_state_dict(record.state_dict())
    assert torch.equal(other.average, record.average)
    assert other.kappa[2] == 7
    with pytest.raises(InputError, match="other data"):
        SampleRecord(y[:3], K).load_state_dict(record.state_dict())


def test_objectives_match_their_formulas():
    natural, adversarial, y = batch()
    target = assign(LabelSmoothing(0.1), None, None, y).target.double()
    cross_entropy = -(target * natural.log_softmax(1)).sum(1).mean()
    adversarial_entropy = -(target * adversarial.log_softmax(1)).sum(1).mean()
    p, q = natural.softmax(1), adversarial.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(StandardTraining()(natural, None, target), cross_entropy)
    torch.testing.assert_close(PGDAT()(None, adversarial, target), adversarial_entropy)
    torch.testing.assert_close(TRADES(beta=4.0)(natural, adversarial, target), cross_entropy + 4 * kl)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_targets("sgrl"), "did you mean sglr"),
        (lambda: make_targets("ls", q=1), "does not take"),
        (lambda: make_targets("sglr", r=1.5), "r is 1.5"),
        (lambda: make_targets("sglr", temperature=0), "temperature is 0"),
        (lambda: make_targets("sglr", start_epoch=-1), "start_epoch is -1"),
        (lambda: make_objective("trade"), "did you mean trades"),
        (lambda: make_objective("trades", beta=-1), "beta is -1"),
        (lambda: make_objective("st", beta=1), "does not take"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value)
