"""Which images a part of a data set is: the first of a benchmark, of one's own data drawn by class; and who says so."""

import csv
import json
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from eval import calibration, common, confidence_attack, page, pgd
from rb_noisy.cli import app as console
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.figures.groups import grouped
from rb_noisy.label_issues import find_label_issues, out_of_fold
from rb_noisy.recipes import Recipe, based_on
from rb_noisy.runs import Run
from rb_noisy.subsets import subset
from rb_noisy.training import train
from rb_noisy.training_data import training_set

EACH, CLASSES = 8, 3
TINY = {"backbone": "resnet8_narrow", "eps": 0.1, "alpha": 0.05, "steps": 1, "epochs": 1, "batch_size": 4, "lr": 0.01}
TINY |= {"augment": False, "normalize": False, "track": 4, "track_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder as they are: class by class."""
    path, random = tmp_path_factory.mktemp("data") / "sorted", np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(CLASSES):
            place = path / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(EACH):
                image = random.integers(0, 90, (8, 8)) + 80 * label
                Image.fromarray(image.astype(np.uint8)).save(place / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    recipe = Recipe(data=f"imagefolder:{folder}", train_size=12, **TINY)
    return train(recipe, tmp_path_factory.mktemp("runs") / "run")


def call(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_draw_has_every_class_is_nested_and_the_same_everywhere():
    y = torch.arange(18) // 6
    chosen = subset("npz:a.npz", y, 6, seed=0)
    assert chosen.index.tolist() == [2, 3, 8, 11, 13, 15], "the same on every machine"
    assert chosen.words == "6 of 18 images, drawn by class, seed 0"
    for seed in range(20):
        sets = [set(subset("imagefolder:a", y, n, seed).index.tolist()) for n in range(1, 19)]
        assert all(len(small) < len(large) and small < large for small, large in pairwise(sets))
        counts = [torch.bincount(y[list(chosen)], minlength=3) for chosen in sets]
        assert all(count.max() - count.min() <= 1 for count in counts)
    assert len({tuple(subset("npz:a", y, 6, seed).index.tolist()) for seed in range(20)}) > 10
    assert subset("npz:a", y, None).words == "all 18 images"


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10", "cifar100", "cifar100-coarse"])
def test_of_a_benchmark_it_is_the_first(data):
    chosen = subset(data, torch.arange(18) // 6, 6, seed=3)
    assert chosen.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen.words == "the first 6 of 18 images"
    with pytest.raises(InputError, match=f"19 images are asked for but {data} has 18"):
        subset(data, torch.arange(18) // 6, 19)


def test_an_evaluation_of_a_few_images_has_all_classes_and_says_which(run, folder, tmp_path):
    whole = load_data(f"imagefolder:{folder}")
    output = call(pgd.main, "--model", run.path, "--n", 6, "--steps", 1, "--out", tmp_path, "--seed", 2)
    words = "6 of 24 images, drawn by class, seed 2"
    assert words in output
    (saved,) = tmp_path.glob("*/pgd-1.npz")
    with np.load(saved) as verdicts:
        assert np.bincount(verdicts["y"]).tolist() == [2, 2, 2]
        assert (whole.y_test[verdicts["index"]].numpy() == verdicts["y"]).all()
    (file,) = tmp_path.glob("*/pgd-1.json")
    assert json.loads(file.read_text())["pgd-1"]["images"] == words
    assert json.loads((run.path / "results-final.json").read_text())["pgd-1"]["images"] == words


def test_an_evaluation_on_a_benchmark_takes_the_first_and_says_so(tmp_path):
    options = ("--steps", 1, "--json", tmp_path / "figures.json", "--out", tmp_path)
    output = call(pgd.main, "--model", "st_digits", "--n", 7, *options)
    assert "the first 7 of 540 images" in output
    (saved,) = tmp_path.glob("*/pgd-1.npz")
    with np.load(saved) as verdicts:
        assert verdicts["index"].tolist() == list(range(7))
        assert (verdicts["y"] == load_data("digits").y_test[:7].numpy()).all()
    assert json.loads((tmp_path / "figures.json").read_text())["pgd-1"]["images"] == "the first 7 of 540 images"


def test_the_option_says_which_images():
    app = typer.Typer()
    app.command()(pgd.main)
    said = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.replace("│", " ").split())
    assert "The first N test images; of npz: and imagefolder: N drawn by class" in said


@pytest.fixture
def sorted_npz(tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"x_{s}": random.integers(0, 256, (40, 8, 8), dtype=np.uint8) for s in ("train", "test")}
    np.savez(tmp_path / "sorted.npz", **arrays, y_train=np.arange(40) // 10, y_test=np.arange(40) // 10)
    return f"npz:{tmp_path / 'sorted.npz'}"


def test_training_on_a_part_sees_all_classes_with_their_own_labels(sorted_npz, tmp_path):
    human = (np.arange(40) // 10 + np.arange(40) % 2) % 4
    np.save(tmp_path / "human.npy", human)
    noise = {"noise": "human", "noise_options": {"file": str(tmp_path / "human.npy")}}
    whole = load_data(sorted_npz)
    data, labels = training_set(Recipe(data=sorted_npz, train_size=20, **noise, **TINY))
    assert torch.bincount(data.y_train).tolist() == [5, 5, 5, 5]
    index = data.train_index
    assert torch.equal(data.x_train, whole.x_train[index])
    assert torch.equal(labels.true, whole.y_train[index])
    assert labels.given.tolist() == human[index].tolist()
    again, _ = training_set(Recipe(data=sorted_npz, train_size=20, seed=5, noise_seed=5, **TINY))
    assert torch.equal(again.train_index, index), "every run of a size has the same images"


@pytest.mark.parametrize(("chosen", "said"), [(None, "8 training images drawn"), ("first", "first 8 training")])
def test_training_on_a_part_says_which(chosen, said, sorted_npz, tmp_path):
    recipe = Recipe(data=sorted_npz, train_size=8, train_images=chosen, **TINY)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    arguments = ["train", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(console, arguments)
    assert done.exit_code == 0, done.output
    assert f"trained on: {said}" in done.output
    assert said in grouped([_source(Run.open(tmp_path / "run"))])[0].title
    with pytest.raises(InputError, match="unknown train_images in the recipe 'last'"):
        Recipe(data=sorted_npz, train_size=8, train_images="last")


def test_a_part_of_digits_is_the_first_as_ever():
    data, _ = training_set(Recipe(data="digits", train_size=30))
    assert torch.equal(data.x_train, load_data("digits").x_train[:30])


def test_a_run_from_before_there_was_a_draw_keeps_the_first_images(sorted_npz, tmp_path):
    recipe = Recipe(data=sorted_npz, train_size=20, train_images="first", **TINY)
    train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["recipe"]["train_images"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    run = Run.open(tmp_path / "run")
    assert run.recipe == recipe
    assert torch.equal(training_set(run.recipe)[0].x_train, load_data(sorted_npz).x_train[:20])
    assert Recipe.from_dict(based_on(run.recipe, {"epochs": 3})).train_images == "first"
    assert "(first 20 training images)" in grouped([_source(run)])[0].title
    done = CliRunner().invoke(console, ["train", "--out", str(tmp_path / "run"), "--resume"])
    assert done.exit_code == 0, done.output
    with pytest.raises(InputError, match="train_images differ"):
        train(Recipe(data=sorted_npz, train_size=20, **TINY), tmp_path / "run", resume=True)


def _source(run):
    options = {"recipe": run.recipe, "metrics": run.metrics, "name": "run", "noisy": False, "rate": "0"}
    return types.SimpleNamespace(**options)


def test_label_issues_of_a_part_name_the_files_of_the_whole_folder(run, folder, tmp_path):
    index = training_set(run.recipe)[0].train_index
    assert index.tolist() != list(range(12))
    issues = find_label_issues(run, score="loss")
    assert sorted(issues.index.tolist()) == index.tolist()
    arguments = ["label-issues", "--run", str(run.path), "--score", "loss", "--out", str(tmp_path)]
    done = CliRunner().invoke(console, arguments)
    assert done.exit_code == 0, done.output
    with open(tmp_path / "label_issues.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        number = int(row["index"])
        assert Path(row["file"]) == folder / "train" / f"class{number // EACH}" / f"{number % EACH}.png"
        assert row["given_name"] == f"class{number // EACH}"


def test_out_of_fold_models_of_a_part_name_the_whole_sets_samples(sorted_npz, tmp_path):
    recipe = Recipe(data=sorted_npz, train_size=12, **TINY)
    found = out_of_fold(recipe, 2, tmp_path / "folds")
    found.save(tmp_path / "found.npz")
    index = training_set(recipe)[0].train_index
    for source in (found, type(found).open(tmp_path / "found.npz")):
        issues = find_label_issues(source, score="loss")
        assert sorted(issues.index.tolist()) == index.tolist()
        assert torch.equal(issues.given, issues.index // 10)


def test_an_attack_on_confidence_is_fitted_and_tried_on_all_classes(run, tmp_path, monkeypatch):
    seen = []

    def fit(subject, robust, batch_size, rows):
        seen.append(subject.index[rows])
        return {}

    def attack(subject, calibrators, **_):
        seen.append(subject.index)
        raise KeyboardInterrupt

    monkeypatch.setattr(confidence_attack, "fit", fit)
    monkeypatch.setattr(confidence_attack, "attack", attack)
    app = typer.Typer()
    app.command()(confidence_attack.main)
    CliRunner().invoke(app, ["--model", str(run.path), "--attacked", "6", "--out", str(tmp_path)])
    fitted, attacked = seen
    assert torch.bincount(fitted // EACH).tolist() == [4, 4, 4]
    assert torch.bincount(attacked // EACH).tolist() == [2, 2, 2]
    assert not set(fitted.tolist()) & set(attacked.tolist())


@pytest.mark.parametrize(
    ("images", "index", "expected"),
    [
        (None, [0, 2, 3], [0, 2, 3]),  # a card from before there was a draw: the first 4
        ("the first 4 of 10 images", [1, 5], None),
        ("4 of 10 images, drawn by class, seed 0", [0, 1], None),
        ("4 of 10 images, drawn by class, seed 0", [2, 5, 7, 9], [0, 1, 2, 3]),
    ],
)
def test_verdicts_in_a_card_are_taken_for_their_own_images_only(images, index, expected, monkeypatch, tmp_path):
    verdicts = torch.tensor([True, False, False, True])
    figures = {"verdicts": common.packed(verdicts), "n": 4, "of": 10, "weights_sha256": "w"}
    figures |= {} if images is None else {"images": images}
    words = images if images and len(index) == 4 else "some images"
    subject = types.SimpleNamespace(index=torch.tensor(index), images=words, weights_sha256="w", x=torch.tensor(index))
    monkeypatch.setattr(common, "saved_verdicts", lambda *_: None)
    monkeypatch.setattr(common, "entered", lambda _: {"autoattack": figures})
    found = calibration.autoattack_verdicts(subject, tmp_path)
    assert found is None if expected is None else torch.equal(found, verdicts[expected])


def test_a_card_says_which_images_and_warns_where_its_command_would_draw_others():
    card = {"name": "mine", "recipe": None, "results": {}}
    for dataset, images, note in (
        ("npz:mine.npz", None, "  # drawn by class now; the figures are of the first 4 of 10 images"),
        ("npz:mine.npz", "4 of 10 images, drawn by class, seed 0", ""),
        ("digits", None, ""),
    ):
        figures = {"n": 4, "of": 10, "dataset": dataset, "accuracy": 0.5} | ({"images": images} if images else {})
        (command,) = page._commands(card | {"results": {"pgd-20": figures}}, None)
        assert command.endswith(f"--batch-size 250{note}")
        (line,) = page._figure_lines("pgd-20", figures)
        assert (images or "the first 4 of 10 images") in line
