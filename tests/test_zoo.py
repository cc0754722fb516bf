import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rb_noisy
from model_zoo import registry
from rb_noisy.errors import InputError
from rb_noisy.training import train


@pytest.fixture
def run(tiny_recipe, tmp_path):
    return train(tiny_recipe(epochs=1, method="pgd-at+ls"), tmp_path / "run")


@pytest.fixture
def zoo(run, tmp_path):
    registry.publish(run.path, "tiny", zoo=tmp_path / "zoo", authors="someone")
    return tmp_path / "zoo"


def card_file(zoo):
    return next(zoo.glob("model_info/*/*/tiny.json"))


def weights_file(zoo):
    return next(zoo.glob("weights/*.safetensors"))


def test_a_published_run_is_loaded_by_name_with_the_same_outputs(run, zoo):
    model = rb_noisy.load_model("tiny", zoo=zoo)
    x = torch.rand(3, 1, 8, 8)
    assert not model.training
    assert torch.equal(model(x), run.load("final")(x))


def test_label_noise_is_named_by_its_rate_or_its_set():
    worse = {"kind": "human", "rate": None, "seed": 0, "file": "cifar10n_labels.npz", "key": "worse"}
    others = [{"kind": "symmetric", "rate": 0.4, "seed": 0}, {"kind": "human", "rate": None, "file": "mine.csv"}, None]
    assert [registry.noise_title(noise) for noise in [worse, *others]] == [
        "human worse",
        "symmetric 0.4",
        "human",
        "none",
    ]
    assert {"human worse", "none"} <= {registry.noise_title(card["noise"]) for card in registry.read_cards()}


def test_a_card_has_robustbenchs_fields_first_and_all_that_makes_the_model_again(run, zoo):
    card = json.loads(card_file(zoo).read_text())
    robustbench = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc"
    robustbench += " reported autoattack_acc unreliable"
    assert list(card)[:13] == robustbench.split()
    assert card_file(zoo).relative_to(zoo).parts[:3] == ("model_info", "quadrants", "Linf")
    assert rb_noisy.Recipe.from_dict(card["recipe"]) == run.recipe
    assert card["noise"] == {"kind": "symmetric", "rate": 0.3, "seed": 0}
    assert (card["checkpoint"], card["authors"], card["eps"]) == ("final", "someone", "0.1")
    assert card["training"]["final"]["test_pgd_acc"] == run.metrics[-1]["test_pgd_acc"]
    assert card["training"]["processes"] == [1]


def test_models_are_listed_by_data_set_noise_and_method(run, zoo):
    def names(**filters):
        return rb_noisy.list_models(zoo=zoo, **filters)

    assert names() == ["tiny"]
    assert names(dataset="quadrants", noise="symmetric", method="pgd-at+ls") == ["tiny"]
    assert names(dataset="digits") == names(noise="none") == names(method="trades") == []


def test_an_unknown_name_offers_the_nearest(zoo):
    with pytest.raises(InputError, match="unknown model 'tinny'; did you mean tiny"):
        rb_noisy.load_model("tinny", zoo=zoo)


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda zoo: weights_file(zoo).unlink(), "are missing"),
        (lambda zoo: weights_file(zoo).write_bytes(weights_file(zoo).read_bytes()[:-9]), "truncated or altered"),
        (lambda zoo: flip_a_byte(weights_file(zoo)), "altered"),
        (lambda zoo: card_file(zoo).write_text("{"), "is damaged"),
        (lambda zoo: card_file(zoo).write_text("[]"), "is damaged"),
        (lambda zoo: card_file(zoo).write_text("{}"), "lacks architecture"),
    ],
)
def test_damaged_zoos_are_named_and_no_half_model_is_loaded(damage, words, zoo):
    damage(zoo)
    with pytest.raises(InputError) as error:
        rb_noisy.load_model("tiny", zoo=zoo)
    assert words in str(error.value)


def test_a_card_cannot_point_out_of_its_zoo(zoo):
    card = json.loads(card_file(zoo).read_text())
    for file in ("../../secret.safetensors", "model.pt"):
        card["weights"]["file"] = file
        card_file(zoo).write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"want a plain \.safetensors"):
            rb_noisy.load_model("tiny", zoo=zoo)


def test_publishing_never_replaces_unasked_and_never_takes_an_unfinished_run(run, zoo, tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="already"):
        registry.publish(run.path, "tiny", zoo=zoo)
    with pytest.raises(InputError, match="cannot be a model's name"):
        registry.publish(run.path, "Tiny-2", zoo=zoo)
    other = train(tiny_recipe(epochs=1, seed=5), tmp_path / "other")
    old = weights_file(zoo)
    registry.publish(other.path, "tiny", zoo=zoo, overwrite=True)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(rb_noisy.load_model("tiny", zoo=zoo)(x), other.load()(x))
    assert not old.exists()
    (other.path / "final.safetensors").unlink()
    with pytest.raises(InputError, match="continue it with --resume"):
        registry.publish(other.path, "fresh", zoo=zoo)


def figures(card, n, accuracy):
    rate = {"accuracy": accuracy, "interval": [0, 1]}
    return {"n": n, "weights_sha256": card["weights"]["sha256"], "natural": rate, "final_iterate": rate, **rate}


def test_figures_enter_the_card_and_those_there_are_not_replaced_unasked(zoo):
    card = registry.read_card("tiny", zoo)
    assert registry.write_result("tiny", "autoattack", figures(card, 60, 0.25), zoo)
    for n in (10, 60):
        assert not registry.write_result("tiny", "autoattack", figures(card, n, 0.5), zoo)
    card = registry.read_card("tiny", zoo)
    assert card["results"]["autoattack"]["n"] == 60
    assert (card["clean_acc"], card["autoattack_acc"]) == ("25.00", "25.00")
    assert registry.write_result("tiny", "autoattack", figures(card, 60, 0.5), zoo, replace=True)
    assert registry.read_card("tiny", zoo)["autoattack_acc"] == "50.00"


def test_figures_measured_on_a_run_folder_are_published_with_it(run, tmp_path):
    registry.publish(run.path, "first", zoo=tmp_path / "zoo")
    card = registry.read_card("first", tmp_path / "zoo")
    file = registry.results_file(run.path, "final")
    assert registry.write_result(file, "autoattack", figures(card, 60, 0.25))
    stale = figures(card, 60, 0.9) | {"weights_sha256": "other weights"}
    assert registry.write_result(file, "pgd-20", stale)
    assert registry.write_result(registry.results_file(run.path, "best"), "pgd-20", figures(card, 60, 0.1))
    registry.publish(run.path, "second", zoo=tmp_path / "zoo")
    assert list(registry.read_card("second", tmp_path / "zoo")["results"]) == ["autoattack"]


def test_a_card_that_is_still_being_written_is_not_seen(zoo):
    (card_file(zoo).parent / ".other.123.tmp.json").write_text("{")
    assert rb_noisy.list_models(zoo=zoo) == ["tiny"]


def test_a_zoo_on_the_hub_is_a_zoo(zoo, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(zoo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert rb_noisy.list_models(zoo="hf://someone/zoo") == ["tiny"]
    assert asked[0][0] == "someone/zoo"
    assert not any("*.pt" in pattern or "*.bin" in pattern for pattern in asked[0][1])

    def no_network(repo, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(InputError, match="hf://someone/zoo cannot be fetched"):
        rb_noisy.list_models(zoo="hf://someone/zoo")


class Hub(BaseHTTPRequestHandler):
    """The Hub's way of handing out one file. The first connection breaks in the middle of it."""

    content, broken_at, ranges = np.random.default_rng(0).bytes(24 << 20), 12 << 20, []

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", 40 * "a")
        self.end_headers()

    def do_GET(self):
        self.ranges.append((self.path, self.headers.get("Range")))
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("ETag", '"1234"')
        self.end_headers()
        self.wfile.write(self.content[start:] if asked else self.content[: self.broken_at])

    def log_message(self, *_):
        pass


def test_large_weights_are_fetched_on_first_use_and_go_on_where_the_connection_broke(zoo, tmp_path):
    card = json.loads(card_file(zoo).read_text())
    digest = hashlib.sha256(Hub.content).hexdigest()
    card["weights"] |= {"hub": "someone/large", "sha256": digest, "bytes": len(Hub.content)}
    card_file(zoo).write_text(json.dumps(card))
    weights_file(zoo).unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from model_zoo.registry import read_card, weights_file\n"
        f"print(weights_file(read_card('tiny', {str(zoo)!r}), {str(zoo)!r}))"
    )
    hub = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5", "NO_PROXY": "127.0.0.1"}

    def fetch(port, cache):
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / cache)}
        environment = os.environ | hub | place
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, timeout=90, text=True)

    done, again = (fetch(server.server_port, "cache") for _ in range(2))
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == Hub.content
    assert again.stdout == done.stdout
    asked = [start for path, start in Hub.ranges if path.endswith(card["weights"]["file"])]
    assert asked[0] is None
    assert [0 < int(start.strip("bytes=-")) <= Hub.broken_at for start in asked[1:]] == [True]
    failed = fetch(9, "other")
    assert "cannot be fetched from hf://someone/large" in failed.stderr


def test_a_place_on_the_hub_is_checked_before_anything_is_written(run, tmp_path):
    with pytest.raises(InputError, match="'only-a-user' is no place on the Hugging Face Hub; give USER/REPO"):
        registry.publish(run.path, "x", zoo=tmp_path / "other", hub="only-a-user")
    assert not (tmp_path / "other").exists()
    registry.publish(run.path, "x", zoo=tmp_path / "other", hub="hf://someone/large")
    assert registry.read_card("x", tmp_path / "other")["weights"]["hub"] == "someone/large"


def test_half_precision_halves_the_file_and_brings_no_figures_of_the_full_one(run, tmp_path):
    registry.publish(run.path, "full", zoo=tmp_path / "zoo")
    full = registry.read_card("full", tmp_path / "zoo")
    assert registry.write_result(registry.results_file(run.path, "final"), "autoattack", figures(full, 60, 0.25))
    registry.publish(run.path, "half", zoo=tmp_path / "zoo", half=True)
    half = registry.read_card("half", tmp_path / "zoo")
    assert (full["weights"]["precision"], half["weights"]["precision"]) == ("fp32", "fp16")
    assert half["weights"]["bytes"] < 0.6 * full["weights"]["bytes"]
    assert half["results"] == {}, "they would be of other weights"
    states = [rb_noisy.load_model(name, zoo=tmp_path / "zoo").state_dict() for name in ("full", "half")]
    for name, value in states[0].items():
        assert states[1][name].dtype == value.dtype
        assert torch.equal(states[1][name], value.half().float() if value.is_floating_point() else value)
    weights = load_file(run.path / "final.safetensors")
    save_file(weights | {"head.fc.bias": torch.full_like(weights["head.fc.bias"], 1e6)}, run.path / "final.safetensors")
    with pytest.raises(InputError, match=r"head.fc.bias has values beyond the range of fp16"):
        registry.publish(run.path, "broken", zoo=tmp_path / "zoo", half=True)


def test_a_card_says_what_is_not_the_usual_form_of_its_network(tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=1, backbone_options={"width": 0.5}), tmp_path / "run")
    registry.publish(run.path, "half_width", zoo=tmp_path / "zoo")
    assert registry.read_card("half_width", tmp_path / "zoo")["architecture"] == "resnet8_narrow (width 0.5)"


def test_a_place_without_models_is_named(tmp_path):
    with pytest.raises(InputError, match="is no zoo"):
        rb_noisy.list_models(zoo=tmp_path)


def test_every_shipped_model_has_its_figures_and_stands_up_to_its_card():
    """Natural accuracy is measured again on the spot where the data are embedded."""
    data = rb_noisy.load_data("digits")
    names = rb_noisy.list_models()
    assert "sglr_digits" in names
    for name in names:
        card = registry.read_card(name)
        assert {"pgd-20", "autoattack", "calibration"} <= card["results"].keys(), name
        for result in card["results"].values():
            assert result["weights_sha256"] == card["weights"]["sha256"]
        assert card["results"]["autoattack"]["accuracy"] <= card["results"]["pgd-20"]["any_iterate"]["accuracy"] + 0.02
        if card["dataset"] == "digits":
            with torch.no_grad():
                right = rb_noisy.load_model(name)(data.x_test).argmax(1) == data.y_test
            assert right.double().mean().item() == pytest.approx(float(card["clean_acc"]) / 100, abs=0.002)


def test_three_doors_lead_to_the_same_model_in_a_fresh_process():
    program = """
import torch, rb_noisy, timm
from robustbench.utils import load_model
ours = rb_noisy.load_model("sglr_digits")
theirs = load_model("sglr_digits", dataset="digits", threat_model="Linf")
timms = timm.create_model("sglr_digits", pretrained=True).eval()
x = torch.rand(4, 1, 8, 8)
assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), timms(x))
fresh = timm.create_model("sglr_digits").eval()
assert not torch.equal(ours(x), fresh(x))
assert timm.create_model("sglr_digits", pretrained=True, num_classes=3)(x).shape == (4, 3)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("same"), done.stderr
