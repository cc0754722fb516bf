"""The zoo's models by RobustBench and timm, and timm's own pretrained weights with the Hub's package of today."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rb_noisy
from model_zoo.registry import read_cards, timm_names
from rb_noisy import compat
from rb_noisy.errors import InputError

ROOT = Path(__file__).parents[1]
CIFAR = [card["name"] for card in read_cards() if card["dataset"] == "cifar10_jpeg"]


@pytest.fixture
def robustbench():
    compat.install()
    return importlib.import_module("robustbench")


def test_every_model_of_the_zoo_has_a_name_that_robustbench_forms():
    import timm

    assert len(CIFAR) == 7
    for card in read_cards():
        dataset = {"cifar10_jpeg": "cifar10"}.get(card["dataset"], card["dataset"])
        names = timm_names(card)
        assert f"{card['name']}_{dataset}_linf" in names
        assert all(map(timm.is_model, names))
        assert timm.is_model(f"{card['name']}_{card['dataset']}_linf")


@pytest.mark.parametrize("name", [name for name in CIFAR if "sglr" in name])
def test_robustbench_loads_the_cifar_models_as_rb_noisy_does(robustbench, name):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = robustbench.load_model(name, dataset="cifar10", threat_model="Linf")
    assert torch.equal(model(x), rb_noisy.load_model(name)(x))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dataset": "cifar10_jpeg"}, "unknown RobustBench data set 'cifar10_jpeg'; did you mean cifar10"),
        ({"dataset": "digitz"}, "unknown RobustBench data set 'digitz'; did you mean digits"),
        ({}, "sglr_digits is no model of 'cifar10_linf'; load it with dataset='digits', threat_model='Linf'"),
        ({"dataset": "cifar100"}, "load it with dataset='digits', threat_model='Linf'"),
        ({"dataset": "digits", "threat_model": "L2"}, "load it with dataset='digits', threat_model='Linf'"),
    ],
)
def test_a_missing_data_set_is_said_in_words(robustbench, asked, words):
    with pytest.raises(InputError, match=words):
        robustbench.load_model("sglr_digits", **asked)


def test_a_model_of_the_jpeg_copy_is_said_to_be_found_under_cifar10(robustbench):
    with pytest.raises(InputError, match="load it with dataset='cifar10', threat_model='Linf'"):
        robustbench.load_model("at_cifar10", dataset="cifar100")


def test_robustbench_s_own_missing_models_are_missing_as_before(robustbench):
    with pytest.raises(KeyError, match="NoSuchModel"):
        robustbench.load_model("NoSuchModel", dataset="cifar10")


def test_images_that_cannot_be_fetched_are_said_in_words(robustbench, monkeypatch, tmp_path):
    from robustbench import data

    def unreachable(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(data.datasets, "CIFAR10", unreachable)
    with pytest.raises(InputError, match=rf"cifar10 is not in {tmp_path} and cannot be fetched \(no route to host\)"):
        data.load_clean_dataset(data.BenchmarkDataset("cifar10"), 5, str(tmp_path), None)


HUB = """
import huggingface_hub, json, sys, torch
from pathlib import Path
from safetensors.torch import save_file

folder, safe = Path(sys.argv[1]), sys.argv[2] == "safetensors"
asked = []

def download(repo_id, filename, **options):
    asked.append((repo_id, filename, options.get("library_name")))
    if not (folder / filename).is_file():
        from huggingface_hub.utils import EntryNotFoundError
        raise EntryNotFoundError.__new__(EntryNotFoundError)
    return str(folder / filename)

huggingface_hub.hf_hub_download = download  # the faked Hub
import rb_noisy, timm

theirs = timm.create_model("resnet10t", num_classes=1000)
if safe:
    save_file(theirs.state_dict(), folder / "model.safetensors")
else:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))
    torch.save({"state": Evil()}, folder / "pytorch_model.bin")
try:
    model = timm.create_model("resnet10t", pretrained=True)
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values()))
except Exception as error:
    same = type(error).__name__
print(json.dumps([same, asked[:1], timm.__version__]))
"""


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_timm_s_pretrained_weights_come_from_the_hub_and_run_no_code(tmp_path, kind):
    """With the timm and the huggingface_hub that are installed, in an interpreter of its own."""
    command = [sys.executable, "-c", HUB, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    same, asked, _ = json.loads(done.stdout.splitlines()[-1])
    assert asked == [["timm/resnet10t.c3_in1k", "model.safetensors", "timm"]]
    assert same is True if kind == "safetensors" else same in ("UnpicklingError", "RuntimeError")
    assert not (tmp_path / "ran").exists()


def test_a_hub_that_timm_knows_is_left_alone():
    class Hub:
        _has_hf_hub = True

    before = dict(vars(Hub))
    compat._mend_hub(Hub)
    assert dict(vars(Hub)) == before
