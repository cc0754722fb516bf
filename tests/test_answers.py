"""What commands answer to filters, spellings and combinations of options that cannot be meant."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import eval.calibration
from eval.leaderboard import app as leaderboard
from model_zoo.registry import is_noise, list_models, load_model
from rb_noisy.cli import app
from rb_noisy.confidence import calibrate
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.gallery import gallery
from rb_noisy.label_issues import LabelIssues
from rb_noisy.recipes import Recipe
from rb_noisy.sweep import expand_grid

calibration = typer.Typer()
calibration.command()(eval.calibration.main)


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refusal(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


# --- filters


@pytest.mark.parametrize("command", [(app, "models"), (leaderboard,)], ids=["models", "leaderboard"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--dataset", "cifar10_jpg"], "'cifar10_jpg'; did you mean cifar10_jpeg"),
        (["--noise", "symetric 0.4"], "'symetric 0.4'; did you mean symmetric 0.4"),
        (["--dataset", "digits", "--noise", "human"], "'human'; known: none, symmetric 0.4"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_unknown_name(command, asked, words):
    output = refusal(*command, *asked)
    assert re.search(r"error: unknown (data set|label noise)", output)
    assert words in output


def test_what_the_zoo_has_not_is_an_unknown_name_for_each_filter():
    assert "did you mean cifar10_jpeg" in refusal(app, "models", "--dataset", "cifar10")
    assert "unknown method of these models 'pgd-ta'; did you mean pgd-at" in refusal(
        app, "models", "--method", "pgd-ta"
    )


@pytest.mark.parametrize("asked", ["cifar10_jpeg", "cifar10 (JPEG copy)"])
def test_what_tables_call_a_data_set_can_be_asked_for(asked):
    assert "at_cifar10_narrow" in call(app, "models", "--dataset", asked).output
    assert "at_cifar10_narrow" in call(leaderboard, "--dataset", asked).output


# --- one spelling of a noise


@pytest.mark.parametrize(
    ("title", "asked"),
    [
        ("none", ["none", "clean labels"]),
        ("symmetric 0.4", ["symmetric", "symmetric 0.4", "symmetric 0.40", "symmetric .4"]),
        ("human worse", ["human", "human worse", "human:labels.npz:worse"]),
    ],
)
def test_every_spelling_finds_a_noise_and_no_other(title, asked):
    for text in asked:
        assert is_noise(title, text), text
        for other in {"none", "symmetric 0.4", "human worse"} - {title}:
            assert not is_noise(other, text), text
    assert not is_noise("symmetric 0.4", "symmetric 0.2")
    assert not is_noise("human worse", "human aggre")


@pytest.mark.parametrize("noise", ["none", "clean labels", "symmetric", "symmetric 0.4", "human worse"])
def test_models_and_leaderboard_take_the_same_spellings(noise):
    models = set(list_models(noise=noise))
    shown = call(app, "models", "--noise", noise).output
    board = call(leaderboard, "--noise", noise).output
    assert models
    for name in list_models():
        assert (f" {name} " in shown) == (f" {name} " in board) == (name in models), name


def test_a_recipe_takes_the_spellings_of_the_tables():
    rated = Recipe(data="digits", noise="symmetric", noise_rate=0.4)
    assert Recipe(data="digits", noise="symmetric 0.4") == rated
    assert Recipe(data="digits", noise="symmetric 0.4", noise_rate=0.4) == rated
    assert Recipe(data="digits", noise="clean labels") == Recipe(data="digits")
    with pytest.raises(InputError, match=r"noise 'symmetric 0.4' and noise_rate 0.2 differ"):
        Recipe(data="digits", noise="symmetric 0.4", noise_rate=0.2)
    file = "human:my labels 0.4"
    assert Recipe(data="digits", noise=file).noise_options == {"file": "my labels 0.4"}


def test_a_sweep_takes_them_too():
    axes = {"data": ["digits"], "seed": [0, 1]}
    same = {"noise": ["none", "symmetric"], "noise_rate": [0.4]}
    separate = [expand_grid(axes | {"noise": [kind], "noise_rate": [0.4]}) for kind in ("symmetric",)]
    assert expand_grid(axes | {"noise": ["symmetric 0.4"]}) == separate[0]
    assert expand_grid(axes | {"noise": ["clean labels", "symmetric 0.4"]}) == expand_grid(axes | same)


@pytest.mark.parametrize("command", ["train", "sweep", "label-issues"])
def test_every_command_that_trains_reads_kind_and_rate_in_one(command, tmp_path):
    asked = ["--data", "digits", "--noise", "symmetric 0.4", "--noise-rate", "0.2", "--out", tmp_path / "out"]
    assert "noise 'symmetric 0.4' and noise_rate 0.2 differ" in refusal(app, command, *asked)


# --- options that belong together


@pytest.mark.parametrize("option", [["--splits", "20"], ["--clever"], ["--label-noise", "0.4"]])
def test_an_option_of_a_target_is_refused_without_one(option):
    output = refusal(calibration, "--model", "at_digits", *option)
    assert f"error: {option[0]}" in output
    assert "--target" in output


def test_annotate_with_a_calibration_says_one_thing(tmp_path):
    data = load_data("digits")
    model = load_model("at_digits")
    sure = calibrate(model, data.x_test[:60], data.y_test[:60], eps=0.15, method="logistic", kappa_steps=4)
    file = tmp_path / "confidence.json"
    sure.save(file)
    np.savez(tmp_path / "a.npz", x=data.x_test[:6].permute(0, 2, 3, 1).numpy())
    asked = ["annotate", "--model", "at_digits", "--images", f"npz:{tmp_path / 'a.npz'}", "--calibration", file]
    asked += ["--out", tmp_path / "labels.csv"]
    for option, given, own in (("--eps", "0.1", "0.15"), ("--steps", "10", "4")):
        assert f"{option} is {given} but {file} is for {own}; leave out {option}" in refusal(app, *asked, option, given)
        assert not (tmp_path / "labels.csv").exists()
    same = call(app, *asked, "--eps", "0.15", "--steps", "4")
    assert same.exit_code == 0, same.output
    plain = call(app, *asked)
    assert plain.output == same.output
    assert "the calibrated probability of 'right': go by it, not by κ" in plain.output
    assert "do not trust" not in plain.output
    assert "not calibrated" not in plain.output


# --- the page of label-issues


def issues(rate):
    index = torch.arange(4)
    values = torch.ones(4, dtype=torch.float64)
    return LabelIssues(index, index % 2, (index + 1) % 2, values, values, values, rate, ("cat", "dog"))


def test_the_page_carries_the_warning_of_the_terminal():
    from rb_noisy.commands import label_issues

    images = torch.zeros(4, 1, 8, 8)
    doubtful, fine = issues(0.6), issues(0.1)
    assert doubtful.warning in gallery(doubtful, images, "pets")
    assert "more than can be told" not in gallery(fine, images, "pets")
    with label_issues.console.capture() as said:
        label_issues._show(doubtful, label_issues.Path("out"))
    assert f"warning: {doubtful.warning}" in said.get()


# --- places on the Hub


@pytest.mark.parametrize("hub", ["../..", "hf://../..", "a/b/c", "user", "user/..", "-a/b", "user/re po"])
def test_no_place_but_a_repository_is_one(hub, tmp_path):
    run = tmp_path / "run"
    output = refusal(app, "publish", run, "mine", "--zoo", tmp_path / "zoo", "--hub", hub)
    assert f"error: {hub!r} is no place on the Hugging Face Hub" in output
    assert not (tmp_path / "zoo").exists()
    if hub.startswith("hf://"):
        assert "is no place on the Hugging Face Hub" in refusal(app, "models", "--zoo", hub)


def test_a_card_that_names_no_repository_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    from model_zoo.registry import read_card, weights_file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    card = json.loads(json.dumps(read_card("at_digits")))
    card["weights"] |= {"hub": "../..", "file": "nowhere.safetensors"}
    with pytest.raises(InputError, match=r"'\.\./\.\.' is no place on the Hugging Face Hub"):
        weights_file(card)
