"""Users' own data as they lie on disks: hidden files, pipes, turned and transparent images, parts that are missing."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import rb_noisy
from eval import pgd
from rb_noisy.annotation import load_images
from rb_noisy.cli import app as console
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.noise import corrupt
from rb_noisy.training_data import training_files

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, colour=(90, 90, 90), size=(6, 5), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / ".cache" / "pets"  # the folder itself may lie in a hidden one
    for split in ("train", "test"):
        for label, colour in (("cat", RED), ("dog", BLUE)):
            for number in range(2):
                picture(root / split / label / f"{number}.png", colour)
    return root


# --- image folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".trash", "@eaDir", "__MACOSX"])
def test_hidden_files_and_folders_are_no_data_wherever_they_lie(folder, hidden):
    for place in (folder / "train", folder / "train/cat", folder / "train/cat/more", folder / "test/dog"):
        (place / hidden / "0.png").mkdir(parents=True)  # Synology's: a folder that is called like the image
        picture(place / hidden / "deep" / "1.png", size=(9, 9))
    picture(folder / "train/cat/.1.png", size=(9, 9))
    data = load_data(f"imagefolder:{folder}")
    assert data.class_names == ("cat", "dog")
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 0, 1, 1], [0, 0, 1, 1])
    assert training_files(f"imagefolder:{folder}")[1] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert load_images(str(folder / "train"))[1] == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


def test_what_is_no_file_is_no_image_and_a_lost_one_is_named(folder):
    (folder / "train/cat/x.jpg").mkdir()
    os.mkfifo(folder / "train/cat/x.png")
    (folder / "train/cat/y.png").symlink_to(folder / "train/cat/x.png")
    script = f"import rb_noisy; print(rb_noisy.load_data('imagefolder:{folder}'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "4 train, 4 test" in done.stdout, done.stderr
    (folder / "train/cat/z.png").symlink_to(folder / "gone.png")
    with pytest.raises(InputError, match=r"train/cat/z\.png is damaged"):
        load_data(f"imagefolder:{folder}")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(folder, orientation):
    upright = np.zeros((6, 4, 3), np.uint8)
    upright[:3], upright[:, :2, 1] = 200, 100  # no two of the eight ways look the same
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a, 3),
    }
    for file in folder.rglob("*.png"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(turns[orientation](upright))).save(file, exif=exif)
    data = load_data(f"imagefolder:{folder}")
    assert (data.x_train[0] * 255).round().byte().permute(1, 2, 0).numpy().tolist() == upright.tolist()


def test_damaged_exif_data_are_no_damaged_image(folder):
    for file in folder.rglob("*.png"):
        file.unlink()
        picture(file.with_suffix(".jpg"), exif=b"Exif\0\0nonsense")
    assert load_data(f"imagefolder:{folder}").x_train.shape == (4, 3, 5, 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white_and_not_what_lies_beneath(folder, mode):
    for file in folder.rglob("*.png"):
        if mode == "RGBA":
            image = Image.new("RGBA", (6, 5), (255, 0, 0, 0))
            image.putpixel((0, 0), (0, 0, 255, 255))
            image.putpixel((1, 0), (0, 0, 0, 128))
            image.save(file)
        elif mode == "LA":
            Image.new("LA", (6, 5), (7, 0)).save(file)
        else:  # one colour or level stands for nothing
            Image.new(mode, (6, 5), RED if mode == "RGB" else 0).save(file, transparency=RED if mode == "RGB" else 0)
    x = load_data(f"imagefolder:{folder}").x_train
    assert x.shape[1] == (1 if mode == "L" else 3)
    assert (x[:, :, 1:] == 1).all()
    if mode == "RGBA":
        assert x[0, :, 0, 0].tolist() == [0, 0, 1]
        assert x[0, :, 0, 1].tolist() == pytest.approx([127 / 255] * 3, abs=1 / 255)


def test_a_class_may_lack_test_images(folder):
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    for _ in ("with its empty folder", "without"):
        data = load_data(f"imagefolder:{folder}")
        assert data.class_names == ("cat", "dog")
        assert data.y_test.tolist() == [1, 1]
        if (folder / "test/cat").is_dir():
            (folder / "test/cat").rmdir()
    for file in (folder / "test/dog").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"there is no image in .*test"):
        load_data(f"imagefolder:{folder}")


def test_a_class_without_training_images_is_refused_with_a_way_out(folder):
    for file in (folder / "train/cat").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"train/cat has no image: add some .* or remove it, of a class from test too"):
        load_data(f"imagefolder:{folder}")


# --- test images alone ------------------------------------------------------------------------------------------------


def _alone(kind, tmp_path):
    digits = rb_noisy.load_data("digits")
    images = (digits.x_test[:30, 0] * 255).round().byte().numpy()
    if kind == "npz":
        np.savez(
            tmp_path / "mine.npz", x_test=images, y_test=digits.y_test[:30].numpy(), class_names=list("0123456789")
        )
        return f"npz:{tmp_path / 'mine.npz'}"
    for number, (image, label) in enumerate(zip(images, digits.y_test[:30].tolist(), strict=True)):
        file = tmp_path / "mine" / "test" / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return f"imagefolder:{tmp_path / 'mine'}"


@pytest.mark.parametrize("kind", ["npz", "imagefolder"])
def test_test_images_alone_serve_evaluation_and_calibration_and_no_training(kind, tmp_path):
    name = _alone(kind, tmp_path)
    app = typer.Typer()
    app.command()(pgd.main)
    options = ["--dataset", name, "--eps", "0.1", "--steps", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["--model", "st_digits", *options])
    assert done.exit_code == 0, done.output
    assert "all 30 images" in done.output
    data = load_data(name)
    assert data.x_train.shape == (0, 1, 8, 8)
    assert (len(data.y_train), data.y_train.dtype, data.in_chans, data.image_size) == (0, torch.int64, 1, (8, 8))
    model = rb_noisy.load_model("st_digits")
    assert rb_noisy.calibrate(model, data.x_test, data.y_test, eps=0.2).predict(data.x_test[:2]).label.shape == (2,)
    for command in (["train", "--data", name], ["label-issues", "--data", name]):
        done = CliRunner().invoke(console, [*command, "--out", str(tmp_path / "run")])
        assert done.exit_code == 2, done.output
        assert "has test images alone, enough to evaluate on: add training images" in " ".join(done.output.split())
        assert not (tmp_path / "run" / "run.json").exists()


def test_classes_are_counted_in_the_labels_there_are(tmp_path):
    x = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_test=x, y_test=[0, 1, 2, 1])
    assert load_data(f"npz:{tmp_path / 'a.npz'}").class_names == ("0", "1", "2")
    np.savez(tmp_path / "a.npz", x_test=x, y_test=[0, 1, 3, 1])
    with pytest.raises(InputError, match=r"y_test of .* has no label 2.*add class_names"):
        load_data(f"npz:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "a.npz", x_test=x, y_test=[0, 1, 3, 1], x_train=x)
    with pytest.raises(InputError, match="has no array 'y_train'"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_recognised(channels, dtype, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, channels, 9, 7)).astype(np.uint8)
    given = x if dtype is np.uint8 else (x / 255).astype(dtype)
    np.savez(
        tmp_path / "a.npz", x_train=given, y_train=np.arange(5), x_test=given.transpose(0, 2, 3, 1), y_test=[0] * 5
    )
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    assert torch.equal((data.x_train * 255).round().byte(), torch.from_numpy(x))
    assert torch.equal(data.x_train, data.x_test)
    assert data.x_train.is_contiguous()
    np.savez(tmp_path / "b.npz", x=given)
    assert torch.equal(load_images(f"npz:{tmp_path / 'b.npz'}")[0], data.x_train)


@pytest.mark.parametrize("shape", [(5, 3, 9, 3), (5, 1, 9, 3), (5, 3, 9, 1), (5, 1, 9, 1), (5, 3, 9, 2)])
def test_where_either_axis_may_be_the_channels_it_is_asked(shape, tmp_path):
    np.savez(tmp_path / "a.npz", x_test=np.zeros(shape, np.uint8), y_test=np.zeros(5, int))
    with pytest.raises(InputError, match=rf"x_test of .*{re.escape(str(shape))}.*x\.transpose\(0, 2, 3, 1\)"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


# --- label files ------------------------------------------------------------------------------------------------------

COARSE = np.array([0, 1, 0, 1, 1, 0])
FINE = np.array([70, 12, 3, 55, 12, 3])


@pytest.mark.parametrize("key", ["noisy_coarse_label", "noisy_coarse"])
def test_coarse_labels_are_compared_with_coarse_ones(key, tmp_path):
    file = tmp_path / "cifar100n.npz"
    sets = {"clean_label": FINE, "noisy_label": FINE[::-1], "clean_coarse_label": COARSE}
    np.savez(file, **sets, noisy_coarse_label=1 - COARSE)
    labels = corrupt(COARSE, f"human:{file}:{key}", None, 2)
    assert labels.given.tolist() == (1 - COARSE).tolist()
    assert corrupt(FINE, f"human:{file}:noisy", None, 100).given.tolist() == FINE[::-1].tolist()
    with pytest.raises(InputError, match=r"clean_coarse_label .* is 1 at index 1 where the data set has 0 .*order"):
        corrupt(np.roll(COARSE, 1), f"human:{file}:{key}", None, 2)
    with pytest.raises(InputError, match=r"clean_coarse_label .* classes are others"):
        corrupt(FINE, f"human:{file}:{key}", None, 100)


def test_the_advice_for_a_pickled_dict_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("human.npy", {"clean_label": COARSE, "worse_label": 1 - COARSE})
    with pytest.raises(InputError, match=r"human\.npy is a pickle and no pickle is read") as error:
        corrupt(COARSE, "human", None, 2, file="human.npy")
    (advice,) = re.findall("`(.*)`", str(error.value))
    exec(advice)
    assert corrupt(COARSE, "human:human.npz:worse", None, 2).given.tolist() == (1 - COARSE).tolist()
    np.save("data.npy", {"x_test": np.zeros((4, 8, 8), np.uint8), "y_test": np.array([0, 1, 2, 1])})
    with pytest.raises(InputError, match=r"data\.npy is a pickle") as error:
        load_data("npz:data.npy")
    (advice,) = re.findall("`(.*)`", str(error.value))
    exec(advice)
    assert load_data("npz:data.npz").num_classes == 3
