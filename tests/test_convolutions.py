"""Convolutions as matrix products: the same values, chosen where they are faster, kept by the run."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from rb_noisy import convolutions
from rb_noisy.backbones import build_backbone
from rb_noisy.convolutions import PARTS, PlannedConv2d, apply_plan, make_plan
from rb_noisy.training import train


def network(bias=False):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1, bias=bias), nn.ReLU(), nn.Conv2d(5, 4, 3, 2, 1, bias=bias))
    return layers.double().to(memory_format=torch.channels_last)


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(4, 9), st.integers(4, 9)),
    kernel=st.sampled_from([1, 2, 3, 4]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_every_part_is_the_librarys_value(sizes, kernel, stride, padding, bias, last):
    count, inputs, outputs, height, width = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, height, width, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    plain = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias).double()
    planned = copy.deepcopy(plain)
    parts = [part for part in PARTS if part != "input" or (stride == 1 and padding < kernel)]
    apply_plan(nn.ModuleDict({"conv": planned}), {"conv": parts})
    assert isinstance(planned, PlannedConv2d)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = planned(ours), plain(theirs)
    torch.testing.assert_close(found, expected)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for mine, other in zip(planned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
        assert mine.grad.dtype == mine.dtype


def test_a_bf16_pass_has_the_gradients_of_autocast():
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, 1, 1)
    planned = copy.deepcopy(plain)
    apply_plan(nn.ModuleDict({"conv": planned}), {"conv": list(PARTS)})
    x = torch.randn(4, 8, 6, 6)
    for conv in (plain, planned):
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        assert out.dtype == torch.bfloat16
        out.float().pow(2).mean().backward()
    assert planned.weight.grad.dtype == torch.float32
    torch.testing.assert_close(planned.weight.grad, plain.weight.grad, rtol=0.05, atol=2e-3)


def test_an_attack_asks_for_no_weight_gradient(monkeypatch):
    from rb_noisy.attacks import pgd

    model = network().float()
    asked = []
    real = convolutions.library_gradients
    monkeypatch.setattr(convolutions, "library_gradients", lambda *a: asked.append(a[-1]) or real(*a))
    monkeypatch.setattr(convolutions, "weight_product", lambda *a: pytest.fail("a weight gradient in an attack"))
    apply_plan(model, {"0": ["weight"], "2": ["forward"]})
    classifier = nn.Sequential(model, nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    pgd(classifier, x, y, eps=0.1, alpha=0.05, steps=2, mode="train", seed=0)
    assert asked
    assert not any(weight for _, weight in asked)


def test_a_network_that_names_its_arguments_is_planned_too(monkeypatch):
    monkeypatch.setattr(convolutions, "_wins", lambda *ways: True)

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(input=x)

    model, x = ByName().train(), torch.rand(2, 3, 6, 6)
    expected = model(x)
    apply_plan(model, make_plan(model, lambda: model(x)))
    assert isinstance(model.conv, PlannedConv2d)
    torch.testing.assert_close(model(x), expected)


def test_only_training_passes_are_planned_and_forward_derivatives_still_exist():
    model = network()
    apply_plan(model, {"0": list(PARTS), "2": ["weight"]})
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.eval()
    value, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, network()(x))
    assert slope.isfinite().all()


def test_what_is_faster_is_chosen_once_for_each_shape(monkeypatch):
    asked = []

    def wins(library, product):
        torch.testing.assert_close(torch.as_tensor(_last(library())), torch.as_tensor(_last(product())))
        asked.append(product)
        return len(asked) % 2 == 1

    monkeypatch.setattr(convolutions, "_wins", wins)
    model = build_backbone("preact_resnet8_narrow", num_classes=4, in_chans=1).train()
    x = torch.rand(4, 1, 8, 8)
    plan = make_plan(model, lambda: model(x))
    shapes = {(tuple(m.weight.shape), m.stride) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert len(asked) == sum(3 if stride == (1, 1) else 2 for _, stride in shapes)
    assert plan
    assert all(set(parts) <= set(PARTS) for parts in plan.values())
    before = model.state_dict()
    apply_plan(model, plan)
    assert model.state_dict().keys() == before.keys()


def _last(value):
    """Of the library's two gradients the one that was asked for."""
    return value if torch.is_tensor(value) else next(v for v in value if v is not None)


def test_a_choice_needs_a_clear_gain_on_work_that_lasts(monkeypatch):
    def work(seconds):
        import time

        return lambda: time.sleep(seconds)

    assert convolutions._wins(work(0.02), work(0.005))
    assert not convolutions._wins(work(0.02), work(0.0195))
    monkeypatch.setattr(convolutions, "LEAST", 1.0)
    assert not convolutions._wins(work(0.02), work(0.005))


def test_odd_convolutions_stay_the_librarys(monkeypatch):
    monkeypatch.setattr(convolutions, "_wins", lambda *ways: True)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    assert make_plan(model, lambda: model(torch.rand(2, 4, 6, 6))) == {"5": ["forward", "input", "weight"]}


def test_a_tuned_run_keeps_its_choice_when_it_is_resumed(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(epochs=3, method="pgd-at+sglr")
    plain = train(recipe, tmp_path / "plain")
    monkeypatch.setattr(convolutions, "_wins", lambda *ways: True)
    said = []
    whole = train(recipe, tmp_path / "whole", tune=True, on_note=said.append)
    assert said == ["convolutions as matrix products: forward of 9, input of 5, weight of 9"]
    assert [line["train_correct_slope_squared"] is None for line in whole.metrics] == [False] * 3
    assert [line["matrix_products"] for line in whole.metrics] == [23] * 3
    first = train(recipe, tmp_path / "cut", tune=True, max_minutes=1e-9)
    assert not first.finished
    monkeypatch.setattr(convolutions, "_wins", lambda *ways: False)
    while not (resumed := train(recipe, tmp_path / "cut", resume=True, max_minutes=1e-9)).finished:
        pass
    ours, theirs, others = (load_file(run.path / "final.safetensors") for run in (resumed, whole, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, value in others.items():  # the same training but for rounding
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=0.05, atol=0.05)


def test_the_loss_falls_alike(tiny_recipe, tmp_path):
    """Of a network with every part planned, over many steps, in fp32."""
    model, other = (build_backbone("resnet8_narrow", num_classes=4, in_chans=1).train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    names = [name for name, m in other.named_modules() if isinstance(m, nn.Conv2d)]
    strided = {name for name, m in other.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    apply_plan(other, {name: [p for p in PARTS if p != "input" or name not in strided] for name in names})
    x, y = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
    for network in (model, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(5):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
