"""Our training step beside the published loop, in one run: `pytest tests/benchmarks -n 0 --benchmark-group-by=group`.

The published loop is that of Rice et al. 2020 and of [SGLR]'s code without its GPU library: fp32, NCHW,
`loss.backward()` inside the attack. Model, batch, steps and optimiser are the same.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rb_noisy.backbones import build_backbone
from rb_noisy.recipes import Recipe
from rb_noisy.training import _Trainer
from tests.benchmarks.measure import profiled
from tests.conftest import threads

BATCH, EPS, ALPHA, STEPS = 64, 8 / 255, 2 / 255, 10
NETWORK = {"width": 0.25}  # of PreAct-ResNet-18, so that the suite stays quick
rounds = {"rounds": 3, "warmup_rounds": 1}


@pytest.fixture(autouse=True)
def both_cores(one_thread):
    """After `one_thread`, which every test begins with."""
    with threads(2):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (2 * BATCH, 32, 32, 3), dtype=np.uint8)
    y = np.arange(2 * BATCH) % 10
    file = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(file, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    return file


def published_step(images, mode):
    """One step of PGD-AT as published, with BatchNorm in `mode` during the attack; a function without arguments."""
    arrays = np.load(images)
    x = torch.from_numpy(arrays["x_train"][:BATCH]).permute(0, 3, 1, 2).float().div(255).contiguous()
    y = torch.from_numpy(arrays["y_train"][:BATCH])
    torch.manual_seed(0)
    model = build_backbone("preact_resnet18", num_classes=10, in_chans=3, **NETWORK).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step():
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        delta.data = torch.clamp(x + delta, 0, 1) - x
        delta.requires_grad_()
        model.train(mode == "train")
        for _ in range(STEPS):
            F.cross_entropy(model(x + delta), y).backward()
            moved = torch.clamp(delta.data + ALPHA * delta.grad.sign(), -EPS, EPS)
            delta.data = torch.clamp(x + moved, 0, 1) - x
            delta.grad.zero_()
        model.train()
        loss = F.cross_entropy(model(x + delta.detach()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def our_step(images, folder, mode="eval", compiled=False, **fields):
    recipe = Recipe(
        data=f"npz:{images}",
        backbone="preact_resnet18",
        backbone_options=NETWORK,
        eps=EPS,
        alpha=ALPHA,
        steps=STEPS,
        batch_size=BATCH,
        lr=0.1,
        normalize=False,
        augment=False,
        attack_mode=mode,
        epochs=10,
        track=10,
        **fields,
    )
    trainer = _Trainer(recipe, folder, False, None, compiled=compiled)
    draws, index = torch.Generator().manual_seed(0), torch.arange(BATCH)
    return lambda: trainer.step(index, 0, 0.0, draws)[0]


def where(step):
    """Peak of the tensors that one step allocates, in MiB, and the shares of its time, in %."""
    peak, times = profiled(step)
    parts = {"convolutions": "conv", "BatchNorm": "batch_norm"}
    total = sum(times.values())
    shares = {part: sum(t for key, t in times.items() if name in key) / total for part, name in parts.items()}
    return round(peak), {part: round(100 * share) for part, share in shares.items()}


long = pytest.mark.skipif("RB_NOISY_LONG" not in os.environ, reason="compiles for a minute: set RB_NOISY_LONG")
LOOPS = [  # of the attack: BatchNorm's mode, who, how
    ("eval", "published", {}),
    ("eval", "ours", {}),
    ("eval", "ours, bf16", {"precision": "bf16"}),
    pytest.param("eval", "ours, compiled", {"compiled": True}, marks=long),
    pytest.param("eval", "ours, compiled, bf16", {"compiled": True, "precision": "bf16"}, marks=long),
    ("train", "published", {}),
    ("train", "ours", {}),
]


@pytest.mark.parametrize(("mode", "loop", "options"), LOOPS)
def test_training_step(mode, loop, options, benchmark, images, tmp_path, capsys):
    benchmark.group = f"a PGD-10 training step of a quarter-width PreAct-ResNet-18, attack in {mode} mode"
    step = published_step(images, mode) if loop == "published" else our_step(images, tmp_path / "run", mode, **options)
    loss = benchmark.pedantic(step, **rounds)
    assert torch.isfinite(loss)
    mebibytes, shares = where(step)
    speed = round(BATCH / benchmark.stats.stats.median, 1)
    benchmark.extra_info.update(images_per_second=speed, peak_mib=mebibytes, shares=shares)
    others = 100 - sum(shares.values())
    split = ", ".join(f"{part} {share}%" for part, share in (shares | {"all else": others}).items())
    with capsys.disabled():
        print(f"\n{mode}, {loop}: {speed} images per second, {mebibytes} MiB of tensors beside the model; {split}")


@pytest.mark.benchmark(group="what SGLR adds to a PGD-10 training step")
@pytest.mark.parametrize("method", ["pgd-at", "pgd-at+sglr"])
def test_cost_of_sglr(method, benchmark, images, tmp_path):
    options = {"start_epoch": 0} if "sglr" in method else {}  # with its second forward pass
    step = our_step(images, tmp_path / "run", method=method, target_options=options)
    assert torch.isfinite(benchmark.pedantic(step, **rounds))
