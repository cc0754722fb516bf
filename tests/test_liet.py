"""LIET against a loop written out from the paper and its released code, on the network and data of a real run."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.objectives import LIET
from rb_noisy.recipes import Recipe
from rb_noisy.training import _Trainer, train

SMALL = {"steps": None, "alpha": None, "noise": "none", "noise_rate": None}


def smoothed(labels, classes, share, draws):
    """One minus the share on the label, the share spread at random over the other classes."""
    random = torch.rand(len(labels), classes, generator=draws)
    rows = []
    for i, label in enumerate(labels.tolist()):
        others = sum(random[i, k].item() for k in range(classes) if k != label)
        rows.append([1 - share if k == label else share * random[i, k].item() / others for k in range(classes)])
    return torch.tensor(rows)


def cross_entropy(logits, target):
    return -(target * logits.log_softmax(1)).sum(1).mean()


class Literal:
    """The published loop: one network, one optimiser, a step at a time."""

    def __init__(self, model, recipe, smoothing, consistency, low, high, refresh):
        self.model, self.recipe = model, recipe
        self.smoothing, self.consistency, self.low, self.high, self.refresh = smoothing, consistency, low, high, refresh
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def step(self, x, y, epoch, number, draws):
        eps, classes = self.recipe.eps, 4
        wide = eps > 8 / 255 + 1e-6
        if number % self.refresh == 0:
            self.model.eval()
            grey = torch.full((classes, *x.shape[1:]), 0.5, requires_grad=True, dtype=x.dtype)
            labels = torch.arange(classes)
            loss = cross_entropy(self.model(grey), smoothed(labels, classes, self.smoothing, draws))
            self.signs = torch.autograd.grad(loss, grey)[0].sign()
        self.model.train()
        delta = eps * self.signs[y]
        mask, noise = torch.rand(x.shape, generator=draws), 2 * torch.rand(x.shape, generator=draws) - 1
        ratio = self.low + (self.high - self.low) * torch.rand((), generator=draws).item()
        negative = torch.rand((), generator=draws).item() < 0.5
        delta[mask < ratio] = ((2 * eps if wide else eps) * noise.to(x))[mask < ratio]
        start = (x - delta if negative else x + delta).clamp(0, 1).requires_grad_()
        first = self.model(start)
        loss = cross_entropy(first, smoothed(y, classes, self.smoothing, draws))
        gradient = torch.autograd.grad(loss, start, retain_graph=True)[0]
        moved = start.detach() + eps * gradient.sign()
        if not wide:
            moved = x + (moved - x).clamp(-eps, eps)
        second = self.model(moved.clamp(0, 1))
        loss = cross_entropy(second, smoothed(y, classes, self.smoothing, draws))
        rising = self.consistency * (epoch + 1) / self.recipe.epochs
        for p, q in zip(first.softmax(1), second.softmax(1), strict=True):
            m = (p + q) / 2
            for one in (p, q):
                loss = loss + rising * 0.5 * (one * (one / m).log()).sum() / len(y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), (first.argmax(1) == y).long()


@pytest.mark.parametrize("eps", [8 / 255, 0.1])  # on both sides of where the noise widens
def test_steps_are_those_of_a_literal_loop(eps, tiny_recipe, tmp_path):
    recipe = tiny_recipe(method="liet", epochs=4, eps=eps, objective_options={"refresh": 3}, **SMALL)
    trainer = _Trainer(recipe, tmp_path / "run", False, None)
    data = load_data(recipe.data)
    # In double precision, because a gradient of nearly 0 may round to either sign.
    trainer.model.double()
    trainer.step.x, trainer.record.average = data.x_train.double(), trainer.record.average.double()
    literal = Literal(copy.deepcopy(trainer.model), recipe, 0.6, 100.0, 0.1, 0.5, 3)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for number in range(8):
        index = torch.arange(32 * number, 32 * number + 32) % len(data.x_train)
        loss, _ = trainer.step(index, number // 4, number / 4, ours, number)
        expected, kappa = literal.step(data.x_train[index].double(), data.y_train[index], number // 4, number, theirs)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(trainer.record.kappa[index], kappa)
    for mine, other in zip(trainer.model.state_dict().values(), literal.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_the_recipe_takes_one_step_of_eps():
    recipe = Recipe(data="cifar10", method="liet+wa")
    assert (recipe.steps, recipe.alpha, recipe.track_alpha) == (1, recipe.eps, recipe.eps / 4)
    objective = recipe.make_objective()
    # configs.yaml of the released code, cifar10: ls 0.6, lambda 100, mask ratios 0.1 and 0.5, li_update 20
    published = {"smoothing": 0.6, "consistency": 100, "noise_from": 0.1, "noise_to": 0.5, "refresh": 20}
    assert vars(objective) == published


def test_softening_leaves_a_distribution_and_its_share_to_the_rest():
    draws, labels = torch.Generator().manual_seed(0), torch.tensor([2, 0])
    target = torch.tensor([[0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0]])
    softened = LIET(smoothing=0.6).soften(target, labels, draws)
    assert softened.sum(1).tolist() == pytest.approx([1, 1])
    assert softened[0, 2].item() == pytest.approx(0.4 * 0.75)
    assert softened[1, 0].item() == pytest.approx(0.4)
    assert len(set(softened[1, 1:].tolist())) == 3
    assert LIET(smoothing=0).soften(target, labels, draws) is target
    assert LIET().soften(0.3 * target, labels, draws).sum(1).tolist() == pytest.approx([0.3, 0.3])  # a teacher's rest


def test_a_draw_of_nothing_but_zeros_is_no_nan(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator=None: torch.zeros(shape))
    target = torch.tensor([[1.0, 0.0]])
    assert LIET().soften(target, torch.tensor([0]), None).isfinite().all()


def test_the_start_holds_the_label_and_stays_in_the_ball():
    x, signs = torch.full((400, 1, 4, 4), 0.5), torch.ones(400, 1, 4, 4)
    for low, high in ((0.0, 0.0), (0.3, 0.3), (1.0, 1.0)):
        start = LIET(noise_from=low, noise_to=high).start(x, signs, 0.1, False, torch.Generator().manual_seed(1)) - x
        assert start.abs().max() <= 0.1 + 1e-6
        assert (start.abs() > 0.1 - 1e-6).float().mean().item() == pytest.approx(1 - low, abs=0.02)
    wide = LIET(noise_from=1, noise_to=1).start(x, signs, 0.1, True, torch.Generator().manual_seed(1)) - x
    assert 0.19 < wide.abs().max() <= 0.2 + 1e-6


def test_equal_predictions_cost_nothing_and_certain_opposites_log_two():
    logits = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert LIET().compared(logits, logits, 1.0).item() == pytest.approx(0, abs=1e-5)
    certain = torch.tensor([[300.0, 0.0, 0.0]])  # the third is 0 in float32 for both: no NaN
    assert LIET().compared(certain, certain.roll(1, 1), 0.5).item() == pytest.approx(50 * math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"consistency": -1.0}, "consistency is -1.0"),
        ({"noise_from": 0.6}, "noise_from and noise_to are 0.6, 0.5"),
        ({"refresh": 0}, "refresh is 0"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(InputError, match=named):
        Recipe(data="digits", method="liet", objective_options=options)
    with pytest.raises(InputError, match="liet is defined for norm Linf only"):
        Recipe(data="digits", method="liet", norm="L2")


@pytest.mark.parametrize("method", ["liet+sglr+awp+wa", "liet+te", "liet+kgr"])
def test_it_composes(method, tiny_recipe, tmp_path):
    run = train(tiny_recipe(method=method, epochs=2, steps=None, alpha=None), tmp_path / "run")
    assert all(math.isfinite(line["train_loss"]) for line in run.metrics)
    assert run.history().kappa.max() == 1


def test_a_kill_between_two_refreshes_changes_nothing(tiny_recipe, tmp_path):
    recipe = tiny_recipe(method="liet+wa", epochs=3, batch_size=16, steps=None, alpha=None)
    whole = train(recipe, tmp_path / "whole")
    file = tmp_path / "recipe.json"

    file.write_text(json.dumps(recipe.to_dict()))
    command = [sys.executable, "-m", "rb_noisy", "train", "--recipe", str(file), "--out", str(tmp_path / "killed")]
    command += ["--resume", "--checkpoint-minutes", "0.0001"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    state = tmp_path / "killed" / "state.safetensors"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    ours, theirs = (load_file(folder / "final.safetensors") for folder in (tmp_path / "killed", whole.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
