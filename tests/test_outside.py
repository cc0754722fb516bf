"""What lies in the current folder, a zoo or a folder of images neither runs, nor hangs, nor goes missing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import rb_noisy
from eval import label_issues, pgd
from model_zoo import registry
from model_zoo.registry import list_models
from rb_noisy.annotation import load_images
from rb_noisy.cli import app
from rb_noisy.data import load_data
from rb_noisy.errors import DataWarning, InputError
from rb_noisy.image_files import image_files, read_image
from rb_noisy.label_files import read_labels, split_label_file
from rb_noisy.placement import module_command
from rb_noisy.reading import read_bytes

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


def grey(file, value=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(file, **options)


@pytest.fixture
def folders(tmp_path):
    """An image folder: two classes of one training and one test image each."""
    for split in ("train", "test"):
        for value, name in enumerate(("ant", "bee")):
            grey(tmp_path / "pets" / split / name / "0.png", 50 * value)
    return tmp_path / "pets"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_plain_tiff_is_turned_as_a_png_of_the_same_pixels_is(mode, orientation, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6), np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x112] = orientation
    for kind in ("png", "tif"):
        image.save(tmp_path / f"0.{kind}", exif=exif)
    assert np.array_equal(read_image(tmp_path / "0.tif"), read_image(tmp_path / "0.png"))


@pytest.mark.parametrize("ending", ["gif", "jfif", "jp2", "tga", "JPE", "pcx"])
def test_whatever_pillow_opens_is_an_image(ending, folders):
    before = len(load_data(f"imagefolder:{folders}").x_train)
    grey(folders / "train/ant" / f"1.{ending}", 90)
    data = load_data(f"imagefolder:{folders}")
    assert len(data.x_train) == before + 1
    assert data.y_train.tolist() == [0, 0, 1]


def test_what_is_left_out_of_an_image_folder_is_counted_and_named(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (".hidden.txt", "Thumbs.db", "@eaDir/0.heic"):
            (folders / "train/ant" / name).parent.mkdir(exist_ok=True)
            (folders / "train/ant" / name).write_text("")
        load_data(f"imagefolder:{folders}")
    for name in ("1.heic", "2.HEIC", "more/3.eps"):
        (folders / "train/bee" / name).parent.mkdir(exist_ok=True)
        (folders / "train/bee" / name).write_text("")
    grey(folders / "test/stray.png")
    with pytest.warns(DataWarning, match=r"left out.*: 1 \.eps, 2 \.heic, 1 \.png; the first is .*train/bee/1\.heic"):
        data = load_data(f"imagefolder:{folders}")
    assert (len(data.x_train), len(data.x_test)) == (2, 2)
    with pytest.warns(DataWarning, match=r"2 \.heic"):
        assert load_images(str(folders / "train"))[1] == ("ant/0.png", "bee/0.png")


def test_links_to_folders_are_followed_once(folders, tmp_path):
    grey(tmp_path / "elsewhere/deep/1.png", 9)
    ant = folders / "train/ant"
    grey(ant / "own/2.png", 9)
    for link, target in (
        ("a", tmp_path / "elsewhere"),
        ("again", tmp_path / "elsewhere/deep"),
        ("an-own", ant / "own"),
        ("up", folders / "train"),
        ("round", ant),
    ):
        (ant / link).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(ant)
    assert [file.relative_to(ant).as_posix() for file in image_files(ant)] == ["0.png", "a/deep/1.png", "own/2.png"]
    assert load_data(f"imagefolder:{folders}").y_train.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_an_image_of_several_frames_is_refused_by_name(ending, folders):
    frames = [Image.new("L", (4, 4), value) for value in (10, 90, 200)]
    frames[0].save(folders / "train/ant" / f"1.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=rf"train/ant/1\.{ending} has 3 frames"):
        load_data(f"imagefolder:{folders}")


def test_a_photograph_with_its_preview_is_one_image(folders):
    pictures = [Image.new("L", (4, 4), value) for value in (10, 90)]
    pictures[0].save(folders / "train/ant/1.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    assert len(load_data(f"imagefolder:{folders}").x_train) == 3


LOST = ("~nosuchuser/x", "~nosuchuser/x.npz", "a" * 300 + ".npz", "b/" * 3000 + "x.npz")


@pytest.mark.parametrize("place", LOST)
def test_a_path_that_cannot_be_is_bad_input(place):
    for use in (
        lambda: load_data(f"npz:{place}"),
        lambda: load_data(f"imagefolder:{place}"),
        lambda: load_data("mnist", place, download=False),
        lambda: read_labels(torch.zeros(2), 2, file=place),
        lambda: load_images(place),
        lambda: load_images(f"npz:{place}"),
        lambda: load_images(f"imagefolder:{place}"),
        lambda: split_label_file(f"{place}:worse"),
    ):
        with pytest.raises(InputError, match=r"names no home folder|is too long") as refused:
            use()
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("place", ["x" * 5000, "deep/" * 1000, "two words " * 500])
@pytest.mark.parametrize("option", ["--recipe", "--noise", "--data"])
def test_an_error_line_has_a_length(option, place, tmp_path):
    result = CliRunner().invoke(app, ["train", "--data", "digits", "--out", str(tmp_path / "run"), option, place])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert 20 < len(result.output) <= 3100, "it is shortened"
    assert "…" in result.output


@pytest.fixture
def in_time():
    """A failure of whatever takes half a minute, instead of a suite that hangs."""

    def stop(*_):
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_named_pipe_is_not_waited_for(in_time, tmp_path):
    zoo = tmp_path / "zoo"
    (zoo / "model_info/digits/Linf").mkdir(parents=True)
    card = next(iter(registry.card_files().values()))
    (zoo / "model_info/digits/Linf" / card.name).write_text(card.read_text())
    os.mkfifo(zoo / "model_info/digits/Linf/x.json")
    assert list_models(zoo=zoo) == [card.stem]
    for name in ("recipe.json", "labels.txt", "labels.npy"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        read_bytes(tmp_path / "recipe.json", "the recipe", "check it")
    for name in ("labels.txt", "labels.npy"):
        with pytest.raises(InputError, match="no regular file"):
            read_labels(torch.zeros(2), 2, file=tmp_path / name)


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ("digits", "digits"),
        ("npz:/data/mine.npz", "mine"),
        ("npz:w5/digits.npz", "own-digits"),
        ("imagefolder:w5/CIFAR10", "own-cifar10"),
        ("imagefolder:imagenet", "own-imagenet"),
        ("npz:cifar10_jpeg.npz", "cifar10_jpeg"),
        ("imagefolder:pets/v1.2", "v1.2"),
        ("imagefolder:pets/v1.5", "v1.5"),
    ],
)
def test_own_data_have_a_label_of_their_own(data, label):
    assert registry.dataset_label(data) == label


def test_runs_on_files_of_one_name_are_not_averaged(tiny_recipe, tmp_path):
    settings = set()
    for folder in ("cats", "dogs"):
        recipe = tiny_recipe(data=f"npz:{folder}/train.npz")
        noise = {"noise": "human", "noise_rate": None, "noise_options": {"file": f"{folder}/labels.npy"}}
        for changed in (recipe, dataclasses.replace(tiny_recipe(), **noise)):
            settings.add(label_issues._setting(changed, "history", 2))
    assert len(settings) == 4


def evaluated(model, data, seed, out):
    """The verdict folder of PGD on four images."""
    single = typer.Typer()
    single.command()(pgd.main)
    before = set(out.glob("*"))
    words = ["--model", model, "--n", 4, "--steps", 1, "--seed", seed, "--out", out, "--eps", 0.1, "--device", "cpu"]
    result = CliRunner().invoke(single, [*map(str, words), *(["--dataset", f"npz:{data}"] if data else [])])
    assert result.exit_code == 0, result.output
    return {folder.name for folder in set(out.glob("*")) - before}


def test_other_images_have_another_folder_of_verdicts(tmp_path):
    digits = load_data("digits")
    for folder, part in (("a", slice(0, 40)), ("b", slice(40, 80))):
        (tmp_path / folder).mkdir()
        x = (digits.x_test[part, 0] * 255).round().byte().numpy()
        np.savez(
            tmp_path / folder / "mine.npz", x_test=x, y_test=digits.y_test[part].numpy(), class_names=np.arange(10)
        )
    out = tmp_path / "out"
    places = [
        evaluated("st_digits", tmp_path / name / "mine.npz", seed, out)
        for name, seed in zip("aab", (0, 1, 0), strict=True)
    ]
    assert [len(place) for place in places] == [1, 1, 1]
    assert evaluated("st_digits", tmp_path / "a/mine.npz", 0, out) == set(), "the same images, the same folder"
    [benchmark] = evaluated("st_digits", None, 0, out)
    assert benchmark.endswith("-digits-4-Linf-0.1"), "the first of a benchmark are known by their number"
