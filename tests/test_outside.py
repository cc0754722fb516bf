"""What lies in the current folder, a zoo or a folder of images neither runs, nor hangs, nor goes missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import rb_noisy
from rb_noisy.placement import module_command

ROOT = Path(rb_noisy.__file__).parents[1]
TINY = {"data": "digits", "backbone": "preact_resnet8_narrow", "method": "st", "epochs": 1, "batch_size": 512}
TINY |= {"track": 20, "track_steps": 1}


def rb_noisy_in(folder, *arguments):
    """The console command, in a folder where a file of each name that our processes import would leave a mark."""
    folder.mkdir()
    for name in ("torch", "eval", "numpy", "rb_noisy", "runpy"):
        (folder / f"{name}.py").write_text(f"open('ran-{name}', 'w')\nraise SystemExit('{name} of the folder ran')")
    script = folder.parent / "bin" / "rb-noisy"
    script.parent.mkdir()
    script.write_text("from rb_noisy.cli import app\napp()")
    command = [sys.executable, "-W", "ignore", script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, sorted(file.name for file in folder.glob("ran-*"))


def test_processes_of_a_training_run_nothing_of_the_current_folder(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(TINY))
    arguments = ["train", "--recipe", recipe, "--out", tmp_path / "run", "--processes", 2]
    code, said, ran = rb_noisy_in(tmp_path / "here", *arguments)
    assert ran == []
    assert code == 0, said
    assert (tmp_path / "run/final.safetensors").is_file()


def test_a_sweep_and_its_evaluations_run_nothing_of_the_current_folder(tmp_path):
    jobs = tmp_path / "list.json"
    jobs.write_text(json.dumps([{"name": "a", **TINY}, {"evaluate": "pgd", "model": "a", "n": 5}]))
    code, said, ran = rb_noisy_in(tmp_path / "here", "sweep", "--grid", jobs, "--out", tmp_path / "runs")
    assert ran == []
    assert code == 0, said
    assert "pgd-20" in (tmp_path / "runs/a/results-final.json").read_text()


def test_processes_find_the_checkout_that_their_command_was_started_in(tmp_path):
    """`python -m` has the current folder on its path, and means to run what is there."""
    (tmp_path / "package").mkdir()
    show = "import sys\nprint(sys.modules['__main__'].__spec__.name, sys.argv[1:], sys.path[0], flush=True)\n"
    again = "import subprocess; from rb_noisy.placement import module_command\n"
    again += "if not sys.argv[1:]: subprocess.run(module_command('package.part', ['two words']), check=True)\n"
    (tmp_path / "package/part.py").write_text(show + again)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "package.part"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    first, second = (f"package.part {arguments} {tmp_path}" for arguments in ([], ["two words"]))
    assert done.stdout.splitlines() == [first, second], done.stderr


def test_a_process_fails_as_its_module_does(tmp_path, monkeypatch):
    (tmp_path / "seven.py").write_text("raise SystemExit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    assert subprocess.run(module_command("seven", [])).returncode == 7
