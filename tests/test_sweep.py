"""Sweeps: the grid and its names, and processes that skip, continue, fail alone and end when told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rb_noisy.commands.sweep import parse_axes, sweep
from rb_noisy.errors import InputError
from rb_noisy.jobs import carry_out, make_jobs
from rb_noisy.objectives import OBJECTIVES
from rb_noisy.recipes import PARTS, Recipe
from rb_noisy.runs import Run
from rb_noisy.studies import studies, study
from rb_noisy.sweep import expand_grid
from rb_noisy.sweep_teachers import with_teachers
from rb_noisy.targets import TAUGHT
from rb_noisy.training import train

app = typer.Typer()
app.command()(sweep)
PROGRAM = "import typer; from rb_noisy.commands.sweep import sweep; typer.run(sweep)"
ROOT = Path(__file__).parents[1]
TINY = {"data": "digits", "backbone": "preact_resnet8_narrow", "steps": 1, "track": 50, "track_steps": 1}
TINY |= {"batch_size": 512, "method": "st"}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def options(**fields):
    return [part for name, value in (TINY | fields).items() for part in ("--set", f"{name}={value}")]


def names(*arguments):
    return list(expand_grid(parse_axes(list(arguments))))


def test_names_say_method_noise_and_seed_and_whatever_else_varies():
    assert names("data=digits", "method=st,pgd-at+sglr", "noise=symmetric", "noise_rate=0.4") == [
        "st_symmetric0.4_seed0",
        "pgd-at+sglr_symmetric0.4_seed0",
    ]
    grid = ["data=digits,npz:/data/mine.npz", "epochs=20", "backbone=small_cnn,resnet18.a1_in1k", "method=st"]
    assert names(*grid) == [
        "digits_st_clean_small_cnn_seed0",
        "digits_st_clean_resnet18.a1_in1k_seed0",
        "npz-mine_st_clean_small_cnn_seed0",
        "npz-mine_st_clean_resnet18.a1_in1k_seed0",
    ]
    sets = ["data=digits", "noise=human:/data/n.npz:worse,human:/data/n.npz:aggre,human:/data/mine.csv"]
    assert names(*sets) == ["pgd-at_human-worse_seed0", "pgd-at_human-aggre_seed0", "pgd-at_human_seed0"]
    ablation = ["data=digits", "method=pgd-at+sglr", "target_options.r=0,0.2", "augment=true,false"]
    assert names(*ablation)[1] == "pgd-at+sglr_clean_r0_augment-false_seed0"
    assert names("data=digits", "eps=8/255,4/255") == ["pgd-at_clean_eps-8-255_seed0", "pgd-at_clean_eps-4-255_seed0"]
    assert names("data=digits", "milestones=[5,8],[6,9]") == [
        "pgd-at_clean_milestones5-8_seed0",
        "pgd-at_clean_milestones6-9_seed0",
    ]


def test_a_larger_grid_finds_the_runs_of_the_smaller_one():
    small = names("data=digits", "method=st", "noise=pair", "noise_rate=0.4", "seed=0")
    large = names("data=digits", "method=st,pgd-at", "noise=pair,symmetric", "noise_rate=0,0.4", "seed=0,1,2")
    assert set(small) < set(large)


def test_rate_zero_is_one_run_without_noise_whatever_the_kind():
    recipes = expand_grid(parse_axes(["data=digits", "noise=symmetric,pair", "noise_rate=0,0.2", "noise_seed=7"]))
    assert list(recipes) == ["pgd-at_clean_seed0", "pgd-at_symmetric0.2_seed0", "pgd-at_pair0.2_seed0"]
    assert recipes["pgd-at_clean_seed0"].noise_rate is None
    assert recipes["pgd-at_pair0.2_seed0"].noise_seed == 7
    assert names("data=digits", "noise=none,pair", "noise_rate=0.2,0.4") == [
        "pgd-at_clean_seed0",
        "pgd-at_pair0.2_seed0",
        "pgd-at_pair0.4_seed0",
    ]


def test_the_recipes_of_a_list_are_merged_over_every_combination():
    entries = [{"method": "st"}, {"method": "pgd-at+sglr", "target_options": {"r": 0.4}, "epochs": 3}]
    recipes = expand_grid({"data": ["digits"], "seed": [0, 1], "epochs": [5]}, entries)
    assert [(r.method, r.seed, r.epochs) for r in recipes.values()] == [
        ("st", 0, 5),
        ("pgd-at+sglr", 0, 3),
        ("st", 1, 5),
        ("pgd-at+sglr", 1, 3),
    ]
    assert "pgd-at+sglr_clean_r0.4_epochs3_seed1" in recipes


rates = st.lists(st.floats(0, 0.49), min_size=1, max_size=3)
texts = st.lists(st.text(max_size=12), min_size=1, max_size=3)


@settings(max_examples=25)
@given(rates=rates, lrs=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3), files=texts)
def test_names_are_safe_and_tell_recipes_apart(rates, lrs, files):
    axes = {"data": ["digits"], "noise": ["symmetric", "pair"], "noise_rate": rates, "lr": lrs}
    recipes = expand_grid(axes)
    assert len(recipes) == len({repr(recipe) for recipe in recipes.values()})
    wanted = {(kind, rate, lr) if rate else (None, 0, lr) for kind in axes["noise"] for rate in rates for lr in lrs}
    assert len(recipes) == len(wanted)
    try:
        recipes |= expand_grid(axes | {"noise_options.file": files, "data": [f"npz:{file}" for file in files]})
    except InputError as error:
        assert "share the name" in str(error)  # noqa: PT017 - two texts may well make one name
    for name in recipes:
        assert name not in (".", "..")
        assert all(character.isalnum() or character in "_.+-" for character in name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digits", "--method", "st,pgd-it"], "pgd-it"),
        (["--data", "digits", "--seed", "0,,1"], "empty value"),
        (["--data", "digits", "--set", "lr"], "is not FIELD=VALUE"),
        (["--data", "digits", "--set", "leaning_rate=1,2"], "unknown recipe field"),
        (["--data", "digits", "--noise-rate", "0,0.4"], "no noise is named"),
        (["--data", "digits", "--jobs", "0"], "--jobs is 0"),
        (["--data", "digits", "--grid", "nowhere.json"], "is no file"),
        (["--data", "npz:/a/x.npz,npz:/b/x.npz"], "share the name 'npz-x_pgd-at_clean_seed0'"),
        ([], "names no data set"),
    ],
)
def test_bad_grids_end_in_one_clear_line_before_anything_runs(arguments, words, tmp_path):
    result = call("--out", tmp_path / "sweep", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "sweep").exists()


def test_a_grid_file_must_hold_a_list_of_objects(tmp_path):
    file = tmp_path / "grid.json"
    for text, words in (("{}", "no list of JSON objects"), ("[1]", "no list of JSON objects"), ("[", "not valid JSON")):
        file.write_text(text)
        result = call("--out", tmp_path / "sweep", "--data", "digits", "--grid", file)
        assert result.exit_code == 2, result.output
        assert words in result.output


def test_finished_runs_are_skipped_and_a_folder_of_another_recipe_stops_everything(tmp_path):
    recipes = expand_grid({name: [value] for name, value in (TINY | {"epochs": 1}).items()})
    train(recipes["st_clean_seed0"], tmp_path / "st_clean_seed0")
    arguments = ["--out", tmp_path, *options(epochs=1)]
    dry = call(*arguments, "--seed", "0,1", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.output.split() == ["st_clean_seed0", "finished", "st_clean_seed1", "to", "do"]
    before = (tmp_path / "st_clean_seed0" / "final.safetensors").stat().st_mtime_ns
    again = call(*arguments)
    assert again.exit_code == 0, again.output
    assert "1 of 1 runs are finished already" in again.output
    (outcome,) = carry_out(make_jobs(recipes, tmp_path), tmp_path)
    assert (outcome.job.name, outcome.problem, outcome.job.state()) == ("st_clean_seed0", "", "finished")
    assert (tmp_path / "st_clean_seed0" / "final.safetensors").stat().st_mtime_ns == before
    other = call("--out", tmp_path, *options(epochs=1, lr=0.5), "--seed", "1,0")
    assert other.exit_code == 2, other.output
    assert "holds a run of another recipe (lr differ)" in other.output
    assert not (tmp_path / "st_clean_seed1").exists(), "nothing ran"


def test_half_done_runs_go_on_and_a_diverging_one_does_not_stop_the_others(tmp_path):
    arguments = ["--out", tmp_path, *options(epochs=3, lr="0.05,1e30")]
    recipes = expand_grid(parse_axes([text for text in arguments[2:] if text != "--set"]))
    good = tmp_path / "st_clean_lr0.05_seed0"

    def stop_after_two(line):
        if line["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipes[good.name], good, on_epoch=stop_after_two)
    done = (good / "metrics.jsonl").read_text()
    assert "st_clean_lr0.05_seed0  2 of 3 epochs" in call(*arguments, "--dry-run").output
    result = call(*arguments, "--jobs", 2)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("st_clean_lr0.05_seed0  best PGD-1")]
    assert "final PGD-1" in line
    assert "failed: st_clean_lr1e+30_seed0: diverged: the loss is" in result.output
    assert "1 of 2 runs failed" in result.output
    assert Run.open(good).finished
    assert (good / "metrics.jsonl").read_text().startswith(done), "the epochs that were done are not done again"
    assert "epoch 3/3" in (good / "train.log").read_text()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and ps")
def test_sigterm_ends_the_runs_too(tmp_path):
    command = [sys.executable, "-c", PROGRAM, "--out", tmp_path, "--jobs", 2, *options(epochs=500), "--seed", "0,1,2"]
    started = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(running := children(started.pid)) < 2:
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=30)
    finally:
        started.kill()
    assert started.returncode == 130
    assert "what was finished is kept" in said
    assert not [pid for pid in running if is_alive(pid)]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["st_clean_seed0", "st_clean_seed1"]


def children(parent):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in map(str.split, listed.splitlines()) if int(of) == parent]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
@pytest.mark.parametrize("name", studies())
def test_every_study_of_the_papers_is_a_grid_of_recipes(name, data):
    grid = study(name)
    recipes = with_teachers(expand_grid({"data": [data], **grid.axes}, grid.recipes))
    count = {"sglr-table4": 15, "nl-noise": 18, "nl-annotator": 4, "sglr-table3": 4, "sglr-noise": 2}
    count |= {"refinement": 17, "refinement-weak": 15}
    assert len(recipes) == count.get(name, len(grid.recipes))
    for recipe in recipes.values():
        assert recipe.data == data
        teachers = set(recipe.make_targets().teachers) - {"average"}
        assert teachers <= {"at_digits", "st_digits", "../pgd-at_clean_seed0", "../st_clean_seed0"}
        assert bool(teachers) == (recipe.targets_name in TAUGHT)
        assert Recipe.from_dict(recipe.changes()) == recipe, "what a recipe file says is the same recipe"


def test_the_methods_study_names_every_part_there_is():
    methods = {part for recipe in study("methods").recipes for part in recipe["method"].split("+")}
    assert methods == {*OBJECTIVES, *(part for parts in PARTS.values() for part in parts)} - {"hard", "ce"}


def test_a_study_is_named_on_the_command_line_and_options_override_its_axes(tmp_path):
    done = call(
        "--grid", "sglr-table4", "--data", "digits", "--set", "target_options.r=0.2", "--dry-run", "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 3
    unknown = call("--grid", "sglr-table9", "--data", "digits", "--dry-run", "--out", tmp_path)
    assert unknown.exit_code == 2
    assert "did you mean sglr-table" in unknown.output
