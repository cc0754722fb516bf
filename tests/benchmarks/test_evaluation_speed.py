"""Evaluation beside its peers, in one run: `pytest -n 0 tests/benchmarks/test_evaluation_speed.py`.

On digits it is a rehearsal: with so small a network Python decides. The measurement is that on
`sglr_cifar10`, which needs the images:
`RB_NOISY_CIFAR10=cifar10 pytest -n 0 tests/benchmarks/test_evaluation_speed.py`
(or `npz:FILE`). torchattacks and ART (adversarial-robustness-toolbox) are measured where they are installed.

All start from the same image in eval mode with the same weights and threads; verdicts are compared before speeds.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rb_noisy
import rb_noisy.autoattack
from rb_noisy.attacks import pgd
from rb_noisy.autoattack import run_autoattack
from rb_noisy.data import load_data
from rb_noisy.fast import fast_form
from rb_noisy.geometry import kappa, stands
from tests.benchmarks.measure import interleaved, profiled, published_kappa
from tests.conftest import threads
from tests.test_autoattack import shorten

CIFAR10 = os.environ.get("RB_NOISY_CIFAR10")
MODEL = os.environ.get("RB_NOISY_MODEL", "sglr_cifar10")
BATCH = 250
"""For PGD-20: the default of `eval.pgd`, and of AutoAttack."""
SUBJECTS = ["digits", pytest.param("cifar10", marks=pytest.mark.skipif(CIFAR10 is None, reason="no RB_NOISY_CIFAR10"))]


@pytest.fixture(autouse=True)
def both_cores(one_thread):
    with threads(2):
        yield


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request):
    """A robust network as its peers use it (NCHW), in our forms, images, and the threat model."""
    large = request.param == "cifar10"
    model = rb_noisy.load_model(MODEL if large else "at_digits")
    data = load_data(CIFAR10 if large else "digits")
    n = 512 if large else 64
    ball = {"eps": 8 / 255, "alpha": 2 / 255} if large else {"eps": 0.2, "alpha": 0.05}
    forms = {"fast": fast_form(model), "fast, bf16": fast_form(model, half=True)}
    if large:
        forms |= {f"{name}, compiled": fast_form(model, compiled=True, half="bf16" in name) for name in list(forms)}
    for form in forms.values():  # compiled at the first call, with gradients and without
        kappa(form, data.x_test[:16], data.y_test[:16], steps=2, **ball)
        with torch.no_grad():
            form(data.x_test[:16])
    return types.SimpleNamespace(
        name=request.param,
        model=model,
        last=copy.deepcopy(model).to(memory_format=torch.channels_last),
        forms=forms,
        x=data.x_test[:n],
        y=data.y_test[:n],
        ball=ball,
        large=large,
        rounds=3,
    )


def report(capsys, title, seconds, memory, notes):
    slowest = next(iter(seconds.values()))
    with capsys.disabled():
        print(f"\n{title}")
        for name, time in seconds.items():
            peak = f"{memory[name]:7.0f} MiB" if name in memory else ""
            print(f"  {name:38s} {time:8.2f} s  {slowest / time:5.2f}x {peak}  {notes.get(name, '')}")


def batches(x, y):
    return zip(x.split(BATCH), y.split(BATCH), strict=True)


def test_kappa(subject, capsys):
    options = subject.ball | {"steps": 10}
    own = options | {"random_start": False, "batch_size": 128}
    contenders = {
        "published loop": lambda: published_kappa(subject.model, subject.x, subject.y, batch_size=128, **options),
        "published loop, channels_last": lambda: published_kappa(
            subject.last, subject.x, subject.y, batch_size=128, **options
        ),
    }
    for name, form in subject.forms.items():
        contenders[f"ours, {name}"] = lambda form=form: kappa(form, subject.x, subject.y, **own)
    values = {name: contender() for name, contender in contenders.items()}
    wanted = values["published loop"]
    changed = {name: (found != wanted).double().mean().item() for name, found in values.items()}
    assert all(share <= 0.005 for name, share in changed.items() if "bf16" not in name)
    memory = {name: profiled(contender)[0] for name, contender in contenders.items()}
    seconds = interleaved(contenders, subject.rounds)
    notes = {name: f"κ of {share:.2%} differs" for name, share in changed.items()}
    report(capsys, f"κ from PGD-10 of {len(wanted)} images, {subject.name}", seconds, memory, notes)
    assert memory["ours, fast"] <= 1.05 * memory["published loop"]


def torchattacks_pgd(model, x, y, eps, alpha, steps):
    torchattacks = pytest.importorskip("torchattacks")
    attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=False)
    return torch.cat([accurate(model, attack(xb, yb), yb) for xb, yb in batches(x, y)])


def art_pgd(model, x, y, eps, alpha, steps):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    shape, classes = tuple(x.shape[1:]), 10
    network = PyTorchClassifier(model, nn.CrossEntropyLoss(), shape, classes, clip_values=(0, 1), device_type="cpu")
    settings = {"eps": eps, "eps_step": alpha, "max_iter": steps, "batch_size": BATCH, "verbose": False}
    attack = ProjectedGradientDescentPyTorch(network, **settings)
    x_adv = torch.from_numpy(attack.generate(x.numpy(), F.one_hot(y, classes).numpy()))
    return torch.cat([accurate(model, xb, yb) for xb, yb in batches(x_adv, y)])


@torch.no_grad()
def accurate(model, x, y):
    return model(x).argmax(1) == y


def our_pgd(model, x, y, **options):
    attacks = [pgd(model, xb, yb, random_start=False, evaluate_final=True, **options) for xb, yb in batches(x, y)]
    return torch.cat([attack.final_correct for attack in attacks])


def our_stands(model, x, y, **options):
    return stands(model, x, y, random_start=False, batch_size=BATCH, **options)


def test_pgd_20(subject, capsys):
    options = subject.ball | {"steps": 20}
    x, y = subject.x[:BATCH], subject.y[:BATCH]
    contenders = {}
    if importlib.util.find_spec("torchattacks"):
        contenders["torchattacks"] = lambda: torchattacks_pgd(subject.model, x, y, **options)
        contenders["torchattacks, channels_last"] = lambda: torchattacks_pgd(
            subject.last, x.to(memory_format=torch.channels_last), y, **options
        )
    if importlib.util.find_spec("art"):
        contenders["ART"] = lambda: art_pgd(subject.model, x, y, **options)
    for kind, ours in (("final iterate", our_pgd), ("any iterate", our_stands)):
        for name, form in {"plain": subject.model, **subject.forms}.items():
            if "bf16" not in name:
                contenders[f"ours, {kind}, {name}"] = lambda form=form, ours=ours: ours(form, x, y, **options)
    verdicts = {name: contender() for name, contender in contenders.items()}
    final, standing = (verdicts[f"ours, {kind} iterate, plain"] for kind in ("final", "any"))
    assert not (standing & ~final).any()
    for name, found in verdicts.items():
        assert (found != (standing if "any" in name else final)).double().mean() <= 0.005, name
    memory = {name: profiled(contender)[0] for name, contender in contenders.items()}
    seconds = interleaved(contenders, subject.rounds)
    notes = {name: f"robust {found.double().mean():.2%}" for name, found in verdicts.items()}
    report(capsys, f"PGD-20 of {len(final)} images, {subject.name}", seconds, memory, notes)


def two_processes(subject, n, size, folder):
    """`eval.autoattack` as users launch it, one thread a process; its start is part of the time."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = {"model": MODEL if subject.large else "at_digits", "n": n, "batch-size": size, "out": folder}
    if subject.large:
        options["dataset"] = CIFAR10
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "eval.autoattack", *arguments, "--json", folder / "figures.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    (file,) = folder.glob("*/autoattack.npz")
    with np.load(file, allow_pickle=False) as verdicts:
        return torch.from_numpy(verdicts["robust"])


def test_autoattack(subject, capsys, monkeypatch, tmp_path):
    """Once in batches for two processes, of which there must be several after each attack, and once in one."""
    from pyautoattack import AutoAttack

    n, size = (64, 12) if subject.large else (4, 2)
    x, y, eps = subject.x[:n], subject.y[:n], subject.ball["eps"]

    def reference(model, size, change=lambda adversary: adversary):
        adversary = change(AutoAttack(copy.deepcopy(model), norm="Linf", eps=eps, seed=0, version="standard"))
        return adversary.run_standard_evaluation(x, y, batch_size=size)[1] == y

    def ours(size=size):
        return run_autoattack(subject.model, x, y, eps=eps, batch_size=size, fast=subject.forms["fast"]).robust

    contenders = {
        "reference driver": lambda: reference(subject.model, size),
        "ours": ours,
        "ours, two processes": lambda: two_processes(subject, n, size, tmp_path),
        # Other random draws than in smaller batches, and so perhaps other verdicts.
        "reference driver, one batch, channels_last": lambda: reference(subject.last, n),
        "ours, one batch": lambda: ours(n),
    }
    verdicts = {}
    seconds = interleaved(
        {name: lambda name=name, call=call: verdicts.update({name: call()}) for name, call in contenders.items()}, 1
    )
    for name, found in verdicts.items():
        same_draws = "reference driver" + (", one batch, channels_last" if "one batch" in name else "")
        assert torch.equal(found, verdicts[same_draws]), name
    # The peak is that of any iteration, of which a profile holds only so many.
    memory = {"reference driver": profiled(lambda: reference(subject.model, size, shorten))[0]}
    build = rb_noisy.autoattack._build_attacks
    monkeypatch.setattr(rb_noisy.autoattack, "_build_attacks", lambda *args: shorten(build(*args)))
    memory["ours"] = profiled(ours)[0]
    notes = {name: f"{int(found.sum())} of {n} stand" for name, found in verdicts.items()}
    report(capsys, f"AutoAttack on {n} images, {subject.name}", seconds, memory, notes)
