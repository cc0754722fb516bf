"""The bridge to RobustBench and AutoAttack: what becomes importable, what is left alone, what data sets are known."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pickle
import pkgutil
import runpy
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rb_noisy import compat
from rb_noisy.data import load_data
from rb_noisy.errors import InputError


def python(code: str, *, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    root = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(path)!r}]\n{code}" if path else code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def robustbench():
    compat.install()
    return importlib.import_module("robustbench")


@pytest.fixture
def autoattack():
    compat.install()
    module = importlib.import_module("autoattack")
    if "pyautoattack" not in module.__file__:
        pytest.skip("fra31's autoattack is installed, and is left alone")
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules that are importable until the test ends; watched names are forgotten after it."""
    callbacks, modules, finders = dict(compat._callbacks), set(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str = "value = 1\n") -> str:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        importlib.invalidate_caches()
        return name.removesuffix(".__init__")

    yield write
    compat._callbacks.clear()
    compat._callbacks.update(callbacks)
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# --- after_import


def test_callback_runs_between_the_module_s_code_and_the_import_statement(package):
    name = package("rbn_plain")
    seen = []
    compat.after_import(name, lambda module: seen.append(module.value))
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [1]
    importlib.import_module(name)
    assert seen == [1]
    importlib.reload(module)
    assert seen == [1, 1]


def test_callback_runs_at_once_for_an_imported_module(package):
    module = importlib.import_module(package("rbn_before"))
    seen = []
    compat.after_import("rbn_before", seen.append)
    assert seen == [module]


def test_importers_of_a_watched_submodule_see_what_the_callback_did(package):
    package("rbn_pack.__init__", "from rbn_pack.part import value\n")
    package("rbn_pack.part")
    compat.after_import("rbn_pack.part", lambda module: setattr(module, "value", 2))
    assert importlib.import_module("rbn_pack").value == 2


def test_loader_spec_and_resources_stay_the_import_system_s_own(package, tmp_path):
    package("rbn_data.__init__")
    (tmp_path / "rbn_data" / "note.txt").write_text("here")
    plain = importlib.util.find_spec("rbn_data")
    compat.after_import("rbn_data", lambda module: None)
    module = importlib.import_module("rbn_data")
    assert module.__spec__ == plain
    assert type(module.__loader__) is type(plain.loader)
    assert vars(module.__loader__) == vars(plain.loader)
    assert pkgutil.get_data("rbn_data", "note.txt") == b"here"
    assert inspect.getsource(module) == "value = 1\n"
    package("rbn_data.inner")
    assert importlib.import_module("rbn_data.inner").value == 1
    pickle.dumps(module.__loader__)


def test_watched_module_runs_as_a_program(package):
    compat.after_import(package("rbn_main"), lambda module: None)
    assert runpy.run_module("rbn_main", run_name="__main__")["__name__"] == "__main__"


def test_modules_of_one_zip_file_keep_their_own_callbacks(package, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as file:
        file.writestr("rbn_zip_a.py", "import rbn_zip_b, rbn_zip_c\n")
        file.writestr("rbn_zip_b.py", "")
        file.writestr("rbn_zip_c.py", "")
    monkeypatch.syspath_prepend(tmp_path / "both.zip")
    seen = []
    for name in ("rbn_zip_b", "rbn_zip_a"):
        compat.after_import(name, lambda module, name=name: seen.append((name, module.__name__)))
        importlib.util.find_spec(name)  # a mere look must leave nothing behind on the loader they share
    importlib.import_module("rbn_zip_a")
    assert seen == [("rbn_zip_b", "rbn_zip_b"), ("rbn_zip_a", "rbn_zip_a")]


def test_failing_import_fails_as_without_us_and_can_be_tried_again(package):
    name = package("rbn_fails", "raise LookupError('theirs')\n")
    seen = []
    compat.after_import(name, seen.append)
    with pytest.raises(LookupError, match="theirs") as caught:
        importlib.import_module(name)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert seen == []
    package("rbn_fails", "value = 'a longer one'\n")
    importlib.import_module(name)
    assert len(seen) == 1


def test_failing_callback_is_a_warning_and_not_a_failed_import(package):
    name = package("rbn_warns")
    compat.after_import(name, lambda module: module.missing)
    with pytest.warns(RuntimeWarning, match="could not extend rbn_warns: AttributeError"):
        assert importlib.import_module(name).value == 1


def test_missing_module_is_still_missing(package):
    compat.after_import("rbn_nowhere", lambda module: None)
    assert importlib.util.find_spec("rbn_nowhere") is None
    with pytest.raises(ModuleNotFoundError, match="rbn_nowhere"):
        importlib.import_module("rbn_nowhere")


@pytest.mark.parametrize("watched_before", [True, False])
def test_callback_waits_for_another_thread_s_import(package, watched_before):
    package("rbn_gate", "import threading\nstarted, go = threading.Event(), threading.Event()\n")
    gate = importlib.import_module("rbn_gate")
    package("rbn_slow", "import rbn_gate\nrbn_gate.started.set()\nassert rbn_gate.go.wait(5)\nvalue = 1\n")
    early, late = [], []
    if watched_before:
        compat.after_import("rbn_slow", lambda module: early.append(module.value))
    importing = threading.Thread(target=importlib.import_module, args=("rbn_slow",))
    importing.start()
    assert gate.started.wait(5)
    asking = threading.Thread(target=compat.after_import, args=("rbn_slow", lambda module: late.append(module.value)))
    asking.start()
    asking.join(0.1)
    assert late == []
    gate.go.set()
    importing.join(5)
    asking.join(5)
    assert early == ([1] if watched_before else [])
    assert late == [1]


# --- install


def test_install_imports_nothing_and_once_is_enough():
    code = """
import sys
import rb_noisy
from rb_noisy import compat
from rb_noisy.data import load_data
compat.install()
callbacks = {name: len(found) for name, found in compat._callbacks.items()}
compat.install()
assert callbacks == {name: len(found) for name, found in compat._callbacks.items()}
assert len([finder for finder in sys.meta_path if type(finder) is compat._Finder]) == 1
print(*({"torchvision", "timm", "robustbench", "pyautoattack", "autoattack", "pkg_resources"} & set(sys.modules)))
"""
    assert python(code).strip() == ""


def test_robustbench_imports_even_after_it_failed():
    code = """
import importlib.util, sys
has_real = importlib.util.find_spec("pkg_resources") is not None  # an older setuptools still brings it
try:
    import robustbench
    print("skip")
except ModuleNotFoundError:
    assert "robustbench.model_zoo.enums" in sys.modules  # left behind by the failed import
    from rb_noisy import compat
    compat.install()
    import robustbench, robustbench.loaders
    assert has_real or "pkg_resources" not in sys.modules
    assert robustbench.utils is sys.modules["robustbench.utils"]
    assert "pyautoattack" not in sys.modules
    from robustbench.model_zoo.enums import BenchmarkDataset
    assert robustbench.utils.DATASET_CLASSES[BenchmarkDataset("digits")] == 10
    assert BenchmarkDataset.mnist in robustbench.data._clean_dataset_loaders
"""
    if python(code).strip() == "skip":
        pytest.skip("robustbench imports here without help")


def test_robustbench_finds_its_own_files(robustbench):
    loaders = importlib.import_module("robustbench.loaders")
    path = Path(loaders.pkg_resources.resource_filename("robustbench.loaders", "helper_files"))
    assert path == Path(robustbench.__file__).parent / "helper_files"
    assert path.is_dir()


def test_a_real_pkg_resources_is_preferred(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    package("pkg_resources", "real = True\n")
    with compat._pkg_resources():
        assert importlib.import_module("pkg_resources").real
    assert sys.modules.pop("pkg_resources").real


def test_the_stand_in_for_pkg_resources_goes_when_the_import_fails(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    monkeypatch.delitem(sys.modules, "pkg_resources")
    package("pkg_resources", "raise AttributeError('made for an older Python')\n")

    def fail():
        with compat._pkg_resources():
            assert sys.modules["pkg_resources"].resource_filename
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert "pkg_resources" not in sys.modules


# --- RobustBench's data sets


def test_data_sets_are_real_enum_members(robustbench):
    from robustbench.model_zoo.enums import BenchmarkDataset

    digits = BenchmarkDataset("digits")
    assert digits is BenchmarkDataset.digits is BenchmarkDataset["digits"]
    assert isinstance(digits, BenchmarkDataset)
    assert digits in BenchmarkDataset
    assert (digits.name, digits.value, repr(digits)) == ("digits", "digits", "<BenchmarkDataset.digits: 'digits'>")
    assert [member.value for member in BenchmarkDataset] == ["cifar10", "cifar100", "imagenet", "digits", "mnist"]
    assert pickle.loads(pickle.dumps(digits)) is digits
    assert {digits: 1}[BenchmarkDataset("digits")] == 1
    with pytest.raises(ValueError, match="svhn"):
        BenchmarkDataset("svhn")


def test_robustbench_s_own_data_sets_are_untouched(robustbench):
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    data, cifar10 = robustbench.data, BenchmarkDataset("cifar10")
    assert cifar10 is BenchmarkDataset.cifar_10
    assert data._clean_dataset_loaders[cifar10] is data.load_cifar10
    assert robustbench.utils.DATASET_CLASSES[cifar10] == 10
    assert "Rice2020Overfitting" in model_dicts[cifar10][ThreatModel.Linf]
    with pytest.raises(KeyError):
        robustbench.load_model("NoSuchModel", dataset="cifar10")


def test_unknown_model_of_our_data_sets_gets_the_nearest_names(robustbench, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "list_models", lambda pattern: ["sglr_digits_linf"] if pattern == "*_digits_linf" else [])
    with pytest.raises(InputError, match="unknown model 'sglrr'; did you mean sglr"):
        robustbench.load_model("sglrr", dataset="digits", threat_model="Linf")


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


BENCHMARK = {"dataset": "digits", "threat_model": "Linf", "n_examples": 5, "batch_size": 5}


def nearest_mean() -> tuple[nn.Module, float]:
    """A linear classifier of digits, and its accuracy on the first five test images."""
    data = load_data("digits")
    means = torch.stack([data.x_train[data.y_train == digit].mean(0).flatten() for digit in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)
    model[1].weight[:], model[1].bias[:] = means, -means.square().sum(1) / 2
    return model, (model(data.x_test[:5]).argmax(1) == data.y_test[:5]).double().mean().item()


def test_benchmark_runs_unchanged_on_digits(robustbench):
    model, right = nearest_mean()
    assert right > 0
    assert robustbench.benchmark(model, **BENCHMARK, eps=0.5) == pytest.approx((right, 0))


def test_benchmark_with_a_state_file_ends_and_resumes(autoattack, robustbench, tmp_path, capsys):
    (model, right), state = nearest_mean(), tmp_path / "state.json"
    for _ in range(2):
        accuracies = robustbench.benchmark(model, **BENCHMARK, eps=0.001, aa_state_path=state)
        assert accuracies == pytest.approx((right, right))
    assert "Restored state" in capsys.readouterr().out


# --- autoattack


def test_signatures_are_fra31_s(autoattack):
    def parameters(function):
        return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.name != "self"}

    empty = inspect.Parameter.empty
    evaluation = {"x_orig": empty, "y_orig": empty, "bs": 250, "return_labels": False}
    assert parameters(autoattack.AutoAttack) == {
        **{"model": empty, "norm": "Linf", "eps": 0.3, "seed": None, "verbose": True, "attacks_to_run": ()},
        **{"version": "standard", "is_tf_model": False, "device": "cuda", "log_path": None},
    }
    assert parameters(autoattack.AutoAttack.run_standard_evaluation) == {**evaluation, "state_path": None}
    assert parameters(autoattack.AutoAttack.run_standard_evaluation_individual) == evaluation


def test_submodules_come_under_the_name_autoattack(autoattack):
    for name in ("autopgd_base", "fab_base", "fab_pt", "fab_projections", "square", "state", "checks", "other_utils"):
        assert importlib.import_module(f"autoattack.{name}").__name__ == f"autoattack.{name}"
    assert importlib.import_module("autoattack.autoattack").AutoAttack is autoattack.AutoAttack


def test_an_installed_autoattack_is_left_alone(tmp_path):
    (tmp_path / "autoattack").mkdir()
    (tmp_path / "autoattack" / "__init__.py").write_text("from .autoattack import AutoAttack\n")
    (tmp_path / "autoattack" / "autoattack.py").write_text("from .state import EvaluationState as AutoAttack\n")
    (tmp_path / "autoattack" / "state.py").write_text("EvaluationState = 'theirs'\n")
    code = "from rb_noisy import compat; compat.install(); import autoattack; print(autoattack.AutoAttack)"
    assert python(code, path=tmp_path).strip() == "theirs"


def test_a_plain_folder_named_autoattack_is_not_the_package(tmp_path):
    (tmp_path / "autoattack").mkdir()
    code = "from rb_noisy import compat; compat.install(); import autoattack; print(autoattack.AutoAttack.__name__)"
    assert python(code, path=tmp_path).strip() == "AutoAttack"


def adversary(autoattack, **options):
    built = autoattack.AutoAttack(linear_model(), **{"eps": 0.02, "device": "cpu", "seed": 1, **options})
    built.apgd.n_iter = built.apgd_targeted.n_iter = built.fab.n_iter = 5
    built.square.n_queries = 30
    return built


@pytest.fixture
def data():
    model = linear_model()
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return x, model(x).argmax(1)


def test_customised_attacks_are_the_ones_run(autoattack, data, capsys):
    built = adversary(autoattack, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"])
    built.attacks_to_run = ["apgd-ce"]
    built.apgd.n_restarts = 1
    x_adv, labels = built.run_standard_evaluation(*data, bs=8, return_labels=True)
    broken = labels != data[1]
    assert 0 < broken.sum() < len(broken)
    assert (x_adv - data[0]).abs().max() <= 0.02 + 1e-6
    assert built.clean_accuracy(x_adv, data[1], bs=8) == pytest.approx(1 - broken.double().mean().item())
    out = capsys.readouterr().out
    assert "apgd-ce - 3/3" in out
    assert "dlr" not in out
    assert torch.equal(built.run_standard_evaluation(*data, bs=8), x_adv)


def test_individual_evaluation_runs_each_attack_on_all_samples(autoattack, data, capsys):
    built = adversary(autoattack)
    found = built.run_standard_evaluation_individual(*data, bs=8)
    assert list(found) == built.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for attack, x_adv in found.items():
        alone = adversary(autoattack, verbose=False)
        alone.attacks_to_run = [attack]
        assert torch.equal(alone.run_standard_evaluation(*data, bs=8), x_adv)
    assert "robust accuracy by FAB-T" in capsys.readouterr().out
    labelled = adversary(autoattack, verbose=False).run_standard_evaluation_individual(*data, return_labels=True)
    assert len(labelled["square"]) == 2


def test_log_file_gets_the_lines_and_a_quiet_run_only_warnings(autoattack, data, capsys, tmp_path):
    class Softmax(nn.Module):
        def forward(self, x):
            return linear_model()(x).softmax(1)

    built = adversary(autoattack, log_path=tmp_path / "log.txt")
    built.run_standard_evaluation(*data)
    out = capsys.readouterr().out
    assert "initial accuracy: 100.00%" in out
    assert (tmp_path / "log.txt").read_text() == out
    built = adversary(autoattack, verbose=False)
    built.model = Softmax()
    built.run_standard_evaluation(*data)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Warning: it seems that the output is a probability distribution")


def test_unsupported_settings_are_refused(autoattack):
    with pytest.raises(InputError, match="is_tf_model=True needs fra31's autoattack"):
        adversary(autoattack, is_tf_model=True)
    with pytest.raises(InputError, match="attacks_to_run needs version='custom'"):
        adversary(autoattack, attacks_to_run=["square"])


@pytest.mark.parametrize("stopped_in", ["apgd", "fab", "square"])
def test_resume_gives_the_flags_of_an_uninterrupted_run(autoattack, data, tmp_path, stopped_in):
    path = tmp_path / "state.json"
    whole = adversary(autoattack, verbose=False)
    _, labels = whole.run_standard_evaluation(*data, bs=8, return_labels=True)

    stopped = adversary(autoattack, verbose=False)
    getattr(stopped, stopped_in).perturb = lambda x, y: (_ for _ in ()).throw(InterruptedError)
    with pytest.raises(InterruptedError):
        stopped.run_standard_evaluation(*data, bs=8, state_path=path)
    again = adversary(autoattack, verbose=False)
    again.run_standard_evaluation(*data, bs=8, state_path=path)

    state = autoattack.state.EvaluationState.from_disk(path)
    robust = labels == data[1]
    assert torch.equal(torch.as_tensor(state.robust_flags.tolist()), robust)
    assert state.robust_flags.mean().item() == state.robust_accuracy == pytest.approx(robust.double().mean().item())
    assert torch.equal(data[1][state.robust_flags], data[1][robust])
    assert state.clean_accuracy == 1.0


def test_state_of_other_attacks_or_samples_or_a_damaged_one_is_refused(autoattack, data, tmp_path):
    path = tmp_path / "state.json"
    x, y = data
    adversary(autoattack, verbose=False).run_standard_evaluation(x, y, state_path=path)
    with pytest.raises(InputError, match=r"state\.json is of 20 samples, not 19"):
        adversary(autoattack, verbose=False).run_standard_evaluation(x[:19], y[:19], state_path=path)
    other = adversary(autoattack, verbose=False, version="custom", attacks_to_run=["square"])
    with pytest.raises(ValueError, match="different set of attacks"):
        other.run_standard_evaluation(x, y, state_path=path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"state\.json is no AutoAttack state .*delete it"):
        adversary(autoattack, verbose=False).run_standard_evaluation(x, y, state_path=path)


def test_a_state_written_by_the_packages_themselves_is_read(autoattack, tmp_path):
    path = tmp_path / "state.json"
    theirs = autoattack.state.EvaluationState.__bases__[0]({"apgd-ce", "square"}, path)
    theirs.robust_flags = torch.tensor([True, False])
    assert isinstance(json.loads(path.read_text())["_attacks_to_run"], str)
    state = autoattack.state.EvaluationState.from_disk(path)
    assert state.attacks_to_run == {"apgd-ce", "square"}
    assert state.robust_flags.tolist() == [True, False]
