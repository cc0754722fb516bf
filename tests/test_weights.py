import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rb_noisy.errors import InputError
from rb_noisy.weights import AVERAGING, AWP, SWA, Averager, WeightAverage, kept_buffers


def net(seed=0, batchnorm=True):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm2d(4)] if batchnorm else []
    layers = [nn.Conv2d(2, 4, 3, padding=1), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def batch(seed, n=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 5, 5, generator=g).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(3, (n,), generator=g)


def step(model, seed):
    """One step of plain gradient descent in train mode."""
    x, y = batch(seed)
    model.train()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad


def gradients_of(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_awp_moves_each_weight_by_gamma_of_its_own_norm_along_its_gradient():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = gradients_of(model, *batch(1))
    differences = iter(AWP(gamma=0.05).perturb(model, gradients))
    for w, old, g in zip(model.parameters(), before, gradients, strict=True):
        if old.dim() == 1:  # biases, and both parameters of BatchNorm
            assert torch.equal(w, old)
            continue
        norm, gradient_norm = old.pow(2).sum().sqrt(), g.pow(2).sum().sqrt()
        expected = 0.05 * norm / gradient_norm * g
        torch.testing.assert_close(w - old, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(next(differences), expected)
    assert next(differences, None) is None


def test_awp_of_a_hand_computed_case():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0]])
    AWP(gamma=0.1).perturb(model, [torch.tensor([[0.0, -2.0]])])  # ‖w‖ = 5 along (0, −1)
    torch.testing.assert_close(model.weight.data, torch.tensor([[3.0, 3.5]]))


def test_awp_raises_the_loss_and_restores_the_weights_bit_by_bit():
    model, (x, y) = net(), batch(1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with AWP(gamma=0.1).perturbed(model, gradients):
        worse = F.cross_entropy(model(x), y)
        worse.backward()
    assert worse > loss
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ZeroDivisionError), AWP().perturbed(model, gradients):
        raise ZeroDivisionError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_awp_leaves_frozen_weights_and_those_without_gradient_finite():
    model = net()
    first = model[0].weight.detach().clone()
    gradients = [None, *(torch.zeros_like(p) for p in list(model.parameters())[1:])]
    differences = AWP().perturb(model, gradients)
    assert torch.equal(model[0].weight, first)
    assert all((d == 0).all() for d in differences)


def test_kept_buffers_lets_a_pass_leave_no_trace():
    model, (x, y) = net().train(), batch(1)
    before = snapshot(model)
    with kept_buffers(model):
        gradients = gradients_of(model, x, y)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert same(model.state_dict(), before)
    assert all(g.isfinite().all() for g in gradients)


def test_wa_matches_a_literal_running_average_statistics_included():
    model = net()
    averager = Averager(model, WeightAverage(decay=0.3))
    assert not averager.started
    assert same(averager.model.state_dict(), model.state_dict())
    expected, decays = None, [0.1, 2 / 11, 3 / 12, 0.3, 0.3]  # min(0.3, (1+t)/(10+t)); 4/13 is above 0.3
    for t, decay in enumerate(decays):
        step(model, t)
        averager.after_step(model)
        now = {k: v.double() for k, v in snapshot(model).items()}
        expected = now if t == 0 else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    averager.after_epoch(model, 1.0)
    assert averager.started
    found = averager.model.state_dict()
    assert found.pop("1.num_batches_tracked") == model[1].num_batches_tracked
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    averager.refresh_statistics([batch(9)[0]])
    assert torch.equal(averager.model[1].running_mean, found["1.running_mean"]), "WA keeps its averaged statistics"


def test_wa_copies_what_cannot_be_averaged_and_keeps_constants_exact():
    class WithTables(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.arange(50))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("mean", torch.tensor([0.4914, 0.1]))

    model = WithTables()
    averager = Averager(model, WeightAverage(decay=0.9))
    for _ in range(7):
        averager.after_step(model)
    assert same(averager.model.state_dict(), model.state_dict())


def test_swa_is_the_equal_average_of_the_epoch_ends_from_its_start_on():
    model = net()
    averager = Averager(model, SWA(start=0.5))
    ends = []
    for epoch in range(1, 7):
        step(model, epoch)
        averager.after_step(model)
        averager.after_epoch(model, epoch / 6)
        ends.append(snapshot(model))
        assert averager.started == (epoch >= 3)
        if epoch <= 3:
            assert same(averager.model.state_dict(), ends[-1]), "until then it is the plain network"
    for name, parameter in averager.model.named_parameters():
        mean = torch.stack([end[name].double() for end in ends[2:]]).mean(0)
        torch.testing.assert_close(parameter.double(), mean, atol=1e-6, rtol=1e-5)


def test_swa_estimates_its_statistics_anew_as_plain_means_over_the_batches():
    model = net()
    averager = Averager(model, SWA(start=0.0))
    averager.refresh_statistics([batch(20)[0]])
    assert same(averager.model.state_dict(), model.state_dict()), "nothing has started yet"
    for epoch in (1, 2):
        step(model, epoch)
        averager.after_epoch(model, epoch / 2)
    batches = [batch(seed)[0] for seed in (20, 21, 22)]
    averager.refresh_statistics(iter(batches))
    hidden = [averager.model[0](x).transpose(0, 1).flatten(1) for x in batches]
    norm = averager.model[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(1) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(1) for h in hidden]).mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in averager.model.modules())


def test_without_batchnorm_no_batch_is_taken():
    model = net(batchnorm=False)
    averager = Averager(model, SWA(start=0.0))
    averager.after_epoch(model, 0.5)
    batches = iter([batch(0)[0]])
    averager.refresh_statistics(batches)
    assert len(list(batches)) == 1


@pytest.mark.parametrize("rule", [WeightAverage(0.9), SWA(0.0), SWA(0.5)])
def test_an_averager_resumed_anywhere_goes_on_bit_by_bit(rule):
    def go(model, averager, epochs):
        for epoch in epochs:
            for t in range(2):
                step(model, 10 * epoch + t)
                averager.after_step(model)
            averager.after_epoch(model, (epoch + 1) / 6)
            averager.refresh_statistics([batch(epoch)[0]])

    for cut in (0, 1, 4):
        model = net()
        whole = Averager(model, rule)
        go(model, whole, range(cut))
        # Saved files give back tensors in the default memory format.
        saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in whole.state_dict().items()}
        other = net(seed=5)
        resumed = Averager(other, rule)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        resumed.load_state_dict(saved)
        assert resumed.started == whole.started
        go(model, whole, range(cut, 6))
        go(other, resumed, range(cut, 6))
        assert same(whole.state_dict(), resumed.state_dict()), cut


def test_the_averaged_network_is_apart_from_the_trained_one():
    for make in AVERAGING.values():
        model = net().train()
        averager = Averager(model, make())
        averager.after_step(model)
        averager.after_epoch(model, 1.0)
        assert averager.model[0].weight.is_contiguous(memory_format=torch.channels_last)
        before = snapshot(averager.model)
        step(model, 1)
        assert same(averager.model.state_dict(), before)
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in averager.model.modules())


def test_a_state_of_another_network_is_refused():
    state = Averager(net(batchnorm=False), SWA()).state_dict()
    with pytest.raises(InputError, match="not of this network"):
        Averager(net(), SWA()).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AWP(gamma=-0.1), "gamma is -0.1"),
        (lambda: AWP(gamma=float("nan")), "gamma is nan"),
        (lambda: AWP(warmup=-1), "warmup is -1"),
        (lambda: WeightAverage(decay=1.0), "decay is 1.0"),
        (lambda: SWA(start=1.5), "start is 1.5"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()
