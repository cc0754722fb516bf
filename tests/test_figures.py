import csv
import dataclasses
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import model_zoo
from rb_noisy.attacks import pgd
from rb_noisy.cli import app
from rb_noisy.commands.figures import NAMES
from rb_noisy.data import load_data
from rb_noisy.figures import FIGURES, Context, NotDrawn, Source, base, kappa, networks, toy
from rb_noisy.geometry import kappa as measure_kappa
from rb_noisy.runs import Run
from rb_noisy.training import train
from rb_noisy.training_data import training_set

STUDIES = Path(model_zoo.__file__).parent / "studies"
RUNS = ("pgd-at", "pgd-at+ls")


def call(*arguments):
    return CliRunner().invoke(app, ["figures", *map(str, arguments)], env={"COLUMNS": "200"})


def read(file):
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def column(rows, name, **where):
    return [float(row[name]) for row in rows if all(row[key] == str(value) for key, value in where.items())]


@pytest.fixture(scope="session")
def runs(tiny_data, tmp_path_factory):
    """Tiny runs with 30% wrong labels, and a clean one."""
    from rb_noisy.recipes import Recipe

    folder = tmp_path_factory.mktemp("figures")
    tiny = {
        **{"data": f"npz:{tiny_data}", "backbone": "resnet8_narrow", "eps": 0.1, "alpha": 0.04, "steps": 3},
        **{"epochs": 2, "batch_size": 32, "lr": 0.05, "augment": False, "normalize": False, "track": 40},
        "track_steps": 3,
    }
    for method in RUNS:
        train(Recipe(method=method, noise="symmetric", noise_rate=0.3, **tiny), folder / method)
    train(Recipe(method="pgd-at", **tiny), folder / "clean")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Figures of few points: the numbers change, the way they are made does not."""
    monkeypatch.setattr(base, "DPI", 40)
    monkeypatch.setattr(toy, "ITERATIONS", 3)
    monkeypatch.setattr(networks, "STEPS", torch.linspace(-1, 1, 3))
    monkeypatch.setattr(networks, "SAMPLES", 40)
    monkeypatch.setattr(kappa, "SAMPLES", 60)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take most of the time; where only numbers are looked at, none are made."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: Path(file).write_bytes(b""))


def test_every_figure_of_both_papers_is_drawn_or_refused_with_its_reason(runs, small, tmp_path):
    done = call(runs / "pgd-at", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    refused = [line for line in done.output.splitlines() if line.startswith("not drawn:")]
    assert [line.split()[2] for line in refused] == ["annotators", "label-assignment"]
    assert "--grid nl-annotator" in refused[0]
    assert "at least two label assignments" in refused[1]
    drawn = {path.stem.partition("_")[0] for path in tmp_path.glob("*.png")} - {"features-umap"}
    several = {"kappa-against-loss-pgd", "features-t-sne"}
    assert drawn == FIGURES.keys() - {"annotators", "label-assignment", "features"} | several
    for png in tmp_path.glob("*.png"):
        pixels = np.asarray(Image.open(png).convert("L"))
        assert pixels.min() < 100 < 200 < pixels.max(), f"{png.name} is blank"
        assert ElementTree.parse(png.with_suffix(".svg")).getroot().tag.endswith("svg")
        assert read(png.with_suffix(".csv")), f"{png.name} has no data"


def test_every_figure_is_drawn_from_the_shipped_runs(small, no_pictures, tmp_path):
    done = call(STUDIES / "digits-figures", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "not drawn" not in done.output
    for name in FIGURES:
        assert list(tmp_path.glob(f"{name}*.png")), name
        assert all(read(file) for file in tmp_path.glob(f"{name}*.csv"))


def test_curves_hold_the_metrics_of_the_runs(runs, no_pictures, tmp_path):
    names = "learning-curves,train-accuracy,kappa-over-epochs,neighbourhood-entropy,gradient-norm,confidence"
    names += ",label-assignment,memorisation"
    assert call(runs, "--out", tmp_path, "--figure", names).exit_code == 0
    at = Run.open(runs / "pgd-at").metrics

    def metric(name, scale=1):
        return pytest.approx([scale * line[name] for line in at], rel=1e-5)

    noisy = {"method": "pgd-at", "noise_rate": 0.3}
    part = "quadrants-symmetric.csv"
    curves = read(tmp_path / f"learning-curves_{part}")
    assert column(curves, "value", **noisy, attack="natural") == metric("test_natural_acc", 100)
    assert column(curves, "value", **noisy, attack="PGD-3") == metric("test_pgd_acc", 100)
    clean = [100 * line["test_pgd_acc"] for line in Run.open(runs / "clean").metrics]
    assert column(curves, "value", method="pgd-at", noise_rate=0, attack="PGD-3") == pytest.approx(clean, rel=1e-5)
    training = read(tmp_path / f"train-accuracy_{part}")
    wrong = {"labels": "incorrect labels"}
    assert column(training, "value", **noisy, **wrong, measure="PGD-3") == metric("train_incorrect_pgd_acc", 100)
    means = read(tmp_path / f"kappa-over-epochs_{part}")
    assert column(means, "value", **noisy, **wrong, measure="mean κ") == metric("train_incorrect_kappa")
    assert column(means, "value", **noisy, measure="mean natural loss", labels="correct labels") == metric(
        "train_correct_loss"
    )
    around = read(tmp_path / f"neighbourhood-entropy_{part}")
    assert column(around, "value", **noisy, direction="adversarial") == metric("train_incorrect_entropy_adversarial")
    norms = read(tmp_path / "gradient-norm_pgd-at.csv")
    assert column(norms, "gradient_norm") == metric("gradient_norm")
    whole = [0.7 * line["train_correct_slope_squared"] + 0.3 * line["train_incorrect_slope_squared"] for line in at]
    assert column(norms, "information_in_weights") == pytest.approx([160 * value / 2 for value in whole], rel=1e-4)
    trained = [70 * line["train_correct_pgd_acc"] + 30 * line["train_incorrect_pgd_acc"] for line in at]
    assigned = read(tmp_path / "label-assignment_quadrants-symmetric-0.3.csv")
    assert column(assigned, "value", method="pgd-at", data="training") == pytest.approx(trained, rel=1e-5)
    assert column(assigned, "value", method="pgd-at", data="test") == metric("test_pgd_acc", 100)
    memory = read(tmp_path / "memorisation_quadrants-symmetric-0.3.csv")
    natural = [70 * line["train_correct_natural_acc"] + 30 * line["train_incorrect_natural_acc"] for line in at]
    assert column(memory, "value", method="pgd-at", curve="training, whole") == pytest.approx(natural, rel=1e-5)
    sure = read(tmp_path / "confidence_pgd-at.csv")
    assert column(sure, "right", attack="PGD-3") == metric("test_pgd_conf_right")


def test_tracked_confidence_and_entropy_are_those_of_the_saved_network(runs):
    """The test set has 60 images and the tracked sample 40 of them; the last of 2 epochs gave the final weights."""
    from rb_noisy.tracking import Tracker
    from rb_noisy.training import _seed

    run = Run.open(runs / "pgd-at")
    recipe, model, last = run.recipe, run.load(), run.metrics[-1]
    x, y = Tracker(recipe, *training_set(recipe), _seed).sets["test"]
    logits = model(x).detach()
    confidence, right = logits.softmax(1).amax(1), logits.argmax(1) == y
    assert last["test_natural_conf_right"] == pytest.approx(confidence[right].mean().item(), rel=1e-4)
    assert last["test_natural_conf_wrong"] == pytest.approx(confidence[~right].mean().item(), rel=1e-4)
    starts = torch.Generator().manual_seed(_seed(recipe.seed, 5, 1))
    attack = {"eps": recipe.eps, "alpha": recipe.track_alpha, "generator": starts}
    state = starts.get_state()
    for steps, name in ((0, "random"), (1, "adversarial")):
        starts.set_state(state)
        p = model(pgd(model, x, y, steps=steps, **attack).x_adv).softmax(1).detach()
        assert last[f"test_entropy_{name}"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-4)


def test_a_network_without_forward_mode_derivatives_is_tracked_but_for_the_information_in_weights(runs, monkeypatch):
    from rb_noisy import tracking
    from rb_noisy.training import _seed

    def refuse(*_):
        raise NotImplementedError("no forward-mode derivative")

    run = Run.open(runs / "pgd-at")
    tracker = tracking.Tracker(run.recipe, *training_set(run.recipe), _seed)
    tracker.start = dict(run.load().named_parameters())
    monkeypatch.setattr(tracking, "loss_slopes", refuse)
    line = tracker.measure(run.load(), 1, torch.device("cpu"))
    assert line["train_correct_slope_squared"] is line["train_incorrect_slope_squared"] is None
    assert line["test_pgd_acc"] == run.metrics[-1]["test_pgd_acc"]


def test_kappa_figures_hold_what_the_network_and_the_history_say(runs, small, no_pictures, tmp_path):
    names = "kappa-against-loss,densities,gallery,accuracy-by-kappa"
    assert call(runs / "pgd-at", "--out", tmp_path, "--figure", names).exit_code == 0
    run = Run.open(runs / "pgd-at")
    data, labels = training_set(run.recipe)
    rows = read(tmp_path / "kappa-against-loss_pgd-at.csv")
    index = torch.tensor([int(row["index"]) for row in rows])
    assert len(index.unique()) == 60
    assert [row["mislabeled"] == "1" for row in rows] == labels.is_wrong[index].tolist()
    found = measure_kappa(run.load(), data.x_train[index], labels.given[index], eps=0.1, alpha=0.04, steps=3, seed=0)
    assert column(rows, "kappa") == found.tolist()
    assert {row["steps"] for row in read(tmp_path / "kappa-against-loss-pgd_pgd-at.csv")} == {"8", "12", "16", "20"}
    shown = read(tmp_path / "gallery_pgd-at.csv")
    names = run.class_names
    assert all(names[labels.given[int(row["index"])]] == row["given"] for row in shown)
    assert all(names[labels.true[int(row["index"])]] == row["true"] for row in shown)
    counts = read(tmp_path / "accuracy-by-kappa_pgd-at.csv")
    assert sum(column(counts, "right")) + sum(column(counts, "wrong")) == 30
    densities = read(tmp_path / "densities_pgd-at.csv")
    for labels_ in ("correct labels", "incorrect labels"):
        values = column(densities, "density", measure="κ", epoch=2, labels=labels_)
        assert np.trapezoid(values, np.linspace(-0.25, 1.25, len(values))) == pytest.approx(1, abs=0.01)


def test_one_seed_gives_one_csv_and_another_seed_another(runs, small, no_pictures, tmp_path):
    names = "toy,kappa-against-loss,loss-landscape"
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = call(runs / "pgd-at", "--out", tmp_path / folder, "--figure", names, "--seed", seed)
        assert done.exit_code == 0, done.output
    files = sorted(path.name for path in (tmp_path / "a").glob("*.csv"))
    assert len(files) == 4
    for name in files:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b, name
        assert a != c, name


def test_toy_needs_no_run_and_has_two_wrong_labels(small, no_pictures, tmp_path):
    assert call("--figure", "toy", "--out", tmp_path).exit_code == 0
    rows = read(tmp_path / "toy.csv")
    points = [row for row in rows if row["panel"] == "points"]
    assert len(points) == 23
    assert sum(row["mislabeled"] == "1" for row in points) == 2
    assert {row["panel"] for row in rows} == {"points", "ST", *(f"AT (PGD-{n})" for n in (1, 2, 3, 4))}


def test_shipped_records_without_weights_or_history_give_the_curves_and_reasons_for_the_rest(no_pictures, tmp_path):
    study = STUDIES / "mnist-noise"
    done = call(*(study / f"{m}_symmetric0.{r}_seed0" for m in ("st", "pgd-at") for r in (2, 4)), "--out", tmp_path,
                "--figure", ",".join(name for name in FIGURES if name != "toy"))  # fmt: skip
    assert done.exit_code == 0, done.output
    drawn = {path.stem.partition("_")[0] for path in tmp_path.glob("*.png")}
    assert drawn == {"learning-curves", "train-accuracy", "kappa-over-epochs", "gradient-norm", "memorisation"}
    refused = {line.split()[2]: line for line in done.output.splitlines() if line.startswith("not drawn:")}
    assert refused.keys() == FIGURES.keys() - drawn - {"toy"}
    assert all("to have it: " in line for line in refused.values())
    assert "recorded no confidence" in refused["confidence"]
    assert read(tmp_path / "gradient-norm_pgd-at_symmetric0.2_seed0.csv")[0]["information_in_weights"] == ""


def test_a_zoo_model_gives_the_figures_of_its_weights(small, no_pictures, tmp_path):
    names = "accuracy-by-kappa,learning-curves"
    done = call("at_digits", "--out", tmp_path, "--figure", names)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "accuracy-by-kappa_at_digits.png").is_file()
    assert "not drawn: learning-curves" in done.output


def test_seeds_are_averaged_and_networks_stand_side_by_side(runs, no_pictures, tmp_path):
    for name, backbone, accuracy in (("a", "x", 0.5), ("b", "x", 0.7), ("c", "y", 0.1)):
        shutil.copytree(runs / "pgd-at", tmp_path / "runs" / name)
        run = Run.open(tmp_path / "runs" / name)
        described = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
        described["recipe"] |= {"backbone": backbone, "seed": ord(name)}
        (run.path / "run.json").write_text(json.dumps(described))
        lines = [json.dumps(line | {"test_pgd_acc": accuracy}) for line in run.metrics]
        (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert call(tmp_path / "runs", "--out", tmp_path / "f", "--figure", "learning-curves").exit_code == 0
    rows = read(tmp_path / "f" / "learning-curves_quadrants-symmetric.csv")
    assert column(rows, "value", method="pgd-at, x", attack="PGD-3") == pytest.approx([60, 60])
    assert column(rows, "value", method="pgd-at, y", attack="PGD-3") == pytest.approx([10, 10])


def test_runs_of_another_size_get_figures_of_their_own(runs, no_pictures, tmp_path):
    other = tmp_path / "runs" / "short"
    shutil.copytree(runs / "pgd-at", other)
    described = json.loads((other / "run.json").read_text(encoding="utf-8"))
    described["recipe"] |= {"train_size": 80}
    (other / "run.json").write_text(json.dumps(described))
    assert call(runs / "pgd-at", other, "--out", tmp_path / "f", "--figure", "learning-curves").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "f").glob("*.png"))
    assert names == ["learning-curves_quadrants-symmetric.2.png", "learning-curves_quadrants-symmetric.png"]


def test_runs_of_one_name_do_not_overwrite_each_other(runs, no_pictures, tmp_path):
    for place in ("one", "two"):
        shutil.copytree(runs / "clean", tmp_path / place / "run")
    done = call(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "f", "--figure", "confidence")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "f").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--figure", "tow"], "did you mean toy"),
        ([], "no run is named"),
        (["nowhere"], "unknown model 'nowhere'"),
        (["--figure", "toy", "--seed", "-1"], "--seed is -1"),
        (["tests"], "holds no run folder"),
    ],
)
def test_bad_requests_end_in_one_clear_line_and_leave_nothing(arguments, words, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_figure_and_its_number_in_the_papers():
    for name, figure in FIGURES.items():
        assert f"{name} ({figure.papers}" in NAMES


def test_annotators_are_compared_by_what_they_were_trained_on(runs):
    noisy, clean = (Source.from_run(Run.open(runs / name)) for name in ("pgd-at", "clean"))

    def trained_by(source, method):
        return dataclasses.replace(source, recipe=dataclasses.replace(source.recipe, method=method))

    sources = [noisy, trained_by(noisy, "pgd-at+annotator"), trained_by(clean, "st"), clean]
    (drawing,) = FIGURES["annotators"].draw(Context(sources, seed=3))
    data, recipe = load_data(clean.recipe.data), clean.recipe
    attack = pgd(clean.load(), data.x_test, data.y_test, eps=recipe.eps, alpha=recipe.eps / 4, steps=20, seed=3)
    with torch.no_grad():
        right = [(clean.load()(x).argmax(1) == data.y_test).double() for x in (data.x_test, attack.x_adv)]
    for role in ("standard", "oracle"):
        first, *_, last = (row for row in drawing.rows if row["annotator"] == role)
        assert (first["share"], last["share"]) == (0, 1)
        assert [first["accuracy"], last["accuracy"]] == pytest.approx([r.mean().item() for r in right])
    with pytest.raises(NotDrawn, match=r"pgd-at\+annotator"):
        FIGURES["annotators"].draw(Context(sources[1:]))


def test_two_methods_of_one_name_are_told_apart(runs):
    """A temperature, say: the lines of a figure are by recipe, not by the name of the method."""
    from rb_noisy.figures.groups import grouped

    run = Run.open(runs / "pgd-at+ls")
    other = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, target_options={"r": 0.4}))
    (group,) = grouped([Source.from_run(run), dataclasses.replace(Source.from_run(other), name="r0.4")])
    assert group.methods == ["pgd-at+ls", "pgd-at+ls (r0.4)"]
