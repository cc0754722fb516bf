"""A run goes on with the images and labels that it began with; and batches of one sample."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rb_noisy.cli import app
from rb_noisy.errors import InputError
from rb_noisy.runs import Run
from rb_noisy.training import train


@pytest.fixture
def own(tiny_data, tiny_recipe, tmp_path):
    """The recipe of a run of two epochs on data of its own, of which one is trained; its files."""
    with np.load(tiny_data) as arrays:
        arrays = dict(arrays)
    file, out = tmp_path / "mine.npz", tmp_path / "run"
    np.savez(file, **arrays)
    recipe = tiny_recipe(data=f"npz:{file}")

    class StopError(Exception):
        pass

    def stop(line):
        raise StopError

    with pytest.raises(StopError):
        train(recipe, out, on_epoch=stop)
    assert len(Run.open(out).metrics) == 1
    return recipe, arrays, file, out


@pytest.mark.parametrize("changed", ["x_train", "y_train", "x_test", "y_test"])
def test_resume_refuses_other_data_of_the_same_name(own, changed):
    _, arrays, file, out = own
    np.savez(file, **arrays | {changed: np.roll(arrays[changed], 1, axis=0)})
    before = (out / "state.safetensors").read_bytes()
    done = CliRunner().invoke(app, ["train", "--out", str(out), "--resume"])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert "the images or labels of" in said
    assert "put them back, or train into another folder" in said
    assert (out / "state.safetensors").read_bytes() == before
    np.savez(file, **arrays)
    done = CliRunner().invoke(app, ["train", "--out", str(out), "--resume"])
    assert done.exit_code == 0, done.output
    assert Run.open(out).finished


def test_a_state_from_before_there_was_a_digest_goes_on_to_the_same_weights(own, tmp_path):
    recipe, _, _, out = own
    state = out / "state.safetensors"
    with safe_open(state, framework="pt") as opened:
        header = opened.metadata()
    del header["data_sha256"]
    save_file(load_file(state), state, header)
    resumed, whole = train(recipe, out, resume=True), train(recipe, tmp_path / "whole")
    one, other = (load_file(run.path / "final.safetensors") for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with safe_open(state, framework="pt") as opened:
        assert "data_sha256" in opened.metadata()


@pytest.fixture
def for_small_cnn(tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"x_{s}": random.integers(0, 256, (9, 28, 28), dtype=np.uint8) for s in ("train", "test")}
    np.savez(tmp_path / "small.npz", **arrays, y_train=np.arange(9) % 3, y_test=np.arange(9) % 3)
    return {"data": f"npz:{tmp_path / 'small.npz'}", "backbone": "small_cnn", "epochs": 1, "lr": 0.01}


@pytest.mark.parametrize("method", ["pgd-at", "trades+sglr", "mart+awp"])
def test_batches_of_one_train_a_network_without_batchnorm(method, for_small_cnn, tiny_recipe, tmp_path):
    run = train(tiny_recipe(**for_small_cnn, batch_size=1, method=method), tmp_path / "run")
    assert run.finished
    assert (run.history().prediction >= 0).all(), "all samples were trained on"


def test_batches_of_one_are_refused_with_their_reason(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match=r"batch_size is 1, but 'resnet8_narrow' has BatchNorm.* give 2 or more"):
        train(tiny_recipe(batch_size=1), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(InputError, match=r"1 training samples are too few .* BatchNorm, which needs 2"):
        train(tiny_recipe(train_size=1), tmp_path / "run")
