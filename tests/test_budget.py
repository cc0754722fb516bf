"""AutoAttack for so many minutes: what is attacked, when it stops, how it goes on."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

import eval.budget
from eval.budget import attack_for, stratified_order
from rb_noisy.errors import InputError
from rb_noisy.processes import Processes

N = 400
CLASSES = torch.arange(N) % 10


@pytest.mark.parametrize("y", [CLASSES, (torch.arange(N) ** 2 % 7).sort().values])
def test_any_beginning_of_the_order_has_every_class_by_its_share(y):
    order = stratified_order(y, seed=1)
    assert sorted(order.tolist()) == list(range(N))
    shares = torch.bincount(y) / N
    for k in (1, 10, 37, 200, 399):
        assert (torch.bincount(y[order[:k]], minlength=len(shares)) - k * shares).abs().max() <= 1
    assert not torch.equal(order, stratified_order(y, seed=2))
    assert torch.equal(order, stratified_order(y, seed=1))


class Clock:
    """Seconds that pass only while something is attacked."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(eval.budget, "time", clock)
    return clock


def subject(processes=None, images=0.0):
    describe = lambda seed, batch_size: {"seed": seed, "batch_size": batch_size, "date": "today"}  # noqa: E731
    x = torch.arange(N).view(N, 1, 1, 1).float() + images
    return types.SimpleNamespace(x=x, y=CLASSES, describe=describe, processes=processes or Processes())


def attacker(clock, seen, seconds=1.0, fails_after=None, sizes=None):
    sizes = [] if sizes is None else sizes

    def attack(x, y, batch_size, state):
        if fails_after is not None and len(seen) == fails_after:
            raise KeyboardInterrupt
        seen.append(len(x))
        sizes.append(batch_size)
        clock.now += seconds * len(x)
        broken_by = (x.flatten().long() % 3 - 1).to(torch.int8)
        return types.SimpleNamespace(broken_by=broken_by, warnings=("careful",))

    return attack


def run(minutes, attack, tmp_path, batch_size=50, settings=None, images=0.0):
    options = {"batch_size": batch_size, "file": tmp_path / "state.npz", "settings": settings or {}}
    return attack_for(minutes, subject(images=images), attack, seed=0, **options)


def test_it_attacks_as_many_as_fit_and_goes_on(clock, tmp_path):
    seen = []
    rows, broken_by, warnings = run(2, attacker(clock, seen), tmp_path)
    assert seen[0] == 16
    assert max(seen) == 50
    assert 110 <= len(rows) <= 120
    assert clock.now <= 120
    assert torch.equal(broken_by, (rows % 3 - 1).to(torch.int8))
    assert warnings == ["careful"]
    more, _, _ = run(1, attacker(clock, seen), tmp_path)
    assert torch.equal(more[: len(rows)], rows)
    assert 50 <= len(more) - len(rows) <= 60
    everything, broken_by, _ = run(60, attacker(clock, seen), tmp_path)
    assert sorted(everything.tolist()) == list(range(N))
    assert sum(seen) == N, "nothing is attacked twice"
    assert len(run(60, attacker(clock, seen), tmp_path)[0]) == N
    assert sum(seen) == N


def test_a_part_that_was_interrupted_is_the_next(clock, tmp_path):
    seen, sizes = [], []
    with pytest.raises(KeyboardInterrupt):
        run(5, attacker(clock, seen, fails_after=2), tmp_path)
    before = list(seen)
    with np.load(tmp_path / "state.npz") as state:
        part = json.loads(str(state["about"]))["part"]
    run(0.001, attacker(clock, seen, sizes=sizes), tmp_path)
    assert [seen, sizes] == [[*before, part[0]], [part[1]]], "its state file is of a part of that size"


def test_how_fast_the_rest_of_an_interrupted_part_was_says_nothing_of_the_next(clock, tmp_path):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(5, attacker(clock, seen, fails_after=2), tmp_path)
    clock.now = 0.0
    slow = attacker(clock, seen)

    def nearly_done(x, y, batch_size, state):
        found = slow(x, y, batch_size, state)
        clock.now -= 0.99 * len(x) if len(seen) == 3 else 0
        return found

    run(2, nearly_done, tmp_path)
    assert seen[3] == 16
    assert clock.now <= 120


def test_another_number_of_processes_goes_on_in_the_same_batches(clock, tmp_path):
    def attack_as(count, sizes, fails_after=None):
        processes = types.SimpleNamespace(count=count, main=True, largest=lambda values: values, wait=lambda: None)
        attack, file = attacker(clock, [], fails_after=fails_after, sizes=sizes), tmp_path / "state.npz"
        options = {"seed": 0, "batch_size": 10, "file": file, "settings": {}}
        return attack_for(0.5, subject(processes), attack, **options)

    first, resumed = [], []
    with pytest.raises(KeyboardInterrupt):
        attack_as(3, first, fails_after=0)
    attack_as(1, resumed)
    assert resumed == [10], "30 images of three processes, for one whose batches are of 10"


def test_too_slow_for_its_minutes_it_still_says_something(clock, tmp_path):
    seen = []
    rows, _, _ = run(0.1, attacker(clock, seen, seconds=60), tmp_path)
    assert len(rows) == 16


def test_errors_name_the_way_out(clock, tmp_path):
    attack = attacker(clock, [])
    with pytest.raises(InputError, match="--minutes is 0"):
        run(0, attack, tmp_path)
    run(0.5, attack, tmp_path)
    with pytest.raises(InputError, match="another setting"):
        run(0.5, attack, tmp_path, batch_size=3)
    for other in ({"settings": {"reference": True}}, {"images": 0.5}):
        with pytest.raises(InputError, match="another setting"):
            run(0.5, attack, tmp_path, **other)
    whole = (tmp_path / "state.npz").read_bytes()
    for damaged in (b"no", b"", *(whole[:cut] for cut in range(1, len(whole), 31))):
        (tmp_path / "state.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            run(0.5, attack, tmp_path)
