"""Files that two write at once, or whose writer is killed, or whose disk is full: whole, and nobody's leftovers."""

import json
import os
import resource
import signal
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from eval import leaderboard, pgd
from model_zoo import registry
from rb_noisy import files
from rb_noisy.cli import app
from rb_noisy.commands.label_issues import label_issues
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path, only_changer, write_json
from rb_noisy.processes import forget_state
from rb_noisy.runs import save_tensors
from rb_noisy.training import train


@pytest.fixture
def run(tiny_recipe, tmp_path):
    return train(tiny_recipe(epochs=1, method="pgd-at"), tmp_path / "run")


def hidden(folder):
    """What is not finished being written, and locks, anywhere below."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob(".*"))


def killed_in_writing(name, work):
    """Do `work` in a process that is killed (SIGKILL) when a file of this name is about to become whole."""

    def until_then():
        replace = os.replace

        def kill(source, place):
            if name in os.path.basename(place):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, place)

        os.replace = kill
        work()

    process = get_context("fork").Process(target=until_then)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def test_two_writers_of_one_file_never_share_a_temporary_one(tmp_path):
    """Two containers on a shared folder have the same PID; here it is one process, which has it twice."""
    file = tmp_path / "figures.json"
    with atomic_path(file) as slow:
        slow.write_text("half of wh")
        with atomic_path(file) as quick:
            assert quick != slow
            quick.write_text("the other's")
        assert file.read_text() == "the other's"
        with slow.open("a") as more:
            more.write("at it is")
        forget_state(tmp_path / "figures.json")  # leaves what a living one writes
        assert slow.read_text() == "half of what it is"
    assert file.read_text() == "half of what it is"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("guess", ["the PID", "the random name"])
def test_no_planted_link_is_followed(guess, tmp_path, monkeypatch):
    name = os.getpid() if guess == "the PID" else "planted"
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(["planted", "free", *map(str, range(9))]))
    victim, file = tmp_path / "victim", tmp_path / "cards" / "card.json"
    victim.write_text("precious")
    file.parent.mkdir()
    (file.parent / f".card.{name}.tmp.json").symlink_to(victim)
    write_json(file, {"a": 1})
    assert victim.read_text() == "precious"
    assert json.loads(file.read_text()) == {"a": 1}
    assert not file.is_symlink()


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".npz"])
def test_the_next_writer_removes_what_a_killed_one_left_but_nobody_elses(suffix, tmp_path):
    file, other = tmp_path / f"a[1]{suffix}", tmp_path / f"b{suffix}"
    write = {
        ".json": lambda place: write_json(place, [1]),
        ".safetensors": lambda place: save_tensors({"x": torch.ones(3)}, place, {}),
        ".npz": lambda place: np.savez(place, x=np.ones(3)),
    }[suffix]

    def whole(place):
        if suffix == ".npz":
            with atomic_path(place) as temporary:
                write(temporary)
        else:
            write(place)

    whole(file)
    before = file.read_bytes()
    for place in (file, other):
        killed_in_writing(place.name, lambda place=place: whole(place))
    assert file.read_bytes() == before
    assert len(left := hidden(tmp_path)) == 4, left  # a folder and a file in it for each
    whole(file)
    assert [name for name in hidden(tmp_path) if name.startswith(".a")] == []
    assert len(hidden(tmp_path)) == 2
    whole(other)
    assert not hidden(tmp_path)


def test_without_locks_only_what_is_old_is_a_killed_ones(tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(files.fcntl, "flock", none)
    file = tmp_path / "a.json"
    new, old = tmp_path / ".a.new.tmp.json", tmp_path / ".a.old.tmp.json"
    for folder in (new, old):
        folder.mkdir()
        (folder / ".new.json").write_text("half")
    for place in (old / ".new.json", old):
        os.utime(place, (time.time() - 2 * files.ABANDONED,) * 2)
    write_json(file, 1)
    assert new.exists()
    assert not old.exists()


@contextmanager
def no_file_above(size):
    """A full disk, in effect: writing more fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_old_file_whole_and_names_it(tmp_path):
    text, tensors = tmp_path / "a.json", tmp_path / "a.safetensors"
    write_json(text, "old")
    save_tensors({"x": torch.ones(3)}, tensors, {})
    with no_file_above(2000):
        with pytest.raises(OSError, match=r"a\.json") as failed:
            write_json(text, "new" * 1000)
        with pytest.raises(OSError, match=r"a\.safetensors"):
            save_tensors({"x": torch.ones(3000)}, tensors, {})
    assert failed.value.filename == str(text)
    assert json.loads(text.read_text()) == "old"
    assert load_file(tensors)["x"].shape == (3,)
    assert not hidden(tmp_path)


def figures(digest, n=60):
    rate = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    return {"weights_sha256": digest, "n": n, "of": 60, "natural": rate, "final_iterate": rate, "accuracy": 0.25}


@pytest.mark.parametrize("kind", ["card", "run folder"])
def test_no_figures_are_lost_where_many_enter_theirs_at_once(kind, run, tmp_path):
    zoo = None
    if kind == "card":
        registry.publish(run.path, "tiny", zoo=(zoo := tmp_path / "zoo"))
    target = "tiny" if zoo else registry.results_file(run.path, "final")

    def enter(number):
        for evaluation in range(6):
            registry.write_result(target, f"{number}-{evaluation}", figures("0" * 64), zoo)

    context = get_context("fork")
    writers = [context.Process(target=enter, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(100)
        assert writer.exitcode == 0
    found = registry.read_card("tiny", zoo)["results"] if zoo else registry.read_results(target)
    assert sorted(found) == sorted(f"{number}-{evaluation}" for number in range(8) for evaluation in range(6))
    assert not hidden(tmp_path)


def test_figures_entered_while_a_model_is_published_anew_never_bring_its_old_weights_back(run, tmp_path):
    zoo, old = tmp_path / "zoo", figures("0" * 64)
    registry.publish(run.path, "tiny", zoo=zoo)
    enter = get_context("fork").Process(target=registry.write_result, args=("tiny", "pgd-20", old, zoo))
    with only_changer(zoo / "model_info"):
        enter.start()
        time.sleep(0.3)
        assert registry.read_card("tiny", zoo)["results"] == {}, "it waits"
    enter.join(60)
    assert "pgd-20" in registry.read_card("tiny", zoo)["results"]
    registry.publish(run.path, "tiny", zoo=zoo, half=True, overwrite=True)
    assert [file.name for file in (zoo / "weights").iterdir()] == [registry.read_card("tiny", zoo)["weights"]["file"]]


def test_a_change_waits_for_another_but_not_for_ever_and_a_killed_ones_lock_is_free(tmp_path, monkeypatch):
    file = tmp_path / "card.json"
    monkeypatch.setattr(files, "CHANGES", 0.1)
    ended = pytest.raises(InputError, match=r"changing .*card\.json.* end it and try again")
    with only_changer(file), ended, only_changer(file):
        pass

    def die():
        with only_changer(file):
            os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert hidden(tmp_path) == [".card.json.lock"]
    with only_changer(file):
        pass
    assert not hidden(tmp_path)


def command(name, run, folder):
    """(the application, its arguments, a file it writes): commands that write, each into `folder`."""
    apps = {"leaderboard": leaderboard.leaderboard, "pgd": pgd.main, "label-issues": label_issues}
    own = typer.Typer()
    if name in apps:
        own.command()(apps[name])
    images = folder.parent / "images.npz"
    np.savez(images, x=np.zeros((4, 8, 8, 1), np.uint8))
    corrections = folder.parent / "c.csv"
    data = run.recipe.data
    with np.load(data.removeprefix("npz:")) as arrays:
        given = int(arrays["y_train"][0])
    corrections.write_text(f"index,given,label\n0,{given},{(given + 1) % 4}\n")
    return {
        "leaderboard": (own, ["--html", folder / "board.html"], "board.html"),
        "pgd": (own, ["--model", run.path, "--out", folder, "--json", folder / "f.json"], "f.json"),
        "label-issues": (own, ["--run", run.path, "--out", folder], "label_issues.png"),
        "annotate": (
            app,
            ["annotate", "--model", run.path, "--images", f"npz:{images}", "--out", folder / "a.csv"],
            "a.",
        ),
        "apply-corrections": (
            app,
            ["apply-corrections", corrections, "--data", data, "--out", folder / "new.npz"],
            "new.npz",
        ),
        "publish": (app, ["publish", run.path, "tiny", "--zoo", folder], ".safetensors"),
        "publish card": (app, ["publish", run.path, "tiny", "--zoo", folder], "tiny.json"),
    }[name]


@pytest.mark.parametrize(
    "name", ["leaderboard", "pgd", "label-issues", "annotate", "apply-corrections", "publish", "publish card"]
)
def test_a_command_removes_what_it_left_when_it_was_killed(name, run, tmp_path):
    folder = tmp_path / "out"
    called, arguments, file = command(name, run, folder)
    arguments = [str(argument) for argument in arguments]
    killed_in_writing(file, lambda: CliRunner().invoke(called, arguments))
    assert any(".tmp" in left for left in hidden(folder)), "it left something"
    again = CliRunner().invoke(called, arguments)
    assert again.exit_code == 0, again.output
    assert not hidden(folder)


def test_publishing_again_removes_the_weights_that_a_killed_one_left(run, tmp_path):
    """Of other weights, too: their file has another name."""
    zoo = tmp_path / "zoo"
    registry.publish(run.path, "tiny_2", zoo=zoo)
    killed_in_writing("tiny.json", lambda: registry.publish(run.path, "tiny", zoo=zoo, half=True))
    killed_in_writing(".safetensors", lambda: registry.publish(run.path, "tiny", zoo=zoo, half=True))
    registry.publish(run.path, "tiny", zoo=zoo)
    named = {registry.read_card(name, zoo)["weights"]["file"] for name in ("tiny", "tiny_2")}
    assert {file.name for file in (zoo / "weights").iterdir()} == named
    assert not hidden(zoo)


def test_of_several_processes_the_first_alone_prints_and_writes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    said = CliRunner().invoke(app, ["label-issues", "--run", str(run.path), "--out", str(tmp_path / "issues")])
    assert (said.exit_code, said.stdout) == (0, "")
    assert not (tmp_path / "issues").exists()
    assert CliRunner().invoke(app, ["models"]).stdout == ""
    monkeypatch.setenv("RANK", "0")
    said = CliRunner().invoke(app, ["label-issues", "--run", str(run.path), "--out", str(tmp_path / "issues")])
    assert "labels are suspicious" in said.stdout
