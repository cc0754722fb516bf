"""Side by side in one run, so that only ratios are read: `pytest tests/benchmarks -n 0 --benchmark-group-by=group`.

Peers are the loops that papers publish: `loss.backward()` inside the attack, κ counted sample by sample, nothing
dropped. Verdicts are compared before speeds.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import rb_noisy
from model_zoo.registry import list_models
from rb_noisy.attacks import pgd
from rb_noisy.data import load_data
from rb_noisy.geometry import kappa
from rb_noisy.recipes import Recipe
from rb_noisy.training import _Trainer
from tests.benchmarks.measure import published_kappa

EPS, ALPHA = 0.2, 0.05
rounds = {"rounds": 5, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def subject():
    data = load_data("digits")
    return rb_noisy.load_model("at_digits"), data.x_test[:256], data.y_test[:256]


def published_pgd(model, x, y, steps):
    x_adv = x.clone()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + ALPHA * x_adv.grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0, 1)
    return x_adv


def our_pgd(model, x, y, steps):
    return pgd(model, x, y, eps=EPS, alpha=ALPHA, steps=steps, random_start=False).x_adv


def our_kappa(model, x, y, **options):
    return kappa(model, x, y, random_start=False, **options)


@pytest.mark.benchmark(group="PGD-20 of 256 digits")
@pytest.mark.parametrize("attack", [published_pgd, our_pgd])
def test_pgd_20(attack, benchmark, subject):
    x_adv = benchmark.pedantic(attack, (*subject, 20), **rounds)
    torch.testing.assert_close(x_adv, published_pgd(*subject, 20))


@pytest.mark.benchmark(group="κ from PGD-10 of 256 digits")
@pytest.mark.parametrize("count", [published_kappa, our_kappa])
def test_kappa(count, benchmark, subject):
    options = {"eps": EPS, "alpha": ALPHA, "steps": 10}
    values = benchmark.pedantic(count, subject, options, **rounds)
    assert values.tolist() == published_kappa(*subject, **options).tolist()


@pytest.mark.benchmark(group="one training step on 128 digits")
@pytest.mark.parametrize("method", ["pgd-at", "pgd-at+sglr"])
def test_training_step(method, benchmark, tmp_path):
    options = {"start_epoch": 0} if "sglr" in method else {}  # with its second forward pass from the first step on
    recipe = Recipe(data="digits", method=method, target_options=options)
    trainer = _Trainer(recipe, tmp_path / "run", False, None)
    draws = torch.Generator().manual_seed(0)
    index = torch.arange(128)
    loss, _ = benchmark.pedantic(trainer.step, (index, 0, 0.0, draws), **rounds)
    assert torch.isfinite(loss)


@pytest.mark.benchmark(group="load_model")
def test_load_model(benchmark):
    assert "sglr_digits" in list_models()
    model = benchmark.pedantic(rb_noisy.load_model, ("sglr_digits",), **rounds)
    assert not model.training
