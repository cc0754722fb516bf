import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import eval.common
import eval.pgd
from eval import autoattack, calibration, pgd
from eval.__main__ import main as evaluate_all
from model_zoo import registry
from rb_noisy.attacks import pgd as attack
from rb_noisy.data import load_data
from rb_noisy.files import sha256, tensors_digest
from rb_noisy.subsets import subset
from rb_noisy.training import train

COUNT = 12


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    from rb_noisy.recipes import Recipe

    recipe = Recipe(
        data=f"npz:{tiny_data}",
        backbone="resnet8_narrow",
        eps=0.15,
        alpha=0.04,
        steps=3,
        epochs=4,
        batch_size=32,
        lr=0.05,
        augment=False,
        normalize=False,
        track=20,
        track_steps=2,
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "tiny")


def command(module, *arguments, cwd, check=True):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def call(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def children(pid):
    """Process numbers of the processes that `pid` has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def folder(out, run, n=60, label="tiny", eps=0.15):
    weights, data = sha256(run.path / "final.safetensors")[:8], load_data(run.recipe.data)
    part = subset(run.recipe.data, data.y_test, n).index
    images = tensors_digest([("x", data.x_test[part]), ("y", data.y_test[part])])[:8]
    return out / f"{label}-{weights}-quadrants-{n}-{images}-Linf-{eps}"


@pytest.fixture(scope="module")
def everything(run, tmp_path_factory):
    """One command on a run folder, from another directory."""
    out = tmp_path_factory.mktemp("everything")
    done = command("eval", "--model", run.path, "--n", COUNT, "--out", out, cwd=out)
    return done.stdout, registry.read_results(registry.results_file(run.path, "final")), folder(out, run, COUNT)


def test_one_command_measures_everything_and_says_where_the_model_stands(everything):
    stdout, results, out = everything
    assert results.keys() == {"pgd-20", "autoattack", "calibration"}
    for words in ("PGD-20", "AutoAttack, standard version", "Calibration of tiny", "tiny is 1st of 1 on quadrants"):
        assert words in stdout
    for figures in results.values():
        assert {"dataset", "split", "n", "of", "norm", "eps", "seed", "date", "attack"} <= figures.keys()
        assert (figures["n"], figures["of"], figures["eps"]) == (COUNT, 60, 0.15)
    for rate in (*results["autoattack"]["after"].values(), results["pgd-20"]["final_iterate"], results["autoattack"]):
        low, high = rate["interval"]
        assert low <= rate["accuracy"] <= high
    assert results["autoattack"]["after"]["square"]["accuracy"] == results["autoattack"]["accuracy"]
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_verdicts_are_kept_per_sample_and_agree_with_the_figures(run, everything):
    _, results, out = everything
    data = load_data(run.recipe.data)
    with np.load(out / "pgd-20.npz", allow_pickle=False) as verdicts:
        assert verdicts["y"].tolist() == data.y_test[verdicts["index"]].tolist()
        assert verdicts["index"].tolist() == subset(data.name, data.y_test, COUNT).index.tolist()
        final, any_iterate = verdicts["final_iterate"], verdicts["any_iterate"]
        assert final.mean() == pytest.approx(results["pgd-20"]["final_iterate"]["accuracy"])
        assert not (any_iterate & ~final).any()
        assert not (any_iterate & ~verdicts["natural"]).any()
    with np.load(out / "autoattack.npz", allow_pickle=False) as verdicts:
        assert verdicts["robust"].mean() == pytest.approx(results["autoattack"]["accuracy"])
        assert not (verdicts["robust"] & (verdicts["broken_by"] != -1)).any()
    with np.load(out / "calibration.npz", allow_pickle=False) as values:
        with torch.no_grad():
            logits = run.load()(data.x_test[values["index"]])
        np.testing.assert_allclose(values["natural_logits"], logits, atol=1e-5)
        assert values["natural_kappa"].min() >= 1, "against its own prediction no sample is wrong at the start"
    assert results["calibration"]["report"]["natural"]["robust"]["share"] == results["autoattack"]["accuracy"]


def test_two_processes_killed_and_launched_again_reach_the_verdicts_of_one(run, tmp_path):
    arguments = ["--model", run.path, "--n", 4, "--batch-size", 1, "--out"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert call(evaluate_all, *arguments, alone, "--json", alone / "figures.json").exit_code == 0

    def launch(module, *more):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--main_process_port", "0", "-m", module]
        return subprocess.Popen(
            [*launcher, *map(str, (*arguments, shared, "--json", shared / "figures.json", *more))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    killed = launch("eval.autoattack")
    state = folder(shared, run, 4) / ".autoattack.state.1of2.npz"
    deadline = time.monotonic() + 100
    while not state.exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(children(killed.pid)[0], signal.SIGKILL)
    assert killed.wait(60) != 0
    assert not (shared / "figures.json").exists()
    # What a kill in the midst of writing leaves; when exactly it comes cannot be arranged.
    (folder(shared, run, 4) / "..autoattack.state.0of2.1.tmp.npz").write_bytes(b"half")
    resumed = launch("eval")
    printed = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0
    assert printed.count("AutoAttack, standard version") == 1, "one process prints"
    left = [file.name for file in folder(shared, run, 4).iterdir() if file.name.startswith(".")]
    assert not left, "a finished evaluation leaves nothing to resume"
    for file in ("pgd-20.npz", "autoattack.npz", "calibration.npz"):
        with np.load(folder(alone, run, 4) / file) as one, np.load(folder(shared, run, 4) / file) as two:
            assert one.files == two.files
            assert all(np.array_equal(one[name], two[name]) for name in one.files)
    one, two = (json.loads((out / "figures.json").read_text(), object_hook=_undated) for out in (alone, shared))
    assert one == two


def _undated(figures):
    """Figures as they would be on any day: midnight may come between two evaluations."""
    return {name: value for name, value in figures.items() if name != "date"}


def test_pgd_figures_are_those_of_the_library(run, tmp_path):
    result = call(pgd.main, "--model", run.path, "--out", tmp_path, "--json", tmp_path / "f.json", "--batch-size", 60)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "f.json").read_text())["pgd-20"]
    data, seed = load_data(run.recipe.data), int(np.random.SeedSequence((0, 0)).generate_state(1)[0])
    model = run.load()
    found = attack(model, data.x_test, data.y_test, eps=0.15, alpha=0.0375, steps=20, seed=seed, evaluate_final=True)
    right = model(data.x_test).argmax(1) == data.y_test
    assert figures["final_iterate"]["accuracy"] == pytest.approx(found.final_correct.double().mean().item())
    assert figures["any_iterate"]["accuracy"] == pytest.approx((~found.broken & right).double().mean().item())


def test_an_interrupted_pgd_goes_on_where_it_was(run, tmp_path, monkeypatch):
    arguments = ["--model", run.path, "--batch-size", 15]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert call(pgd.main, *arguments, "--out", whole, "--json", whole / "f.json").exit_code == 0
    batches = []

    def interrupted(*args, **kwargs):
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return attack(*args, **kwargs)

    monkeypatch.setattr(eval.pgd, "pgd", interrupted)
    stopped = call(pgd.main, *arguments, "--out", part, "--json", part / "f.json")
    assert stopped.exit_code == 130
    assert call(pgd.main, *arguments, "--out", part, "--json", part / "f.json").exit_code == 0
    assert len(batches) == 3 + 2, "two of the four batches were done before"
    assert json.loads((whole / "f.json").read_text()) == json.loads((part / "f.json").read_text())


def test_an_interrupted_pgd_starts_over_on_other_images_of_the_same_name(run, tiny_data, tmp_path, monkeypatch):
    file, sizes, stops = tmp_path / "mine.npz", [], [3]
    with np.load(tiny_data) as arrays:
        np.savez(file, **arrays)
        others = {**arrays, "x_test": 255 - arrays["x_test"]}
    arguments = ["--model", run.path, "--batch-size", 15, "--dataset", f"npz:{file}", "--out", tmp_path]

    def interrupted(*args, **kwargs):
        sizes.append(len(args[1]))
        if len(sizes) in stops:
            raise KeyboardInterrupt
        return attack(*args, **kwargs)

    monkeypatch.setattr(eval.pgd, "pgd", interrupted)
    assert call(pgd.main, *arguments).exit_code == 130
    np.savez(file, **others)
    done = call(pgd.main, *arguments)
    assert done.exit_code == 0, done.output
    assert sizes == [15] * 3 + [15] * 4


def test_figures_enter_the_card_of_a_zoo_model_unless_its_setting_is_another(run, tmp_path):
    zoo = tmp_path / "zoo"
    registry.publish(run.path, "mine", zoo=zoo)
    before = registry.read_card("mine", zoo)["results"].get("pgd-20")
    common = ["--model", "mine", "--zoo", zoo, "--out", tmp_path]
    assert "not a card" in call(pgd.main, *common, "--eps", 0.05).output
    assert "not a card" in call(pgd.main, *common, "--alpha", 0.01).output
    assert registry.read_card("mine", zoo)["results"].get("pgd-20") == before
    assert call(pgd.main, *common).exit_code == 0
    assert registry.read_card("mine", zoo)["results"]["pgd-20"]["n"] == 60
    assert json.loads((folder(tmp_path, run, label="mine") / "pgd-20.json").read_text())["pgd-20"]["n"] == 60
    card = registry.read_card("mine", zoo)
    for other in (["--n", 10], ["--seed", 1]):
        assert "keeps those it has" in call(pgd.main, *common, *other).output
        assert registry.read_card("mine", zoo) == card
    assert "entered" in call(pgd.main, *common, "--seed", 1, "--replace").output
    assert registry.read_card("mine", zoo)["results"]["pgd-20"]["seed"] == 1


def test_another_epsilon_or_fewer_images_leave_earlier_verdicts_where_they_are(run, tmp_path):
    for options in (["--n", 20], ["--n", 10], ["--n", 10, "--eps", 0.05]):
        arguments = ["--model", run.path, "--out", tmp_path, "--json", tmp_path / "f.json"]
        assert call(pgd.main, *arguments, *options).exit_code == 0
    for n, eps in ((20, 0.15), (10, 0.15), (10, 0.05)):
        place = folder(tmp_path, run, n, eps=eps)
        with np.load(place / "pgd-20.npz") as verdicts:
            assert len(verdicts["natural"]) == n
        figures = json.loads((place / "pgd-20.json").read_text())["pgd-20"]
        assert (figures["n"], figures["eps"]) == (n, eps)


def test_presets_are_the_papers_settings(run, tmp_path):
    for preset, (eps, alpha) in {"sglr": (8 / 255, 2 / 255), "nl": (0.031, 0.031 / 4)}.items():
        file = tmp_path / f"{preset}.json"
        call(pgd.main, "--model", run.path, "--preset", preset, "--n", 4, "--out", tmp_path, "--json", file)
        figures = json.loads(file.read_text())["pgd-20"]
        assert (figures["eps"], figures["alpha"], figures["steps"]) == (eps, alpha, 20)


def test_a_timm_network_is_evaluated_on_a_named_data_set(tiny_data, tmp_path):
    arguments = ["--model", "resnet8_narrow", "--dataset", f"npz:{tiny_data}", "--n", 6, "--out", tmp_path]
    result = call(pgd.main, *arguments, "--eps", 0.1, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert "no pretrained weights" in result.output
    assert json.loads((tmp_path / "f.json").read_text())["model"] == "resnet8_narrow"


def test_calibration_asks_for_autoattack_verdicts_of_the_same_weights_only(run, tmp_path):
    folder(tmp_path, run).mkdir()
    arrays = {"robust": np.ones(60, bool), "eps": 0.15, "y": load_data(run.recipe.data).y_test.numpy()}
    arrays["images_sha256"] = tensors_digest([("x", load_data(run.recipe.data).x_test)])
    np.savez(folder(tmp_path, run) / "autoattack.npz", weights_sha256="other weights", **arrays)
    result = call(calibration.main, "--model", run.path, "--out", tmp_path, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert "run eval.autoattack first" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "sglr_digitz"], "unknown model 'sglr_digitz'; did you mean sglr_digits"),
        (["--model", "resnet_18"], "did you mean resnet18"),
        (["--model", "Q"], "known: at_cifar10, at_cifar10_narrow,"),
        (["--model", "resnet8_narrow"], "name what to evaluate it on with --dataset"),
        (["--model", "resnet8_narrow", "--dataset", "digits"], "has no ε of its own; give --eps"),
        (["--model", "RUN", "--n", "61"], "--n is 61"),
        (["--model", "RUN", "--n", "0"], "--n is 0"),
        (["--model", "RUN", "--batch-size", "0"], "--batch-size is 0"),
        (["--model", "RUN", "--dataset", "digits"], "tells 4 classes apart but digits has 10"),
        (["--model", "RUN", "--preset", "sgrl"], "did you mean sglr"),
        (["--model", "RUN", "--checkpoint", "first"], "give 'best' or 'final'"),
        (["--model", "RUN", "--eps", "-1"], "--eps is -1"),
        (["--model", "RUN", "--eps", "-1/255"], "--eps is -0.0039"),
        (["--model", "RUN", "--eps", "8/x"], "--eps is '8/x'; give a number such as 0.2 or 8/255"),
        (["--model", "RUN", "--seed", "-1"], "--seed is -1"),
        (["--model", "RUN", "--device", "gpu"], "--device gpu cannot be used"),
        (["--model", "RUN", "--preset", "nl", "--alpha", "0.1"], "give it alone"),
        (
            ["--model", "small_cnn", "--dataset", "digits", "--eps", "0.1"],
            "small_cnn on digits: the network cannot take 16 images of 1x8x8",
        ),
        (["--model", "at_digits", "--zoo", "ZOO"], "unknown model 'at_digits'"),
    ],
)
def test_bad_requests_end_in_one_clear_line_and_code_2(arguments, words, run, tmp_path):
    zoo = tmp_path / "zoo"
    registry.publish(run.path, "mine", zoo=zoo)
    arguments = [{"RUN": str(run.path), "ZOO": str(zoo)}.get(a, a) for a in arguments]
    result = call(pgd.main, *arguments, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_figures_of_best_and_final_weights_are_kept_apart(run, tmp_path):
    for checkpoint in ("final", "best"):
        arguments = ["--model", run.path, "--out", tmp_path, "--n", 60 if checkpoint == "final" else 30]
        assert call(pgd.main, *arguments, "--checkpoint", checkpoint).exit_code == 0
    counts = {c: registry.read_results(registry.results_file(run.path, c))["pgd-20"]["n"] for c in ("final", "best")}
    assert counts == {"final": 60, "best": 30}


def test_a_model_is_found_by_its_robustbench_name_too(run, tmp_path):
    zoo, file = tmp_path / "zoo", tmp_path / "f.json"
    registry.publish(run.path, "mine", zoo=zoo)
    arguments = ["--model", "mine_quadrants_linf", "--zoo", zoo, "--out", tmp_path, "--json", file]
    assert call(pgd.main, *arguments).exit_code == 0
    natural = json.loads(file.read_text())["pgd-20"]["natural"]["accuracy"]
    assert natural == pytest.approx(run.metrics[-1]["test_natural_acc"], abs=0.2)
    assert natural > 0.5, "a random network tells four classes apart by chance"


def test_three_classes_are_attacked_without_the_loss_that_needs_four(tiny_data, tmp_path):
    with np.load(tiny_data) as arrays:
        keep = {part: arrays[f"y_{part}"] < 3 for part in ("train", "test")}
        three = {name: arrays[name][keep[name[2:]]] for name in arrays.files}
    np.savez(tmp_path / "three.npz", **three)
    options = ["--model", "resnet8_narrow", "--dataset", f"npz:{tmp_path / 'three.npz'}", "--n", 2, "--eps", 0.5]
    result = call(autoattack.main, *options, "--out", tmp_path, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "f.json").read_text())["autoattack"]
    assert list(figures["after"]) == ["apgd-ce", "fab-t", "square"]
    assert "without APGD-T" in figures["attack"]


def test_a_damaged_state_is_named_and_a_state_of_other_settings_started_over(run, tmp_path):
    state = folder(tmp_path, run) / ".pgd-20.state.npz"
    state.parent.mkdir()
    state.write_bytes(b"PK no zip")
    result = call(pgd.main, "--model", run.path, "--out", tmp_path)
    assert result.exit_code == 2
    assert "delete it to start this evaluation over" in result.output
    np.savez(state, key="other settings", **{"0.natural": np.zeros(60, bool)})
    file = tmp_path / "f.json"
    assert call(pgd.main, "--model", run.path, "--out", tmp_path, "--json", file).exit_code == 0
    assert json.loads(file.read_text())["pgd-20"]["natural"]["accuracy"] > 0


def test_any_iterate_alone_is_the_same_figure_and_stays_out_of_the_card(run, tmp_path):
    common = ["--model", run.path, "--batch-size", 25]
    figures = {}
    for name, more in (("pgd-20", []), ("pgd-20-any", ["--any-iterate"])):
        done = call(pgd.main, *common, "--out", tmp_path, "--json", tmp_path / "f.json", *more)
        assert done.exit_code == 0, done.output
        figures[name] = json.loads((tmp_path / "f.json").read_text())[name]
    assert figures["pgd-20-any"]["any_iterate"] == figures["pgd-20"]["any_iterate"]
    assert 0 < figures["pgd-20"]["any_iterate"]["accuracy"] < 1
    assert "final_iterate" not in figures["pgd-20-any"]
    before = registry.read_results(registry.results_file(run.path, "final"))
    assert "not a card" in call(pgd.main, *common, "--out", tmp_path, "--any-iterate").output
    assert registry.read_results(registry.results_file(run.path, "final")) == before


def test_an_estimate_says_that_it_is_one(run, tmp_path):
    done = call(autoattack.main, "--model", run.path, "--n", 1, "--estimate", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "AutoAttack in bf16: an estimate" in done.output
    assert "not a card" in done.output
    refused = call(autoattack.main, "--model", run.path, "--estimate", "--reference", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "leave out --estimate" in refused.output
