"""Lists of trainings and evaluations: order, needs, what is skipped, what goes on, and what a status says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rb_noisy.commands.sweep import duration, sweep
from rb_noisy.errors import InputError
from rb_noisy.jobs import Evaluation, Training, carry_out, make_jobs, passes, seconds_left
from rb_noisy.placement import usable_cores
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run, read_results, results_file
from rb_noisy.sweep import expand_grid
from rb_noisy.sweep_teachers import with_teachers
from rb_noisy.training import train

app = typer.Typer()
app.command()(sweep)
PROGRAM = "import typer; from rb_noisy.commands.sweep import sweep; typer.run(sweep)"
ROOT = Path(__file__).parents[1]
TINY = {"data": "digits", "backbone": "preact_resnet8_narrow", "method": "st", "epochs": 1, "batch_size": 512}
TINY |= {"track": 20, "track_steps": 1}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def written(folder, entries):
    file = folder / "list.json"
    file.write_text(json.dumps(entries))
    return file


def test_a_list_of_trainings_and_evaluations_is_carried_out_in_order_and_then_skipped(tmp_path):
    entries = [
        {"name": "second-by-name", **TINY, "seed": 1},
        {"name": "first", **TINY, "seed": 0},
        {"evaluate": "pgd", "model": "first", "n": 30, "batch_size": 15},
    ]
    arguments = ["--out", tmp_path / "runs", "--grid", written(tmp_path, entries)]
    before = call(*arguments, "--status")
    assert before.exit_code == 0, before.output
    assert not (tmp_path / "runs").exists(), "a status changes nothing"
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    lines = [line.split("  ")[0] for line in done.output.splitlines()]
    assert lines == ["second-by-name", "first", "pgd of first n=30 batch_size=15"]
    assert "of 30 images" in done.output
    assert read_results(results_file(tmp_path / "runs" / "first", "final"))["pgd-20"]["n"] == 30
    assert "final iterate" in (tmp_path / "runs" / "first" / "pgd.log").read_text()
    again = call(*arguments)
    assert "3 of 3 runs are finished already" in again.output
    status = call(*arguments, "--status").output.splitlines()
    assert status[-1] == "all is done"
    assert all(line.endswith("  finished") for line in status[:-1])
    # More images than were asked for before are not done.
    entries[-1]["n"] = 31
    status = call("--out", tmp_path / "runs", "--grid", written(tmp_path, entries), "--status").output
    assert "pgd of first n=31 batch_size=15  to do, time not known yet" in status


RATES = {name: {"accuracy": 0.5} for name in ("natural", "final_iterate", "any_iterate")}


def test_an_evaluation_of_other_weights_does_not_count(tmp_path):
    recipes = expand_grid({name: [value] for name, value in TINY.items()})
    ((name, recipe),) = recipes.items()
    run = train(recipe, tmp_path / name)
    _, evaluation = make_jobs(recipes, tmp_path, [{"evaluate": "pgd", "n": 10}])
    assert isinstance(evaluation, Evaluation)
    file = results_file(run.path, "final")
    file.write_text(json.dumps({"pgd-20": RATES | {"n": 10, "of": 540, "weights_sha256": "0" * 64}}))
    assert not evaluation.done()
    from rb_noisy.files import sha256

    digest = sha256(run.path / "final.safetensors")
    file.write_text(json.dumps({"pgd-20": RATES | {"n": 10, "of": 540, "weights_sha256": digest}}))
    assert evaluation.done()
    assert not make_jobs(recipes, tmp_path, [{"evaluate": "pgd"}])[1].done(), "all 540 are asked for"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"evaluate": "autoatack"}, "unknown evaluation 'autoatack'; did you mean autoattack"),
        ({"evaluate": "pgd", "model": "b"}, "unknown model to evaluate (a run of the list) 'b'"),
        ({"evaluate": "pgd", "batchsize": 3}, "unknown option of pgd 'batchsize'; did you mean batch_size"),
        ({"evaluate": "pgd", "n": "all"}, "n of pgd of a is 'all'; give int"),
        ({"evaluate": "pgd", "n": -1}, "n of pgd of a is -1; give 1 or more"),
        ({"evaluate": "pgd", "checkpoint": "bst"}, "unknown checkpoint of a 'bst'; did you mean best"),
        ({"evaluate": ["pgd"]}, "unknown evaluation"),
        ({"evaluate": "pgd", "model": ["a"]}, "unknown model to evaluate"),
    ],
)
def test_evaluations_that_cannot_be_had_are_named_before_anything_runs(entry, words, tmp_path):
    file = written(tmp_path, [{"name": "a", **TINY}, entry])
    result = call("--out", tmp_path / "runs", "--grid", file)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "runs").exists()


def test_two_evaluations_whose_figures_would_be_one_are_refused(tmp_path):
    recipes = expand_grid({}, [{"name": "a", **TINY}])
    twice = [{"evaluate": "pgd", "n": 20}, {"evaluate": "pgd", "n": 20, "seed": 1}]
    with pytest.raises(InputError, match=r"pgd of a \(final\) is in the list 2 times"):
        make_jobs(recipes, tmp_path, twice)
    assert len(make_jobs(recipes, tmp_path, [twice[0], twice[1] | {"checkpoint": "best"}])) == 3


def test_figures_of_another_seed_are_not_those_that_were_asked_for(tmp_path):
    from rb_noisy.files import sha256

    recipes = expand_grid({}, [{"name": "a", **TINY}])
    run = train(recipes["a"], tmp_path / "a")
    figures = RATES | {"n": 540, "of": 540, "seed": 0, "batch_size": 250}
    figures["weights_sha256"] = sha256(run.path / "final.safetensors")
    results_file(run.path, "final").write_text(json.dumps({"pgd-20": figures}))
    for options, done in (({}, True), ({"seed": 0}, True), ({"seed": 1}, False), ({"n": 20, "batch_size": 5}, False)):
        job = make_jobs(recipes, tmp_path, [{"evaluate": "pgd", **options}])[1]
        assert job.done() == done, options
        assert "--replace" in job.command(None), "what is there is not what was asked for"


def test_runs_that_teach_each_other_are_refused(tmp_path):
    student = {**TINY, "method": "pgd-at+kd"}
    for names in (("a", "a"), ("a", "b")):
        entries = [
            {"name": name, **student, "target_options": {"robust": f"../{other}"}}
            for name, other in zip(names, reversed(names), strict=True)
        ][: len(set(names))]
        with pytest.raises(InputError, match="run a waits for itself"):
            make_jobs(expand_grid({}, entries), tmp_path)


def test_a_teacher_by_the_lists_own_name_is_that_run(tmp_path):
    taught = {"name": "student", **TINY, "method": "pgd-at+rslad", "target_options": {"robust": "teacher"}}
    recipes = with_teachers(expand_grid({}, [taught, {"name": "teacher", **TINY}]))
    assert make_jobs(recipes, tmp_path)[0].needs == ("teacher",)


def test_no_jobs_at_a_time_is_one_line(tmp_path):
    file = written(tmp_path, [{"name": "a", **TINY}])
    result = call("--out", tmp_path / "runs", "--grid", file, "--status", "--jobs", "0")
    assert result.exit_code == 2
    assert "--jobs is 0" in result.output


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", 3])
def test_names_that_are_no_folders_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="cannot be a folder's"):
        expand_grid({"data": ["digits"]}, [{"name": name}])


def test_what_needs_a_failed_run_is_not_begun(tmp_path):
    entries = [{"name": "bad", **TINY, "lr": 1e30, "epochs": 2}, {"name": "good", **TINY}]
    recipes = expand_grid({}, entries)
    jobs = make_jobs(recipes, tmp_path, [{"evaluate": "pgd", "model": "bad"}])
    seen = []
    outcomes = carry_out(jobs, tmp_path, at_a_time=2, on_done=lambda outcome: seen.append(outcome.job.name))
    problems = {outcome.job.name: outcome.problem for outcome in outcomes}
    assert "diverged" in problems["bad"]
    assert problems["pgd of bad"] == "it needs bad, which failed"
    assert problems["good"] == ""
    assert sorted(seen) == ["bad", "good", "pgd of bad"]
    assert not (tmp_path / "bad" / "pgd.log").exists()


def start(tmp_path, entries):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, "--out", tmp_path / "runs", "--jobs", 2]
    command += ["--grid", written(tmp_path, entries)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, text=True, **streams)


def children_of(parent):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in map(str.split, listed.splitlines()) if int(of) == parent]


def wait_until(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.1)


def is_running(pid):
    file = Path(f"/proc/{pid}/cmdline")
    try:
        return bool(file.read_text())  # a zombie has an empty one
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_a_killed_list_leaves_no_process_and_its_command_goes_on(tmp_path):
    entries = [{"name": f"r{i}", **TINY, "epochs": 12, "seed": i} for i in range(2)]
    process = start(tmp_path, entries)
    metrics = [tmp_path / "runs" / f"r{i}" / "metrics.jsonl" for i in range(2)]
    try:
        wait_until(lambda: all(file.exists() for file in metrics), process)
        second = call("--out", tmp_path / "runs", "--grid", tmp_path / "list.json")
        assert second.exit_code == 2
        assert "another process writes to" in second.output
        running = children_of(process.pid)
        assert len(running) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    wait_until(lambda: not any(map(is_running, running)), seconds=30)
    done = [len(Run.open(tmp_path / "runs" / f"r{i}").metrics) for i in range(2)]
    status = call("--out", tmp_path / "runs", "--grid", tmp_path / "list.json", "--status").output
    for i, count in enumerate(done):
        if count < 12:
            assert re.search(rf"^r{i}  {count} of 12 epochs, about \d+ min left$", status, re.MULTILINE)
    again = call("--out", tmp_path / "runs", "--grid", tmp_path / "list.json", "--jobs", "2")
    assert again.exit_code == 0, again.output
    runs = [Run.open(tmp_path / "runs" / f"r{i}") for i in range(2)]
    assert all(run.finished for run in runs)
    if len(usable_cores()) == 2:  # a core for each, and one thread
        assert {count for run in runs for line in run.metrics for count in line["threads"]} == {1}


def test_the_time_left_comes_of_a_runs_own_epochs_or_of_those_of_its_like(tmp_path):
    base = TINY | {"method": "fgsm-rs", "epochs": 4}
    recipes = expand_grid(
        {},
        [
            {"name": "half", **base},
            {"name": "like", **base, "seed": 1},
            {"name": "dear", **base, "method": "pgd-at", "steps": 10},
            {"name": "wide", **base, "backbone": "preact_resnet18"},
        ],
    )
    train(recipes["half"], tmp_path / "half", max_minutes=1e-9)
    run = train(recipes["half"], tmp_path / "half", resume=True, max_minutes=1e-9)
    while len(run.metrics) < 2:
        run = train(recipes["half"], tmp_path / "half", resume=True, max_minutes=1e-9)
    file = tmp_path / "half" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, seconds in zip(lines, (10, 14), strict=True):
        line["seconds"] = seconds
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = seconds_left(make_jobs(recipes, tmp_path, [{"evaluate": "autoattack", "model": "half"}]))
    assert left["half"] == pytest.approx(2 * 12)
    assert left["like"] == pytest.approx(4 * 12)
    assert left["dear"] == pytest.approx(4 * 12 * 23 / 5)
    assert left["wide"] is left["autoattack of half"] is None


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [  # units a step of arXiv 2604.22853: N-FGSM 5, LIET 7, PGD-AT 23
        ("st", None, 3),
        ("n-fgsm", None, 5),
        ("liet", None, 7),
        ("pgd-at", 10, 23),
        ("n-fgsm+awp", None, 8),
        ("n-fgsm+sglr", None, 6),
        ("trades", 10, 26),
        ("trades+sglr", 10, 26),
    ],
)
def test_passes_of_a_step(method, steps, expected):
    assert passes(Recipe(data="cifar10", method=method, steps=steps)) == expected


def test_a_training_of_another_recipe_is_refused(tmp_path):
    recipes = expand_grid({}, [{"name": "a", **TINY}])
    train(recipes["a"], tmp_path / "a")
    with pytest.raises(InputError, match=r"holds a run of another recipe \(lr differ\)"):
        make_jobs(expand_grid({}, [{"name": "a", **TINY, "lr": 0.5}]), tmp_path)
    (job,) = make_jobs(recipes, tmp_path)
    assert isinstance(job, Training)
    assert (job.state(), job.done()) == ("finished", True)


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0, 60, 3600, 3 * 3600, 80 * 3600)] == [
        "1 min",
        "1 min",
        "60 min",
        "3.0 h",
        "3.3 days",
    ]
