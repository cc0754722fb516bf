"""The part of the feature maps that a small change moves: the logits of the whole image."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from rb_noisy.backbones import BACKBONES
from rb_noisy.fast import fast_form
from rb_noisy.local_forward import LocalForward
from tests.test_fast import build, lived_in


def follow(model, x, changes):
    """Largest difference from the whole network, relative, over changes (rows, corner, sides, which are accepted)."""
    local, best, largest = LocalForward(fast_form(model).graph), x.clone(), 0.0
    with torch.no_grad():
        torch.testing.assert_close(local.remember(x), model(x), rtol=1e-4, atol=1e-4)
        for number, (rows, (r, c), (h, w), accepted) in enumerate(changes):
            rows = torch.tensor(rows)
            window = (r, min(r + h, x.shape[2]), c, min(c + w, x.shape[3]))
            new = best[rows].clone()
            new[:, :, window[0] : window[1], window[2] : window[3]] = (number * 0.37) % 1
            wanted = model(new)
            asked = None if rows.tolist() == list(range(len(x))) else rows
            difference = (local(new, asked, window) - wanted).abs().max() / wanted.abs().max().clamp_min(1)
            largest = max(largest, float(difference))
            chosen = torch.tensor(accepted[: len(rows)])
            local.accept(chosen)
            best[rows[chosen]] = new[chosen]
    return largest


SIDE = st.sampled_from([1, 2, 3, 5, 9, 30])
CHANGE = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.tuples(st.integers(0, 31), st.integers(0, 31)),
    st.tuples(SIDE, SIDE),
    st.lists(st.booleans(), min_size=4, max_size=4),
)


@settings(max_examples=15)
@given(st.lists(CHANGE, min_size=1, max_size=6))
def test_any_changes_in_any_order(changes):
    model, _ = build("preact_resnet18")
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert follow(model, x, changes) < 1e-4


# Corners, edges and the middle; a pixel, a few, and nearly all.
PLACES = [
    (rows, (r, c), (side, side), [True, False, True, False])
    for rows, side in (([0, 2, 3], 1), ([0, 1, 2, 3], 4), ([0, 2, 3], 4), ([0, 1, 2, 3], 20))
    for r, c in ((0, 0), (0, 27), (27, 0), (27, 27), (13, 14), (12, 0))
]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone(name):
    model, _ = build(name)
    shape = (1, 28, 28) if name in ("small_cnn", "strided_cnn") else (3, 32, 32)
    torch.nn.init.normal_(model.get_classifier().weight)
    assert follow(model, torch.rand(4, *shape), PLACES) < 1e-4


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto"])
def test_timm_networks(name):
    model = lived_in(timm.create_model(name, num_classes=3))
    assert follow(model, torch.rand(4, 3, 64, 64), PLACES[::2]) < 1e-4


def test_images_that_are_no_longer_asked_of_are_forgotten():
    model, _ = build("preact_resnet18")
    x = torch.rand(4, 3, 32, 32)
    local, rows = LocalForward(fast_form(model).graph), torch.tensor([3, 1])
    local.remember(x)
    local.keep(rows)
    new = x[rows].clone()
    new[:, :, 5:9, 7:11] = 0
    with torch.no_grad():
        wanted = model(new)
    assert torch.allclose(local(new, None, (5, 9, 7, 11)), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(local(new[1:], torch.tensor([1]), (5, 9, 7, 11)), wanted[1:], rtol=1e-4, atol=1e-4)


def test_it_spares_most_of_the_first_maps():
    model, x = build("preact_resnet18")
    local = LocalForward(fast_form(model).graph)
    local.remember(x[:1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    whole = counter.get_total_flops() // 2
    assert 0.3 * whole < local.saved(x) < 0.7 * whole
