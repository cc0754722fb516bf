"""ARD and RSLAD, each against a loop written out from its paper and released code, on a real run's network and data."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.recipes import Recipe
from rb_noisy.targets import make_targets
from rb_noisy.training import _Trainer, train


@pytest.fixture
def teacher(tiny_recipe, tmp_path):
    return train(tiny_recipe(epochs=2, noise="none", noise_rate=None), tmp_path / "teacher")


def softmax(z, temperature=1.0):
    e = (z / temperature).exp()
    return e / e.sum(1, keepdim=True)


def kl(taught, z, temperature=1.0):
    """KL(teacher ‖ student) of a batch, (B,)."""
    p, q = softmax(taught, temperature), softmax(z, temperature)
    return (p * (p / q).log()).sum(1)


class Literal:
    """A published loop: one network, its teacher, one optimiser, a step at a time."""

    def __init__(self, model, teacher, recipe, loss):
        self.model, self.teacher, self.recipe, self.loss = model, teacher, recipe, loss
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def attack(self, x, start, raised):
        eps, x_adv = self.recipe.eps, start
        for _ in range(self.recipe.steps):
            x_adv = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(raised(self.model(x_adv)), x_adv)
            x_adv = x_adv.detach() + self.recipe.alpha * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        return x_adv.detach()

    def step(self, x, y, draws):
        with torch.no_grad():
            taught = self.teacher(x)
        loss = self.loss(self, x, y, taught, draws)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def ard(alpha, temperature):
    """ "Adversarially Robust Distillation", main.py: `net.train()`, then the attack, x̃ and x go through the network;
    `loss = alpha*temp*temp*KL_loss(...) + (1.0-alpha)*XENT_loss(basic_outputs, targets)`, KL_loss = nn.KLDivLoss().
    """

    def loss(loop, x, y, taught, draws):
        loop.model.train()
        start = (x + loop.recipe.eps * (2 * torch.rand(x.shape, generator=draws, dtype=x.dtype) - 1)).clamp(0, 1)
        x_adv = loop.attack(x, start, lambda z: F.cross_entropy(z, y, reduction="sum"))
        adversarial, natural = loop.model(x_adv), loop.model(x)
        mean_over_classes = kl(taught, adversarial, temperature) / 4  # what nn.KLDivLoss() takes for KL
        hard = -softmax(natural).log()[torch.arange(len(y)), y].mean()
        return alpha * temperature**2 * mean_over_classes.mean() + (1 - alpha) * hard

    return loss


def rslad(loop, x, y, taught, draws):
    """RSLAD, resnet18_rslad_cifar10.py and rslad_loss.py: x̃ in eval mode from x + 0.001·N(0, 1), raising the summed
    KL; then in train mode x̃ and x, `loss = 5/6.0*kl_Loss1 + 1/6.0*kl_Loss2`, each `torch.mean` over batch and ten
    classes.
    """
    loop.model.eval()
    start = (x + 0.001 * torch.randn(x.shape, generator=draws, dtype=x.dtype)).clamp(0, 1)
    x_adv = loop.attack(x, start, lambda z: kl(taught, z).sum())
    loop.model.train()
    adversarial, natural = loop.model(x_adv), loop.model(x)
    return (5 / 6 * kl(taught, adversarial).mean() + 1 / 6 * kl(taught, natural).mean()) / 10


@pytest.mark.parametrize(
    ("method", "options", "mode", "literal"),
    [
        ("ard", {"kl_scale": 0.25}, "train", ard(1.0, 30.0)),
        ("ard", {"kl_scale": 0.25, "alpha": 0.6, "temperature": 5}, "train", ard(0.6, 5.0)),
        ("rslad", {}, "eval", rslad),
    ],
)
def test_steps_are_those_of_a_literal_loop(method, options, mode, literal, tiny_recipe, teacher, tmp_path):
    recipe = tiny_recipe(
        method=f"pgd-at+{method}",
        target_options={"robust": str(teacher.path), **options},
        attack_mode=mode,
        noise="none",
        noise_rate=None,
    )
    trainer = _Trainer(recipe, tmp_path / "run", False, None)
    data = load_data(recipe.data)
    # In double precision and through the network itself, because a gradient of nearly 0 may round to either sign.
    trainer.step.attacked = None
    (taught,) = trainer.step.teachers.values()
    for network in (trainer.model, taught):
        network.double()
    trainer.step.x, trainer.record.average = data.x_train.double(), trainer.record.average.double()
    loop = Literal(copy.deepcopy(trainer.model), copy.deepcopy(taught), recipe, literal)
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    for number in range(4):
        index = torch.arange(32 * number, 32 * number + 32)
        loss, _ = trainer.step(index, 0, number / 5, ours)
        expected = loop.step(data.x_train[index].double(), data.y_train[index], theirs)
        assert loss.item() == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert expected > 1e-4
    mine, other = trainer.model.state_dict(), loop.model.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6, msg=name)


def test_the_defaults_are_the_authors():
    """ARD main.py: --temp 30.0, --alpha 1.0. RSLAD: `5/6.0*kl_Loss1 + 1/6.0*kl_Loss2`."""
    assert vars(make_targets("ard", robust="t")) == {"robust": "t", "alpha": 1, "temperature": 30, "kl_scale": 0.1}
    assert vars(make_targets("rslad", robust="t")) == {"robust": "t", "natural_weight": 1 / 6, "kl_scale": 0.1}


METHODS = ["pgd-at+ard", "pgd-at+rslad", "pgd-at+ard+swa", "pgd-at+rslad+awp+wa"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_from_a_teacher(method, tiny_recipe, teacher, tmp_path):
    options = {"robust": str(teacher.path)} | ({"alpha": 0.5} if method == "pgd-at+ard+swa" else {})
    run = train(tiny_recipe(method=method, epochs=3, target_options=options), tmp_path / "run")
    losses = [line["train_loss"] for line in run.metrics]
    assert losses[-1] < losses[0]
    assert run.finished
    assert all(math.isfinite(line["gradient_norm"]) for line in run.metrics)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "pgd-at+ard"}, "ard has no teacher"),
        ({"method": "pgd-at+rslad"}, "rslad has no teacher"),
        ({"method": "trades+rslad", "target_options": {"robust": "t"}}, "write pgd-at+rslad"),
        ({"method": "st+ard", "target_options": {"robust": "t"}}, "write pgd-at+ard"),
        ({"method": "pgd-at+ard+sce", "target_options": {"robust": "t"}}, "ard is a loss of its own"),
        ({"method": "pgd-at+ard", "target_options": {"robust": "t", "alpha": 2}}, "alpha is 2"),
        ({"method": "pgd-at+ard", "target_options": {"robust": "t", "temperature": 0}}, "temperature is 0"),
        ({"method": "pgd-at+rslad", "target_options": {"robust": "t", "natural_weight": -1}}, "natural_weight is -1"),
        ({"method": "pgd-at+rslad", "target_options": {"robust": "t", "kl_scale": -1}}, "kl_scale is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        Recipe(data="digits", **fields)
    assert words in str(error.value)


@pytest.mark.parametrize("method", ["pgd-at+ard", "pgd-at+rslad"])
def test_what_a_recipe_changes_names_its_teacher(method):
    recipe = Recipe(data="digits", method=method, target_options={"robust": "at_digits"})
    assert recipe.changes() == {"data": "digits", "method": method, "target_options": {"robust": "at_digits"}}
