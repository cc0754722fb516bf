import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rb_noisy.cli import app
from rb_noisy.runs import Run
from rb_noisy.training import train

ROOT = Path(__file__).parents[1]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_train_publish_and_list_from_the_command_line(tiny_data, tmp_path, monkeypatch):
    run, zoo = tmp_path / "run", tmp_path / "zoo"
    settings = ["backbone=resnet8_narrow", "steps=2", "track=20", "track_steps=2", "batch_size=32", "augment=false"]
    settings += ["normalize=false", "target_options.r=0.4"]
    options = [part for setting in settings for part in ("--set", setting)]
    noise = ["--noise", "pair", "--noise-rate", 0.2]
    target = ["--set", "target_options.momentum=0.5"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("rb_noisy.placement.usable_cores", lambda: [0, 1])
    monkeypatch.setattr("rb_noisy.placement.fastest", lambda seconds: 1)
    trained = call(
        "train", "--data", f"npz:{tiny_data}", "--method", "trades+sglr", *noise, "--epochs", 2, "--out", run, *options
    )
    assert trained.exit_code == 0, trained.output
    assert "epoch 2/2" in trained.output
    recipe = Run.open(run).recipe
    assert (recipe.method, recipe.noise, recipe.noise_rate) == ("trades+sglr", "pair", 0.2)
    assert (recipe.steps, recipe.target_options["r"], recipe.backbone) == (2, 0.4, "resnet8_narrow")
    assert call("publish", run, "mine", "--zoo", zoo).exit_code == 0
    assert "pair 0.2" in call("models", "--zoo", zoo).output
    assert "mine" not in call("models", "--zoo", zoo, "--noise", "symmetric").output
    monkeypatch.setattr("rb_noisy.placement.fastest", lambda seconds: 2)  # on another day, less busy
    again = call("train", "--like", "mine", "--zoo", zoo, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert Run.open(tmp_path / "again").recipe == recipe
    weights = [(folder / "final.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
    assert weights[0] == weights[1], "a card's recipe makes its weights again"
    longer = call("train", "--like", "mine", "--zoo", zoo, "--out", tmp_path / "b", "--epochs", 4, *target)
    assert longer.exit_code == 0, longer.output
    recipe = Run.open(tmp_path / "b").recipe
    assert recipe.milestones == (2, 3), "what the length of the run decides moves with it"
    assert recipe.target_options == {"r": 0.4, "momentum": 0.5, "start_epoch": 4 * 89 // 200}
    refused = call("publish", run, "other", "--zoo", "hf://me/zoo")
    assert refused.exit_code == 2
    assert "publish into a folder" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digitz"], "did you mean digits"),
        (["--data", "digits", "--method", "pgdat"], "did you mean pgd-at"),
        (["--data", "digits", "--noise", "symetric"], "did you mean symmetric"),
        (["--data", "digits", "--noise", "symmetric", "--noise-rate", "1.4"], "1.4"),
        (["--data", "digits", "--set", "lr"], "is not FIELD=VALUE"),
        (["--data", "digits", "--set", "learning_rate=1"], "unknown recipe field"),
        (["--data", "digits", "--set", "epochs=many"], "epochs"),
        (["--data", "digits", "--backbone", "resnet18_cifer"], "did you mean resnet18_cifar"),
        (["--recipe", "nowhere.json"], "is no file"),
        (["--like", "no_such_model", "--recipe", "x.json"], "give one of them"),
        ([], "names no data set"),
        (["--resume"], "holds no run to resume"),
        (["--data", "digits", "--method", "pgd-at+sglr", "--set", "target_options.q=1"], "'q'; it takes r,"),
        (["--data", "digits", "--seed", "-1"], "seed is -1"),
        (["--data", "digits", "--backbone", "small_cnn"], "at least 16x16"),
        (["--data", "digits", "--backbone", "vit_tiny_patch16_224"], "cannot take the 1x8x8 images of digits"),
    ],
)
def test_bad_requests_end_in_one_clear_line_and_leave_nothing(arguments, words, tmp_path):
    result = call("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_ends_in_one_clear_line_and_code_3(tiny_recipe, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_recipe(lr=1e30, epochs=3).to_dict()))
    result = call("train", "--recipe", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 3, result.output
    assert "diverged: the loss is" in result.output


def test_the_installed_console_command_answers():
    script = shutil.which("rb-noisy", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed here: pip install '.[test]'")
    done = subprocess.run([script, "models", "--dataset", "digits"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "sglr_digits" in done.stdout


def test_a_disk_that_is_full_is_one_line_that_names_the_file(tiny_recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(epochs=1).to_dict()))
    program = (
        "import resource, sys; from rb_noisy.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "sys.argv = ['rb-noisy', 'train', '--recipe', 'recipe.json', '--out', 'run']; app()"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "safetensors cannot be written" in done.stderr
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_whoever_may_read_the_folder_may_read_the_weights(tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=1), tmp_path / "run")
    modes = {file.stat().st_mode for file in run.path.iterdir() if file.is_file()}
    assert len(modes) == 1


def test_importing_the_package_is_cheap():
    """No torchvision, timm, RobustBench or plotting until they are needed: under 1.5 s more than torch."""
    program = (
        "import sys, torch; before = set(sys.modules); import rb_noisy; rb_noisy.Recipe; rb_noisy.corrupt\n"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rb_noisy" in done.stdout.split()
    heavy = {"torchvision", "timm", "robustbench", "matplotlib", "sklearn", "accelerate", "pandas"}
    assert not heavy & set(done.stdout.split())


def test_a_run_that_is_already_finished_needs_no_time(tiny_recipe, tmp_path):
    train(tiny_recipe(epochs=1), tmp_path / "run")
    started = time.perf_counter()
    result = call("train", "--out", tmp_path / "run", "--resume")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" not in result.output
    assert time.perf_counter() - started < 20
