"""What was learnt is joined to the very data that it was learnt on: classes, images, labels, teachers, folds."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eval import label_issues as judging
from eval import pgd
from rb_noisy.cli import app
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.label_issues import OutOfFold, out_of_fold
from rb_noisy.recipes import Recipe
from rb_noisy.same_data import check_classes
from rb_noisy.training import train


def call(command, *arguments):
    if command is not app:
        function, command = command, typer.Typer()
        command.command()(function)
    done = CliRunner().invoke(command, [str(a) for a in arguments], env={"COLUMNS": "300"})
    return done.exit_code, " ".join(done.output.split())


TINY = {
    **{"backbone": "resnet8_narrow", "eps": 0.02, "alpha": 0.01, "steps": 1, "epochs": 2, "batch_size": 12},
    **{"lr": 0.05, "augment": False, "track_steps": 1, "track": 10},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with an image folder `pets` and a run on it."""
    folder, random = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (folder / "pets" / split / name).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 40, (8, 8)) + 100 * c
                Image.fromarray(image.astype(np.uint8)).save(folder / "pets" / split / name / f"{i:02d}.png")
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(Recipe(data="imagefolder:pets", **TINY), folder / "run")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def pets(finished, tmp_path, monkeypatch):
    """The same as `finished`, to be changed; it is the working folder."""
    shutil.copytree(finished, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def rename_class(folder, old, new):
    for split in ("train", "test"):
        (folder / "pets" / split / old).rename(folder / "pets" / split / new)


def without_digest(run, state=False):
    """Make of a run one of an earlier version: no digest in run.json and, with `state`, none in the state either."""
    content = json.loads((run / "run.json").read_text())
    assert content.pop("data_sha256")
    (run / "run.json").write_text(json.dumps(content))
    if state:
        (run / "state.safetensors").unlink()


EVALUATE = ("--model", "run", "--steps", 1, "--replace")


@pytest.mark.parametrize("new", ["fly", "amp"], ids=["another order", "in place"])
def test_figures_on_a_runs_own_data_are_refused_once_a_class_has_another_name(pets, new):
    assert call(pgd.main, *EVALUATE)[0] == 0
    before = (pets / "run/results-final.json").read_bytes()
    rename_class(pets, "ant", new)
    code, said = call(pgd.main, *EVALUATE)
    assert code == 2, said
    assert "other classes than run: class 0 is" in said
    assert "and 'ant' to the network; give the classes their names and order back" in said
    assert (pets / "run/results-final.json").read_bytes() == before


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A function that writes an .npz of 40 test digits (and 60 for training) by class names, with labels to match."""
    monkeypatch.chdir(tmp_path)
    data = load_data("digits")
    x = (data.x_test[:100, 0] * 255).round().byte().numpy()

    def write(names, order=range(10)):
        y = np.argsort(list(order))[data.y_test[:100].numpy()]
        arrays = {"x_train": x[40:], "y_train": y[40:], "x_test": x[:40], "y_test": y[:40]}
        np.savez("own.npz", **arrays, **({} if names is None else {"class_names": np.array(names)}))
        return "npz:own.npz"

    return write


def test_the_same_classes_in_another_order_are_refused(digits):
    data = digits(list("9876543210"), order=range(9, -1, -1))
    code, said = call(pgd.main, "--model", "at_digits", "--dataset", data, "--steps", 1)
    assert code == 2, said
    assert "has the same classes in another order than at_digits: class 0 is '9' there and '0' to the network" in said
    assert "bring the classes of the data into the order that the model learnt" in said


def test_numbers_for_classes_without_names_are_no_names(digits):
    for data in (digits(None), digits(list("0123456789")), digits([f"0{i}" for i in range(10)])):
        code, said = call(pgd.main, "--model", "at_digits", "--dataset", data, "--steps", 1)
        assert code == 0, said
        assert "classes" not in said


def test_other_names_on_other_data_are_a_warning_and_moved_ones_are_refused(pets):
    shutil.copytree("pets", "more/pets")
    arguments = ("--model", "run", "--dataset", "imagefolder:more/pets", "--steps", 1)
    for name in ("ant", "bee", "cat"):
        rename_class(pets / "more", name, name * 2)
    code, said = call(pgd.main, *arguments)
    assert code == 0, said
    assert "warning: imagefolder:more/pets has other classes than run: class 0 is 'antant' there and 'ant'" in said
    for name in ("bee", "cat"):
        rename_class(pets / "more", name * 2, name)
    rename_class(pets / "more", "antant", "dog")
    code, said = call(pgd.main, *arguments)
    assert code == 2, said
    assert "class 0 is 'bee' there and 'ant' to the network; bring the classes" in said


def test_a_teacher_of_other_classes_is_refused(digits, tmp_path):
    data = digits(list("9876543210"), order=range(9, -1, -1))
    teacher = {"method": "pgd-at+kd", "target_options": {"robust": "at_digits"}}
    with pytest.raises(InputError, match="in another order than teacher 'at_digits': class 0 is '9' there and '0'"):
        train(Recipe(data=data, **teacher, **TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(Recipe(data=digits(list("0123456789")), **teacher, **TINY | {"epochs": 1}), tmp_path / "run").finished


def test_a_run_as_a_teacher_of_other_names_is_refused(pets):
    shutil.copytree("pets", "more/pets")
    rename_class(pets / "more", "cat", "cow")
    recipe = Recipe(data="imagefolder:more/pets", method="pgd-at+kd", target_options={"robust": "run"}, **TINY)
    with pytest.raises(InputError, match=r"other classes than teacher 'run': class 2 is 'cow' there.*name a teacher"):
        train(recipe, pets / "student")


@pytest.mark.parametrize(
    ("learnt", "found", "answer"),
    [
        ("abc", "abc", None),
        ("abc", "ABC", None),
        ("012", "abc", None),
        ("abc", "012", None),
        ("abc", "xyz", "doubt"),
        ("abc", "abz", "doubt"),
        ("abc", "bcz", "refused"),
        ("abc", "cba", "refused"),
        ("012", "210", "refused"),
        ("abc", "ab", "doubt"),
    ],
)
def test_which_names_go_together(learnt, found, answer):
    def ask(other_names):
        try:
            return check_classes(tuple(learnt), tuple(found), "run", "data", "do so", other_names=other_names)
        except InputError:
            return "refused"

    assert ask(False) == (answer and "refused")
    doubt = ask(True)
    assert doubt == answer or (answer == "doubt" and doubt.startswith("data has other classes than run"))


def test_a_run_whose_class_was_renamed_does_not_go_on(pets):
    (pets / "run/final.safetensors").unlink()
    rename_class(pets, "ant", "amp")
    code, said = call(app, "train", "--out", "run", "--resume")
    assert code == 2, said
    assert "class 0 is 'amp' there and 'ant' to the network; put them back, or train into another folder" in said
    rename_class(pets, "amp", "ant")
    assert call(app, "train", "--out", "run", "--resume")[0] == 0


def kappas(file):
    with open(file, encoding="utf-8") as lines:
        return {row["file"]: (row["kappa"], row["loss"]) for row in csv.DictReader(lines)}


@pytest.mark.parametrize("earlier", [False, True])
def test_an_old_history_is_not_joined_to_files_in_another_order(pets, earlier):
    issues = ("label-issues", "--run", "run", "--out", "issues")
    assert call(app, *issues)[0] == 0
    before = kappas("issues/label_issues.csv")
    if earlier:
        without_digest(pets / "run")  # the state has it still
    first, last = pets / "pets/train/ant/00.png", pets / "pets/train/ant/zz.png"
    first.rename(last)
    for command, arguments in ((app, issues), (judging.main, ("run",)), (app, ("figures", "run", "--out", "f"))):
        if arguments[0] == "figures":
            arguments += ("--figure", "gallery")
        code, said = call(command, *arguments)
        assert code == 2, said
        assert "the images or labels of imagefolder:pets are not those that run was trained on; put them back" in said
    assert kappas("issues/label_issues.csv") == before
    last.rename(first)
    assert call(app, *issues)[0] == 0
    assert kappas("issues/label_issues.csv") == before


def test_a_history_without_any_digest_is_still_read(pets):
    without_digest(pets / "run", state=True)
    for command, arguments in ((app, ("label-issues", "--run", "run")), (judging.main, ("run",))):
        assert call(command, *arguments)[0] == 0
    (pets / "pets/train/ant/00.png").unlink()
    for command, arguments in ((app, ("label-issues", "--run", "run")), (judging.main, ("run",))):
        code, said = call(command, *arguments)
        assert code == 2, said
        assert "run saw 18 samples but imagefolder:pets has 17 now" in said


def test_densities_of_an_old_history_are_not_split_by_new_labels(tiny_data, tiny_recipe, tmp_path):
    file, out = tmp_path / "mine.npz", tmp_path / "run"
    shutil.copy(tiny_data, file)
    train(tiny_recipe(data=f"npz:{file}", epochs=1), out)
    swap(file)
    code, said = call(app, "figures", out, "--figure", "densities", "--out", tmp_path / "figures")
    assert code == 2, said
    assert "the images or labels of" in said


def swap(file):
    """Let the samples of an .npz change places."""
    with np.load(file) as saved:
        arrays = dict(saved)
    np.savez(file, **arrays | {name: np.roll(arrays[name], 4, axis=0) for name in ("x_train", "y_train")})


def test_out_of_fold_models_are_judged_on_the_data_they_were_of(tiny_data, tiny_recipe, tmp_path):
    file = tmp_path / "mine.npz"
    shutil.copy(tiny_data, file)
    found = out_of_fold(tiny_recipe(data=f"npz:{file}", epochs=1), 2, tmp_path / "folds")
    found.save(tmp_path / "out_of_fold.npz")
    assert OutOfFold.open(tmp_path / "out_of_fold.npz").data_sha256 == found.data_sha256
    assert call(judging.main, tmp_path)[0] == 0
    swap(file)
    code, said = call(judging.main, tmp_path)
    assert code == 2, said
    assert "the images or labels of" in said
    with np.load(tmp_path / "out_of_fold.npz") as saved:  # of an earlier version
        arrays = {name: saved[name] for name in saved.files if name != "data_sha256"}
    np.savez(tmp_path / "out_of_fold.npz", **arrays)
    assert call(judging.main, tmp_path)[0] == 0


@pytest.fixture
def folds(tiny_data, tiny_recipe, tmp_path):
    """Two folds, finished; their recipe, its data and their folder."""
    file = tmp_path / "mine.npz"
    shutil.copy(tiny_data, file)
    recipe = tiny_recipe(data=f"npz:{file}", epochs=1)
    out_of_fold(recipe, 2, tmp_path / "folds")
    return recipe, file, tmp_path / "folds"


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["seed", "data", "method", "folds"])
def test_refused_folds_leave_the_finished_ones_as_they_are(folds, change):
    recipe, file, folder = folds
    before = contents(folder)
    if change == "data":
        swap(file)
    other = Recipe.from_dict(recipe.to_dict() | {"seed": {"seed": 1}, "method": {"method": "trades"}}.get(change, {}))
    with pytest.raises(InputError, match=r"another recipe|has other images, labels or classes than .* another folder"):
        out_of_fold(other, 3 if change == "folds" else 2, folder)
    assert contents(folder) == before


def test_a_fold_whose_data_file_is_gone_gets_the_same_again_or_none(folds):
    recipe, file, folder = folds
    whole = (folder / "1.npz").read_bytes()
    kept = {path: content for path, content in contents(folder).items() if path.name != "1.npz"}
    (folder / "1.npz").unlink()
    original = file.read_bytes()
    swap(file)
    (folder / "0.npz").rename(folder / "away")
    with pytest.raises(InputError, match=r"the images or labels of .* are not those that .*folds/0 was trained on"):
        out_of_fold(recipe, 2, folder)
    assert not (folder / "1.npz").exists()
    assert not (folder / "0.npz").exists()
    (folder / "away").rename(folder / "0.npz")
    file.write_bytes(original)
    out_of_fold(recipe, 2, folder)
    assert (folder / "1.npz").read_bytes() == whole
    assert {path: content for path, content in contents(folder).items() if path in kept} == kept


def test_folds_that_never_began_to_train_may_be_written_anew(folds):
    recipe, file, folder = folds
    for k in range(2):
        shutil.rmtree(folder / str(k))
    before = (folder / "0.npz").read_bytes()
    swap(file)
    assert len(out_of_fold(recipe, 2, folder).fold) == 160
    assert (folder / "0.npz").read_bytes() != before


def test_a_run_goes_on_with_the_teachers_that_it_began_with(tiny_data, tiny_recipe, tmp_path):
    for seed in range(2):
        train(tiny_recipe(epochs=1, seed=seed), tmp_path / f"teacher{seed}")
    recipe = tiny_recipe(method="pgd-at+kd", target_options={"robust": str(tmp_path / "teacher0")}, epochs=3)

    class StopError(Exception):
        pass

    def stop(line):
        raise StopError

    out, weights = tmp_path / "run", tmp_path / "teacher0/final.safetensors"
    with pytest.raises(StopError):
        train(recipe, out, on_epoch=stop)
    original, state = weights.read_bytes(), (out / "state.safetensors").read_bytes()
    shutil.copy(tmp_path / "teacher1/final.safetensors", weights)
    code, said = call(app, "train", "--out", out, "--resume")
    assert code == 2, said
    assert "the weights of teacher" in said
    assert "put them back, or train into another folder" in said
    assert (out / "state.safetensors").read_bytes() == state
    weights.write_bytes(original)
    with pytest.raises(StopError):
        train(recipe, out, resume=True, on_epoch=stop)
    with safe_open(out / "state.safetensors", framework="pt") as opened:
        header = opened.metadata()
    del header["teachers_sha256"]  # a state of an earlier version
    save_file(load_file(out / "state.safetensors"), out / "state.safetensors", header)
    assert train(recipe, out, resume=True).finished
