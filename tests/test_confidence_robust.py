import json
import shutil

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import rb_noisy
from eval import calibration, common, confidence_attack, confidence_noise, confidence_splits
from eval import confidence_robust as command
from model_zoo.registry import card_files, read_card
from rb_noisy.calibrators import MEASURED
from rb_noisy.confidence import WITHSTANDS, calibrate

MODEL, COUNT = "at_digits", 120
EPS = 0.15  # not the card's, whose AutoAttack verdicts would be taken


def call(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    given = ["--model", MODEL, "--n", COUNT, "--batch-size", 30, *arguments]
    return CliRunner().invoke(app, [str(a) for a in given], env={"COLUMNS": "220"})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("robust")
    file = out / "figures.json"
    options = ["--eps", EPS, "--splits", 3, "--label-noise", 0.4]
    result = call(calibration.main, "--target", "robust", *options, "--out", out, "--json", file)
    assert result.exit_code == 0, result.output
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return result.stdout, json.loads(file.read_text())["confidence"], folder


def test_the_tables_are_shown_and_kept_beside_a_plot(done):
    stdout, figures, folder = done
    markdown = (folder / "confidence-robust.md").read_text()
    for row in [*command.PLAIN.values(), *command.ATTACKED.values(), *command.CURVE.values()]:
        assert row.text in stdout
        assert f"| {row.text} |" in markdown
    brier = figures["rows"]["isotonic_kappa"]["brier"]
    assert f"{brier['mean']:.3f} ± {brier['mean'] - brier['interval'][0]:.3f}" in markdown
    assert (folder / "confidence-robust.png").read_bytes().startswith(b"\x89PNG")
    assert WITHSTANDS in stdout


def test_every_row_has_every_figure_and_the_best_without_attack_has_ratio_one(done):
    _, figures, _ = done
    rows = figures["rows"]
    assert rows.keys() == command.ROWS.keys() - {"clever"}
    expected = {*command.METRICS, *command.CHANCE, *command.KEPT, *command.KEPT_GAIN, "brier_ratio", "passes"}
    for name, row in rows.items():
        few = {"brier", "auroc", "brier_ratio", "passes"}
        assert row.keys() - {"passes_to_the_end"} == (few if name in command.CURVE else expected)
        assert ("passes_to_the_end" in row) == (command.ROWS[name].steps > 0)
    best = figures["best_without_attack"]
    assert best in command.PLAIN
    assert rows[best]["brier_ratio"]["mean"] == 1
    assert rows[best]["brier"]["mean"] == min(rows[name]["brier"]["mean"] for name in command.PLAIN)
    assert figures["robust"]["accuracy"] < figures["natural"]["accuracy"]
    assert len(figures["noisy_calibration"]["rows"]) == 5
    assert rows["max_softmax"]["kept_30_gain"]["mean"] == 0
    assert rows["max_softmax"]["ece"]["mean"] != rows["temperature"]["ece"]["mean"]


def test_the_target_is_right_and_withstands(done):
    _, figures, folder = done
    model, data = rb_noisy.load_model(MODEL), rb_noisy.load_data("digits")
    x, y = data.x_test[:COUNT], data.y_test[:COUNT]
    with np.load(folder / "withstands.npz") as saved:
        stands = torch.from_numpy(saved["stands"])
    wrong = model(x).argmax(1) != y
    assert not stands[wrong].any()
    assert 0 < stands.sum() < COUNT - wrong.sum()
    assert figures["robust"]["accuracy"] == pytest.approx(stands.double().mean().item())


@pytest.mark.parametrize("name", ["logistic_attack", "logistic_targeted", "logistic_2eps", "logistic@3"])
def test_the_passes_are_those_that_a_prediction_takes(done, name):
    _, figures, _ = done
    row = command.ROWS[name]
    model, data = rb_noisy.load_model(MODEL), rb_noisy.load_data("digits")
    x, y = data.x_test[:COUNT], data.y_test[:COUNT]
    fitted = calibrate(model, x, y, eps=EPS, features=row.features, method="logistic", kappa_steps=row.steps)
    forth, back = [], []

    def count(module, inputs, logits):
        forth.append(len(logits))
        if logits.requires_grad:
            back.append(len(logits))

    with_hook = model.register_forward_hook(count)
    fitted.predict(x)
    with_hook.remove()
    assert [sum(forth) / COUNT, sum(back) / COUNT] == pytest.approx(figures["rows"][name]["passes"])


def test_autoattacks_verdicts_are_the_target_where_there_are_any(done, tmp_path, monkeypatch):
    """From its own file, else from the card; never those of other weights or of too few images."""
    _, _, folder = done
    given = []

    def study(y, arrays, robust, **_):
        given.append(robust)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "study", study)
    place = tmp_path / "out" / folder.name.replace(f"-{EPS:g}", "-0.2")  # the card's ε
    shutil.copytree(folder, place)
    zoo = tmp_path / "zoo"
    file = card_files(None)[MODEL]
    shutil.copytree(
        file.parents[3] / "weights", zoo / "weights", ignore=lambda d, names: [n for n in names if MODEL + "-" not in n]
    )
    target = zoo / "model_info" / "digits" / "Linf" / file.name
    target.parent.mkdir(parents=True)
    card = read_card(MODEL)
    options = ["--target", "robust", "--zoo", zoo, "--out", tmp_path / "out"]
    verdicts = torch.arange(540) % 3 == 0
    figures = card["results"]["autoattack"] | {"verdicts": common.packed(verdicts), "n": 540}
    for change, expected in (
        ({}, verdicts[:COUNT]),
        ({"weights_sha256": "0" * 64}, None),
        ({"n": COUNT - 1, "verdicts": common.packed(verdicts[: COUNT - 1])}, None),
    ):
        target.write_text(json.dumps(card | {"results": card["results"] | {"autoattack": figures | change}}))
        call(calibration.main, *options)
        assert torch.equal(given.pop(), expected) if expected is not None else given.pop().sum() > COUNT / 2
    with np.load(place / "withstands.npz") as saved:
        subject = {name: saved[name] for name in ("y", "weights_sha256", "images_sha256")}
    target.write_text(json.dumps(card | {"results": card["results"] | {"autoattack": figures}}))
    for change, expected in (({}, ~verdicts), ({"images_sha256": "0" * 64}, verdicts)):
        np.savez(place / "autoattack.npz", robust=(~verdicts[:COUNT]).numpy(), eps=0.2, **(subject | change))
        call(calibration.main, *options)
        assert torch.equal(given.pop(), expected[:COUNT]), "verdicts on other images with the same labels are not these"


def test_wrong_calibration_labels_spoil_what_takes_them_and_not_what_takes_none():
    """Of synthetic inputs κ says which stay, and nine tenths of all are right."""
    random = np.random.default_rng(0)
    n = 2000
    stays = torch.tensor(random.random(n) < 0.5)
    y = torch.tensor(random.integers(0, 10, n))
    prediction = torch.where(torch.tensor(random.random(n) < 0.9), y, (y + 1) % 10)
    arrays = {"logits": torch.nn.functional.one_hot(prediction, 10) * torch.tensor(random.exponential(3, (n, 1)))}
    for name in MEASURED:
        arrays[f"{name}@10"] = torch.where(stays, 10, 4) if "kappa" in name else torch.where(stays, 1.0, -1.0)
    robust = stays & (prediction == y)
    found = confidence_noise.study(y, arrays, robust, stays, rate=0.4, splits=4, seed=0)
    assert found.keys() == {
        f"{name} on {labels} labels" for name in ("logistic", "logistic_attack") for labels in ("true", "noisy")
    } | {"stays"}
    brier = {name: row["brier"]["mean"] for name, row in found.items()}
    assert brier["logistic_attack on true labels"] == pytest.approx(0.5 * 0.9 * 0.1, abs=0.01)
    # What stays is called right with probability 0.9·0.6 + 0.1·0.4/9, and is so with 0.9.
    assert brier["logistic_attack on noisy labels"] == pytest.approx(0.5 * (0.09 + (0.9 - 0.544) ** 2), abs=0.02)
    assert brier["stays"] == pytest.approx(0.5 * 0.1, abs=0.01)  # says 1 of what is right with 0.9
    assert brier["logistic on true labels"] > 0.2
    assert found["stays"]["auroc"]["mean"] == pytest.approx(
        found["logistic_attack on true labels"]["auroc"]["mean"], abs=0.02
    )


@pytest.mark.parametrize("n", [1, 8, 9, 540])
def test_packed_verdicts_come_back(n):
    verdicts = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    assert torch.equal(common.unpacked(common.packed(verdicts), n), verdicts)


def test_who_ranks_best_keeps_the_most():
    outcome = torch.tensor([True] * 3 + [False] * 7)
    assert confidence_splits.kept(outcome.double(), outcome) == [1.0, 0.75]
    assert confidence_splits.kept(torch.full((10,), 0.3), outcome) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "rihgt"), "right"),
        (("--clever",), "--target robust"),
        (("--label-noise", 0.4), "--target robust"),
        (("--target", "robust", "--label-noise", 1.4), "1.4"),
        (("--target", "robust", "--kappa-steps", 5), "--kappa-steps 5"),
        (("--target", "robust", "--splits", 1), "--splits is 1"),
        (("--target", "robust", "--eps", 0.9), "0 of the 120 images are right and stay right"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, message):
    result = call(calibration.main, "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_the_attack_command_fools_softmax_more_than_nobody(tmp_path):
    result = call(confidence_attack.main, "--attacked", 12, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*/confidence-attack.json")
    figures = json.loads(file.read_text())["confidence-attack"]
    assert figures["rows"].keys() == confidence_attack.DEFENCES.keys()
    for rows in figures["rows"].values():
        assert [row["share"] for row in rows] == [0.3, 0.5, 0.7]
        for row in rows:
            shares = {kind: rate["accuracy"] for kind, rate in row["fooled"].items()}
            assert shares["natural"] <= min(shares.values())
            assert max(shares.values()) == shares["any"]
        assert [row["threshold"] for row in rows] == sorted((row["threshold"] for row in rows), reverse=True)
    assert "--attacked is 61" in call(confidence_attack.main, "--attacked", 61, "--out", tmp_path).output
