import csv
import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from eval import label_issues as evaluation
from rb_noisy.commands.label_issues import label_issues
from rb_noisy.contact_sheet import contact_sheet
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.label_issues import (
    LabelIssues,
    OutOfFold,
    cleanlab_score,
    estimate_noise_rate,
    find_label_issues,
    fold_of,
    joint_score,
    kappa_score,
    loss_score,
    out_of_fold,
    self_confidence_score,
    suggested_labels,
)
from rb_noisy.measures import auroc
from rb_noisy.recipes import Recipe
from rb_noisy.runs import History, Run
from rb_noisy.training import train
from rb_noisy.training_data import training_set


def call(function, *arguments):
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def history(kappa, loss, prediction):
    return History(
        torch.tensor(kappa, dtype=torch.int16),
        torch.tensor(loss, dtype=torch.float32),
        torch.tensor(prediction, dtype=torch.int16),
    )


# Four epochs of five samples; the last one was never trained on, sample 3 not in epoch 2.
NAN = math.nan
SMALL = history(
    [[9, 9, 9, 9, -1], [9, 9, 9, 9, -1], [10, 0, 0, -1, -1], [10, 0, 0, 4, -1]],
    [[9, 9, 9, 9, NAN], [9, 9, 9, 9, NAN], [0.5, 1, 4, NAN, NAN], [0.5, 3, 2, 1, NAN]],
    [[7, 7, 7, 7, -1], [7, 7, 7, 7, -1], [0, 2, 3, -1, -1], [0, 2, 1, 1, -1]],
)


def test_scores_are_means_over_the_second_half_and_leave_out_what_was_not_trained_on():
    assert kappa_score(SMALL)[:4].tolist() == [-10, 0, 0, -4]
    assert loss_score(SMALL)[:4].tolist() == [0.5, 2, 3, 1]
    for score in (kappa_score, loss_score, joint_score):
        assert score(SMALL).dtype == torch.float64
        assert score(SMALL)[4].isnan()
    assert kappa_score(SMALL, (1, 3))[:4].tolist() == [-9.5, -4.5, -4.5, -9]


def test_the_joint_score_ranks_by_kappa_and_breaks_its_ties_by_the_loss():
    np.testing.assert_allclose(joint_score(SMALL)[:4], [0, 2 / 3, 1, 1 / 3])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_the_joint_score_is_the_share_ranked_below(pairs):
    one = history([[k for k, _ in pairs]], [[float(loss) for _, loss in pairs]], [[0] * len(pairs)])
    keys = [(-k, loss) for k, loss in pairs]
    expected = [sum(other < key for other in keys) / (len(keys) - 1) for key in keys]
    np.testing.assert_allclose(joint_score(one), expected)


def test_the_suggested_label_is_the_one_predicted_most_often_and_the_lower_on_a_tie():
    assert suggested_labels(SMALL).tolist() == [0, 2, 1, 1, -1]


def test_the_noise_rate_counts_persistent_other_predictions_with_no_kappa():
    # κ 0 and always another label; κ 0 but a wandering prediction; κ 0 and the given label; κ large and another label.
    seen = history([[0, 0, 0, 5]] * 4, [[1.0] * 4] * 4, [[1, 1, 0, 1], [1, 2, 0, 1], [1, 1, 0, 1], [1, 2, 0, 1]])
    labels = [0, 0, 0, 0]
    assert estimate_noise_rate(seen, labels, (0, 4)) == 0.25
    without_kappa = History(torch.full_like(seen.kappa, -1), seen.loss, seen.prediction)
    assert estimate_noise_rate(without_kappa, labels, (0, 4)) == 0.5


def test_the_noise_rate_out_of_fold_is_that_of_confident_predictions():
    labels = torch.arange(100) % 2
    wrong = torch.arange(100) < 20
    right = torch.where(wrong, 1 - labels, labels)
    probabilities = torch.nn.functional.one_hot(right, 2).double() * 0.8 + 0.1
    assert estimate_noise_rate(judged(labels, probabilities)) == pytest.approx(0.2)
    unsure = torch.full((100, 2), 0.5, dtype=torch.float64)
    # Everything is above both thresholds and goes to the lower class: half the labels disagree with a constant.
    assert estimate_noise_rate(judged(labels, unsure)) == pytest.approx(0.5)


def judged(labels, probabilities):
    n = len(labels)
    zeros = torch.zeros(n, dtype=torch.int64)
    names = tuple(map(str, range(probabilities.shape[1])))
    return OutOfFold(labels, probabilities, zeros, zeros, names, Recipe(data="digits"))


def test_self_confidence_is_one_minus_p_of_the_given_label():
    p = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
    np.testing.assert_allclose(self_confidence_score(p, [0, 1]), [0.3, 0.9])


def test_cleanlab_is_asked_where_it_is_installed_and_missed_clearly_where_not(monkeypatch):
    p, labels = [[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]], [0, 0, 1]
    if importlib.util.find_spec("cleanlab"):
        np.testing.assert_allclose(cleanlab_score(p, labels, "self_confidence"), self_confidence_score(p, labels))
        assert cleanlab_score(p, labels).argmax() == 1
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    with pytest.raises(InputError, match="pip install cleanlab"):
        cleanlab_score(p, labels)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: kappa_score(History(-torch.ones_like(SMALL.kappa), SMALL.loss, SMALL.prediction)), "has no κ"),
        (lambda: loss_score(SMALL, (2, 5)), "window 2..5 is no range of the 4 epochs"),
        (lambda: loss_score(SMALL, (2, 2)), "window 2..2"),
        (lambda: estimate_noise_rate(SMALL), "pass given"),
        (lambda: estimate_noise_rate(SMALL, [0, 1]), "give one label each"),
        (lambda: self_confidence_score([[2.0, -1.0]], [0]), "pass softmax"),
        (lambda: self_confidence_score([[0.5, 0.6]], [0]), "pass softmax"),
        (lambda: self_confidence_score([[0.5, 0.5]], [2]), "0..1"),
        (lambda: self_confidence_score([[0.5, 0.5]], [0, 1]), "shape"),
        (lambda: fold_of(torch.zeros(4, dtype=torch.int64), 5), "folds is 5"),
        (lambda: fold_of(torch.zeros(4, dtype=torch.int64), 1), "folds is 1"),
        (lambda: find_label_issues("nowhere", score="kapa"), "did you mean kappa"),
        (lambda: find_label_issues("nowhere", score="self-confidence"), "needs out-of-fold models"),
        (lambda: find_label_issues("nowhere"), "is no run folder"),
        (lambda: OutOfFold.open("nowhere.npz"), "there is no file"),
        (lambda: contact_sheet(torch.zeros(0, 1, 4, 4), [], "x.png", ""), "as many captions"),
        (lambda: contact_sheet(torch.zeros(2, 1, 4, 4), ["one"], "x.png", ""), "as many captions"),
        (lambda: contact_sheet(torch.zeros(1, 1, 4, 4), ["one"], "x.png", "", columns=0), "columns is 0"),
    ],
)
def test_bad_input_is_named(function, words):
    with pytest.raises(InputError, match=words):
        function()


def test_folds_are_even_also_within_a_class_and_differ_by_seed():
    labels = torch.arange(103) % 4
    fold = fold_of(labels, 5, seed=1)
    for some in (fold, *(fold[labels == c] for c in range(4))):
        sizes = torch.bincount(some, minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(fold, fold_of(labels, 5, seed=1))
    assert not torch.equal(fold, fold_of(labels, 5, seed=2))


def test_the_csv_is_sorted_and_names_classes_and_files(tmp_path):
    issues = LabelIssues(
        index=torch.tensor([2, 0, 1]),
        given=torch.tensor([0, 1, 1]),
        suggested=torch.tensor([1, 0, 1]),
        kappa=torch.tensor([0, 2.5, math.nan]),
        loss=torch.tensor([3.25, 1, 0.5]),
        score=torch.tensor([1, 0.5, 0]),
        noise_rate=1 / 3,
        class_names=("cat, tabby", "Hündin"),
    )
    issues.to_csv(tmp_path / "issues.csv", files=["a.png", "b.png", "c.png"])
    with open(tmp_path / "issues.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert " ".join(rows[0]) == "index given given_name suggested suggested_name kappa loss score file"
    assert list(rows[0].values()) == ["2", "0", "cat, tabby", "1", "Hündin", "0", "3.25", "1", "c.png"]
    assert [row["file"] for row in rows] == ["c.png", "a.png", "b.png"]
    assert rows[2]["kappa"] == "nan"
    assert issues.suspicious == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_contact_sheet_shows_every_image_in_its_cell(channels, tmp_path):
    images = torch.zeros(10, channels, 5, 5)
    images[9] = 1
    contact_sheet(images, [f"#{i}\n$a_b → c" for i in range(10)], tmp_path / "sheet.png", "ten")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (8 * 165, round((2 * 1.9 + 0.4) * 110))
        pixels = np.asarray(image.convert("L"))
    centre = round(0.4 * 110 + (1.8 - 0.65) * 110)
    assert pixels[centre, 7 * 165 + 82] == 0, "the eighth image ends the first row"
    assert pixels[centre + 209, 82] == 0, "the ninth begins the second"
    assert pixels[centre + 209, 165 + 82] == 255, "the tenth is white"


@pytest.fixture(scope="module")
def noisy_digits(tmp_path_factory):
    """A short run on digits with a fifth of the labels wrong."""
    torch.set_num_threads(1)
    recipe = Recipe(
        data="digits", noise="symmetric", noise_rate=0.2, epochs=8, steps=3, alpha=0.1, track=20, track_steps=1
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "digits")


def test_planted_wrong_labels_are_found_from_one_training_run(noisy_digits):
    labels = training_set(noisy_digits.recipe)[1]
    for score in ("joint", "loss", "kappa"):
        issues = find_label_issues(noisy_digits, score=score)
        assert auroc(issues.score, labels.is_wrong[issues.index]) > 0.9, score
        assert (issues.score.diff() <= 0).all()
    issues = find_label_issues(noisy_digits)
    assert torch.equal(issues.given, labels.given[issues.index])
    assert 0.1 < issues.noise_rate < 0.35
    worst = issues.index[:150]
    assert labels.is_wrong[worst].double().mean() > 0.9
    assert (issues.suggested[:150] == labels.true[worst]).double().mean() > 0.7


def test_the_command_writes_csv_and_contact_sheet_of_a_run(noisy_digits, tmp_path):
    result = call(label_issues, "--run", noisy_digits.path, "--top", 12, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "labels are suspicious" in result.output
    with open(tmp_path / "label_issues.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == list(range(1257))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    with Image.open(tmp_path / "label_issues.png") as image:
        assert image.size == (1320, round((2 * 1.9 + 0.4) * 110))


def test_the_evaluation_tabulates_scores_and_compares_kappa_with_the_loss(noisy_digits, tmp_path):
    file = tmp_path / "figures.json"
    result = call(evaluation.main, noisy_digits.path, "--format", "markdown", "--json", file)
    assert result.exit_code == 0, result.output
    assert result.output.count("| digits |") == 3
    assert "digits, pgd-at, preact_resnet8_narrow, 8 epochs, symmetric 0.2, by history:" in result.output
    table = json.loads(file.read_text())
    for row in table["rows"]:
        low, high = row["auroc"]["interval"]
        assert 0.9 < low < row["auroc"]["value"] < high <= 1
        assert row["true_rate"] == pytest.approx(0.2, abs=0.03)
    by_score = {row["score"]: row["auroc"]["value"] for row in table["rows"]}
    difference = table["kappa_less_loss"][0]["auroc"]
    assert difference["value"] == pytest.approx(by_score["kappa"] - by_score["loss"])
    assert difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert r"\begin{tabular}" in call(evaluation.main, noisy_digits.path, "--format", "latex").output
    assert "did you mean latex" in call(evaluation.main, noisy_digits.path, "--format", "latx").output


def test_several_runs_of_a_setting_are_averaged_with_an_interval_over_runs(noisy_digits):
    one = evaluation.judge(noisy_digits.path)
    noise = np.random.default_rng(0).normal(size=len(one.wrong)) / 5
    other = evaluation.Judged(one.setting, one.scores | {"joint": one.scores["joint"] + noise}, one.wrong, 0.3)
    values = [evaluation.Ranking(j.scores["joint"], j.wrong)()[0] for j in (one, other)]
    row = evaluation.tabulate([one, other])["rows"][0]
    assert (row["score"], row["runs"]) == ("joint", 2)
    assert row["auroc"]["value"] == pytest.approx(np.mean(values))
    half = 12.7062 * np.std(values, ddof=1) / math.sqrt(2)  # Student's t for one degree of freedom
    assert row["auroc"]["interval"][0] == pytest.approx(max(0, np.mean(values) - half), abs=1e-3)
    assert row["estimated_rate"] == pytest.approx((one.estimated_rate + 0.3) / 2)


def test_a_setting_without_wrong_labels_has_a_rate_but_no_ranking(tiny_recipe, tmp_path):
    train(tiny_recipe(noise="none", noise_rate=None), tmp_path / "clean")
    result = call(evaluation.main, tmp_path / "clean", "--format", "markdown")
    assert result.exit_code == 0, result.output
    assert "| joint | 1 | – | – | – |" in result.output


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30), st.randoms())
def test_the_ranking_measures_agree_with_scikit_learn_also_with_ties_and_weights(samples, random):
    score = np.array([float(s) for s, _ in samples])
    wrong = np.array([w for _, w in samples])
    weights = np.array([random.randint(0, 2) for _ in samples])
    repeated, labels = score.repeat(weights), wrong.repeat(weights)
    if labels.all() or not labels.any():
        assert np.isnan(evaluation.Ranking(score, wrong)(weights)).all()
        return
    figures = evaluation.Ranking(score, wrong)(weights)
    expected = [roc_auc_score(labels, repeated), average_precision_score(labels, repeated)]
    np.testing.assert_allclose(figures[:2], expected)
    kth = np.sort(-repeated)[labels.sum() - 1]
    above, tied = -repeated < kth, -repeated == kth
    hits = labels[above].sum() + labels[tied].mean() * (labels.sum() - above.sum())
    assert figures[2] == pytest.approx(hits / labels.sum())


def test_out_of_fold_models_never_train_on_what_they_judge(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(epochs=1)
    trained = []
    monkeypatch.setattr(
        "rb_noisy.label_issues.train",
        lambda recipe, path, **rest: trained.append(recipe) or train(recipe, path, **rest),
    )
    found = out_of_fold(recipe, 3, tmp_path / "folds")
    data, labels = training_set(recipe)
    assert torch.equal(found.given, labels.given)
    assert (labels.given != labels.true).any()
    judged = torch.zeros(len(found.fold), dtype=torch.int64)
    for k, fold_recipe in enumerate(trained):
        fold = load_data(fold_recipe.data)
        held_out = found.fold == k
        assert (fold_recipe.noise, fold_recipe.train_size) == ("none", None), "the labels are as given already"
        assert torch.equal(fold.x_train, data.x_train[~held_out])
        assert torch.equal(fold.y_train, labels.given[~held_out])
        assert torch.equal(fold.x_test, data.x_train[held_out])
        images = {image.numpy().tobytes() for image in fold.x_train}
        assert not images & {image.numpy().tobytes() for image in data.x_train[held_out]}
        model = Run.open(tmp_path / "folds" / str(k)).load("final")
        with torch.no_grad():
            expected = model(data.x_train[held_out]).double().softmax(1)
        torch.testing.assert_close(found.probabilities[held_out], expected)
        judged += held_out
    assert (judged == 1).all()
    assert found.kappa.min() >= 0
    assert found.kappa.max() <= recipe.steps


def test_the_command_trains_folds_goes_on_and_is_evaluated(tiny_data, tiny_recipe, tmp_path):
    fields = {k: v for k, v in tiny_recipe().changes().items() if k not in ("data", "method", "noise", "noise_rate")}
    settings = [part for k, v in fields.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    asked = ["--data", f"npz:{tiny_data}", "--noise", "symmetric", "--noise-rate", 0.3, "--out", tmp_path / "out"]
    first = call(label_issues, *asked, "--folds", 2, "--score", "self-confidence", *settings)
    assert first.exit_code == 0, first.output
    stamp = (tmp_path / "out/folds/1/final.safetensors").stat().st_mtime_ns
    again = call(label_issues, *asked, "--folds", 2, "--score", "joint", *settings)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out/folds/1/final.safetensors").stat().st_mtime_ns == stamp, "nothing is trained again"
    assert OutOfFold.open(tmp_path / "out/out_of_fold.npz").fold.max() == 1
    result = call(evaluation.main, tmp_path / "out", "--format", "markdown")
    assert result.exit_code == 0, result.output
    assert "| 2 folds | self-confidence |" in result.output


def test_the_command_ranks_an_image_folder_from_one_run_and_names_the_files(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random.integers(0, 256, (8, 8), np.uint8))
                image.save(tmp_path / "pets" / split / name / f"{i:02d}.png")
    settings = ["backbone=resnet8_narrow", "steps=2", "batch_size=16", "augment=false", "track=4", "track_steps=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    asked = ["--data", f"imagefolder:{tmp_path / 'pets'}", "--epochs", 2, "--out", tmp_path / "out", *options]
    for _ in range(2):
        result = call(label_issues, *asked)
        assert result.exit_code == 0, result.output
    with open(tmp_path / "out/label_issues.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            expected = ("cat", "dog")[int(row["index"]) // 20], f"{int(row['index']) % 20:02d}.png"
            assert tuple(row["file"].split("/")[-2:]) == expected
            assert row["given_name"] == expected[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digitz"], "did you mean digits"),
        ([], "names no data set"),
        (["--data", "digits", "--score", "kapa"], "did you mean kappa"),
        (["--data", "digits", "--score", "self-confidence"], "needs out-of-fold models"),
        (["--data", "digits", "--folds", "1"], "--folds is 1"),
        (["--data", "digits", "--folds", "-3"], "--folds is -3"),
        (["--data", "digits", "--top", "0"], "--top is 0"),
        (["--data", "digits", "--method", "st"], "leaves no κ"),
        (["--run", "nowhere"], "is no run folder"),
        (["--data", "digits", "--set", "lr"], "is not FIELD=VALUE"),
    ],
)
def test_bad_requests_end_in_one_clear_line_and_train_nothing(arguments, words, tmp_path):
    result = call(label_issues, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert not (tmp_path / "out").exists()


def test_a_given_run_takes_no_recipe(noisy_digits, tmp_path):
    for extra, words in ((["--epochs", 3], "leave out epochs"), (["--folds", 3], "give one of them")):
        result = call(label_issues, "--run", noisy_digits.path, *extra, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert words in result.output
