"""The AutoAttack driver: the reference's verdicts, exact resume, warnings that arrive, inputs refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rb_noisy.autoattack
import rb_noisy.fewer_passes
from rb_noisy.autoattack import ATTACKS, AutoAttackResult, run_autoattack
from rb_noisy.autoattack_state import Warnings
from rb_noisy.data import load_data
from rb_noisy.errors import InputError
from rb_noisy.fast import fast_form
from rb_noisy.local_forward import LocalForward
from rb_noisy.processes import Processes, forget_state, state_files
from tests.test_fast import build


def small_model(classes: int = 6) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, classes)]
    return nn.Sequential(*layers).eval()


def small_data(model: nn.Module, n: int = 34, shape=(1, 8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images whose labels are the model's own predictions, but for every seventh."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y, classes = model(x).argmax(1), model(x).shape[1]
    y[::7] = (y[::7] + 1) % classes
    return x, y


def shorten(adversary):
    """The same attacks with fewer steps and targets, so that each leaves work to the next."""
    adversary.apgd.n_iter = adversary.apgd.n_iter_orig = 4
    adversary.apgd_targeted.n_iter = adversary.apgd_targeted.n_iter_orig = 6
    adversary.apgd_targeted.n_target_classes = 3
    adversary.fab.n_iter = 8
    adversary.fab.n_target_classes = 3
    adversary.square.n_queries = 60
    return adversary


build_attacks = rb_noisy.autoattack._build_attacks


@pytest.fixture(autouse=True)
def _short_attacks(monkeypatch):
    monkeypatch.setattr(rb_noisy.autoattack, "_build_attacks", lambda *args: shorten(build_attacks(*args)))


EPS = {"Linf": 0.045, "L2": 0.28, "L1": 1.5}


def run(model, x, y, **options) -> AutoAttackResult:
    return run_autoattack(model, x, y, **{"eps": EPS["Linf"], "batch_size": 8, "seed": 3, **options})


def same(a: AutoAttackResult, b: AutoAttackResult) -> bool:
    adversarials = a.x_adv is b.x_adv or torch.equal(a.x_adv, b.x_adv)
    return torch.equal(a.broken_by, b.broken_by) and a.warnings == b.warnings and adversarials


def of_the_zoo(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    data = load_data("digits")
    return rb_noisy.load_model(name), data.x_test[20:36], data.y_test[20:36]


def untrained(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = build(name)[0]
    return model, *small_data(model, n=16, shape=(3, 16, 16))


SUBJECTS = {
    "small": (lambda name: (small_model(), *small_data(small_model())), EPS),
    "at_digits": (of_the_zoo, {"Linf": 0.25, "L2": 0.9}),
    "trades_sglr_digits_sym40": (of_the_zoo, {"Linf": 0.2, "L2": 0.7}),
    "preact_resnet18": (untrained, {"Linf": 0.015, "L2": 0.4}),
}


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, (_, eps) in SUBJECTS.items() for norm in eps])
def test_verdicts_and_adversarials_equal_the_reference_driver(name, norm, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack")
    monkeypatch.setattr(rb_noisy.fewer_passes, "_WORTH_CUTTING", 0)
    monkeypatch.setattr(rb_noisy.autoattack, "_FAB_ON_CPU", 5)
    make, radii = SUBJECTS[name]
    (model, x, y), eps = make(name), radii[norm]
    reference = shorten(pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=3, version="standard"))
    x_adv, y_adv = reference.run_standard_evaluation(x, y, batch_size=8)

    exact = run(model, x, y, norm=norm, eps=eps, return_adversarials=True, reference=True)
    sooner = run(model, x, y, norm=norm, eps=eps, return_adversarials=True)

    assert torch.equal(exact.robust, y_adv == y)
    assert torch.equal(exact.x_adv, x_adv)
    assert 0 < exact.robust_acc < exact.clean_acc < 1
    assert len(exact.broken_by.unique()) >= (4 if name == "small" else 3)  # wrong, robust, and broken by which attack
    assert torch.equal(sooner.broken_by, exact.broken_by)
    broken = sooner.broken_by > 0
    with torch.no_grad():
        assert (model(sooner.x_adv[broken]).argmax(1) != y[broken]).all()
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    assert ((sooner.x_adv - x).flatten(1).norm(order, dim=1) <= eps * (1 + 1e-4)).all()
    assert torch.equal(sooner.x_adv[~broken], x[~broken])


def test_square_answers_from_known_maps_reach_the_same_verdicts(monkeypatch):
    model = small_model()
    x, y = small_data(model)
    options = {"attacks": ("square",), "return_adversarials": True}
    plain = run(model, x, y, reference=True, **options)
    passed = []
    monkeypatch.setattr(rb_noisy.fewer_passes, "_WORTH_CUTTING", 0)
    call = LocalForward.__call__
    monkeypatch.setattr(LocalForward, "__call__", lambda self, *a: passed.append(len(a[0])) or call(self, *a))
    local = run(model, x, y, **options)
    assert torch.equal(local.broken_by, plain.broken_by)
    assert 0 < local.robust_acc < local.clean_acc
    assert 100 < sum(passed) < 60 * len(x), "some queries change nothing"


def test_attacks_have_the_standard_version_parameters():
    pyautoattack = pytest.importorskip("pyautoattack")
    model = small_model()
    reference = pyautoattack.AutoAttack(model, norm="L1", eps=0.5, seed=3, version="standard")
    x, y = small_data(model)
    report, device, log = print, torch.device("cpu"), Warnings()
    task = rb_noisy.autoattack._Task(model, x, y, 0.5, "L1", 3, 8, device, ATTACKS, True, Processes(), report)
    ours = build_attacks(task, log)
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        wanted, got = vars(getattr(reference, name)).copy(), vars(getattr(ours, name)).copy()
        for settings in (wanted, got):
            settings.pop("logger", None)
            settings["device"] = str(settings["device"])
        assert got == wanted


def test_a_single_remaining_sample_is_attacked():
    model = small_model()
    x, y = small_data(model, n=9)
    result = run(model, x[1:2], y[1:2], eps=0.5, return_adversarials=True)
    assert result.clean_correct.tolist() == [True]
    assert result.broken_by.tolist() == [1]
    assert result.x_adv.shape == (1, 1, 8, 8)


def test_result_accounts_for_every_sample():
    model = small_model()
    x, y = small_data(model)
    result = run(model, x, y, return_adversarials=True)
    n = len(x)
    assert torch.equal(result.robust, result.broken_by == -1)
    assert torch.equal(result.clean_correct, result.broken_by != 0)
    left = result.clean_correct.sum().item()
    for attack, accuracy in result.accuracy_after.items():
        left -= (result.broken_by == ATTACKS.index(attack) + 1).sum().item()
        assert accuracy == pytest.approx(left / n)
    assert list(result.accuracy_after) == list(ATTACKS)
    assert result.robust_acc == left / n
    with torch.no_grad():
        assert torch.equal(model(result.x_adv).argmax(1) == y, result.robust)
    assert torch.equal(result.x_adv[result.broken_by <= 0], x[result.broken_by <= 0])
    assert (result.x_adv - x).abs().max() <= EPS["Linf"] + 1e-6


def test_model_and_random_state_are_left_as_they_were():
    model = small_model()
    x, y = small_data(model)
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needs = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(model, x, y)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_covers_each_stage_and_shrinks_with_the_survivors():
    model = small_model()
    x, y = small_data(model)
    calls = []
    result = run(model, x, y, progress=lambda *call: calls.append(call))
    stages = {stage: [call[1:] for call in calls if call[0] == stage] for stage, _, _ in calls}
    assert list(stages) == ["clean", *ATTACKS]
    left = [1.0, result.clean_acc, *result.accuracy_after.values()]
    for steps, accuracy in zip(stages.values(), left, strict=False):
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1] == round(accuracy * len(x))


# --- warnings


class Softmax(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).softmax(1)


class Noisy(Softmax):
    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))


class Dynamic(Softmax):
    """Takes a gradient with respect to its own weights on the way."""

    def forward(self, x):
        with torch.enable_grad():
            torch.autograd.grad(self.model(x.detach()).sum(), self.model[0].weight)
        return self.model(x)


class Flat(Softmax):
    """Logits that do not depend on the image: no gradient to follow."""

    def forward(self, x):
        return self.model(x) * 0 + torch.arange(6.0)


@pytest.mark.parametrize(
    ("wrapper", "part"),
    [(Softmax, "probability distribution"), (Noisy, "randomized"), (Dynamic, "dynamic"), (Flat, "zero gradient")],
)
def test_warnings_of_the_checks_reach_the_caller_once(wrapper, part):
    model = small_model()
    x, y = small_data(model, n=12)
    y = torch.full_like(y, 5) if wrapper is Flat else y
    result = run(wrapper(model).eval(), x, y, batch_size=4, attacks=("apgd-ce", "apgd-t"))
    assert sum(part in warning for warning in result.warnings) == 1
    # The reference's counters outlive a call: the next model must not inherit the verdict.
    assert not any("dynamic" in warning for warning in run(model, x, y, attacks=("apgd-ce",)).warnings)


def test_target_classes_are_capped_with_the_reference_warning(monkeypatch):
    monkeypatch.setattr(rb_noisy.autoattack, "_build_attacks", build_attacks)
    model = small_model(classes=4)
    x, y = small_data(model, n=4)
    result = run(model, x, y, eps=0.001, attacks=("apgd-t",))
    assert result.robust_acc == result.clean_acc > 0
    assert any("more target classes (9) than possible (3)" in warning for warning in result.warnings)


def test_square_attack_succeeding_last_is_warned_about():
    class Rounded(nn.Module):
        """Gradients are masked by rounding, so only Square finds the way."""

        def forward(self, x):
            total = (x[:, :, :, :4].sum((1, 2, 3)) - x[:, :, :, 4:].sum((1, 2, 3))).round()
            return torch.stack([total * 0, total, total * 0 - 50, total * 0 - 60], 1) + 0 * x.sum()

    x = torch.full((6, 1, 8, 8), 0.5)
    result = run(Rounded().eval(), x, torch.zeros(6, dtype=torch.int64), eps=0.3, attacks=("apgd-ce", "square"))
    assert result.broken_by.eq(4).any()
    assert any("Square Attack has decreased" in warning for warning in result.warnings)


@pytest.mark.parametrize("fails", [False, True])
def test_an_existing_tracer_is_put_back(fails):
    class Failing(nn.Module):
        def forward(self, x):
            if fails and sys.gettrace() is not tracer:
                raise RuntimeError("forward")
            return torch.zeros(len(x), 4) + x.sum()

    def tracer(frame, event, argument):
        return None

    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="forward"):
                run(Failing().eval(), x, y)
        else:
            run(Failing().eval(), x, y, attacks=("apgd-ce",))
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is tracer


# --- resume


class Interrupted(Exception):
    pass


def test_interrupted_after_any_batch_it_resumes_to_the_same_result(tmp_path):
    model = small_model()
    x, y = small_data(model, n=14)
    calls = []
    whole = run(model, x, y, progress=lambda *call: calls.append(call), return_adversarials=True)
    for stop in range(1, len(calls) + 1):
        state = tmp_path / f"{stop}.npz"
        seen = []

        def progress(*call, seen=seen, stop=stop):
            seen.append(call)
            if len(seen) == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(model, x, y, progress=progress, return_adversarials=True, state_path=state)
        assert same(run(model, x, y, return_adversarials=True, state_path=state), whole)


def test_fab_batches_of_another_size_are_not_taken_for_finished(tmp_path, monkeypatch):
    model = small_model()
    x, y = small_data(model)
    state, options = tmp_path / "state.npz", {"attacks": ("fab-t",)}

    def after_two(stage, done, total):
        if stage == "fab-t" and done >= 6:
            raise Interrupted

    monkeypatch.setattr(rb_noisy.autoattack, "_FAB_ON_CPU", 3)
    with pytest.raises(Interrupted):
        run(model, x, y, state_path=state, progress=after_two, **options)
    monkeypatch.setattr(rb_noisy.autoattack, "_FAB_ON_CPU", 32)
    resumed = run(model, x, y, state_path=state, **options)
    assert same(resumed, run(model, x, y, **options))
    assert (resumed.broken_by == 3).nonzero().max() > 8, "others than the first six of those it classifies rightly"


KILLED = (600, 3)  # images, and the batch of APGD-T in which the process is killed


def _attack_until_killed(state: str) -> None:
    """Runs in a process of its own, and says when a batch is done."""
    rb_noisy.autoattack._build_attacks = lambda *args: shorten(build_attacks(*args))
    torch.set_num_threads(1)
    model = small_model()
    x, y = small_data(model, n=KILLED[0])
    run(model, x, y, batch_size=50, state_path=state, progress=lambda *call: print(*call, flush=True))


def test_killed_process_is_resumed_to_the_same_result(tmp_path):
    state = tmp_path / "state.npz"
    code = f"import tests.test_autoattack as t; t._attack_until_killed({str(state)!r})"
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        batches = 0
        for line in process.stdout:
            batches += line.startswith("apgd-t")
            if batches == KILLED[1]:
                process.kill()
                break
    assert process.returncode == -9
    model = small_model()
    x, y = small_data(model, n=KILLED[0])
    calls = []
    resumed = run(model, x, y, batch_size=50, state_path=state, progress=lambda *call: calls.append(call))
    assert calls[0][0] == "apgd-t"
    assert calls[0][1] >= 50 * (KILLED[1] - 1)
    assert same(resumed, run(model, x, y, batch_size=50))


class Cut(Processes):
    """One of several processes that are interrupted when they have done their share of the first attack."""

    def largest(self, values):
        if values.dtype == torch.bool and values.any():
            raise KeyboardInterrupt
        return values


def test_what_several_processes_left_one_goes_on_from(tmp_path):
    model = small_model()
    x, y = small_data(model)
    path = tmp_path / "state [1].npz"
    for index in range(2):
        with pytest.raises(KeyboardInterrupt):  # each in a folder of its own, as two that run at once know no more
            run(model, x, y, state_path=tmp_path / f"{index}" / path.name, processes=Cut(index, 2))
        (tmp_path / f"{index}" / f"state [1].{index}of2.npz").rename(tmp_path / f"state [1].{index}of2.npz")
    stages = []
    resumed = run(model, x, y, state_path=path, progress=lambda *stage: stages.append(stage))
    assert same(resumed, run(model, x, y))
    assert all(done == total for attack, done, total in stages if attack == "apgd-ce"), "together they had done it all"


def test_finished_run_is_read_back_at_one_pass_of_a_few_images(tmp_path):
    model = small_model()
    x, y = small_data(model)
    first = run(model, x, y, state_path=tmp_path / "state.npz", return_adversarials=True)
    passes = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    assert same(run(model, x, y, state_path=tmp_path / "state.npz", return_adversarials=True), first)
    assert len(passes) == 1
    assert passes[0] <= 16


def test_the_state_of_a_network_that_does_something_else_with_the_same_weights_is_refused(tmp_path):
    class Turned(nn.Sequential):
        def forward(self, x):
            return super().forward(x).roll(1, 1)

    model, state = small_model(), tmp_path / "state.npz"
    x, y = small_data(model, n=8)
    run(model, x, y, state_path=state, attacks=("apgd-ce",))
    with pytest.raises(InputError, match="of a run with another model, whose logits of these images differ"):
        run(Turned(*model).eval(), x, y, state_path=state, attacks=("apgd-ce",))


@pytest.mark.parametrize("changed", ["model", "x", "y", "eps", "norm", "seed", "batch_size", "attacks"])
def test_state_of_another_run_is_refused_by_name(tmp_path, changed):
    model, state = small_model(), tmp_path / "state.npz"
    x, y = small_data(model, n=8)
    run(model, x, y, state_path=state, attacks=("apgd-ce",))
    options = {"eps": 0.1, "norm": "L2", "seed": 4, "batch_size": 7, "attacks": ("fab-t",)}
    if changed == "model":
        model[1].running_mean[0] += 1e-3
    x = x.flip(0) if changed == "x" else x
    y = y.flip(0) if changed == "y" else y
    options = {changed: options[changed]} if changed in options else {}
    with pytest.raises(InputError, match=rf"state\.npz is of a run with other {changed}; delete it"):
        run(model, x, y, state_path=state, **{"attacks": ("apgd-ce",), **options})


def test_an_estimate_is_not_gone_on_from_in_full_precision(tmp_path):
    model, state = small_model(), tmp_path / "state.npz"
    x, y = small_data(model, n=8)
    options = {"state_path": state, "attacks": ("apgd-ce",)}
    run(model, x, y, fast=fast_form(model, half=True), **options)
    with pytest.raises(InputError, match=r"state\.npz is of a run with other precision; delete it"):
        run(model, x, y, **options)


def test_a_neighbour_is_no_part_of_a_state(tmp_path):
    for name in ("cifar.npz", "cifar.0of2.npz", "cifar.11of12.npz", "cifar.softmax.npz", "cifar.1of.npz"):
        (tmp_path / name).touch()
    found = [file.name for file in state_files(tmp_path / "cifar.npz")]
    assert found == ["cifar.npz", "cifar.0of2.npz", "cifar.11of12.npz"]
    forget_state(tmp_path / "cifar.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cifar.1of.npz", "cifar.softmax.npz"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "text", "pickle"])
def test_damaged_state_is_refused_and_kept(tmp_path, damage):
    model, state = small_model(), tmp_path / "state.npz"
    x, y = small_data(model, n=8)
    run(model, x, y, state_path=state, attacks=("apgd-ce",))
    content = state.read_bytes()
    changed = bytearray(content)
    changed[content.index(b"NUMPY", 1) + 200] ^= 1
    damaged = {"truncated": content[:-60], "changed": bytes(changed), "empty": b"", "text": b"no zip", "pickle": b""}
    state.write_bytes(damaged[damage])
    if damage == "pickle":
        np.savez(state, about=np.array({"attack": 0}, dtype=object), broken_by=np.zeros(8))
    content = state.read_bytes()
    with pytest.raises(InputError, match=r"state\.npz is no readable AutoAttack state .*delete it"):
        run(model, x, y, state_path=state, attacks=("apgd-ce",))
    assert state.read_bytes() == content


# --- inputs


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"seed": None}, "seed must be an integer, not None"),
        ({"norm": "linf"}, "unknown norm 'linf'; did you mean Linf"),
        ({"attacks": ("apgd",)}, "unknown attack 'apgd'; did you mean apgd-"),
        ({"attacks": ()}, "at least one of"),
        ({"attacks": ("square", "square")}, "each attack once"),
        ({"eps": 0.0}, "give a number above 0"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
    ],
)
def test_unusable_settings_are_named(options, part):
    model = small_model()
    x, y = small_data(model, n=4)
    with pytest.raises(InputError, match=part):
        run(model, x, y, **options)


def test_unusable_data_are_named():
    model = small_model()
    x, y = small_data(model, n=4)
    for bad_x, bad_y, part in [
        (x * 255, y, r"to \[0, 1\]"),
        (x.log().sqrt(), y, r"to \[0, 1\]"),
        (x.double(), y, "float32 images"),
        (x[:0], y[:0], "N at least 1"),
        (x, y[:3], r"\(3,\) labels for 4 images"),
        (x, y.float(), "torch.int64"),
        (x, y * 0 + 6, "the model knows 0 to 5"),
    ]:
        with pytest.raises(InputError, match=part):
            run(model, bad_x, bad_y)
    with pytest.raises(InputError, match=r"call model\.eval"):
        run(model.train(), x, y)


def test_three_classes_need_another_choice_of_attacks():
    model = small_model(classes=3)
    x, y = small_data(model, n=6)
    with pytest.raises(InputError, match="APGD-T's loss needs 4 classes and the model has 3; leave 'apgd-t' out"):
        run(model, x, y)
    result = run(model, x, y, eps=0.3, attacks=("apgd-ce", "fab-t", "square"))
    assert result.robust_acc < result.clean_acc


def test_fra31_logger_form_is_understood():
    log = Warnings()
    log.log("Warning: there are 2 points with zero gradient!")
    log.warning("there are 30 points with zero gradient!")
    log.warning("there are 4 points with zero gradient!")
    assert list(log.messages.values()) == ["there are 30 points with zero gradient!"]
