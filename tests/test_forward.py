"""What a network may answer and be given: one contract, kept by everything that asks a network."""

from __future__ import annotations

import copy
import importlib
import json
import warnings

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import rb_noisy
from rb_noisy import analysis
from rb_noisy.annotation import annotate
from rb_noisy.attacks import moved, pgd
from rb_noisy.autoattack import run_autoattack
from rb_noisy.confidence import calibrate, withstands
from rb_noisy.confidence_attack import believed_attack
from rb_noisy.errors import InputError, NetworkWarning
from rb_noisy.fast import fast_form
from rb_noisy.geometry import kappa, resistance, stands

BALL = {"eps": 0.2, "alpha": 0.05, "steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return rb_noisy.load_model("at_digits")


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    data = rb_noisy.load_data("digits")
    return data.x_test[:24], data.y_test[:24]


ASKERS = {
    "pgd": lambda model, x, y: pgd(model, x, y, **BALL),
    "kappa": lambda model, x, y: kappa(model, x, y, **BALL),
    "kappa of unlabelled": lambda model, x, y: kappa(model, x, **BALL),
    "kappa by count": lambda model, x, y: kappa(model, x, y, definition="count", **BALL),
    "resistance": lambda model, x, y: resistance(model, x, y, **BALL),
    "stands": lambda model, x, y: stands(model, x, y, **BALL),
    "annotate": lambda model, x, y: annotate(model, x, eps=0.2, steps=3),
    "calibrate": lambda model, x, y: calibrate(model, x, y, eps=0.2, method="isotonic", features=["kappa"]),
    "withstands": lambda model, x, y: withstands(model, x, y, eps=0.2),
    "believed_attack": lambda model, x, y: list(believed_attack(model, x, y, eps=0.2, steps=2)),
    "run_autoattack": lambda model, x, y: run_autoattack(model, x, y, eps=0.2, attacks=["apgd-ce"]),
}
every_asker = pytest.mark.parametrize("asker", ASKERS)


def figures(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """What the attacks say of a network, without AutoAttack."""
    attack = pgd(model, x, y, evaluate_final=True, **BALL)
    notes = annotate(model, x, eps=0.2, steps=3)
    found = [attack.kappa, attack.broken, attack.final_correct, kappa(model, x, y, **BALL), stands(model, x, y, **BALL)]
    return [*found, notes.label, notes.kappa]


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(self, model: nn.Module, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def spoiled(weight: float, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = weight
    return model


# --- finite numbers


@every_asker
def test_natural_logits_that_are_not_finite_are_refused_with_their_count(asker, model, images):
    with pytest.raises(InputError, match="logits of 24 of 24 natural images are not finite"):
        ASKERS[asker](spoiled(float("nan"), model), *images)


def only_some(z: Tensor, value: float) -> Tensor:
    return torch.where((torch.arange(len(z)) % 8 == 5)[:, None], torch.full_like(z, value), z)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_few_are_counted_too(value, model, images):
    x, y = images
    bad = Around(model, after=lambda z: only_some(z, value))
    for name in ("pgd", "kappa", "stands", "annotate"):
        with pytest.raises(InputError, match=r"logits of 3 of 24 natural .* \(image 5 is the first\)"):
            ASKERS[name](bad, x, y)


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_logits_that_are_not_finite_under_attack_count_as_broken(model, images):
    x, y = images  # of sixteenths, which no attack leaves so

    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            natural = ((x * 16).frac() == 0).flatten(1).all(1)
            return torch.where(natural[:, None], self.model(x), torch.nan)

    fragile = Fragile().eval()
    with pytest.warns(NetworkWarning, match="24 attacked images are not finite; these images count as broken"):
        attack = pgd(fragile, x, y, evaluate_final=True, **BALL)
    assert attack.broken.all()
    assert attack.x_adv.isfinite().all()
    assert not attack.final_correct.any()
    assert not attack.kappa.any()
    with pytest.warns(NetworkWarning, match="count as broken"):
        assert not kappa(fragile, x, y, **BALL).any()
    with pytest.warns(NetworkWarning, match="count as broken"):
        assert not stands(fragile, x, y, **BALL).any()
    with pytest.warns(NetworkWarning, match="count as broken"):
        assert resistance(fragile, x, y, **BALL).margin.max() == -torch.inf
    result = run_autoattack(fragile, x, y, eps=0.2, attacks=["apgd-ce"])
    assert not result.robust.any()
    assert any("count as broken" in warning for warning in result.warnings)


class _Scrambled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


MASKED = {
    "a gradient of NaN": lambda model: Around(model, before=_Scrambled.apply),
    "logits times 10⁴": lambda model: Around(model, after=lambda z: z * 1e4),
    "softmax times 10⁴": lambda model: Around(model, after=lambda z: (z * 1e4).softmax(1)),
    "quantised images": lambda model: Around(model, before=lambda x: (x * 16).round() / 16),
    "no gradient at all": lambda model: Around(model, before=lambda x: x.detach()),
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("asker", ["pgd", "kappa", "resistance", "stands", "annotate", "calibrate"])
def test_gradients_that_hide_from_the_attack_are_told_of(kind, asker, model, images):
    network = MASKED[kind](model).eval()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = ASKERS[asker](network, *images) if asker != "calibrate" else withstands_little(network, *images)
    assert any("images is zero or not finite" in str(w.message) for w in seen if w.category is NetworkWarning)
    if asker == "pgd":
        assert result.masked.double().mean() > 0.05
        assert result.x_adv.isfinite().all()


def withstands_little(network: nn.Module, x: Tensor, y: Tensor) -> object:
    y = y.clone()
    y[::2] = (y[::2] + 1) % 10  # isotonic wants both outcomes
    return calibrate(network, x, y, eps=0.2, method="isotonic", features=["kappa"])


@pytest.mark.parametrize("name", ["at_digits", "st_digits", "trades_digits_sym40"])
def test_a_sound_network_is_not_complained_of(name, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        figures(rb_noisy.load_model(name), *images)


# --- what may be answered

ANSWERS = {
    "a tuple": (lambda z: (z, z), r"tuple of 2, .*perhaps its \[0\]"),
    "a list": (lambda z: [z], "list of 1"),
    "a dict": (lambda z: {"scores": z}, "dict of scores"),
    "an object": (lambda z: type("Output", (), {"logits": z})(), "Output, whose .logits are wanted"),
    "one logit": (lambda z: z[:, :1], r"one logit per image, \(\d+, 1\); .*torch.stack"),
    "one number": (lambda z: z[:, 0], r"one logit per image, \(\d+,\); .*torch.stack"),
    "a map": (lambda z: z[:, :, None], "floating point logits"),
    "classes": (lambda z: z.argmax(1, keepdim=True).expand(-1, 10), "torch.int64"),
}


@pytest.mark.parametrize("kind", ANSWERS)
@every_asker
def test_answers_of_another_kind_are_refused_with_the_way_out(kind, asker, model, images):
    change, words = ANSWERS[kind]
    with pytest.raises(InputError, match=words):
        ASKERS[asker](Around(model, after=change).eval(), *images)


def test_one_logit_written_as_two_as_the_message_says(model, images):
    """The figures of a binary network against those of a literal loop with the binary cross entropy."""
    x, y = images[0], (images[1] >= 5).long()

    def logit(x: Tensor) -> Tensor:
        z = model(x)
        return z[:, 5:].logsumexp(1) - z[:, :5].logsumexp(1)

    class AsTwo(nn.Module):
        def forward(self, x):
            z = logit(x).flatten()
            return torch.stack([torch.zeros_like(z), z], 1)

    ball = BALL | {"eps": 0.4, "alpha": 0.2}
    start = 0.4 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)
    x_adv, right = (x + start).clamp(0, 1), []
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        z = logit(x_adv)
        right.append((z > 0).long() == y)
        (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(z, y.float(), reduction="sum"), x_adv)
        x_adv = (x_adv + 0.2 * gradient.sign()).clamp(x - 0.4, x + 0.4).clamp(0, 1)
    expected = torch.stack(right).long().cumprod(0).sum(0)
    assert torch.equal(kappa(AsTwo().eval(), x, y, **ball), expected)
    assert 0 < expected.double().mean() < 3


@pytest.mark.parametrize("asker", [name for name in ASKERS if name != "run_autoattack"])
def test_probabilities_are_told_of(asker, model, images):
    x, y = images
    y = torch.where(torch.arange(24) % 2 == 0, y, (y + 1) % 10)  # calibrate wants both outcomes
    with pytest.warns(NetworkWarning, match="look like probabilities"):
        ASKERS[asker](Around(model, after=lambda z: z.softmax(1)).eval(), x, y)


def test_chance_and_the_batch_are_told_of(model, images):
    for change, words in (
        (lambda z: z + torch.randn_like(z), "other logits each time"),
        (lambda z: z - 5 * z.mean(0), "depend on the other images"),
    ):
        for asker in ("pgd", "kappa", "stands", "annotate"):
            with pytest.warns(NetworkWarning, match=words):
                ASKERS[asker](Around(model, after=change).eval(), *images)


# --- what may be given


@every_asker
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_the_network_does_not_know(asker, label, model, images):
    if asker in ("annotate", "kappa of unlabelled"):
        return
    y = images[1].clone()
    y[3] = label
    with pytest.raises(InputError, match=r"the labels (begin at -1|reach from \d to 10; the model knows 0 to 9)"):
        ASKERS[asker](model, images[0], y)


def test_target_classes_and_kappa_labels_too(model, images):
    wrong = torch.full_like(images[1], 10)
    with pytest.raises(InputError, match="target classes reach from 10 to 10"):
        stands(model, *images, target=wrong, **BALL)
    with pytest.raises(InputError, match="kappa_labels reach from 10 to 10"):
        pgd(model, *images, kappa_labels=wrong, **BALL)


@every_asker
def test_images_of_another_shape_than_the_model_was_trained_on(asker, model, images):
    larger = F.interpolate(images[0], size=12)
    assert model(larger).shape == (24, 10)  # it would answer
    with pytest.raises(InputError, match="the images are 1x12x12 but the network was trained on 1x8x8"):
        ASKERS[asker](model, larger, images[1])


@every_asker
def test_values_beyond_0_and_1(asker, model, images):
    x, y = images
    y = torch.where(torch.arange(24) % 2 == 0, y, (y + 1) % 10)
    rounded = x.clone()
    rounded[0, 0, 0, 0], rounded[1, 0, 0, 0] = 1.00000012, -1e-7
    ASKERS[asker](model, rounded, y)
    assert rounded.max() > 1  # the user's images stay
    rounded[0, 0, 0, 0] = 1.00001
    with pytest.raises(InputError, match=r"1\.00001"):
        ASKERS[asker](model, rounded, y)
    with pytest.raises(InputError, match=r"uint8|torch\.uint8"):
        ASKERS[asker](model, (x * 16).to(torch.uint8), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_images_in_another_precision(dtype, model, images):
    """Of weights rounded to half precision, the figures are those of the same weights in fp32."""
    x, y = images
    rounded = copy.deepcopy(model).to(dtype).float()
    wanted = figures(rounded, x, y)
    network = copy.deepcopy(model).to(dtype)
    for found, expected in zip(figures(network, x, y), wanted, strict=True):
        assert torch.equal(found, expected)
    assert next(network.parameters()).dtype == dtype  # the user's network stays
    exact = x.to(dtype)  # sixteenths are exact in all of them
    attack = pgd(rounded, exact, y, **BALL)
    assert attack.x_adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:  # whose random start is another
        assert torch.equal(attack.kappa, wanted[0])
        one, other = (run_autoattack(m, x, y, eps=0.2, attacks=["apgd-ce"]) for m in (network, rounded))
        assert torch.equal(one.robust, other.robust)


def test_a_network_that_alters_its_images_gets_its_own(model, images):
    x, y = images

    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.mul_(0.5).mul_(2))  # exact; but then it shifts what it was given

    class Shifted(Shifting):
        def forward(self, x):
            z = self.model(x)
            x.add_(0.25)
            return z

    kept = x.clone()
    for network in (Shifting().eval(), Shifted().eval()):
        with torch.no_grad():
            probe = x[:2].clone()
            network(probe)
        for found, expected in zip(figures(network, x, y), figures(model, x, y), strict=True):
            assert torch.equal(found, expected)
        for asker in ASKERS:
            ASKERS[asker](network, x, torch.where(torch.arange(24) % 2 == 0, y, (y + 1) % 10))
            assert torch.equal(x, kept), asker


# --- where the caller is


def test_inside_inference_mode_all_is_as_outside(model, images):
    x, y = images
    outside = figures(model, x, y)
    assert kappa(model, x, y, **BALL).double().mean().item() == pytest.approx(2.8333, abs=1e-4)
    assert stands(model, x, y, **BALL).double().mean().item() == pytest.approx(0.9167, abs=1e-4)
    with torch.inference_mode():
        loaded = rb_noisy.load_model("at_digits")
        inside, labels = x * 1.0, y * 1
        assert inside.is_inference()
        for network in (model, loaded, fast_form(model)):
            for given in ((x, y), (inside, labels)):
                for found, expected in zip(figures(network, *given), outside, strict=True):
                    assert torch.equal(found, expected)
        short = {"eps": 0.2, "attacks": ["apgd-ce"], "seed": 0}
        for network in (model, loaded):
            assert run_autoattack(network, inside, labels, **short).robust_acc == 0.75
        mixed = torch.where(torch.arange(24) % 2 == 0, labels, (labels + 1) % 10)
        options = {"eps": 0.2, "method": "isotonic", "features": ["kappa"]}
        calibrated = calibrate(model, inside, mixed, **options)
        confidence = calibrated.predict(inside).confidence
    assert torch.equal(confidence, calibrate(model, x, mixed.clone(), **options).predict(x).confidence)
    assert run_autoattack(model, x, y, **short).robust_acc == 0.75


class Plain(nn.Module):
    """A network of our zoo, in a form that every exporter takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def _exported(model, x):
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(Plain(model).eval(), (x,), dynamic_shapes=({0: batch},)).module()


FORMS = {
    "traced": lambda model, x: torch.jit.trace(model, x[:2]),
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.trace(model, x[:2])),
    "scripted": lambda model, x: torch.jit.script(model),
    "scripted and frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "exported": _exported,
    "parallel": lambda model, x: nn.DataParallel(model),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_other_forms_of_a_network(form, model, images):
    x, y = images
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()
    network = FORMS[form](plain, x)
    wanted = figures(plain, x, y)
    for asked in (network, fast_form(network)):
        for found, expected in zip(figures(asked, x, y), wanted, strict=True):
            assert torch.equal(found, expected), form
    one, other = (run_autoattack(m, x, y, eps=0.05, attacks=["apgd-ce"]) for m in (network, plain))
    assert torch.equal(one.robust, other.robust)


# --- radii


@pytest.mark.parametrize("asker", ["pgd", "kappa", "stands", "annotate", "calibrate", "withstands", "run_autoattack"])
def test_radii_as_text_and_too_large(asker, model, images):
    def ask(eps):
        x, y = images
        y = torch.where(torch.arange(24) % 2 == 0, y, (y + 1) % 10)
        ball = {"alpha": 0.02, "steps": 3, "seed": 0}
        return {
            "pgd": lambda: pgd(model, x, y, eps=eps, **ball).x_adv,
            "kappa": lambda: kappa(model, x, y, eps=eps, **ball),
            "stands": lambda: stands(model, x, y, eps=eps, **ball),
            "annotate": lambda: annotate(model, x, eps=eps, steps=3).kappa,
            "calibrate": lambda: torch.tensor(
                calibrate(model, x, y, eps=eps, method="isotonic", features=["kappa"]).eps
            ),
            "withstands": lambda: withstands(model, x, y, eps=eps),
            "run_autoattack": lambda: run_autoattack(model, x, y, eps=eps, attacks=["apgd-ce"]).robust,
        }[asker]()

    assert torch.equal(ask("8/255"), ask(8 / 255))
    for eps in (8, "8", 8.0):
        with pytest.raises(InputError, match=r"did you mean 8/255\?"):
            ask(eps)
    with pytest.raises(InputError, match=r"give a number such as 0\.2 or 8/255"):
        ask("8/x")
    with pytest.raises(InputError, match="eps is nan"):
        ask(float("nan"))


def test_a_step_in_the_wrong_unit(model, images):
    with pytest.raises(InputError, match=r"alpha is 2, .*did you mean 2/255\?"):
        pgd(model, *images, eps="8/255", alpha=2, steps=3)
    assert pgd(model, *images, eps="8/255", alpha="2/255", steps=1).x_adv.shape == images[0].shape
    assert pgd(model, *images, eps=3.0, alpha=1.5, steps=1, norm="L2").x_adv.shape == images[0].shape


def test_a_recipe_and_a_calibration_file_ask_too(tmp_path, model, images):
    with pytest.raises(InputError, match=r"recipe: eps is 8, .*did you mean 8/255\?"):
        rb_noisy.Recipe(data="digits", eps=8)
    y = torch.where(torch.arange(24) % 2 == 0, images[1], (images[1] + 1) % 10)
    calibrated = calibrate(model, images[0], y, eps=0.2, method="isotonic", features=["kappa"])
    calibrated.save(tmp_path / "confidence.json")
    text = (tmp_path / "confidence.json").read_text().replace('"eps": 0.2', '"eps": 8')
    (tmp_path / "confidence.json").write_text(text)
    with pytest.raises(InputError, match=r"did you mean 8/255\?"):
        rb_noisy.confidence.Calibrated.load(tmp_path / "confidence.json", model)


# --- commands


@pytest.fixture
def run_folder(tmp_path):
    """A function that makes a finished run folder of a network: trained for a moment, then with other weights."""

    def make(change) -> str:
        recipe = rb_noisy.Recipe(
            data="digits", method="pgd-at", backbone="strided_cnn", epochs=1, train_size=64, track=20, steps=1
        )
        run = rb_noisy.train(recipe, tmp_path / "run")
        for name in ("final", "best"):
            file = tmp_path / "run" / f"{name}.safetensors"
            state = load_file(file)
            change(state)
            save_file(state, file)
        return str(run.path)

    return make


def evaluate(command: str, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(importlib.import_module(f"eval.{command}").main)
    return CliRunner().invoke(app, list(arguments))


COMMANDS = {
    "pgd": ["--n", "30"],
    "autoattack": ["--n", "10"],
    "calibration": ["--n", "40"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_measures_weights_that_are_no_numbers(command, run_folder, tmp_path):
    def spoil(state):
        state["fc2.bias"][0] = float("nan")

    ended = evaluate(command, "--model", run_folder(spoil), *COMMANDS[command], "--out", str(tmp_path / "out"))
    assert ended.exit_code == 2
    assert "not finite" in ended.output
    assert not (tmp_path / "run" / "results-final.json").exists()


def test_masked_gradients_stand_in_the_figures(run_folder, tmp_path):
    def steep(state):
        state["fc2.weight"] *= 1e6
        state["fc2.bias"] *= 1e6

    file = tmp_path / "figures.json"
    folder = run_folder(steep)
    ended = evaluate("pgd", "--model", folder, "--n", "60", "--out", str(tmp_path / "out"), "--json", str(file))
    assert ended.exit_code == 0, ended.output
    figures = json.loads(file.read_text())["pgd-20"]
    assert figures["masked_gradients"] > 0.05
    assert "looks more robust than it is" in " ".join(figures["warnings"])
    assert "looks more robust than it is" in ended.output
    plain = tmp_path / "plain.json"
    evaluate("pgd", "--model", "at_digits", "--n", "60", "--out", str(tmp_path / "out"), "--json", str(plain))
    figures = json.loads(plain.read_text())["pgd-20"]
    assert figures["masked_gradients"] == 0
    assert figures["warnings"] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_images_of_another_shape(command, tmp_path):
    ended = evaluate(command, "--model", "at_cifar10_narrow", "--dataset", "digits", "--eps", "0.1")
    assert ended.exit_code == 2
    assert "1x8x8" in ended.output
    assert "3x32x32" in ended.output
    ended = evaluate(command, "--model", "at_digits", "--eps", "8")
    assert ended.exit_code == 2
    assert "did you mean 8/255?" in ended.output


# --- what an attack from outside found


@pytest.mark.parametrize("scale", [1, 3, 5, 8, 1e-9])
def test_an_l2_step_has_its_length_however_small_the_gradient(scale):
    """Its squares vanish in float32 long before it does, and a step would be none."""
    gradient = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2) * 10.0 ** (-4 * scale if scale >= 1 else 20)
    x = torch.full((1, 1, 1, 2), 0.5)
    step = moved(x, x, gradient, eps=0.5, alpha=0.25, norm="L2") - x
    torch.testing.assert_close(step.flatten(), torch.tensor([0.15, 0.2]))


def test_a_surer_network_falls_to_l2_all_the_same(images):
    x, y = images
    model = rb_noisy.load_model("st_digits")
    attack = {"eps": 1.0, "alpha": 0.25, "steps": 10, "norm": "L2", "random_start": False, "evaluate_final": True}
    plain, sure = (pgd(Around(model, after=lambda z, s=s: z * s).eval(), x, y, **attack) for s in (1, 3))
    assert abs(int(plain.broken.sum()) - int(sure.broken.sum())) <= 1


class OneBuffer(nn.Module):
    """Answers in one tensor each time where no gradient is asked for, as runners of recorded graphs do."""

    def __init__(self, model):
        super().__init__()
        self.model, self.answers = model, {}

    def forward(self, x):
        z = self.model(x)
        return z if torch.is_grad_enabled() else self.answers.setdefault(len(x), torch.empty_like(z)).copy_(z)


def test_a_network_that_answers_in_one_tensor_each_time(model, images):
    x, y = images
    one = OneBuffer(model).eval()
    assert torch.equal(annotate(one, x, eps=0.2, batch_size=8).label, annotate(model, x, eps=0.2).label)
    assert torch.equal(kappa(one, x, batch_size=8, **BALL), kappa(model, x, **BALL))
    with pytest.warns(NetworkWarning, match="other logits each time"):
        kappa(OneBuffer(Around(model, before=lambda x: x + 0.3 * torch.randn_like(x))).eval(), x, y, **BALL)


def off(z: Tensor) -> Tensor:
    return torch.cat([z, torch.full_like(z[:, :1], -1e9)], 1)


def test_a_class_that_is_switched_off_hides_nothing(model, images):
    x, y = images
    for before, words in (
        (lambda x: x + 0.3 * torch.randn_like(x), "other logits each time"),
        (lambda x: x - x.mean(0, keepdim=True) + 0.5, "depend on the other images"),
    ):
        with pytest.warns(NetworkWarning, match=words):
            kappa(Around(model, before=before, after=off).eval(), x, y, **BALL)


class _Quantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _hooked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, given: (_Quantised.apply(given[0]),))
    return model


def _rebound(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    plain = model.forward
    model.forward = lambda x: plain(_Quantised.apply(x))
    return model


@pytest.mark.parametrize("change", [_hooked, _rebound])
def test_the_fast_form_keeps_what_sits_on_the_network(change, images):
    """Also where it does nothing to natural images, so that these cannot tell."""
    x, y = (images[0] * 4).round() / 4, images[1]
    network = change(rb_noisy.load_model("st_digits"))
    options = {"eps": 0.1, "alpha": 0.025, "steps": 10, "seed": 0, "evaluate_final": True}
    assert torch.equal(pgd(fast_form(network), x, y, **options).broken, pgd(network, x, y, **options).broken)


@pytest.mark.parametrize(
    "wrapped", [fast_form, nn.DataParallel, torch.optim.swa_utils.AveragedModel], ids=lambda f: f.__name__
)
def test_what_wraps_a_network_knows_the_shape_of_its_images(wrapped, model, images):
    network = wrapped(model).eval()
    with pytest.raises(InputError, match="the network was trained on 1x8x8"):
        annotate(network, torch.rand(4, 1, 32, 32), eps=0.2)
    assert torch.equal(kappa(network, *images, **BALL), kappa(model, *images, **BALL))


def test_autoattack_leaves_a_batchnorm_in_training_as_it_was(images, tmp_path):
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    network[0].train()
    before = network[0].running_mean.clone()
    for _ in range(2):  # the second reads the state of the first
        run_autoattack(network, *images, eps=0.02, attacks=["apgd-ce"], state_path=tmp_path / "state.npz")
        assert torch.equal(network[0].running_mean, before)
        assert network[0].training


def test_the_analysis_keeps_the_contract_too(images):
    x, y = images
    model = rb_noisy.load_model("at_digits")
    generator = torch.Generator().manual_seed(0)
    ways = [analysis.filter_normalised_direction(model, generator) for _ in range(2)]
    asked = {
        "adversarial_entropy": lambda m, x: analysis.adversarial_entropy(m, x, y, eps=0.2, alpha=0.05, seed=0),
        "neighbourhood_entropy": lambda m, x: analysis.neighbourhood_entropy(m, x, eps=0.2, points=2, seed=0),
        "gradient_norm": lambda m, x: torch.tensor(analysis.gradient_norm(m, x, y)),
        "penultimate_features": analysis.penultimate_features,
        "loss_landscape": lambda m, x: analysis.loss_landscape(m, x, y, directions=ways, steps=[0.0, 0.1]),
        "believed_attack": lambda m, x: list(believed_attack(m, x, (y + 1) % 10, eps=0.2, steps=2, seed=0))[-1],
    }
    half = copy.deepcopy(model).half()
    for name, ask in asked.items():
        wanted = ask(model, x)
        with torch.inference_mode():
            torch.testing.assert_close(ask(model, x * 1), wanted, msg=name)
        torch.testing.assert_close(ask(half, x).float(), ask(copy.deepcopy(half).float(), x), msg=name)
        if name not in ("adversarial_entropy", "neighbourhood_entropy", "believed_attack"):  # drawn in the images' type
            torch.testing.assert_close(ask(model, x.double()).float(), wanted, msg=name)
    with pytest.raises(InputError, match="no weight that takes a gradient"):
        analysis.gradient_norm(fast_form(model), x, y)


def test_odd_numbers(model, images):
    x, y = images
    for name in ("steps", "seed", "batch_size"):
        value = {"steps": 3, "seed": 0, "batch_size": 7}[name]
        plain = kappa(model, x, y, **{**BALL, name: value})
        assert torch.equal(kappa(model, x, y, **{**BALL, name: np.int64(value)}), plain)
        for odd in (2.5, "2", None if name != "seed" else 1.5, True, -1):
            with pytest.raises(InputError, match=f"{name} is "):
                kappa(model, x, y, **{**BALL, name: odd})
    with pytest.raises(InputError, match="eps is 1000"):
        kappa(model, x, y, **BALL | {"eps": 10**400})
    with pytest.raises(InputError, match="the network is a function; wrap it"):
        kappa(lambda x: model(x), x, y, **BALL)
    with pytest.raises(InputError, match="give a dense tensor"):
        kappa(model, x.to_sparse(), y, **BALL)
    with pytest.raises(InputError, match="give a dense tensor"):
        kappa(model, x.to("meta"), y, **BALL)
    with pytest.raises(InputError, match="give a dense tensor"):
        kappa(model, x.numpy(), y, **BALL)


def test_half_precision_that_cannot_be_copied(images):
    network = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 10))).bfloat16().eval()
    with pytest.raises(InputError, match=r"cannot be copied .*; give it in float32: model.float\(\)"):
        kappa(network, *images, **BALL)


def test_no_images(model):
    class Viewed(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)[:, :10]

    for network in (model, Viewed()):
        none = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
        attack = pgd(network, *none, evaluate_final=True, **BALL)
        assert attack.x_adv.shape == none[0].shape
        assert len(attack.kappa) == len(attack.broken) == len(stands(network, *none, **BALL)) == 0
