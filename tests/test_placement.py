"""Where work runs on a CPU: what is measured, what is chosen, and what becomes of it when the machine is shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import eval.pgd
from eval import common
from rb_noisy import placement
from rb_noisy.cli import app
from rb_noisy.errors import InputError
from rb_noisy.placement import Threads, best_layout, fastest, placed, seconds_by_threads, shares
from rb_noisy.training import _Trainer, train
from tests.conftest import threads


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(placement, "usable_cores", lambda: [0, 1])


class Machine:
    """Work whose length depends on the number of threads, as that of a convolution does."""

    def __init__(self, **seconds):
        self.seconds = {int(name[1:]): value for name, value in seconds.items()}
        self.calls = 0

    def __call__(self):
        self.calls += 1
        time.sleep(self.seconds[torch.get_num_threads()])


def test_each_number_of_threads_is_measured_in_turn_and_none_stays():
    seen = []
    with threads(1):
        found = seconds_by_threads(lambda: seen.append(torch.get_num_threads()), [1, 2], rounds=2)
        assert torch.get_num_threads() == 1
    assert seen == [1, 2, 1, 2, 1, 2]
    assert all(value >= 0 for value in found.values())
    with threads(1), pytest.raises(ZeroDivisionError):
        seconds_by_threads(lambda: 1 / 0, [2])
    assert torch.get_num_threads() == 1


def test_the_lower_number_is_taken_unless_more_threads_pay():
    assert fastest({1: 1.0, 2: 0.6}) == 2
    assert fastest({1: 1.0, 2: 0.97}) == 1
    assert fastest({1: 1.0, 2: 40.0}) == 1


@pytest.mark.parametrize(("machine", "chosen"), [({"t1": 0.03, "t2": 0.01}, 2), ({"t1": 0.01, "t2": 0.1}, 1)])
def test_threads_are_chosen_by_the_measurement_and_said(two_cores, machine, chosen):
    said = []
    with threads(1):
        assert Threads(Machine(**machine), say=said.append).count == torch.get_num_threads() == chosen
    assert len(said) == 1
    assert said[0].startswith(f"threads: {chosen} (a pass over a batch with 1: 0.0")


def test_a_given_number_is_taken_without_a_measurement(two_cores):
    machine = Machine(t1=0, t2=0)
    with threads(1):
        assert Threads(machine, 2).count == torch.get_num_threads() == 2
    assert machine.calls == 0


def test_threads_are_given_up_when_steps_stall_and_taken_again_when_the_cores_are_free(two_cores):
    machine, said = Machine(t1=0.02, t2=0.005), []
    with threads(1):
        chosen = Threads(machine, say=said.append)
        assert chosen.count == 2
        for _ in range(placement.USUAL):
            chosen.after_step(0.01)
        machine.seconds[2] = 0.2  # another process has come
        for _ in range(placement.PATIENCE - 1):
            chosen.after_step(0.4)
        chosen.after_step(0.01)  # no five in a row
        for _ in range(placement.PATIENCE - 1):
            chosen.after_step(0.4)
        assert chosen.count == 2
        chosen.after_step(0.4)
        assert chosen.count == torch.get_num_threads() == 1
        assert "something else uses the CPU" in said[1]
        chosen.between_epochs()
        assert chosen.count == 1
        machine.seconds[2] = 0.005  # it has gone
        chosen.between_epochs()
        assert chosen.count == torch.get_num_threads() == 2
        calls = machine.calls
        chosen.between_epochs()
        assert machine.calls == calls


def test_a_number_that_the_user_gave_is_kept_however_long_steps_take(two_cores):
    with threads(1):
        chosen = Threads(Machine(t1=0.0, t2=0.01), 2, fixed=True)
        for seconds in [0.01] * placement.USUAL + [1.0] * 2 * placement.PATIENCE:
            chosen.after_step(seconds)
        chosen.between_epochs()
        assert chosen.count == torch.get_num_threads() == 2


def test_all_that_an_epoch_was_computed_on_is_in_its_metrics_and_in_the_card(tiny_recipe, tmp_path):
    from model_zoo.registry import publish

    with threads(1):
        run = train(tiny_recipe(epochs=2), tmp_path / "run", on_batch=lambda *done: torch.set_num_threads(2))
    assert [line["threads"] for line in run.metrics] == [[1, 2], [2]]
    card = json.loads(publish(run.path, "mine", zoo=tmp_path / "zoo").read_text())
    assert (card["training"]["threads"], card["training"]["tuned"]) == ([1, 2], False)


def test_processes_are_chosen_where_threads_do_not_pay(two_cores):
    with threads(1):
        alone = best_layout(Machine(t1=0.04, t2=0.04))  # two at once do twice as much
        assert (alone.processes, alone.threads) == (2, 1)
        assert alone.seconds == pytest.approx(0.02, rel=0.5)
        wide = best_layout(Machine(t1=0.06, t2=0.01))
        assert (wide.processes, wide.threads) == (1, 2)
        hardly = best_layout(Machine(t1=0.1, t2=0.048))  # two at once: 0.05 each
        assert (hardly.processes, hardly.threads) == (2, 1)


def test_bf16_is_measured_beside_fp32():
    assert 0.01 < placement.bf16_slowdown() < 1000


def test_jobs_share_the_cores():
    assert shares([0, 1], 1) == [[0, 1]]
    assert shares([0, 1], 2) == [[0], [1]]
    assert shares([2, 3], 3) == [[2], [3], [2]]
    assert shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]


def test_a_placed_command_keeps_to_its_core_gives_way_and_says_how_it_ended(tmp_path):
    core = placement.usable_cores()[-1]
    report = "import json, os; print(json.dumps([sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)]))"
    done = subprocess.run(placed([sys.executable, "-c", report], [core]), capture_output=True, text=True)
    assert json.loads(done.stdout) == [[core], 19], done.stderr
    assert subprocess.run(placed([sys.executable, "-c", "raise SystemExit(7)"], [core])).returncode == 7


def test_a_placed_command_ends_with_its_parent(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    start = "import subprocess, sys; from rb_noisy.placement import placed, usable_cores; "
    start += f"subprocess.run(placed([sys.executable, '-c', {child!r}], usable_cores()))"
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", start])
    deadline = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    running = Path(f"/proc/{pid.read_text()}/cmdline")
    while running.exists() and running.read_text() and time.monotonic() < deadline:  # a zombie has an empty one
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_several_processes_end_with_the_command_that_started_them(tmp_path):
    """Also when it is killed; and what one of them says when it fails is shown, with its exit code."""
    program = (
        f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))"
    )
    (tmp_path / "sleeper.py").write_text(program + "; time.sleep(60)")
    (tmp_path / "failing.py").write_text(
        "import os, sys, time; print('of', os.environ['RANK'], os.environ['WORLD_SIZE'], file=sys.stderr)\n"
        "time.sleep(0.2); sys.exit(3 * int(os.environ['RANK']))"
    )
    start = "import sys; from rb_noisy.placement import relaunch; sys.exit(relaunch(2, sys.argv[1], []))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-W", "ignore", "-c", start]
    parent = subprocess.Popen([*command, "sleeper"], env=environment)
    files, deadline = [tmp_path / "0", tmp_path / "1"], time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for file in files:
        running = Path(f"/proc/{file.read_text()}/cmdline")
        while running.exists() and running.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert time.monotonic() < deadline
    failed = subprocess.run([*command, "failing"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 3
    assert "of 0 2" in failed.stderr
    assert "of 1 2" in failed.stderr


def test_a_network_with_parameters_of_no_use_is_measured_too(tiny_recipe, tmp_path, two_cores):
    trainer = _Trainer(tiny_recipe(epochs=1), tmp_path / "run", False, None)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    with threads(1):
        trainer.place("measured", False, lambda line: None)
    assert trainer.threads.seconds


def test_a_resumed_run_keeps_the_threads_it_had(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(epochs=2)
    with threads(1):
        assert not train(recipe, tmp_path / "run", max_minutes=1e-9, threads=2).finished
    monkeypatch.setattr(placement, "seconds_by_threads", lambda *a: pytest.fail("measured"))
    with threads(1):
        run = train(recipe, tmp_path / "run", resume=True, threads="measured")
    assert [line["threads"] for line in run.metrics] == [[2], [2]]
    with threads(1):
        whole = train(recipe, tmp_path / "whole", threads=2)
    ours, theirs = (load_file(r.path / "final.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_measurement_leaves_no_trace_in_the_run(tiny_recipe, tmp_path, two_cores):
    """Dropout, BatchNorm statistics and random starts are as without it."""
    recipe = tiny_recipe(epochs=1, backbone_options={"drop_rate": 0.3})
    with threads(1):
        plain = train(recipe, tmp_path / "plain", threads=1)
        said = []
        measured = train(recipe, tmp_path / "measured", threads="measured", on_note=said.append)
        if measured.metrics[0]["threads"] == [1]:  # the arithmetic depends on the number
            ours, theirs = (load_file(r.path / "final.safetensors") for r in (measured, plain))
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert said[0].startswith("threads: ")


@pytest.mark.parametrize(("option", "words"), [("--threads", "threads is 0"), ("--processes", "--processes is 0")])
def test_numbers_below_one_leave_nothing_behind(option, words, tmp_path):
    result = CliRunner().invoke(app, ["train", "--data", "digits", "--out", str(tmp_path / "run"), option, "0"])
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "run").exists()


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *map(str, arguments)],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_says_what_it_chose_and_shares_a_step_among_processes(tiny_recipe, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(tiny_recipe(epochs=1, batch_size=16).to_dict()))
    done = command("rb_noisy", "train", "--recipe", file, "--out", tmp_path / "two", "--processes", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("evaluate it with") == 1
    line = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())
    assert (line["processes"], line["threads"]) == (2, [1])
    done = command("rb_noisy", "train", "--recipe", file, "--out", tmp_path / "one")
    if len(placement.usable_cores()) > 1:
        assert "threads: " in done.stdout, done.stderr[-2000:]


PGD = ("--model", "sglr_digits", "--n", "60", "--batch-size", "20")


def pgd_here(*options):
    app = typer.Typer()
    app.command()(eval.pgd.main)
    return CliRunner().invoke(app, [*PGD, *map(str, options)])


def test_an_evaluation_has_the_same_verdicts_over_processes(tmp_path):
    """By the real command in two processes, and here in one."""
    done = command("eval.pgd", *PGD, "--processes", 2, "--out", tmp_path, "--json", tmp_path / "2.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("verdicts:") == 1
    assert pgd_here("--out", tmp_path / "alone", "--json", tmp_path / "1.json").exit_code == 0
    one, two = (json.loads((tmp_path / f"{count}.json").read_text())["pgd-20"] for count in (1, 2))
    assert one["any_iterate"] == two["any_iterate"]


def test_an_evaluation_places_itself_where_that_is_worth_it(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(common, "_command", lambda: "eval.pgd")
    started = []
    monkeypatch.setattr(common, "relaunch", lambda count, module, arguments: started.append((count, module)) or 7)
    monkeypatch.setattr(common, "best_layout", lambda work: work() or placement.Layout(2, 1, 0.5))
    assert pgd_here("--out", tmp_path).exit_code == 0, "an evaluation of seconds is not measured"
    assert started == []
    monkeypatch.setattr(common, "WORTH_PLACING", 0.0)
    done = pgd_here("--out", tmp_path)
    assert (done.exit_code, started) == (7, [(2, "eval.pgd")])
    assert "2 processes of one thread: 0.5 s for the gradients of 32 images" in done.output
    monkeypatch.setattr(common, "best_layout", lambda work: placement.Layout(1, 2, 0.5))
    with threads(1):
        done = pgd_here("--out", tmp_path)
        assert torch.get_num_threads() == 2
    assert done.exit_code == 0
    assert "2 threads: 0.5 s for the gradients of 32 images" in done.output
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "gradients of" not in pgd_here("--out", tmp_path).output


def test_processes_need_a_command_line():
    options = {"zoo": None, "dataset": None, "n": None, "device": "cpu", "eps": None, "data_root": None}
    with pytest.raises(InputError, match="--processes is for the command line"):
        common.load_subject("sglr_digits", checkpoint="final", seed=0, batch_size=10, processes=2, **options)
