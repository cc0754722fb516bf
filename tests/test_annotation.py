import contextlib
import csv
import io
import json
import runpy
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from eval import annotators as command
from eval import pgd
from eval.common import load_subject
from model_zoo.registry import load_model
from rb_noisy.annotation import (
    Annotations,
    accuracy_by_share,
    annotate,
    kept_accuracy,
    load_images,
    most_confident_accuracy,
)
from rb_noisy.cli import app as rb_noisy
from rb_noisy.confidence import calibrate
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.measures import aurc

N = 24
ZOO = {"standard": "st_digits", "oracle": "at_digits", "noisy": "at_digits_sym40", "robust": "sglr_digits_sym40"}


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 1/2, with a slope that is the same everywhere."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        z = self.slope * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack((torch.zeros_like(z), z), dim=1)


def grey(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def call(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def call_annotate(*arguments):
    return CliRunner().invoke(rb_noisy, ["annotate", *map(str, arguments)], env={"COLUMNS": "200"})


def read(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").x_test[:N]


# Annotating


def test_label_kappa_and_confidence_of_a_known_model():
    # ε = 0.2 in 10 steps of 0.05: 0.57 is darker than 1/2 after two steps, 0.64 after three, 0.43 brighter after two.
    found = annotate(Brightness(), grey(0.57, 0.64, 0.8, 0.43, 0.1), eps=0.2)
    assert found.label.tolist() == [1, 1, 1, 0, 0]
    assert found.kappa.tolist() == [2, 3, 10, 2, 10]
    expected = torch.tensor([0.7, 1.4, 3.0, 0.7, 4.0]).double().sigmoid()
    torch.testing.assert_close(found.confidence, expected, atol=1e-6, rtol=0)
    assert (found.label.dtype, found.kappa.dtype, found.confidence.dtype) == (torch.int64, torch.int64, torch.float64)


def test_step_size_and_number_of_steps_can_be_chosen():
    images = grey(0.57, 0.8)
    assert annotate(Brightness(), images, eps=0.2, alpha=0.02, steps=5).kappa.tolist() == [4, 5]
    assert annotate(Brightness(), images, eps=0.2, steps=4).kappa.tolist() == [1, 4], "α is 2.5·ε/4 = 0.125"


def test_annotations_do_not_depend_on_batches_and_progress_counts_every_image(digits):
    model, done = load_model("at_digits"), []
    whole = annotate(model, digits, eps=0.2)
    parts = annotate(model, digits, eps=0.2, batch_size=7, progress=done.append)
    assert torch.equal(whole.label, parts.label)
    assert torch.equal(whole.kappa, parts.kappa)
    torch.testing.assert_close(whole.confidence, parts.confidence, atol=1e-5, rtol=0)
    assert (sum(done), len(done)) == (N, 4)
    assert len(annotate(model, digits[:0], eps=0.2).label) == 0


def test_the_model_is_used_in_eval_mode_and_left_in_its_own():
    model = nn.Sequential(nn.BatchNorm2d(1), Brightness()).train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    annotate(model, grey(0.2, 0.9), eps=0.1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_a_calibrator_gives_its_own_confidence(digits):
    model, y = load_model("at_digits_sym40"), load_data("digits").y_test
    calibrated = calibrate(model, load_data("digits").x_test[100:250], y[100:250], eps=0.2)
    plain, found = annotate(model, digits, eps=0.2), annotate(model, digits, eps=0.2, calibrator=calibrated)
    assert torch.equal(found.confidence, calibrated.predict(digits).confidence)
    assert torch.equal(found.label, plain.label)
    assert torch.equal(found.kappa, calibrated.predict(digits).kappa)
    assert (found.confidence - plain.confidence).abs().max() > 0.1
    with pytest.raises(InputError, match=r"calibrator's κ has eps = 0\.2, not 0\.1"):
        annotate(model, digits, eps=0.1, calibrator=calibrated)
    with pytest.raises(InputError, match=r"alpha = 0\.1, not 0\.05"):
        annotate(model, digits, eps=0.2, alpha=0.05, calibrator=calibrated)
    with pytest.raises(InputError, match="of another model"):
        annotate(Brightness(), digits, eps=0.2, calibrator=calibrated)


def test_a_calibrator_needs_no_more_than_predict():
    answer = SimpleNamespace(label=torch.tensor([3]), kappa=torch.tensor([7]), confidence=torch.tensor([0.25]))
    found = annotate(
        Brightness(), grey(0.9, 0.9), eps=0.1, batch_size=1, calibrator=SimpleNamespace(predict=lambda x: answer)
    )
    assert (found.label.tolist(), found.kappa.tolist(), found.confidence.tolist()) == ([3, 3], [7, 7], [0.25, 0.25])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eps": -0.1}, "is -0.1"),
        ({"norm": "L1"}, "unknown norm 'L1'"),
        ({"images": torch.zeros(2, 2, 2)}, r"shape \(2, 2, 2\)"),
        ({"images": grey(0.5, 1.5)}, "span"),
        ({"images": grey(0.5, float("nan"))}, "without NaN"),
    ],
)
def test_bad_requests_are_named(options, words):
    arguments = {"images": grey(0.2, 0.9), "eps": 0.1} | options
    with pytest.raises(InputError, match=words):
        annotate(Brightness(), arguments.pop("images"), **arguments)


# Writing and reading


def test_csv_has_a_line_per_image_and_survives_odd_names(tmp_path):
    notes = Annotations(torch.tensor([1, 0]), torch.tensor([2, 10]), torch.tensor([0.25, 1.0]).double())
    notes.to_csv(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv") == [
        {"index": "0", "label": "1", "kappa": "2", "confidence": "0.250000"},
        {"index": "1", "label": "0", "kappa": "10", "confidence": "1.000000"},
    ]
    notes.to_csv(tmp_path / "b.csv", ["cat, tabby", 'the "dog"'], ["x/ä.png", "y\n.png"])
    lines = read(tmp_path / "b.csv")
    assert list(lines[0]) == ["file", "label", "class_name", "kappa", "confidence"]
    assert [(line["file"], line["class_name"]) for line in lines] == [
        ("x/ä.png", 'the "dog"'),
        ("y\n.png", "cat, tabby"),
    ]


def test_a_csv_that_cannot_be_whole_is_not_written(tmp_path):
    notes = Annotations(torch.tensor([2]), torch.tensor([2]), torch.tensor([0.5]).double())
    with pytest.raises(InputError, match="label 2 has no name"):
        notes.to_csv(tmp_path / "a.csv", ["cat", "dog"])
    with pytest.raises(InputError, match="2 file names for 1"):
        notes.to_csv(tmp_path / "a.csv", files=["a", "b"])
    assert not list(tmp_path.iterdir())


def test_images_come_from_arrays(tmp_path):
    pixels = np.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, x_test=pixels[:1])
    x, files = load_images(f"npz:{tmp_path / 'a.npz'}")
    assert files is None
    np.testing.assert_allclose(x, pixels.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    np.savez(tmp_path / "b.npz", x_test=pixels[..., 0] / 255)
    assert load_images(f"npz:{tmp_path / 'b.npz'}")[0].shape == (2, 1, 5, 4)
    np.savez(tmp_path / "c.npz", images=pixels)
    with pytest.raises(InputError, match=r"no array 'x' or 'x_test': it holds \['images'\]"):
        load_images(f"npz:{tmp_path / 'c.npz'}")


def test_images_come_from_folders_in_the_order_of_their_names(tmp_path):
    test = tmp_path / "test"
    (test / "b").mkdir(parents=True)
    Image.new("L", (4, 3), 51).save(test / "b" / "1.png")
    Image.new("L", (4, 3), 255).save(test / "a.png")
    x, files = load_images(str(test))
    assert files == ("a.png", "b/1.png")
    assert x.shape == (2, 1, 3, 4)
    assert x[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.2])
    torch.testing.assert_close(load_images(f"imagefolder:{tmp_path}")[0], x)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(test / "c.png")
    assert load_images(str(test))[0].shape == (3, 3, 3, 4)
    Image.new("L", (5, 3)).save(test / "d.png")
    with pytest.raises(InputError, match=r"d\.png is 5x3 but .*a\.png is 4x3"):
        load_images(str(test))
    with pytest.raises(InputError, match="is no folder; give a folder, npz:FILE"):
        load_images(str(tmp_path / "nothing"))


# The user's command


def test_the_command_labels_a_folder_as_the_library_does(digits, tmp_path):
    for i, image in enumerate(digits[:6]):
        Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    result = call_annotate("--model", "at_digits", "--images", tmp_path, "--out", tmp_path / "labels.csv")
    assert result.exit_code == 0, result.output
    assert "not calibrated" in result.output
    lines = read(tmp_path / "labels.csv")
    found = annotate(load_model("at_digits"), load_images(str(tmp_path))[0], eps=0.2)
    assert [line["file"] for line in lines] == [f"{i}.png" for i in range(6)]
    assert [int(line["label"]) for line in lines] == found.label.tolist()
    assert [int(line["kappa"]) for line in lines] == found.kappa.tolist()
    assert [line["class_name"] for line in lines] == [line["label"] for line in lines]


def test_the_command_takes_a_saved_calibration_with_its_radius_and_steps(digits, tmp_path):
    model, y = load_model("at_digits"), load_data("digits").y_test
    sure = calibrate(model, digits, y[:N], eps=0.15, target="right", method="logistic", kappa_steps=4)
    sure.save(tmp_path / "confidence.json")
    np.savez(tmp_path / "a.npz", x=digits[:6].permute(0, 2, 3, 1).numpy())
    arguments = ["--images", f"npz:{tmp_path / 'a.npz'}", "--calibration", tmp_path / "confidence.json"]
    result = call_annotate("--model", "at_digits", *arguments, "--out", tmp_path / "labels.csv")
    assert result.exit_code == 0, result.output
    assert "κ = 4 (PGD-4 within ε = 0.15" in result.output
    assert "the calibrated probability of 'right'" in result.output
    expected = sure.predict(digits[:6])
    lines = read(tmp_path / "labels.csv")
    assert [int(line["kappa"]) for line in lines] == expected.kappa.tolist()
    assert [float(line["confidence"]) for line in lines] == pytest.approx(expected.confidence.tolist(), abs=1e-6)
    other = call_annotate("--model", "at_digits_sym40", *arguments, "--out", tmp_path / "other.csv")
    assert other.exit_code == 2
    assert "was fitted on a model of other weights" in other.output
    assert not (tmp_path / "other.csv").exists()


def test_the_command_takes_a_run_folder_and_its_own_radius(tiny_recipe, tiny_data, tmp_path):
    from rb_noisy.training import train

    run = train(tiny_recipe(epochs=1, eps=0.1), tmp_path / "run")
    arguments = ["--model", run.path, "--images", f"npz:{tiny_data}", "--out", tmp_path / "l.csv", "--steps", 4]
    result = call_annotate(*arguments)
    assert result.exit_code == 0, result.output
    assert "ε = 0.1" in result.output
    lines = read(tmp_path / "l.csv")
    found = annotate(run.load(), load_images(f"npz:{tiny_data}")[0], eps=0.1, steps=4)
    assert [int(line["kappa"]) for line in lines] == found.kappa.tolist()
    assert [line["index"] for line in lines] == [str(i) for i in range(60)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "at_digitz"}, "unknown model 'at_digitz'"),
        ({"--images": "FOLDER/no.npz"}, "is no folder"),
        ({"--images": "npz:FOLDER/no.npz"}, "there is no file"),
        ({"--images": "npz:FOLDER/wide.npz"}, "the images are 1x8x9 but the network was trained on 1x8x8"),
        ({"--steps": 0}, "steps is 0"),
        ({"--eps": -1}, "is -"),
        ({"--model": "RUN"}, "the images are 3x8x8 but the network was trained on 1x8x8"),
    ],
)
def test_the_command_ends_in_one_clear_line(changes, words, tiny_recipe, tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 8, 8), np.uint8))
    np.savez(tmp_path / "wide.npz", x=np.zeros((3, 8, 9), np.uint8))
    np.savez(tmp_path / "rgb.npz", x=np.zeros((3, 8, 8, 3), np.uint8))
    arguments = {"--model": "at_digits", "--images": "npz:FOLDER/x.npz", "--out": tmp_path / "l.csv"} | changes
    if arguments["--model"] == "RUN":
        from rb_noisy.training import train

        arguments["--model"] = train(tiny_recipe(epochs=1, track=4), tmp_path / "run").path
        arguments["--images"] = "npz:FOLDER/rgb.npz"
    flat = [str(part).replace("FOLDER", str(tmp_path)) for pair in arguments.items() for part in pair]
    result = call_annotate(*flat)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert not (tmp_path / "l.csv").exists()


# Accuracy by share and by what is kept


def answers(natural, attacked, **scores):
    n = len(natural)
    plain = {f"{kind}-{name}": np.ones(n) for kind in ("natural", "attacked") for name in ("kappa", "confidence")}
    return plain | {"natural-right": np.array(natural, bool), "attacked-right": np.array(attacked, bool)} | scores


def orders(n, draws=5):
    return [np.random.default_rng(draw).permutation(n) for draw in range(draws)]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_accuracy_goes_from_natural_to_attacked_and_never_up_where_attacks_only_break(pairs):
    natural = [a for a, _ in pairs]
    attacked = [a and b for a, b in pairs]
    lines = accuracy_by_share([answers(natural, attacked)], [0, 0.25, 0.5, 0.75, 1], orders(len(pairs)))
    means = [line["accuracy"] for line in lines]
    assert means[0] == pytest.approx(np.mean(natural))
    assert means[-1] == pytest.approx(np.mean(attacked))
    assert all(later <= before + 1e-12 for before, later in pairwise(means))
    assert lines[0]["sd_over_draws"] == pytest.approx(0, abs=1e-12)
    assert lines[-1]["sd_over_draws"] == pytest.approx(0, abs=1e-12)


def test_an_annotator_that_every_attack_breaks_loses_exactly_the_share():
    (line,) = accuracy_by_share([answers([1] * 10, [0] * 10)], [0.3], orders(10))
    assert line["accuracy"] == pytest.approx(0.7)
    assert line["interval_over"] == "images"


def test_several_models_give_their_mean_and_students_interval():
    models = [answers([1] * right + [0] * (10 - right), [0] * 10) for right in (6, 7, 8)]
    line = accuracy_by_share(models, [0.0], orders(10, 1))[0]
    assert line["accuracy"] == pytest.approx(0.7)
    # t(0.975, 2) = 4.302653 and a standard error of 0.1 / sqrt(3)
    assert line["interval"] == pytest.approx([0.7 - 4.302653 * 0.1 / 3**0.5, 0.7 + 4.302653 * 0.1 / 3**0.5], abs=1e-6)
    assert line["interval_over"] == "models"
    assert line["sd_over_draws"] is None


def test_draws_differ_and_their_deviation_is_shown():
    (line,) = accuracy_by_share([answers([1] * 20, [1] * 10 + [0] * 10)], [0.5], orders(20))
    right = [1 - (order[:10] >= 10).sum() / 20 for order in orders(20)]
    assert line["accuracy"] == pytest.approx(np.mean(right))
    assert line["sd_over_draws"] == pytest.approx(np.std(right, ddof=1))
    assert line["sd_over_draws"] > 0


def test_kept_labels_of_a_known_model():
    model = answers([1, 1, 0, 0], [0] * 4)
    model |= {"natural-kappa": np.array([3, 2, 2, 1]), "natural-confidence": np.array([0.9, 0.6, 0.8, 0.7])}
    found = kept_accuracy([model], 0.0, orders(4), steps=3)
    rows = [(r["kept"], r["by_kappa"]["accuracy"], r["by_confidence"]["accuracy"]) for r in found["by_kappa"]]
    assert rows == [
        (1.0, 0.5, 0.5),
        (1.0, 0.5, 0.5),
        (0.75, pytest.approx(2 / 3), pytest.approx(1 / 3)),
        (0.25, 1.0, 1.0),
    ]
    assert [r["confidence_at_least"] for r in found["by_kappa"]] == pytest.approx([0.6, 0.6, 0.7, 0.9])
    assert found["by_confidence"][-1] == {"kept": 1.0, "accuracy": 0.5}
    attacked = kept_accuracy([model], 1.0, orders(4), steps=3)["by_kappa"]
    assert [r["kept"] for r in attacked] == [1.0, 1.0, 0.0, 0.0]
    assert attacked[2]["by_kappa"]["accuracy"] is None
    assert attacked[2]["confidence_at_least"] is None


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.5001, 1.0]), st.booleans()), min_size=1, max_size=30))
def test_equally_confident_labels_count_as_in_random_order(pairs):
    confidence, right = (np.array(column) for column in zip(*pairs, strict=True))
    curve = most_confident_accuracy(confidence, right)
    assert curve[-1] == pytest.approx(right.mean())
    assert 1 - curve.mean() == pytest.approx(aurc(confidence, right))


# The figure


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """The command through its entry point, with two models in one place."""
    out = tmp_path_factory.mktemp("figure")
    models = [part for key, name in ZOO.items() for part in (f"--{key}", name)]
    arguments = [
        *models,
        "--robust",
        "at_ls_digits_sym40",
        "--n",
        str(N),
        "--shares",
        "0,0.5,1",
        "--format",
        "markdown",
    ]
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(sys, "argv", ["annotators", *arguments, "--seeds", "3", "--out", str(out)])
        patch.delitem(sys.modules, "eval.annotators")
        with pytest.raises(SystemExit) as end:
            runpy.run_module("eval.annotators", run_name="__main__")
    assert not end.value.code
    return stdout.getvalue(), json.loads((out / "annotators.json").read_text(encoding="utf-8")), out


def test_the_ends_of_the_figure_are_natural_and_pgd_20_accuracy(figure, tmp_path):
    _, figures, _ = figure
    for key, name in ZOO.items():
        options = {"zoo": None, "dataset": None, "device": None, "eps": None, "data_root": None}
        subject = load_subject(name, n=N, checkpoint="final", seed=0, batch_size=250, **options)
        expected, _ = pgd.evaluate(subject, alpha=0.05, steps=20, seed=0, batch_size=250, out=tmp_path)
        model = figures["annotators"][key]["models"][0]
        assert model["label"] == name
        assert model["natural"] == expected["natural"]
        assert model["attacked"] == expected["final_iterate"]
        if key != "robust":
            first, half, last = figures["annotators"][key]["accuracy"]
            assert first["accuracy"] == pytest.approx(expected["natural"]["accuracy"])
            assert last["accuracy"] == pytest.approx(expected["final_iterate"]["accuracy"])
            assert last["accuracy"] <= half["accuracy"] <= first["accuracy"]


def test_figures_carry_what_a_published_figure_needs(figure):
    _, figures, _ = figure
    needed = {
        "dataset",
        "split",
        "n",
        "of",
        "norm",
        "eps",
        "seed",
        "date",
        "attack",
        "alpha",
        "steps",
        "kappa",
        "draws",
    }
    assert needed <= figures.keys()
    assert (figures["n"], figures["eps"], figures["alpha"], figures["draws"]) == (N, 0.2, 0.05, 3)
    assert [model["noise"] is None for key in ZOO for model in figures["annotators"][key]["models"]] == [
        *(True, True),
        *(False, False, False),
    ]
    assert [line["interval_over"] for line in figures["annotators"]["robust"]["accuracy"]] == ["models"] * 3


def test_transferred_attacks_are_the_standard_annotators_own(figure):
    _, figures, _ = figure
    standard, oracle = (figures["annotators"][key] for key in ("standard", "oracle"))
    assert standard["transfer"] == standard["accuracy"]
    assert oracle["transfer"][-1]["accuracy"] > oracle["accuracy"][-1]["accuracy"]


def test_tables_figures_and_plots_lie_together(figure):
    stdout, figures, out = figure
    assert {file.name for file in out.iterdir()} == {
        *(f"annotators.{suffix}" for suffix in ("csv", "json", "md", "npz", "png", "tex")),
        *(f"annotators-kept.{suffix}" for suffix in ("csv", "png")),
    }
    for name in ("annotators.png", "annotators-kept.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert stdout.strip() == (out / "annotators.md").read_text(encoding="utf-8").strip()
    assert "| attacked | standard, clean labels |" in stdout
    assert "robust annotator, noisy labels, 2 models" in stdout
    latex = (out / "annotators.tex").read_text(encoding="utf-8")
    body = latex.split("\n", 1)[1]
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    assert r"$\kappa$ $\geq$ 2" in latex
    assert body.isascii()
    lines = read(out / "annotators.csv")
    assert len(lines) == len(ZOO) * 2 * 3
    half = next(
        line for line in lines if (line["annotator"], line["attack"], line["share"]) == ("oracle", "own", "0.5")
    )
    assert float(half["accuracy"]) == figures["annotators"]["oracle"]["accuracy"][1]["accuracy"]
    assert len(read(out / "annotators-kept.csv")) == len(ZOO) * 3 * 11


def test_one_annotator_alone_is_shown_without_transfer(tmp_path):
    result = call(command.main, "--oracle", "at_digits", "--n", 4, "--out", tmp_path, "--shares", "1", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "PGD-based, clean labels (oracle)" in result.output
    assert "standard annotator's gradients" not in result.output
    assert len(read(tmp_path / "annotators.csv")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no annotator is given"),
        (["--oracle", "at_digits", "--shares", "0,1.5"], "--shares is '0,1.5'"),
        (["--oracle", "at_digits", "--shares", "half"], "--shares is 'half'"),
        (["--oracle", "at_digits", "--seeds", "0"], "--seeds is 0"),
        (["--oracle", "at_digits", "--format", "html"], "unknown format 'html'"),
        (["--oracle", "at_digitz"], "unknown model 'at_digitz'"),
        (["--oracle", "at_digits", "--n", "0"], "--n is 0"),
        (["--oracle", "at_digits", "--noisy", "RUN"], "give --dataset and --eps"),
    ],
)
def test_bad_requests_for_the_figure_end_in_one_clear_line(arguments, words, tiny_recipe, tmp_path):
    if "RUN" in arguments:
        from rb_noisy.training import train

        run = train(tiny_recipe(epochs=1, track=4), tmp_path / "run")
        arguments = [str(run.path) if part == "RUN" else part for part in arguments]
    result = call(command.main, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert not (tmp_path / "out").exists()
