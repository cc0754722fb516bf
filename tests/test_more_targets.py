"""SAT, temporal ensembling, ELR, distillation, ADR and the annotator, each against its formula written out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rb_noisy.attacks import kappa
from rb_noisy.errors import InputError
from rb_noisy.record import MEMORY, SampleRecord
from rb_noisy.targets import Batch, make_targets

K, B = 4, 6


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, K, generator=generator), torch.randn(B, K, generator=generator)


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 3, 0, 1])


def batch_of(y, natural=None, adversarial=None, epoch=0, **more):
    given = {"index": torch.arange(len(y)), "x": torch.zeros(len(y), 1, 2, 2), "y": y, "share": 0.0, "epoch": epoch}
    batch = Batch(**given | {"hard": F.one_hot(y, K).float()} | more)
    batch.natural, batch.adversarial = natural, adversarial
    return batch


def record_of(targets, y):
    return SampleRecord(y, K, targets.start_average)


def test_sat_trains_towards_the_average_of_natural_predictions_and_weighs_by_its_peak(logits, y):
    natural, adversarial = logits
    targets = make_targets("sat", momentum=0.9, start_epoch=1)
    record = record_of(targets, y)
    assert torch.equal(targets(batch_of(y, natural, adversarial, epoch=0), record).target, F.one_hot(y, K).float())
    assigned = targets(batch_of(y, natural, adversarial, epoch=1), record)
    assert targets.natural_mode(1) == "eval"
    for i in range(B):
        p = [math.exp(v) for v in natural[i].tolist()]
        expected = [0.9 * float(k == y[i]) + 0.1 * p[k] / sum(p) for k in range(K)]
        assert assigned.target[i].tolist() == pytest.approx(expected, abs=1e-6)
        assert assigned.weight[i].item() == pytest.approx(max(expected), abs=1e-6)


def test_temporal_ensembling_penalises_the_mean_squared_distance_from_the_normalised_average(logits, y):
    natural, adversarial = logits
    targets = make_targets("te", start_epoch=2, ramp_end=4)
    record = record_of(targets, y)
    assert targets.natural_mode(1) is None
    assert targets.natural_mode(2) == "eval"

    def assign(guiding, epoch):
        batch = batch_of(y, None, adversarial, epoch=epoch, guiding=guiding)
        targets.before_attack(batch, record)
        before = targets.penalty(batch, record)  # what the attack raises
        assigned = targets(batch, record)
        assert (before is None) == (assigned.penalty is None)
        assert before is None or before(adversarial) == assigned.penalty(adversarial)
        return assigned

    assert assign(None, 1).penalty is None
    assigned = assign(natural, 3)
    assert torch.equal(assigned.target, F.one_hot(y, K).float())
    # One update from zero, divided by its sum, is the prediction itself; half of the ramp is exp(-5/4).
    mean = ((adversarial.softmax(1) - natural.softmax(1)) ** 2).mean()
    expected = 300 * math.exp(-5 * 0.25) * mean
    assert assigned.penalty(adversarial).item() == pytest.approx(expected.item(), rel=1e-5)
    later = assign(adversarial, 9)
    average = (0.9 * 0.1 * natural.softmax(1) + 0.1 * adversarial.softmax(1)) / 0.19
    expected = 300 * ((adversarial.softmax(1) - average) ** 2).mean()
    assert later.penalty(adversarial).item() == pytest.approx(expected.item(), rel=1e-5)


def test_temporal_ensembling_cannot_end_its_ramp_before_it_starts():
    with pytest.raises(InputError, match="ramp_end is 4, before start_epoch 9"):
        make_targets("te", start_epoch=9, ramp_end=4)


def test_elr_rewards_agreement_with_the_early_average(logits, y):
    natural, adversarial = logits
    targets = make_targets("elr")
    record = record_of(targets, y)
    assigned = targets(batch_of(y, natural, adversarial), record)
    p = adversarial.softmax(1).clamp(1e-4, 1 - 1e-4)
    average = 0.3 * p / p.sum(1, keepdim=True)
    torch.testing.assert_close(record.average, average)
    expected = 3 * (1 - (average * p).sum(1)).log().mean()
    assert assigned.penalty(adversarial).item() == pytest.approx(expected.item(), rel=1e-5)
    # TRADES supervises the natural pass: there ELR averages and regularises that one.
    record = record_of(targets, y)
    targets(batch_of(y, natural, adversarial, supervises="natural"), record)
    q = natural.softmax(1).clamp(1e-4, 1 - 1e-4)
    torch.testing.assert_close(record.average, 0.3 * q / q.sum(1, keepdim=True))


def test_distillation_is_the_weighted_cross_entropy_to_label_and_teachers(logits, y):
    student, other = logits
    taught = {"robust": other, "standard": -other}
    targets = make_targets("kd", robust="robust", standard="standard")
    assert targets.teachers == ("robust", "standard")
    images = []

    def teach(name, x):
        images.append(x)
        return taught[name]

    x_adv = torch.ones(B, 1, 2, 2)
    assigned = targets(batch_of(y, None, student, teach=teach, x_adv=x_adv), record_of(targets, y))
    assert all(x is x_adv for x in images)
    natural = batch_of(y, student, other, teach=teach, x_adv=x_adv, supervises="natural")
    targets(natural, record_of(targets, y))
    assert all(x is natural.x for x in images[2:]), "where x is supervised the teachers see x"
    loss = -(assigned.target * student.log_softmax(1)).sum(1).mean() + assigned.penalty(student)
    hard = F.cross_entropy(student, y)
    soft = [-((z / 2).softmax(1) * (student / 2).log_softmax(1)).sum(1).mean() for z in (other, -other)]
    assert loss.item() == pytest.approx((0.3 * hard + 0.6 * soft[0] + 0.1 * soft[1]).item(), rel=1e-5)


def test_distillation_without_a_teacher_says_how_to_name_one():
    with pytest.raises(InputError, match="kd has no teacher"):
        make_targets("kd")


def test_adr_interpolates_less_where_the_averaged_weights_disagree_with_the_label(y):
    targets = make_targets("adr")
    z = torch.zeros(B, K)
    z[0, 0] = 4.0  # agrees with label 0
    z[1, 2] = 4.0  # contradicts label 1
    for share, mix, temperature in ((0.0, 0.7, 2.0), (1.0, 0.95, 1.0), (0.5, 0.825, 1.5)):
        assigned = targets(batch_of(y, teach=lambda name, x: z, share=share), record_of(targets, y))
        p = (z / temperature).softmax(1)
        for i, own in ((0, mix), (1, max(0.0, mix + (p[1, 1] - p[1, 2]).item()))):
            expected = own * p[i] + (1 - own) * F.one_hot(y[i], K)
            torch.testing.assert_close(assigned.target[i], expected)


class Threshold(nn.Module):
    """Class 1 where the first pixel is above a half, else class 0; the other classes never."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        z = self.scale * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-z, z, z * 0 - 9, z * 0 - 9], 1)


def test_the_annotator_relabels_what_kappa_and_loss_both_suspect():
    # Two wrong labels far from the boundary, one right label so close to it that PGD breaks it at once, three right.
    pixel = torch.tensor([0.9, 0.1, 0.53, 0.95, 0.05, 0.9])
    x = pixel[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    y = torch.tensor([0, 1, 1, 1, 0, 1])
    model = Threshold().train()
    targets = make_targets("annotator", noise_rate=0.5, start_epoch=2)
    common = {"eps": 0.1, "alpha": 0.1, "x": x, "draws": torch.Generator().manual_seed(0)}
    record = record_of(targets, y)
    before = batch_of(y, epoch=1, **common)
    assert torch.equal(targets.attack_labels(model, before, record), y)
    batch = batch_of(y, epoch=2, **common)
    geometry = kappa(model, x, y, eps=0.1, alpha=0.1, steps=2, seed=0)
    assert geometry.tolist()[:2] == [0, 0]
    assert geometry[2] < 2
    batch.labels = targets.attack_labels(model, batch, record)
    # κ alone would also take the third; its loss is among the greatest half, but its prediction is its label.
    assert batch.labels.tolist() == [1, 0, 1, 1, 0, 1]
    assert targets(batch, record).target.argmax(1).tolist() == [1, 0, 1, 1, 0, 1]
    assert model.training
    # With a noise rate of nought the loss is never great.
    none = make_targets("annotator", noise_rate=0.0)
    assert torch.equal(none.attack_labels(model, batch_of(y, **common), record), y)


def test_running_kappa_and_loss_forget_old_epochs():
    record = SampleRecord(torch.tensor([0, 1]), 2)
    index = torch.tensor([1])
    for value in (10, 0, 0):
        record.observe(index, torch.tensor([value]), torch.tensor([float(value)]), torch.tensor([1]))
    assert record.kappa.tolist() == [-1, 0]
    assert record.prediction.tolist() == [-1, 1]
    assert record.kappa_average[1].item() == pytest.approx(10 * MEMORY**2)
    assert record.loss_average[1].item() == pytest.approx(10 * MEMORY**2)
    assert record.kappa_average[0].isnan()
    record.forget_epoch()
    assert record.kappa.tolist() == record.prediction.tolist() == [-1, -1]
    assert record.loss.isnan().all()
    assert record.kappa_average[1].item() == pytest.approx(10 * MEMORY**2)


def test_the_noise_rate_counts_samples_with_one_persistent_other_prediction():
    y = torch.tensor([0, 0, 0, 0, 0])
    record = SampleRecord(y, 3)
    assert record.estimate_noise_rate() == 0
    index = torch.arange(4)  # the fifth is never trained on
    for predictions in ([1, 1, 0, 0], [1, 1, 0, 0], [1, 2, 0, 1]):
        record.observe(index, torch.tensor([0, 0, 3, 0]), torch.ones(4), torch.tensor(predictions))
    assert record.estimate_noise_rate() == pytest.approx(1 / 4)


def test_a_run_does_not_go_on_with_other_labels():
    record, other = SampleRecord(torch.tensor([0, 1]), 2), SampleRecord(torch.tensor([1, 1]), 2)
    with pytest.raises(InputError, match="started on other labels"):
        other.load_state_dict(record.state_dict())
    assert other.labels.tolist() == [1, 1]


def seen_record(y, history, targets):
    """A record that has seen these (κ, predictions) epochs, each a pair of (B,) lists."""
    record = record_of(targets, y)
    for kappas, predictions in history:
        record.observe(torch.arange(len(y)), torch.tensor(kappas), torch.ones(len(y)), torch.tensor(predictions))
    return record


def test_kappa_guided_refinement_doubts_labels_that_are_lost_at_once_to_one_other_label(logits, y):
    natural, adversarial = logits
    targets = make_targets("kgr", r=0.1, r_max=0.9, momentum=0.7, adversarial_weight=0.5)
    # Kept by PGD; lost at once and always to label 2; lost at once, now to 0, now to 3; half kept, half lost to 0.
    history = [([10, 0, 0, 5, 10, 10], [0, 2, 0, 0, 0, 1]), ([10, 0, 0, 5, 10, 10], [0, 2, 3, 3, 0, 1])]
    record = seen_record(y, history, targets)
    batch = batch_of(y, natural, adversarial, epoch=0, steps=10)
    r = targets.share_of_average(batch, record)[:, 0].tolist()
    expected = [0.1, 0.9, 0.1 + 0.8 * MEMORY, 0.1 + 0.8 * 0.5 * MEMORY, 0.1, 0.1]
    assert r == pytest.approx(expected, abs=1e-6)
    target = targets(batch, record).target
    p = 0.5 * natural.softmax(1) + 0.5 * adversarial.softmax(1)
    hard = F.one_hot(y, K).float()
    average = 0.7 * hard + 0.3 * p
    for i in range(B):
        torch.testing.assert_close(target[i], r[i] * average[i] + (1 - r[i]) * hard[i])


def test_kappa_guided_refinement_attacks_the_refined_label(y):
    targets = make_targets("kgr", start_epoch=1)
    record = seen_record(y, [([0] * B, [2] * B)], targets)
    record.average = F.one_hot(torch.full((B,), 2), K).float()
    assert torch.equal(targets.attack_labels(None, batch_of(y, epoch=0, steps=5), record), y)
    # κ̄ = 0 and every vote is for label 2: r = 1, the label is replaced. Sample 2 has that label itself.
    assert targets.attack_labels(None, batch_of(y, epoch=1, steps=5), record).tolist() == [2] * B


def test_with_one_r_for_all_kappa_guided_refinement_is_sglr(logits, y):
    natural, adversarial = logits
    common = {"r": 0.3, "temperature": 1.5, "momentum": 0.9, "adversarial_weight": 0.8}
    guided, sglr = make_targets("kgr", r_max=0.3, **common), make_targets("sglr", **common)
    records = [seen_record(y, [([3] * B, [1] * B)], targets) for targets in (guided, sglr)]
    for epoch in range(3):
        batch = batch_of(y, natural, adversarial, epoch=epoch, steps=10)
        ours, theirs = (t(batch, record).target for t, record in zip((guided, sglr), records, strict=True))
        assert torch.equal(ours, theirs)


def test_with_r_of_nought_or_one_kappa_guided_refinement_is_the_annotator(y):
    """Momentum 0 and a sharp natural prediction: the selected samples get argmax f(x), all others keep their label."""
    torch.manual_seed(0)
    natural = torch.randn(B, K) * 1e4
    targets = make_targets("kgr", r=0.0, momentum=0.0, adversarial_weight=0.0)
    predicted = natural.argmax(1)
    selected = predicted != y
    kappas = torch.where(selected, 0, 10).tolist()
    record = seen_record(y, [(kappas, predicted.tolist())], targets)
    target = targets(batch_of(y, natural, natural, steps=10), record).target
    assert selected.any()
    assert torch.equal(target, F.one_hot(torch.where(selected, predicted, y), K).float())
