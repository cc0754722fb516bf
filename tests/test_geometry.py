"""κ and `stands` with samples that leave the batch: the verdicts of the full computation."""

from __future__ import annotations

import pytest
import torch

import rb_noisy
from rb_noisy.attacks import ATTACK_LOSSES, gradient_of, moved, pgd
from rb_noisy.errors import InputError
from rb_noisy.geometry import kappa, resistance, stands

ATTACK = {"eps": 0.2, "alpha": 0.05, "steps": 6, "seed": 4}


@pytest.fixture(scope="module")
def trained():
    data = rb_noisy.load_data("digits")
    return rb_noisy.load_model("at_digits_sym40"), data.x_test[:60], data.y_test[:60]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("batch_size", [1, 7, 60, 500])
def test_verdicts_are_those_of_the_full_computation(trained, batch_size, norm):
    model, x, y = trained
    attack = ATTACK | {"norm": norm, "eps": 0.2 if norm == "Linf" else 1.2, "alpha": 0.05 if norm == "Linf" else 0.3}
    full = pgd(model, x, y, evaluate_final=True, **attack)
    assert len(full.kappa.unique()) > 3
    assert torch.equal(kappa(model, x, y, batch_size=batch_size, **attack), full.kappa)
    assert torch.equal(stands(model, x, y, batch_size=batch_size, **attack), ~full.broken)


def test_the_last_iterate_counts(trained):
    """A sample that only x⁽ⁿ⁾ breaks has κ = n and does not stand."""
    model, x, y = trained
    attack = ATTACK | {"steps": 1, "alpha": 0.2}
    full = pgd(model, x, y, evaluate_final=True, **attack)
    late = full.broken & (full.kappa == 1)
    assert late.any()
    assert not stands(model, x, y, **attack)[late].any()


def test_the_batch_is_refilled(trained):
    """Every pass but the last few is of a whole batch at least, however many samples have left it."""
    model, x, y = trained
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        values = kappa(model, x, y, batch_size=16, check=False, **ATTACK)
    finally:
        hook.remove()
    passes = (values + (values < ATTACK["steps"])).sum()  # a pass for every iterate that was looked at
    assert sum(sizes) == passes
    assert all(size >= 16 for size in sizes[: -ATTACK["steps"] - 1])


@pytest.mark.parametrize("count", [0, 60])
def test_progress_adds_up(trained, count):
    model, x, y = trained
    seen = []
    assert len(stands(model, x[:count], y[:count], batch_size=16, progress=seen.append, **ATTACK)) == count
    assert sum(seen) == count


def test_no_steps():
    model, x = rb_noisy.load_model("at_digits"), rb_noisy.load_data("digits").x_test[:9]
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    attack = {"eps": 0.2, "alpha": 0.05, "steps": 0, "random_start": False}
    assert stands(model, x, y, **attack).tolist() == [False] + [True] * 8
    assert kappa(model, x, y, **attack).tolist() == [0] * 9


def literal_resistance(model, x, y, loss, eps, alpha, steps):
    """Sample by sample: the first misclassified iterate and the least margin until then."""
    values, margins = [], []
    for i in range(len(x)):
        image, label, least, count = x[i : i + 1], y[i : i + 1], torch.inf, steps
        x_adv = image.clone()
        for t in range(steps):
            gradient, logits = gradient_of(model, x_adv, label, x.new_empty(0), loss(i))
            x_adv = moved(x_adv, image, gradient, eps, alpha, "Linf")
            others = [z for k, z in enumerate(logits[0].tolist()) if k != label.item()]
            least = min(least, logits[0, label].item() - max(others))
            if logits.argmax(1) != label:
                count = t
                break
        values.append(count)
        margins.append(least)
    return torch.tensor(values), torch.tensor(margins)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("batch_size", [7, 60])
def test_the_margin_is_the_least_on_the_way(trained, batch_size, targeted):
    model, x, _ = trained
    x = x[:24]
    with torch.no_grad():
        order = model(x).argsort(1, descending=True)
    y, target = order[:, 0], order[:, 1]

    def loss(i):
        return (lambda z, natural, label: z[0, target[i]] - z[0, label[0]]) if targeted else ATTACK_LOSSES["ce"]

    options = {"eps": 0.2, "alpha": 0.05, "steps": 6}
    values, margins = literal_resistance(model, x, y, loss, **options)
    met = resistance(
        model, x, y, target=target if targeted else None, random_start=False, batch_size=batch_size, **options
    )
    assert len(values.unique()) > 3
    assert torch.equal(met.kappa, values)
    assert torch.allclose(met.margin, margins, atol=1e-4)
    assert torch.equal(met.margin < 0, met.kappa < 6)


def test_an_attack_towards_the_likeliest_other_class_breaks_more_than_towards_the_least_likely(trained):
    model, x, y = trained
    with torch.no_grad():
        others = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    near, far = (stands(model, x, y, target=others[:, rank], **ATTACK) for rank in (0, -2))
    assert near.sum() < far.sum() < len(x)
    with pytest.raises(InputError, match="target classes for 60 images"):
        stands(model, x, y, target=others[:3, 0], **ATTACK)
