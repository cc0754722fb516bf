"""Real kills, and failures that come late: nothing runs on, nothing hangs, nothing blocks the next try."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rb_noisy import training
from rb_noisy.cli import app
from rb_noisy.errors import InputError
from rb_noisy.files import only_writer
from rb_noisy.runs import Run
from rb_noisy.training import TrainingDiverged, train

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
ROOT = str(Path(__file__).parents[1])
PYTHON = [sys.executable, "-W", "ignore"]
TINY = {"data": "digits", "backbone": "preact_resnet8_narrow", "method": "st", "batch_size": 512, "track": 20}
TINY |= {"track_steps": 1}


def start(command, *, environment=None, **streams):
    variables = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen([str(part) for part in command], env=variables, text=True, **streams)


def wait_until(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def children(parent):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in map(str.split, listed.splitlines()) if int(of) == parent]


def is_running(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())  # a zombie has an empty one
    except OSError:
        return False


def test_of_two_trainings_at_once_the_second_leaves_nothing(tiny_recipe, tmp_path, monkeypatch):
    """The first one holds the folder and has not written yet: the second must not leave its recipe there."""
    monkeypatch.setattr(training, "SECONDS_TO_END", 0.2, raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    with only_writer(folder), pytest.raises(InputError, match="another process writes to"):
        train(tiny_recipe(seed=1), folder)
    assert list(folder.iterdir()) == []
    assert train(tiny_recipe(epochs=1), folder).finished


def test_a_training_waits_for_one_that_is_just_ending(tiny_recipe, tmp_path):
    hold = "import sys, time; from rb_noisy.files import only_writer\nwith only_writer(sys.argv[1]): print(flush=True)"
    folder = tmp_path / "run"
    folder.mkdir()
    holder = start([*PYTHON, "-c", f"{hold}; time.sleep(2)", folder], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    assert train(tiny_recipe(epochs=1), folder).finished
    holder.communicate()


@pytest.mark.parametrize("value", [1, 10**30])
def test_a_batch_size_that_makes_no_batch_is_refused_before_anything_is_written(value, tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="batch"):
        train(tiny_recipe(batch_size=value), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_before_anything_was_trained_does_not_block_the_corrected_recipe(there, tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(TrainingDiverged):
        train(tiny_recipe(lr=1e30), folder)
    assert ([file.name for file in folder.iterdir()] == ["notes.txt"]) if there else (not folder.exists())

    def fail(*step):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny_recipe(), folder, on_batch=fail)
    assert train(tiny_recipe(epochs=1), folder).finished


def test_what_fails_later_keeps_the_run(tiny_recipe, tmp_path):
    def fail(epoch, done, total):
        if epoch == 1:
            raise OSError("a full disk")

    with pytest.raises(OSError, match="full"):
        train(tiny_recipe(), tmp_path / "run", on_batch=fail)
    assert len(Run.open(tmp_path / "run").metrics) == 1
    assert train(tiny_recipe(), tmp_path / "run", resume=True).finished


def test_a_killed_command_takes_stopped_children_and_theirs_with_it(tmp_path):
    """As a sweep has an evaluation, which has processes that share it."""
    pids = tmp_path / "pids"
    note = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); "
    (tmp_path / "sleeper.py").write_text(note + "time.sleep(100)")
    middle = note + "from rb_noisy.placement import relaunch; relaunch(2, 'sleeper', [])"
    top = "import subprocess, sys; from rb_noisy.placement import placed, usable_cores; "
    top += f"subprocess.run(placed([sys.executable, '-c', {middle!r}], usable_cores()))"
    parent = start([*PYTHON, "-c", top], environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3, "all have begun")
    running = [int(pid) for pid in pids.read_text().split()]
    try:
        for pid in running:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(is_running, running)), "all have ended", 20)
    finally:
        for pid in filter(is_running, running):
            os.kill(pid, signal.SIGKILL)


def test_where_the_system_ends_no_children_they_see_to_it(tmp_path):
    pid = tmp_path / "pid"
    child = f"from rb_noisy.console import user_errors\nwith user_errors():\n  import os, time; open({str(pid)!r}, 'w')"
    child += ".write(str(os.getpid())); time.sleep(100)"
    top = "import os, subprocess, sys; os.environ['RB_NOISY_PARENT'] = str(os.getpid()); "
    parent = start([*PYTHON, "-c", f"{top} subprocess.run([sys.executable, '-c', {child!r}])"])
    wait_until(lambda: pid.exists() and pid.read_text(), "it has begun")
    running = int(pid.read_text())
    try:
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_running(running), "it has ended", 20)
    finally:
        if is_running(running):
            os.kill(running, signal.SIGKILL)


def test_a_killed_sweep_leaves_nothing_running_and_its_rerun_reports_no_failure(tmp_path):
    """Also where a training is stopped: it would hold its folder against the rerun."""
    entries = [{"name": "r", **TINY, "epochs": 3}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    arguments = ["sweep", "--out", tmp_path / "runs", "--grid", tmp_path / "list.json"]
    sweep = start([*PYTHON, "-m", "rb_noisy", *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (tmp_path / "runs" / "r" / "run.json").exists(), "it trains")
        (pid,) = children(sweep.pid)
        os.kill(pid, signal.SIGSTOP)
    finally:
        sweep.kill()
        sweep.wait()
    try:
        again = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    assert again.exit_code == 0, again.output
    assert Run.open(tmp_path / "runs" / "r").finished


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_peer_was_killed_says_so_and_ends(victim, tiny_recipe, tmp_path):
    """Started by hand, so that no launcher ends it."""
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(epochs=500).to_dict()))
    command = [*PYTHON, "-m", "rb_noisy", "train", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "run"]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    ranks = []
    try:
        for rank in range(2):
            own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            ranks.append(start(command, environment=own, **streams))
        wait_until((tmp_path / "run" / "state.safetensors").exists, "they train")
        ranks[victim].kill()
        said = ranks[1 - victim].communicate(timeout=100)[1]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1 - victim].returncode == 1
    assert f"error: process {2 - victim} of 2 has lost another one" in said
    assert "Traceback" not in said
    assert Run.open(tmp_path / "run").metrics, "what was saved is kept"


def test_a_rank_whose_peer_never_came_does_not_wait_for_days():
    program = "import datetime, rb_noisy.processes as p; p.MEETING = datetime.timedelta(seconds=2)\n"
    program += "from rb_noisy.console import user_errors\nwith user_errors(): p.Processes.launched()"
    shared = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone = start(
        [*PYTHON, "-c", program], environment=shared | {"MASTER_PORT": str(free_port())}, stderr=subprocess.PIPE
    )
    try:
        said = alone.communicate(timeout=60)[1]
    finally:
        alone.kill()
    assert alone.returncode != 0
    assert "error: process 1 of 2 has lost another one, which ended or never began (timed out)" in said


def test_they_wait_for_each_other_longer_than_they_wait_to_meet():
    program = "import os, time, datetime, rb_noisy.processes as p; p.MEETING = datetime.timedelta(seconds=4)\n"
    program += "together = p.Processes.launched(); time.sleep(8 * together.index); together.wait()"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start([*PYTHON, "-c", program], environment=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_of_a_commands_processes_is_killed_the_others_end_and_it_says_which(victim, tmp_path):
    note = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))"
    (tmp_path / "sleeper.py").write_text(note + "; time.sleep(100)")
    program = "import sys; from rb_noisy.placement import relaunch; sys.exit(relaunch(2, 'sleeper', []))"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    parent = start([*PYTHON, "-c", program], environment=environment, stderr=subprocess.PIPE)
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), "both have begun")
    os.kill(int(files[victim].read_text()), signal.SIGKILL)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 128 + signal.SIGKILL
    assert f"error: process {victim + 1} of 2 was killed by signal 9; the others were ended" in said
    assert not is_running(int(files[1 - victim].read_text()))
