"""Whatever a file or an option holds: it is read, or refused by an `InputError` that names it, without a traceback."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rb_noisy
from eval import common, leaderboard, pgd
from model_zoo import registry
from rb_noisy.cli import app
from rb_noisy.confidence import Calibrated
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.label_files import read_labels
from rb_noisy.label_issues import find_label_issues
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run, load_groups, read_results
from rb_noisy.training import train

ROOT = Path(rb_noisy.__file__).parent.parent
STUDY = registry.BUILT_IN / "studies/digits-figures/pgd-at+ls_symmetric0.4_seed0"
WRONG = (None, 5, "x", ["a"], {"a": 1}, float("nan"), 10**400)
UNREADABLE = {
    "deep": b"[" * 100_000,
    "rather deep": b"[" * 500 + b"]" * 500,
    "binary": b"\x93NUMPY\xff\xfe\x00",
    "half a character": b'{"name": "\\ud800"}',
    "digits": b'{"n": ' + b"1" * 5000 + b"}",
    "cut off": b'{"name": ',
    "empty": b"",
    "list": b"[1]",
    "number": b"7",
    "null": b"null",
}


def command(*arguments):
    """The output of a command that has to end without a traceback, and its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output, result.exit_code


def refusal_of(function):
    """The message of the `InputError` that it raises; None where it raises nothing."""
    try:
        function()
    except InputError as error:
        return str(error)
    return None


@pytest.fixture
def zoo(tmp_path):
    """A zoo of one shipped model; its card's file."""
    file = tmp_path / "zoo/model_info/digits/Linf/st_digits.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "zoo/weights").mkdir()
    card = registry.read_card("st_digits")
    file.write_text(json.dumps(card))
    shutil.copy(registry.weights_file(card), tmp_path / "zoo/weights")
    return file


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(STUDY, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_json_object_is_refused_by_every_reader(content, zoo, folder, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    zoo.write_bytes(content)
    root = zoo.parents[3]
    for words in (
        ("models", "--zoo", root),
        ("train", "--like", "st_digits", "--zoo", root, "--out", tmp_path / "new"),
        ("train", "--recipe", file, "--out", tmp_path / "new"),
        ("sweep", "--grid", file, "--dry-run", "--out", tmp_path / "new"),
    ):
        output, code = command(*words)
        assert code == 2, (words, output)
        assert output.startswith("error:")
        assert ".json" in output
    readers = [lambda: Calibrated.load(file, torch.nn.Flatten()), lambda: read_results(file)]
    for name in ("metrics.jsonl", "run.json"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).write_bytes(content or b"\n")
        readers.append(lambda name=name: Run.open(tmp_path / name))
    for reader in readers:
        with pytest.raises(InputError, match=r"\.json"):
            reader()
    assert not (tmp_path / "new").exists()


def uses(root):
    """All that lists, ranks, shows and loads the models of a zoo."""
    cards = registry.read_cards(root)
    assert command("models", "--zoo", root)[1] == 0
    for card in cards:
        registry.noise_title(card["noise"])
        card["architecture"], card["eps"], tuple(card["class_names"]), card["training"].get("threads", [])
        for figures in card["results"].values():
            registry._keeps(card["results"], "autoattack", figures)
    leaderboard.leaderboard_rows(cards, [])
    rb_noisy.load_model("st_digits", zoo=root)
    Recipe.from_dict(cards[0]["recipe"])


FIELDS = [
    *[(name,) for name in registry.read_card("st_digits")],
    *[("weights", name) for name in ("file", "sha256", "bytes")],
    *[("recipe", name) for name in ("data", "eps", "milestones")],
    *[("model_options", name) for name in ("name", "num_classes", "in_chans", "mean", "std")],
    *[("results", "autoattack"), ("results", "autoattack", "n"), ("results", "autoattack", "natural")],
    ("results", "autoattack", "accuracy"),
    ("results", "pgd-20", "final_iterate"),
]


@pytest.mark.parametrize("place", FIELDS, ids=".".join)
def test_a_card_with_any_field_missing_or_wrong_is_refused_by_its_name(place, zoo):
    whole, root, refused = zoo.read_text(), zoo.parents[3], 0
    for value in ("missing", *WRONG):
        card = json.loads(whole)
        *outer, last = place
        holder = card
        for name in outer:
            holder = holder[name]
        if value == "missing":
            holder.pop(last, None)
        else:
            holder[last] = value
        zoo.write_text(json.dumps(card))
        if (refusal := refusal_of(lambda: uses(root))) is not None:
            refused += 1
            assert last in refusal or "st_digits" in refusal
    free = {"additional_data", "number_forward_passes", "unreliable", "mean", "std"}  # or may well be left out
    assert refused or last in free


def test_all_shipped_cards_and_runs_are_read():
    assert len(registry.read_cards()) == len(registry.card_files()) > 20
    found = list(registry.BUILT_IN.glob("studies/**/run.json"))
    assert found
    for file in found:
        Run.open(file.parent)


@pytest.mark.parametrize("name", ["recipe", "model_options", "class_names"])
def test_a_run_folder_with_any_field_missing_or_wrong_is_refused(name, folder):
    whole = json.loads((folder / "run.json").read_text())
    for value in ("missing", *WRONG):
        changed = {key: v for key, v in whole.items() if key != name} | ({} if value == "missing" else {name: value})
        (folder / "run.json").write_text(json.dumps(changed))
        with pytest.raises(InputError):
            Run.open(folder).load()


@pytest.mark.parametrize(
    "line",
    [
        {"test_pgd_acc": "0.5"},
        {"test_pgd_acc": None},
        {"selection_pgd_acc": float("nan")},
        {"epoch": 7},
        {"seconds": None},
        {"train_loss": "low"},
        {"threads": 5},
    ],
)
def test_metrics_of_another_form_are_refused(line, folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for changed in ([json.dumps(json.loads(lines[0]) | line), *lines[1:]], [*lines, lines[-1]], ["{}"]):
        (folder / "metrics.jsonl").write_text("\n".join(changed))
        with pytest.raises(InputError, match=r"metrics"):
            Run.open(folder)


def test_histories_of_another_form_are_refused(folder):
    file = folder / "history/0003.safetensors"
    whole = load_file(file)
    for changed in (
        {name: tensor[:-1] for name, tensor in whole.items()},
        {name: tensor for name, tensor in whole.items() if name != "kappa"},
        whole | {"kappa": whole["kappa"].float()},
        whole | {"loss": whole["loss"][:, None]},
        whole | {"loss": whole["loss"][:3]},
        whole | {"prediction": torch.full_like(whole["prediction"], 10)},
        {},
    ):
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
        with pytest.raises(InputError, match="0003"):
            Run.open(folder).history()
        with pytest.raises(InputError, match="0003"):
            find_label_issues(folder)


def test_states_of_another_run_are_refused(tiny_recipe, tmp_path):
    recipe = tiny_recipe(epochs=3, method="pgd-at+wa")
    path = tmp_path / "run"
    train(recipe, path, max_minutes=1e-9, checkpoint_minutes=1e-9)
    file = path / "state.safetensors"
    groups, header = load_groups(file, ("best",))
    whole = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    weight = next(name for name in whole if name.startswith("model.") and whole[name].shape[:1] > (1,))
    momentum = next(name for name in whole if name.startswith("optimizer.") and whole[name].shape[:1] > (1,))
    assert int(header["samples_done"]) > 0
    changes = [
        {weight: whole[weight][:1]},
        {weight: None},
        {"model.other": torch.zeros(1)},
        {momentum: whole[momentum][:1]},
        {"optimizer.999": whole[momentum].clone()},
        {"optimizer.x": whole[momentum].clone()},
        {"record.votes": torch.zeros(3, 4)},
        {"record.votes": None},
        {next(name for name in whole if name.startswith("averager.")): None},
    ]
    changes += [{"process.losses": None}, {"process.draws": torch.zeros(1, 5, dtype=torch.uint8)}]
    changes += [{next(name for name in whole if "running_mean" in name and "process" in name): torch.zeros(1, 1)}]
    for change in changes:
        save_file({name: v for name, v in (whole | change).items() if v is not None}, file, header)
        with pytest.raises(InputError):
            train(recipe, path, resume=True)
    for change in (
        {"epochs_done": "x"},
        {"samples_done": "-1"},
        {"samples_done": "100000"},
        {"best": "nan"},
        {"seconds": "x"},
        {"threads": "many"},
        {"plan": "["},
        {"plan": '{"conv": ["forward"]}'},
        {"plan": "[1]"},
    ):
        save_file(whole, file, header | change)
        with pytest.raises(InputError):
            train(recipe, path, resume=True, threads=1)
    save_file(whole, file, header)
    assert train(recipe, path, resume=True).finished


@pytest.mark.parametrize(
    "settings",
    [
        ["noise_options=5", "noise_options.a=3"],
        ["noise_options=5"],
        ["noise=human", "noise_options.file=5"],
        ['milestones=["a"]'],
        ["method=pgd-at+kd", "target_options.robust=5"],
        ["train_size=1" + "0" * 400],
        ["lr=" + "[" * 100_000],
        ["epochs=" + "1" * 5000],
        ['backbone="\\ud800"'],
        ["backbone_options.num_classes=3"],
        ['backbone_options={"name": "resnet18"}'],
    ],
    ids=lambda settings: settings[0][:20],
)
def test_settings_of_another_kind_are_one_line(settings, tmp_path):
    words = [word for setting in settings for word in ("--set", setting)]
    output, code = command("train", "--data", "digits", *words, "--out", tmp_path / "new")
    assert code == 2, output
    assert output.startswith("error:")
    assert not (tmp_path / "new").exists()
    command("sweep", "--data", "digits", *words, "--dry-run", "--out", tmp_path / "new")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_npy_is_read_or_refused(tmp_path):
    file = tmp_path / "labels.npy"
    np.save(file, np.zeros(3, np.int64))
    content = file.read_bytes()
    for at in range(len(content)):
        for byte in (content[at] ^ 1, content[at] ^ 64, 0, 255, ord("("), ord("\\")):
            file.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            refusal = refusal_of(lambda: read_labels(torch.zeros(3, dtype=torch.int64), 10, file=file))
            assert refusal is None or "labels.npy" in refusal


def test_damaged_verdicts_are_named(tmp_path):
    fields = dict.fromkeys(field.name for field in dataclasses.fields(common.Subject))
    images = {"x": torch.rand(4, 1, 8, 8), "y": torch.zeros(4, dtype=torch.int64)}
    subject = common.Subject(**fields | images | {"label": "m", "dataset": "digits", "weights_sha256": "0", "eps": 0.1})
    file = subject.folder(tmp_path) / "autoattack.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, robust=np.zeros(4, bool))
    content = file.read_bytes()
    for damaged in (content[:-60], content[:70], b"no", b"", bytes(60)):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"autoattack\.npz is damaged"):
            common.saved_verdicts(tmp_path, "autoattack", subject)


def test_class_names_that_are_no_text_are_refused(tmp_path, tiny_data):
    arrays = dict(np.load(tiny_data))
    np.savez(tmp_path / "bytes.npz", **arrays, class_names=np.array([b"a", b"\xff", b"c", b"d"]))
    np.savez(tmp_path / "half.npz", **arrays, class_names=np.array(["a", "\ud800", "c", "d"]))
    for name in ("bytes", "half"):
        with pytest.raises(InputError, match="no UTF-8 text"):
            load_data(f"npz:{tmp_path / name}.npz")
    from PIL import Image

    for split in ("train", "test"):
        for name in (b"a", b"\xff"):
            place = os.path.join(os.fsencode(tmp_path), b"images", split.encode(), name)
            os.makedirs(place)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(os.fsdecode(os.path.join(place, b"0.png")))
    with pytest.raises(InputError, match="no UTF-8 text"):
        load_data(f"imagefolder:{tmp_path / 'images'}")


def test_a_device_without_memory_is_refused():
    app = typer.Typer()
    app.command()(pgd.main)
    result = CliRunner().invoke(app, ["--model", "st_digits", "--n", "2", "--device", "meta"])
    assert result.exit_code == 2, result.output
    assert "--device meta cannot be used" in result.output


def _hear_ctrl_c() -> None:
    """In the background of a shell these tests ignore it, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "words", [["-m", "rb_noisy", "models"], ["-m", "eval.leaderboard"], ["-m", "eval"], ["rb-noisy", "models"]]
)
@pytest.mark.parametrize("package", ["torch", "typer"])
def test_ctrl_c_while_importing_is_one_line(words, package, tmp_path):
    (tmp_path / f"{package}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    (tmp_path / "rb-noisy").write_text("from rb_noisy.cli import app\napp()")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "preexec_fn": _hear_ctrl_c}
    done = subprocess.run([sys.executable, *words], env=environment, **options)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted; nothing was begun\n"


def test_a_program_that_imports_us_keeps_its_own_ctrl_c():
    program = "import signal, rb_noisy, eval; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    options = {"capture_output": True, "text": True, "cwd": ROOT, "preexec_fn": _hear_ctrl_c}
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.stdout.strip() == "True", done.stderr
