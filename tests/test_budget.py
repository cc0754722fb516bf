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


def subject(processes=None):
    describe = lambda seed, batch_size: {"seed": seed, "batch_size": batch_size, "date": "today"}  # noqa: E731
    x = torch.arange(N).view(N, 1, 1, 1).float()
    return types.SimpleNamespace(x=x, y=CLASSES, describe=describe, processes=processes or Processes())


def attacker(clock, seen, seconds=1.0, fails_after=None):
    def attack(x, y, batch_size, state):
        if fails_after is not None and len(seen) == fails_after:
            raise KeyboardInterrupt
        seen.append(len(x))
        clock.now += seconds * len(x)
        broken_by = (x.flatten().long() % 3 - 1).to(torch.int8)
        return types.SimpleNamespace(broken_by=broken_by, warnings=("careful",))

    return attack


def run(minutes, attack, tmp_path, batch_size=50):
    return attack_for(minutes, subject(), attack, seed=0, batch_size=batch_size, file=tmp_path / "state.npz")


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
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(5, attacker(clock, seen, fails_after=2), tmp_path)
    sizes = list(seen)
    with np.load(tmp_path / "state.npz") as state:
        size = json.loads(str(state["about"]))["size"]
    run(0.001, attacker(clock, seen), tmp_path)
    assert seen == [*sizes, size], "its state file is of a part of that size"


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
    (tmp_path / "state.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="is damaged"):
        run(0.5, attack, tmp_path)
