"""SAT, temporal ensembling, ELR, distillation, ADR and the annotator, each against its formula written out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rb_noisy.errors import InputError
from rb_noisy.geometry import kappa
from rb_noisy.record import MEMORY, TEMPERATURES, SampleRecord
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


def test_the_running_kappa_forgets_old_epochs():
    record = SampleRecord(torch.tensor([0, 1]), 2)
    index = torch.tensor([1])
    for value in (10, 0, 0):
        record.observe(index, torch.tensor([value]), torch.tensor([float(value)]), torch.tensor([1]))
    assert record.kappa.tolist() == [-1, 0]
    assert record.prediction.tolist() == [-1, 1]
    assert record.kappa_average[1].item() == pytest.approx(10 * MEMORY**2)
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


def test_the_annotator_estimates_the_noise_rate_anew_before_every_epoch():
    targets = make_targets("annotator", start_epoch=1)
    record = SampleRecord(torch.tensor([0, 0, 0, 0]), 3)
    index, rates = torch.arange(4), []
    for epoch in range(4):
        targets.begin_epoch(record, epoch)
        rates.append(record.noise_rate.item())
        wrong = [1] * epoch + [0] * (4 - epoch)  # one more is taken for label 1 in every epoch
        record.observe(index, torch.zeros(4, dtype=torch.long), torch.ones(4), torch.tensor(wrong))
    targets.begin_epoch(record, 9)
    assert rates == [0, 0, 0, 0]  # no prediction has persisted yet
    for epoch in range(4, 8):
        record.observe(index, torch.zeros(4, dtype=torch.long), torch.ones(4), torch.tensor([1, 1, 1, 0]))
        targets.begin_epoch(record, epoch)
    assert record.noise_rate.item() == 0.75


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


def transition_by_em(average, given, iterations=20):
    """Dawid & Skene's EM with loops; the transition matrix of the last M step, and every sample's P(given is right)."""
    count, classes = average.shape
    posterior = average / average.sum(1, keepdim=True)
    for _ in range(iterations + 1):
        transition = torch.zeros(classes, classes)
        for k in range(classes):
            for i in range(count):
                transition[k, given[i]] += posterior[i, k]
            transition[k] /= transition[k].sum()
        likelihood = torch.stack([average[i] * transition[:, given[i]] for i in range(count)])
        posterior = likelihood / likelihood.sum(1, keepdim=True)
    return transition, torch.stack([posterior[i, given[i]] for i in range(count)])


def judged_record(targets, count=40):
    """A record whose p̄ is near a true class, with pair-noisy labels, and with κ of its own for every sample."""
    generator = torch.Generator().manual_seed(1)
    true = torch.randint(K, (count,), generator=generator)
    given = torch.where(torch.rand(count, generator=generator) < 0.4, (true + 1) % K, true)
    record = record_of(targets, given)
    noise = torch.rand(count, K, generator=generator)
    record.average = (4 * F.one_hot(true, K) + noise).softmax(1)
    kappa = torch.randint(11, (count,), generator=generator)
    record.observe(torch.arange(count), kappa, torch.ones(count), true)
    return record, true, given, kappa


def test_the_transition_matrix_is_that_of_expectation_maximisation():
    record, true, given, _ = judged_record(make_targets("kgr"))
    transition, right = transition_by_em(record.average, given)
    record.judge()
    torch.testing.assert_close(record.transition, transition)
    assert record.noise_rate.item() == pytest.approx(1 - right.mean().item(), abs=1e-5)
    # What it is for: a rate near the true one, and every wrong label contradicted more than every right one.
    wrong = given != true
    assert record.noise_rate.item() == pytest.approx(wrong.float().mean().item(), abs=0.1)
    contradiction = record.contradiction(torch.arange(len(given)))
    assert contradiction[wrong].min() > contradiction[~wrong].max()


def test_the_temperature_is_the_one_under_which_the_given_labels_are_likeliest():
    targets = make_targets("kgr", fit_temperature=True, temperature=1, draw=False)
    generator = torch.Generator().manual_seed(0)
    knowledge = (3 * torch.randn(150, K, generator=generator)).softmax(1)
    true = torch.multinomial(knowledge, 1, generator=generator)[:, 0]
    given = torch.where(torch.rand(150, generator=generator) < 0.3, (true + 1) % K, true)
    record = seen_record(given, [([0] * 150, true.tolist())], targets)
    plain = record.average = knowledge**0.5 / (knowledge**0.5).sum(1, keepdim=True)  # says less than it knows

    def likelihood(temperature):
        sharp = plain ** (1 / temperature)
        sharp = sharp / sharp.sum(1, keepdim=True)
        transition, _ = transition_by_em(sharp, given)
        return sum((sharp[i] @ transition[:, given[i]]).log().item() for i in range(len(given)))

    targets.begin_epoch(record, 0)
    best = max(TEMPERATURES, key=likelihood)
    assert 0.3 < best < 0.8
    assert record.temperature.item() == pytest.approx(best)
    sharp = plain ** (1 / best)
    sharp = sharp / sharp.sum(1, keepdim=True)
    transition, right = transition_by_em(sharp, given)
    torch.testing.assert_close(record.transition, transition, atol=1e-5, rtol=1e-4)
    assert record.noise_rate.item() == pytest.approx(1 - right.mean().item(), abs=1e-5)
    # The refined label is made of the sharpened p̄; without κ's factor it gives the given label its probability.
    index = torch.arange(len(given))
    refined = targets.refined(batch_of(given, epoch=0, steps=10), record)
    torch.testing.assert_close(refined[index, given], right, atol=1e-5, rtol=1e-4)
    other = (given + 1) % K
    share = (1 - right) / (1 - sharp[index, given])
    torch.testing.assert_close(refined[index, other], share * sharp[index, other], atol=1e-5, rtol=1e-3)


def test_samples_that_training_has_not_seen_do_not_move_the_transition_matrix():
    record, _, given, _ = judged_record(make_targets("kgr"))
    transition, _ = transition_by_em(record.average[:30], given[:30])
    record.votes[30:] = 0
    record.judge()
    torch.testing.assert_close(record.transition, transition)
    record.votes.zero_()
    record.transition = torch.eye(K)
    record.judge()
    assert torch.equal(record.transition, torch.eye(K))
    assert record.contradiction(torch.arange(len(given))).eq(0).all()


def test_kappa_guided_refinement_gives_the_given_label_its_probability_and_spares_what_resists():
    targets = make_targets("kgr", draw=False)
    record, _, given, kappa = judged_record(targets)
    targets.begin_epoch(record, 0)
    _, right = transition_by_em(record.average, given)
    index = torch.arange(len(given))
    p_given = record.average[index, given]
    share = (1 - kappa / 10) * (1 - right) / (1 - p_given)
    batch = batch_of(given, epoch=0, steps=10)
    torch.testing.assert_close(targets.share_of_average(batch, record)[:, 0], share)
    expected = share[:, None] * record.average + (1 - share[:, None]) * F.one_hot(given, K)
    torch.testing.assert_close(targets.refined(batch, record), expected)
    # Without κ the given label keeps exactly its probability.
    record.kappa_average.fill_(0)
    torch.testing.assert_close(targets.refined(batch, record)[index, given], right)


def test_a_witness_keeps_its_label_and_only_witnesses_judge():
    targets = make_targets("kgr", witness_every=4)
    record, _, given, _ = judged_record(targets)
    record.kappa_average.fill_(0)
    targets.begin_epoch(record, 0)
    transition, _ = transition_by_em(record.average[::4], given[::4])
    torch.testing.assert_close(record.transition, transition)
    refined = targets.refined(batch_of(given, epoch=0, steps=10), record)
    witness = torch.arange(len(given)) % 4 == 0
    assert torch.equal(refined[witness], F.one_hot(given[witness], K).float())
    assert (refined[~witness] != F.one_hot(given[~witness], K)).any()


def test_kappa_guided_refinement_draws_the_label_that_is_attacked_and_trained_towards(logits):
    targets = make_targets("kgr", start_epoch=1)
    record, _, given, _ = judged_record(targets)
    assert torch.equal(targets.attack_labels(None, batch_of(given, epoch=0, steps=10), record), given)
    targets.begin_epoch(record, 1)
    batch = batch_of(given, epoch=1, steps=10)
    batch.draws = torch.Generator().manual_seed(0)
    refined = targets.refined(batch, record)
    counts = torch.zeros_like(refined)
    for _ in range(400):
        batch.labels = targets.attack_labels(None, batch, record)
        target = targets(batch, record).target
        assert torch.equal(target, F.one_hot(batch.labels, K).float())
        counts += target
    # Four standard deviations of a share of 400 draws are 0.1 at most.
    torch.testing.assert_close(counts / 400, refined, atol=0.1, rtol=0)


def test_kappa_guided_refinement_takes_the_present_prediction_into_the_average_before_the_attack(logits, y):
    natural, _ = logits
    targets = make_targets("kgr", momentum=0.5, temperature=0.25)
    record = record_of(targets, y)
    batch = batch_of(y, natural, epoch=0, steps=10)
    batch.guiding = natural
    targets.before_attack(batch, record)
    expected = 0.5 * F.one_hot(y, K) + 0.5 * (natural / 0.25).softmax(1)
    torch.testing.assert_close(record.average, expected)
    batch.labels = y
    targets(batch, record)
    torch.testing.assert_close(record.average, expected)  # once per pass


def test_with_one_r_for_all_kappa_guided_refinement_is_sglr(logits, y):
    natural, adversarial = logits
    common = {"r": 0.3, "temperature": 1.5, "momentum": 0.9, "adversarial_weight": 0.8}
    guided, sglr = make_targets("kgr", r_max=0.3, draw=False, **common), make_targets("sglr", **common)
    records = [seen_record(y, [([3] * B, [1] * B)], targets) for targets in (guided, sglr)]
    for epoch in range(3):
        batch = batch_of(y, natural, adversarial, epoch=epoch, steps=10)
        guided.begin_epoch(records[0], epoch)
        guided.before_attack(batch, records[0])
        ours, theirs = (t(batch, record).target for t, record in zip((guided, sglr), records, strict=True))
        assert torch.equal(ours, theirs)


def test_with_r_of_nought_or_one_kappa_guided_refinement_is_the_annotator(y):
    """Momentum 0 and a sharp natural prediction: the selected samples get argmax f(x), all others keep their label."""
    torch.manual_seed(0)
    natural = torch.randn(B, K) * 1e4
    targets = make_targets("kgr", momentum=0.0)
    predicted = natural.argmax(1)
    selected = predicted != y
    record = seen_record(y, [(torch.where(selected, 0, 10).tolist(), predicted.tolist())], targets)
    record.transition.fill_(1 / K)  # any label may have become any other
    batch = batch_of(y, natural, epoch=0, steps=10)
    batch.guiding, batch.draws = natural, torch.Generator().manual_seed(0)
    targets.before_attack(batch, record)
    batch.labels = targets.attack_labels(None, batch, record)
    assert selected.any()
    assert not selected.all()
    assert torch.equal(batch.labels, torch.where(selected, predicted, y))
    assert torch.equal(targets(batch, record).target, F.one_hot(batch.labels, K).float())
