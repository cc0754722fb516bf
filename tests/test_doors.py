"""No card, run folder, recipe or other file makes code run, a file be opened or the network be asked."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import rb_noisy
from model_zoo import registry
from rb_noisy.backbones import build_backbone
from rb_noisy.confidence import Calibrated, calibrate
from rb_noisy.errors import InputError
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run, check_teacher, load_teacher
from rb_noisy.training import train

STUDY = registry.BUILT_IN / "studies/digits-figures/pgd-at+ls_symmetric0.4_seed0"
SENT = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
watched = {"bait": None, "seen": []}


def watch(event, arguments):
    """An audit hook cannot be taken away again: without a bait it does nothing."""
    if watched["bait"] is None:
        return
    opened = event == "open" and str(arguments[0]).startswith(watched["bait"])
    local = event == "socket.connect" and arguments[1] is not None and isinstance(arguments[1], str)
    if opened or (event in SENT and not local):
        watched["seen"].append((event, str(arguments)))


sys.addaudithook(watch)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def bait(tmp_path):
    """A pickle. At the test's end nothing may have run it, opened it or asked the network."""
    folder = tmp_path / "bait"
    folder.mkdir()
    file, ran = folder / "weights.json", tmp_path / "ran"
    file.write_bytes(pickle.dumps({"state_dict": Payload(ran)}))
    watched.update(bait=str(folder), seen=[])
    yield str(file)
    seen, watched["bait"] = list(watched["seen"]), None
    assert not ran.exists()
    assert not seen


def hostile(bait):
    """Options by which timm would open the bait, or ask the network."""
    url = "http://127.0.0.1:9/weights.pth"
    return [
        {"checkpoint_path": bait},
        {"pretrained_cfg_overlay": {"file": bait}, "pretrained": True},
        {"pretrained_cfg": {"file": bait}, "pretrained": True},
        {"pretrained_cfg": {"url": url}, "pretrained": True},
        {"pretrained_cfg": {"hf_hub_id": "someone/weights"}, "pretrained": True},
        {"pretrained_cfg_overlay": {"url": url}},
        {"cache_dir": bait},
        {"global_pool": bait},
        {"global_pool": url},
        {"global_pool": [{"file": bait}]},
        {"drop_rate": {"file": bait}},
        {"width": {"url": url}},
        {"feature_cfg": {"feature_cls": "fx"}},
        {"features_only": True},
    ]


NAMES = ("hf-hub:someone/network", "hf_hub:someone/network", "local-dir:/tmp", "../resnet18", "resnet18.none", "a:b")


@pytest.fixture
def zoo(tmp_path):
    """A zoo with one of our models, and a function that changes its card."""
    card = registry.read_card("st_digits")
    file = tmp_path / "zoo/model_info/digits/Linf/st_digits.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "zoo/weights").mkdir()
    shutil.copy(registry.weights_file(card), tmp_path / "zoo/weights")

    def change(**fields):
        file.write_text(json.dumps(card | fields))
        return tmp_path / "zoo"

    change()
    return change


@pytest.fixture
def folder(tmp_path):
    """A finished run folder, and a function that changes its description."""
    path = tmp_path / "run"
    path.mkdir()
    for name in ("run.json", "metrics.jsonl", "final.safetensors"):
        shutil.copy(STUDY / name, path)
    about = json.loads((path / "run.json").read_text())

    def change(**fields):
        (path / "run.json").write_text(json.dumps(about | fields))
        return path

    return change


@pytest.mark.parametrize("number", range(len(hostile(""))))
@pytest.mark.parametrize("name", ["preact_resnet8_narrow", "resnet18"])
def test_no_option_of_a_card_or_a_run_folder_opens_anything(bait, zoo, folder, name, number):
    options = {"name": name, "num_classes": 10, "in_chans": 1} | hostile(bait)[number]
    with pytest.raises(InputError):
        rb_noisy.load_model("st_digits", zoo=zoo(model_options=options))
    with pytest.raises(InputError):
        Run.open(folder(model_options=options)).load()
    with pytest.raises(InputError):
        registry.publish(folder(model_options=options), "mine", zoo=bait + "-zoo")
    with pytest.raises(InputError):
        load_teacher(str(folder(model_options=options)), torch.rand(2, 1, 8, 8), 10)


@pytest.mark.parametrize("number", range(len(hostile(""))))
def test_no_option_of_a_recipe_opens_anything_and_nothing_is_written(bait, number, tmp_path, tiny_recipe):
    with pytest.raises(InputError):
        train(tiny_recipe(epochs=1, backbone_options=hostile(bait)[number]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_network_is_an_address(bait, zoo, folder, name, tmp_path, tiny_recipe):
    options = {"name": name, "num_classes": 10, "in_chans": 1}
    with pytest.raises(InputError):
        rb_noisy.load_model("st_digits", zoo=zoo(model_options=options))
    with pytest.raises(InputError):
        Run.open(folder(model_options=options)).load()
    with pytest.raises(InputError):
        check_teacher(name)
    with pytest.raises(InputError):
        load_teacher(name, torch.rand(2, 1, 8, 8), 10)
    with pytest.raises(InputError):
        train(tiny_recipe(epochs=1, backbone=name), tmp_path / "new")


def test_a_finished_network_is_never_fetched_again(bait, zoo, folder):
    """What was once begun from pretrained weights says so in its recipe; its own weights lie beside it."""
    options = {"name": "preact_resnet8_narrow", "num_classes": 10, "in_chans": 1, "pretrained": True}
    recipe = Run.open(folder()).recipe.to_dict() | {"backbone_options": {"pretrained": True}}
    before = Run.open(folder()).load().state_dict()
    after = Run.open(folder(model_options=options, recipe=recipe)).load().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    rb_noisy.load_model("st_digits", zoo=zoo(model_options=options, recipe=recipe))
    for load in (
        lambda: rb_noisy.load_model("st_digits", zoo=zoo(model_options=options)),
        lambda: Run.open(folder(model_options=options)).load(),
    ):
        with pytest.raises(InputError, match="pretrained"):
            load()


@pytest.mark.parametrize("file", ["../../x.safetensors", "/x.safetensors", "x.pt", "a/x.safetensors", "x/.."])
def test_a_cards_weights_lie_in_its_zoo_and_are_safetensors(bait, zoo, file):
    weights = registry.read_card("st_digits")["weights"]
    for other in ({"file": file}, {"hub": "http://127.0.0.1/x", "file": "missing.safetensors"}):
        with pytest.raises(InputError):
            rb_noisy.load_model("st_digits", zoo=zoo(weights=weights | other))


def test_a_calibration_holds_numbers_only(bait, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    file = tmp_path / "confidence.json"
    calibrate(model, x, y, eps=0.1, method="logistic", features=("max_softmax",)).save(file)
    content = json.loads(file.read_text())
    for options in hostile(bait):
        file.write_text(json.dumps(content | options))
        assert Calibrated.load(file, model).calibrator.method == "logistic"
    for name in content:
        file.write_text(json.dumps(content | {name: {"file": bait}}))
        with pytest.raises(InputError):
            Calibrated.load(file, model)
    file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(InputError):
        Calibrated.load(file, model)


@pytest.mark.parametrize("data", ["../../outside", "npz:..", "a/b"])
def test_publishing_stays_in_the_zoo(bait, folder, tmp_path, data):
    recipe = Run.open(folder()).recipe.to_dict() | {"data": data}
    with pytest.raises(InputError, match="folder of a data set"):
        registry.publish(folder(recipe=recipe), "mine", zoo=tmp_path / "a/b/zoo")
    assert not list(tmp_path.rglob("mine*"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with these files; what it was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked, files = [], {}

    def download(repo_id, filename, revision=None, **_):
        asked.append((repo_id, filename))
        if filename not in files:
            raise EntryNotFoundError(filename)
        return str(files[filename])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return asked, files


def test_pretrained_weights_are_the_hubs_safetensors(hub, tmp_path, tiny_recipe):
    asked, files = hub
    state = timm.create_model("test_efficientnet", num_classes=1000).state_dict()
    files["model.safetensors"] = tmp_path / "model.safetensors"
    save_file(state, files["model.safetensors"])
    model = build_backbone("test_efficientnet", num_classes=4, in_chans=3, pretrained=True).model
    assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"])
    assert {file for _, file in asked} == {"model.safetensors"}

    run = train(
        tiny_recipe(epochs=1, backbone="test_efficientnet", backbone_options={"pretrained": True}), tmp_path / "run"
    )
    asked.clear()
    run.load()
    assert not asked
    assert "pretrained" not in run.model_options


def test_where_the_hub_has_only_a_pickle_nothing_is_loaded(hub, bait, tmp_path):
    asked, files = hub
    files["pytorch_model.bin"] = Path(bait)
    for name in ("test_efficientnet", "convnext_base.clip_laion2b", "vit_base_patch16_siglip_512.webli"):
        with pytest.raises(InputError, match="no pickle is read"):
            build_backbone(name, num_classes=4, in_chans=3, pretrained=True)
    with pytest.raises(InputError, match="no pickle is read"):
        load_teacher("test_efficientnet", torch.rand(2, 3, 64, 64), 1000)
    assert asked
    assert all(file.endswith(".safetensors") for _, file in asked)


def test_networks_with_another_source_of_weights_are_refused(bait):
    """timm would fetch a .pth by its address."""
    alone = [n for n in timm.list_models(pretrained=True) if not timm.get_pretrained_cfg(n).hf_hub_id]
    assert alone
    for name in (alone[0], "preact_resnet8_narrow"):
        with pytest.raises(InputError, match="no pretrained weights as safetensors"):
            build_backbone(name, num_classes=10, in_chans=3, pretrained=True)


def test_what_architectures_declare_is_still_taken():
    build_backbone("preact_resnet18", num_classes=3, in_chans=3, width=0.1, drop_rate=0.1)
    build_backbone("resnet18", num_classes=3, in_chans=3, layers=[1, 1, 1, 1], channels=(8, 8, 8, 8), act_layer="gelu")
    build_backbone("vit_tiny_patch16_224", num_classes=3, in_chans=3, img_size=32, patch_size=4, depth=1)
    assert isinstance(Recipe(data="digits", backbone_options={"width": 0.5}), Recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_loaded_nor_published(zoo, folder, value, tmp_path):
    run = folder()
    state = load_file(run / "final.safetensors")
    state["head.fc.bias"][0] = value
    save_file(state, run / "final.safetensors")
    for half in (False, True):
        with pytest.raises(InputError, match=r"not finite, the first in 'head\.fc\.bias'"):
            registry.publish(run, "mine", zoo=tmp_path / "other", half=half)
    assert not (tmp_path / "other").exists()

    file = next((zoo() / "weights").iterdir())
    state = load_file(file) | {"head.fc.bias": state["head.fc.bias"]}
    save_file(state, file)
    weights = {"file": file.name, "sha256": registry.sha256(file), "bytes": file.stat().st_size}
    with pytest.raises(InputError, match="not finite"):
        rb_noisy.load_model("st_digits", zoo=zoo(weights=weights))
