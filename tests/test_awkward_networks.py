"""Networks that do what a copy of their operations does not, or not so: the same logits, gradients and verdicts."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import rb_noisy.fewer_passes
from rb_noisy.attacks import pgd
from rb_noisy.errors import InputError
from rb_noisy.fast import fast_form
from rb_noisy.fewer_passes import _NewQueries
from rb_noisy.local_forward import LocalForward
from tests.test_autoattack import _short_attacks, run, same  # noqa: F401
from tests.test_fast import gradient, lived_in

SHAPE = (3, 16, 16)


def layers(conv: nn.Module | None = None) -> nn.Sequential:
    first = nn.Conv2d(3, 8, 3, padding=1) if conv is None else conv
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 5))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(128, 5)

    def before(self, x: Tensor) -> Tensor:
        return x

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def after(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.first(self.before(x))))
        return self.head(self.after(F.relu(self.second(x))))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class StraightThrough(Net):
    def before(self, x):
        return _Rounded.apply(x)


class OnlyTensors(Net):
    def before(self, x):
        return (x - 0.5) / 0.25 if isinstance(x, Tensor) else x


class HalfInside(Net):
    def before(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.first(x).float()[:, :3]


class FixedStatistics(Net):
    def before(self, x):
        with torch.no_grad():
            mean, spread = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return (x - mean) / spread


class Standardised(Net):
    def before(self, x):
        return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


class Excited(Net):
    def between(self, x):
        return F.relu(x) * torch.sigmoid(x.mean((2, 3), keepdim=True) * 4)


class Viewed(Net):
    def after(self, x):
        x = F.max_pool2d(x, 4)
        return x.view(x.size(0), -1)


class Kept(Net):
    def after(self, x):
        self.last = F.avg_pool2d(x, 4)
        return self.last.flatten(1)


class Dense(Net):
    def between(self, x):
        return torch.cat([F.relu(x)[:, :4], F.relu(-x)[:, :4]], 1)


class ByName(Net):
    def between(self, x):
        return self.second(input=torch.add(F.relu(x), other=x))


class ReadAfterwards(Net):
    def between(self, x):
        return F.relu(x, inplace=True) + x


class Scaled(Net):
    def between(self, x):
        x = x.mul_(0.5).add_(0.1)
        return F.relu(x)


class Patchwise(Net):
    """Whose strided convolution needs of a corner just what a corner moves, and of the rest more."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(8, 8, 2, stride=2)

    def after(self, x):
        return F.avg_pool2d(x, 2).flatten(1)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.third, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.third.weight = self.second.weight

    def between(self, x):
        return F.relu(self.norm(self.second(x)) + self.other(self.third(x)))


class WithArguments(Net):
    def forward(self, x, *args):
        return super().forward(x)


def hooked() -> nn.Module:
    model = Net()
    model.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25,))
    model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def own_forward() -> nn.Module:
    model = layers()
    model.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, (x - 0.5) * 4), model)
    return model


def parametrized() -> nn.Module:
    return layers(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)))


def pruned() -> nn.Module:
    model = layers()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


NETWORKS = [StraightThrough, OnlyTensors, HalfInside, FixedStatistics, Standardised, Excited, Viewed, Kept, Dense]
NETWORKS += [ByName, ReadAfterwards, Scaled, Patchwise, Tied, WithArguments, hooked, own_forward, parametrized, pruned]


def made(make) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and labels of which most are right."""
    torch.manual_seed(0)
    model, x = lived_in(make()), torch.rand(12, *SHAPE)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    return model, x, y


@pytest.mark.parametrize("make", NETWORKS)
def test_logits_and_gradients_are_the_network_s(make):
    model, x, _ = made(make)
    model(x)  # which leaves a graph in what keeps tensors
    fast = fast_form(model)
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-5)
    wanted = gradient(model, x)
    # A network that computes in bf16 rounds otherwise in another layout: by a unit of its last place, 1/128.
    rtol, atol = (1e-2, 1e-2) if make is HalfInside else (1e-3, 1e-4)
    assert torch.allclose(gradient(fast, x), wanted, rtol=rtol, atol=atol * wanted.abs().max().item())
    assert (fast.form is None) == (make in (Kept, pruned)), "only what cannot be copied does the work itself"


@pytest.mark.parametrize("make", NETWORKS)
def test_autoattack_s_verdicts_are_the_network_s(make, monkeypatch):
    monkeypatch.setattr(rb_noisy.fewer_passes, "_WORTH_CUTTING", 0)
    model, x, y = made(make)
    options = {"eps": 0.03, "attacks": ("apgd-ce", "square")}
    wanted = run(model, x, y, reference=True, **options)
    assert torch.equal(run(model, x, y, **options).broken_by, wanted.broken_by)
    options["attacks"] = ("square",)
    assert torch.equal(run(model, x, y, **options).broken_by, run(model, x, y, reference=True, **options).broken_by)


def test_a_network_without_its_gradients_is_not_robust():
    model, x, y = made(StraightThrough)
    ball = {"eps": 0.1, "alpha": 0.03, "steps": 10, "seed": 0, "evaluate_final": True}
    broken = pgd(fast_form(model), x, y, **ball).broken
    assert torch.equal(broken, pgd(model, x, y, **ball).broken)
    assert broken.sum() > 2 * pgd(fx.symbolic_trace(model), x, y, **ball).broken.sum()


class ByBatch(Net):
    def before(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_that_looks_at_its_batch_is_attacked_as_it_is(trained):
    model, x, _ = made(Net if trained else ByBatch)
    model.norm.train(trained)
    model.norm.momentum = 0.0
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(8)])
    options = {"eps": 0.03, "attacks": ("apgd-ce", "apgd-t")}
    wanted = run(model, x, y, reference=True, **options)
    found = run(model, x, y, **options)
    assert torch.equal(found.broken_by, wanted.broken_by)
    assert any("depend on the other images" in warning for warning in found.warnings)


class Vanishing(Net):
    """Log-probabilities of which far ones underflow."""

    def forward(self, x):
        return (10000 * super().forward(x)).softmax(1).log()


@pytest.mark.parametrize("reference", [False, True])
def test_logits_that_are_not_finite_are_refused(reference):
    model, x, y = made(Vanishing)
    with pytest.raises(InputError, match="natural images are not finite"):
        run(model, x, y, eps=0.05, attacks=("square",), reference=reference)


def test_what_known_maps_do_not_answer_the_network_does(monkeypatch):
    """Also in the midst of Square, which may have gone on for hours."""
    monkeypatch.setattr(rb_noisy.fewer_passes, "_WORTH_CUTTING", 0)
    model, x, y = made(Net)
    call, calls = LocalForward.__call__, []

    def failing(self, *args):
        calls.append(self)
        if len(calls) == 40:
            raise KeyError("a map")
        return call(self, *args)

    monkeypatch.setattr(LocalForward, "__call__", failing)
    options = {"eps": 0.02, "attacks": ("square",)}
    found = run(model, x, y, **options)
    assert len(calls) == 40
    assert torch.equal(found.broken_by, run(model, x, y, reference=True, **options).broken_by)


def test_wrong_answers_from_known_maps_are_noticed(monkeypatch):
    monkeypatch.setattr(rb_noisy.fewer_passes, "_WORTH_CUTTING", 0)
    model, x, y = made(Net)
    call, do_without, given_up = LocalForward.__call__, _NewQueries._do_without, []
    monkeypatch.setattr(LocalForward, "__call__", lambda self, *args: call(self, *args) + 1e-3)
    monkeypatch.setattr(_NewQueries, "_do_without", lambda self: given_up.append(self) or do_without(self))
    run(model, x, y, eps=0.02, attacks=("square",))
    assert len(given_up) == 1
