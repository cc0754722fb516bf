import json
import math
import shutil

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from eval import calibration, confidence_splits
from eval import confidence_right as command
from model_zoo.registry import read_card
from rb_noisy.attacks import pgd

MODEL, COUNT, SPLITS = "at_digits", 40, 2
CARD = read_card(MODEL)


def call(*arguments):
    app = typer.Typer()
    app.command()(calibration.main)
    given = ["--model", MODEL, "--target", "right", "--n", COUNT, "--splits", SPLITS, "--batch-size", 20, *arguments]
    return CliRunner().invoke(app, [str(a) for a in given], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("confidence")
    result = call("--out", out)
    assert result.exit_code == 0, result.output
    (folder,) = out.iterdir()
    return result.stdout, json.loads((folder / "confidence-right.json").read_text())["confidence-right"], folder


@pytest.fixture(scope="module")
def made():
    """Arrays as `measure` makes them: κ, not the logits, says on PGD-20 inputs which predictions are right."""
    random = np.random.default_rng(0)
    n = 800
    y = torch.zeros(n, dtype=torch.int64)
    arrays = {}
    for kind in command.INPUTS:
        right = random.random(n) < 0.7
        margin = random.exponential(2.0, n) * (1 if kind == "pgd-20" else np.where(right, 1.5, 0.5))
        arrays[f"{kind}.logits"] = torch.tensor(np.stack((np.where(right, margin, -margin), np.zeros(n)), axis=1))
        for name, (steps, _) in command.KAPPAS.items():
            high = right if kind == "pgd-20" else random.random(n) < 0.5
            kappa = np.where(high, steps, random.integers(1, steps, n))
            arrays[f"{kind}.kappa@{name}"] = torch.tensor(kappa)
    return command.study(y, arrays, splits=2, seed=0)


def test_every_figure_of_the_study_is_in_the_json(done):
    _, figures, _ = done
    assert {"dataset", "split", "n", "of", "norm", "eps", "seed", "date", "attack", "kappa", "torch"} <= figures.keys()
    assert (figures["n"], figures["of"], figures["splits"]) == (COUNT, 540, SPLITS)
    assert figures["inputs"].keys() == command.INPUTS.keys()
    study = figures["study"]
    assert list(study["natural"]) == ["same", "mixed"]
    for kind in set(command.INPUTS) - {"natural"}:
        assert list(study[kind]) == ["same", "natural", "mixed"]
    for kind in command.RESULTS:
        assert set(study[kind]["same"]) == {*command.TEXTS, *command.GRID}
    for kind in study.values():
        for rows in kind.values():
            for name, row in rows.items():
                assert row.keys() == {*command.METRICS, *command.CHANCE, "splits", "reliability"}
                assert ("kappa_adds" in row["ece"]) == ("kappa" in name)
                if row["splits"]:
                    low, high = row["ece"]["interval"]
                    assert low <= row["ece"]["mean"] <= high
                    assert sum(row["reliability"]["count"]) == row["splits"] * COUNT // 2
    assert study["pgd-20"]["same"]["temperature"]["nll"]["difference"] == 0


def test_the_tables_are_shown_and_kept_as_markdown_beside_a_plot(done):
    stdout, figures, folder = done
    markdown = (folder / "confidence-right.md").read_text()
    for text in (
        "less temperature scaling",
        "with κ less without κ",
        "ECE by chance",
        "by the kind of input tested on",
    ):
        assert text in stdout
        assert text in markdown
    ece = figures["study"]["pgd-20"]["same"]["isotonic_kappa"]["ece"]
    assert f"{ece['mean']:.3f} ± {ece['mean'] - ece['interval'][0]:.3f}" in markdown
    assert (folder / "confidence-right.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_the_model_is_left_alone(done):
    assert read_card(MODEL) == CARD


def test_an_interrupted_command_goes_on_to_the_same_values(done, tmp_path, monkeypatch):
    _, finished, whole = done
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:  # four attacks a batch: the second batch is under way
            raise KeyboardInterrupt
        return pgd(*arguments, **options)

    monkeypatch.setattr(command, "pgd", interrupted)
    monkeypatch.setattr(command, "study", lambda *_, **__: finished["study"])
    assert call("--out", tmp_path).exit_code == 130
    assert not list(tmp_path.glob("*/confidence-right.*"))
    assert call("--out", tmp_path).exit_code == 0
    assert len(calls) == 6 + 4, "the first batch was kept"
    (folder,) = tmp_path.iterdir()
    with np.load(folder / "confidence-right.npz") as resumed, np.load(whole / "confidence-right.npz") as expected:
        assert resumed.files == expected.files
        assert all(np.array_equal(resumed[name], expected[name]) for name in resumed.files)


def test_a_second_command_attacks_nothing(done, tmp_path, monkeypatch):
    _, finished, folder = done
    shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(command, "pgd", None)
    monkeypatch.setattr(command, "study", lambda *_, **__: finished["study"])
    result = call("--out", tmp_path, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "figures.json").read_text())["confidence-right"]["inputs"] == finished["inputs"]


def test_too_few_splits_or_images_are_named(tmp_path):
    for arguments, words in ((["--splits", 1], "--splits is 1"), (["--n", 10], "10 images are too few")):
        result = call("--out", tmp_path, *arguments)
        assert result.exit_code == 2
        assert words in result.output


def test_kappa_adds_where_it_alone_knows_and_nowhere_else(made):
    natural, attacked = (made[kind]["same"]["logistic_kappa"] for kind in command.RESULTS)
    assert attacked["brier"]["kappa_adds_interval"][1] < 0
    assert attacked["auroc"]["kappa_adds_interval"][0] > 0
    low, high = natural["brier"]["kappa_adds_interval"]
    assert low < 0 < high


def test_differences_are_those_of_the_means_and_intervals_lie_about_them(made):
    rows = made["pgd-20"]["same"]
    for row in rows.values():
        for metric in command.METRICS:
            figure = row[metric]
            assert figure["difference"] == pytest.approx(figure["mean"] - rows["temperature"][metric]["mean"])
            assert sum(figure["interval"]) / 2 == pytest.approx(figure["mean"])
    assert rows["isotonic_kappa"]["ece"]["mean"] < 0.05 < rows["uncalibrated"]["ece"]["mean"]


def test_the_interval_is_that_of_nadeau_and_bengio():
    values = np.array([0.1, 0.2, 0.3, math.nan, 0.2])
    figure = confidence_splits.interval(values, "mean", "interval")
    # t(0.975, 3 degrees of freedom) = 3.1824; variance (1/4 + 1)·(0.02/3)
    assert figure["mean"] == pytest.approx(0.2)
    assert figure["interval"][1] == pytest.approx(0.2 + 3.18245 * math.sqrt(1.25 * 0.02 / 3), abs=1e-5)
    assert confidence_splits.interval(values[2:4], "mean", "interval") == {"mean": None, "interval": None}


def test_a_perfectly_calibrated_confidence_has_the_ece_of_chance():
    random = np.random.default_rng(0)
    confidence = torch.tensor(random.random(4000))
    outcome = torch.tensor(random.random(4000) < confidence.numpy())
    figures = dict(
        zip(command.METRICS | command.CHANCE, confidence_splits.metrics(confidence, outcome, 0), strict=True)
    )
    assert figures["ece"] == pytest.approx(figures["ece_by_chance"], abs=0.01)
    assert figures["brier"] == pytest.approx(1 / 6, abs=0.01)
    assert figures["nll"] == pytest.approx(0.5, abs=0.02)


def test_an_outcome_that_never_happens_leaves_its_calibrators_out():
    n = 40
    arrays = {}
    for kind in command.INPUTS:
        arrays[f"{kind}.logits"] = torch.stack((torch.linspace(0.1, 3, n), torch.zeros(n)), dim=1)
        arrays |= {f"{kind}.kappa@{name}": torch.full((n,), 5) for name in command.KAPPAS}
    result = command.study(torch.zeros(n, dtype=torch.int64), arrays, splits=2, seed=0)
    rows = result["natural"]["same"]
    assert rows["isotonic_kappa"]["splits"] == 0
    assert rows["isotonic_kappa"]["brier"]["mean"] is rows["isotonic_kappa"]["reliability"] is None
    assert rows["temperature"]["ece"]["mean"] is not None
    assert rows["temperature"]["auroc"]["mean"] is None
    json.dumps(result, allow_nan=False)


def test_the_targeted_attack_raises_the_likeliest_wrong_class_of_the_natural_image():
    natural = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    logits = torch.tensor([[1.0, 4.0, 9.0], [2.0, 0.5, 9.0]])
    y = torch.tensor([0, 0])
    assert command.targeted_margin(logits, natural, y) == (4 - 1) + (0.5 - 2)


def test_a_wider_ball_breaks_more(done):
    _, figures, folder = done
    with np.load(folder / "confidence-right.npz", allow_pickle=False) as saved:
        assert saved["natural.kappa@20×2"].max() <= 20
        assert saved["natural.kappa@5×0.5"].min() >= 1
    shares = [figures["inputs"][kind]["accuracy"] for kind in ("natural", "pgd-20-half", "pgd-20", "pgd-20-more")]
    assert shares == sorted(shares, reverse=True)
