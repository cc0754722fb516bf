"""Our training step beside the published loop, in one run: `pytest tests/benchmarks -n 0 --benchmark-group-by=group`.

The published loop is that of Rice et al. 2020 and of [SGLR]'s code without its GPU library: fp32, NCHW,
`loss.backward()` inside the attack. Model, batch, steps and optimiser are the same. `RB_NOISY_LONG=1` adds what takes
minutes: `torch.compile`, and the network at full width, PGD-10 and one-step training, alone and beside other work.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rb_noisy.backbones import build_backbone
from rb_noisy.placement import bf16_slowdown, placed, usable_cores
from rb_noisy.recipes import Recipe
from rb_noisy.training import _Trainer
from tests.benchmarks.measure import interleaved, profiled
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


def published_step(images, mode, network=NETWORK):
    """One step of PGD-AT as published, with BatchNorm in `mode` during the attack; a function without arguments."""
    arrays = np.load(images)
    x = torch.from_numpy(arrays["x_train"][:BATCH]).permute(0, 3, 1, 2).float().div(255).contiguous()
    y = torch.from_numpy(arrays["y_train"][:BATCH])
    torch.manual_seed(0)
    model = build_backbone("preact_resnet18", num_classes=10, in_chans=3, **network).train()
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


def our_step(images, folder, mode="eval", compiled=False, tune=False, **fields):
    settings = {
        "data": f"npz:{images}",
        "backbone": "preact_resnet18",
        "backbone_options": NETWORK,
        "eps": EPS,
        "alpha": ALPHA,
        "steps": STEPS,
        "batch_size": BATCH,
        "lr": 0.1,
        "normalize": False,
        "augment": False,
        "attack_mode": mode,
        "epochs": 10,
        "track": 10,
    }
    trainer = _Trainer(Recipe(**settings | fields), folder, False, None, compiled=compiled)
    trainer.place(None, tune, print)
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


HALF = {"precision": "bf16"} if bf16_slowdown() < 1 else {}  # what its CPU is fastest in
BUSY = """
import torch
torch.set_num_threads({threads})
x, conv = torch.rand(64, 64, 32, 32), torch.nn.Conv2d(64, 64, 3, padding=1)
print("begun", flush=True)
while True:
    conv(x).sum().backward()
"""


@contextlib.contextmanager
def other_work():
    """Another process that computes convolutions on all cores."""
    program = BUSY.format(threads=len(usable_cores()))
    command = placed([sys.executable, "-c", program], usable_cores(), nice=0)  # which ends with this process
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def plain_one_step(images, width):
    """A step of N-FGSM as one would write it: channels_last, autocast where bf16 is faster, no fast form."""
    arrays = np.load(images)
    x = torch.from_numpy(arrays["x_train"][:BATCH]).permute(0, 3, 1, 2).float().div(255)
    x, y = x.contiguous(memory_format=torch.channels_last), torch.from_numpy(arrays["y_train"][:BATCH])
    torch.manual_seed(0)
    model = build_backbone("preact_resnet18", num_classes=10, in_chans=3, width=width)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def loss_of(images):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(HALF)):
            return F.cross_entropy(model(images).float(), y)

    def step():
        start = (x + 2 * EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(start), start)
        optimizer.zero_grad()
        loss = loss_of((start.detach() + EPS * gradient.sign()).clamp(0, 1))
        loss.backward()
        optimizer.step()
        return loss

    return step


def with_threads(count, step):
    def call():
        with threads(count):
            return step()

    return call


@pytest.mark.parametrize("width", [0.25, pytest.param(1, marks=long)])
def test_one_step_training_alone_and_beside_other_work(width, images, tmp_path, capsys):
    """Images per second of N-FGSM; beside other work two threads wait for each other, and one does not."""
    cores = len(usable_cores())
    fields = {"method": "n-fgsm", "steps": None, "alpha": None, "backbone_options": {"width": width}, **HALF}
    plain = plain_one_step(images, width)
    ours, tuned = (our_step(images, tmp_path / str(tune), tune=tune, **fields) for tune in (False, True))
    ways = {"plain": plain, "ours": ours, "ours, tuned": tuned}
    contenders = {(name, count): with_threads(count, way) for name, way in ways.items() for count in {1, cores}}
    rounds = 2 if width == 1 else 3
    for contender in contenders.values():
        assert torch.isfinite(contender())
    found = {"alone": interleaved(contenders, rounds)}
    with other_work():
        time.sleep(1)
        found["beside other work"] = interleaved(contenders, rounds)
    precision = "bf16" if HALF else "fp32"
    with capsys.disabled():
        for place, seconds in found.items():
            print(f"\nN-FGSM, PreAct-ResNet-18 of width {width}, batches of {BATCH}, {precision}, {place}:")
            for (name, count), value in seconds.items():
                ratio = seconds["plain", cores] / value
                print(f"  {name}, {count} threads: {BATCH / value:.1f} images per second, {ratio:.2f}x plain")


@long
def test_pgd_training_step_at_full_width(images, tmp_path, capsys):
    network = {"backbone_options": {"width": 1}}
    contenders = {
        "published": published_step(images, "eval", {"width": 1}),
        "ours, fp32": our_step(images, tmp_path / "plain", **network),
        "ours, fp32, tuned": our_step(images, tmp_path / "tuned", tune=True, **network),
    }
    if HALF:
        contenders["ours, bf16"] = our_step(images, tmp_path / "half", **network, **HALF)
        contenders["ours, bf16, tuned"] = our_step(images, tmp_path / "half-tuned", tune=True, **network, **HALF)
    for contender in contenders.values():
        assert torch.isfinite(contender())
    seconds = interleaved(contenders, 2)
    with capsys.disabled():
        print(f"\nPGD-10 training step, PreAct-ResNet-18, batches of {BATCH}, two threads, attack in eval mode:")
        for name, value in seconds.items():
            print(f"  {name}: {BATCH / value:.2f} images per second, {seconds['published'] / value:.2f}x published")
