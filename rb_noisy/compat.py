"""The bridge that makes RobustBench importable and opens it to our data sets and models; the only file that knows how.

RobustBench 1.1.1 from the package index fails on import: `pkg_resources` left setuptools, and the `autoattack` it
imports is on the index only as `pyautoattack`, with another call signature. And timm 1.0.9, which it pins, no longer
finds the Hugging Face Hub. `install()` puts one finder in front of the import system. Nothing is imported by that: the
finder acts when somebody imports one of those packages.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from datetime import datetime
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import write_json

DATASETS = {"digits": 10, "mnist": 10}  # what RobustBench's own functions learn, with the number of classes

_lock = threading.RLock()
_callbacks: dict[str, list[Callable[[ModuleType], object]]] = {}
_running: set[str] = set()  # watched modules that are being executed now
_installed = False


def install() -> None:
    """Make `import robustbench` and `import autoattack` work from now on; repeated calls do nothing.

    * fra31's `autoattack` is left alone where it is installed; elsewhere that name gives a second copy of
      `pyautoattack`'s modules, with fra31's signatures and an evaluation state that can be resumed.
    * `robustbench.loaders` gets the one function of `pkg_resources` it uses, where no real one can be imported.
    * RobustBench's functions accept `dataset="digits"` and `dataset="mnist"`, and say in words what is wrong with
      another data set, or with a model of our zoo that is looked for under another one.
    * timm 1.0.9 downloads pretrained weights with huggingface_hub 2.x too.
    * The FutureWarnings that timm and RobustBench cause when they are imported are not shown, unless the interpreter
      was started with -W.
    """
    with _lock:
        global _installed
        if _installed:
            return
        _installed = True
    if "robustbench" not in sys.modules:
        # An import that failed half-way leaves submodules behind, which a new package would not know as its own.
        for name in [name for name in sys.modules if name.startswith("robustbench.")]:
            del sys.modules[name]
    # Outside the lock, as a callback may wait for another thread's import.
    after_import("robustbench.model_zoo.enums", _add_datasets)
    after_import("robustbench.model_zoo.models", _add_model_tables)
    after_import("robustbench.data", _add_loaders)
    after_import("robustbench.utils", _add_classes)
    after_import("robustbench.loaders", lambda module: None)  # watched for `pkg_resources` only
    after_import("timm.models._hub", _mend_hub)
    after_import("autoattack.state", _mend_state)
    after_import("autoattack.autoattack", _mend_driver)


def after_import(module_name: str, callback: Callable[[ModuleType], object]) -> None:
    """Run `callback(module)` after every execution of a module (import or reload), at once if it is imported already.

    The callback runs in the importing thread, before the import statement returns. An error inside it becomes a
    `RuntimeWarning`: it must not break a package that would import well without us.
    """
    with _lock:
        _callbacks.setdefault(module_name, []).append(callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        if sys.modules.get(module_name) is None or module_name in _running:
            return
    # Not a bare look into sys.modules: another thread may be half way through this import.
    _call(callback, importlib.import_module(module_name))


def _call(callback: Callable[[ModuleType], object], module: ModuleType) -> None:
    try:
        callback(module)
    except Exception as error:
        message = f"rb_noisy could not extend {module.__name__}: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Finder:
    """Finds watched modules through the other finders, and lets their loaders call back."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _callbacks and name != "autoattack":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        # A plain folder of that name is a namespace package, without origin: not the package meant.
        if name == "autoattack" and (spec is None or spec.origin is None):
            spec = _stand_in_spec()
        return _watched(spec) if spec is not None and name in _callbacks else spec


_finder = _Finder()


def _watched(spec: ModuleSpec) -> ModuleSpec:
    """The same spec, whose loader runs the callbacks after the module's code.

    The loader stays what it is (its class, `get_data`, `get_code`, resources): a copy of it carries the hook as an
    attribute until it has run. A copy, because zip files share one loader between all their modules.
    """
    if not hasattr(spec.loader, "exec_module") or "exec_module" in vars(spec.loader):
        return spec  # a namespace package, a built-in module, or one that is hooked already
    loader: Any = copy.copy(spec.loader)
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        with _lock:
            _running.add(spec.name)
        try:
            with _pkg_resources() if spec.name == "robustbench.loaders" else nullcontext(), _no_future_warnings():
                execute(module)
        finally:
            with _lock:
                _running.discard(spec.name)
                callbacks = list(_callbacks[spec.name])
        for callback in callbacks:
            _call(callback, module)

    loader.exec_module = exec_module
    spec.loader = loader
    return spec


@contextmanager
def _no_future_warnings() -> Iterator[None]:
    """What packages warn of each other when they are imported, as users can do nothing about it."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)
        yield


# --- timm's way to the Hugging Face Hub


def _mend_hub(hub: ModuleType) -> None:
    """Let timm 1.0.9 use huggingface_hub 2.x, where one function that it imports for uploads only has moved.

    timm then takes the whole package for missing. The weights that it reads through this bridge are no pickles that
    run code: where a repository has no safetensors, `torch.load` takes tensors only.
    """
    if hub._has_hf_hub:
        return
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError

    for name in ("create_repo", "get_hf_file_metadata", "hf_hub_url", "upload_folder"):
        setattr(hub, name, getattr(huggingface_hub, name))
    hub.EntryNotFoundError = EntryNotFoundError  # type: ignore[attr-defined]
    tells = {"library_name": "timm", "library_version": hub.__version__}
    hub.hf_hub_download = partial(huggingface_hub.hf_hub_download, **tells)  # type: ignore[attr-defined]
    hub.repo_type_and_id_from_hf_id = _no_upload  # type: ignore[attr-defined]
    load = hub.load_state_dict_from_hf

    @wraps(load)
    def load_state_dict_from_hf(model_id: str, filename: str = hub.HF_WEIGHTS_NAME, weights_only: bool = True) -> Any:
        return load(model_id, filename, weights_only=True)

    hub.load_state_dict_from_hf = load_state_dict_from_hf  # type: ignore[attr-defined]
    hub._has_hf_hub = True  # type: ignore[attr-defined]


def _no_upload(*_: Any, **__: Any) -> Any:
    raise InputError("timm 1.0.9 cannot upload with huggingface_hub 2.x; use: hf upload USER/REPO FOLDER")


# --- pkg_resources


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Let `import pkg_resources` succeed inside the block, by the real one if there is a working one."""
    fake = None
    try:
        importlib.import_module("pkg_resources")
    except Exception:  # an old one on a new Python fails with AttributeError
        fake = ModuleType("pkg_resources", "What RobustBench uses of setuptools' former pkg_resources.")
        fake.resource_filename = _resource_filename  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = fake
    try:
        yield
    finally:
        if fake is not None and sys.modules.get("pkg_resources") is fake:
            del sys.modules["pkg_resources"]


def _resource_filename(module_name: str, resource: str) -> str:
    return os.path.join(os.path.dirname(str(sys.modules[module_name].__file__)), resource)


# --- RobustBench's data sets


def _add_datasets(enums: ModuleType) -> None:
    for name in DATASETS:
        _add_member(enums.BenchmarkDataset, name, name)

    def missing(cls: Any, value: object) -> Any:
        raise unknown_name("RobustBench data set", str(value), [member.value for member in cls])

    enums.BenchmarkDataset._missing_ = classmethod(missing)


def _add_member(enum: Any, name: str, value: str) -> None:
    """Give an existing Enum class one more member, as its class statement would have."""
    if name in enum.__members__:
        return
    member = object.__new__(enum)
    member._name_, member._value_, member.__objclass__ = name, value, enum
    member._sort_order_ = len(enum.__members__)
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.13 looks there too
        enum._hashable_values_.append(value)


class _Models(dict):
    """RobustBench's own models of a data set and threat model, if any: it looks here for what timm does not have.

    That is where a model of our zoo is missed whose data set is another, or was not given.
    """

    def __init__(self, own: dict[str, Any], dataset: str, threat: str) -> None:
        super().__init__(own)
        self.dataset, self.ending = dataset, f"_{dataset}_{threat.lower()}"

    def __missing__(self, name: str) -> Any:
        from model_zoo.registry import read_cards, robustbench_dataset

        for card in read_cards():
            if card["name"] == name.lower().replace("-", "_"):
                right = f"dataset={robustbench_dataset(card)!r}, threat_model={card['threat_model']!r}"
                raise InputError(f"{name} is no model of {self.ending[1:]!r}; load it with {right}")
        if self.dataset not in DATASETS:
            raise KeyError(name)  # as RobustBench has it for its own
        import timm

        known = [model.removesuffix(self.ending) for model in timm.list_models(f"*{self.ending}")]
        raise unknown_name("model", name, known)


def _add_model_tables(models: ModuleType) -> None:
    for dataset in models.BenchmarkDataset:
        tables = models.model_dicts.setdefault(dataset, {})
        for threat in models.ThreatModel:
            if threat in tables or dataset.value in DATASETS:
                tables[threat] = _Models(tables.get(threat, {}), dataset.value, threat.value)


def _add_loaders(data: ModuleType) -> None:
    for name in DATASETS:
        data._clean_dataset_loaders.setdefault(data.BenchmarkDataset(name), partial(_load_clean, name))
    for name in ("cifar10", "cifar100"):
        loader = _in_words(getattr(data, f"load_{name}"), name)
        setattr(data, f"load_{name}", loader)
        data._clean_dataset_loaders[data.BenchmarkDataset(name)] = loader


def _in_words(load: Callable[..., Any], name: str) -> Callable[..., Any]:
    """RobustBench's own loader, whose download may fail."""

    @wraps(load)
    def loader(n_examples: int | None = None, data_dir: str = "./data", *rest: Any, **options: Any) -> Any:
        try:
            return load(n_examples, data_dir, *rest, **options)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{name} is not in {data_dir} and cannot be fetched ({error}); check the network, or give as data_dir= "
                "the folder that torchvision keeps it in"
            ) from error

    return loader


def _load_clean(name: str, n_examples: int | None, data_dir: str, prepr: Any) -> tuple[Any, Any]:
    from rb_noisy.data import load_data

    dataset = load_data(name, data_dir)
    return dataset.x_test[:n_examples], dataset.y_test[:n_examples]


def _add_classes(utils: ModuleType) -> None:
    for name, classes in DATASETS.items():
        utils.DATASET_CLASSES.setdefault(utils.BenchmarkDataset(name), classes)


# --- pyautoattack as `autoattack`


def _stand_in_spec() -> ModuleSpec | None:
    """A spec that runs pyautoattack's files under the name `autoattack`; their imports are relative, so all follow."""
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or spec.origin is None:
        return None
    places = list(spec.submodule_search_locations or ())
    return importlib.util.spec_from_file_location("autoattack", spec.origin, submodule_search_locations=places)


def _is_stand_in(module: ModuleType) -> bool:
    return Path(str(module.__file__)).parent.name == "pyautoattack"


class _Log:
    """What the attacks and checks log through: printed, and added to a file, as fra31's Logger does."""

    def __init__(self, verbose: bool, path: str | os.PathLike | None) -> None:
        self.verbose = verbose
        self.path = path

    def log(self, message: str) -> None:
        print(message)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{message}\n")

    def debug(self, message: str) -> None:
        if self.verbose:
            self.log(message)

    info = debug

    def warning(self, message: str) -> None:
        self.log(f"Warning: {message}")


def _mend_state(module: ModuleType) -> None:
    """Replace the evaluation state by one that comes back from the disk as it went there."""
    if not _is_stand_in(module):
        return
    import torch

    class Flags(torch.Tensor):
        """A bool tensor with a mean: the driver uses it as a mask, RobustBench takes its mean."""

        def mean(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.Tensor.mean(self.float(), *args, **kwargs)

    class EvaluationState(module.EvaluationState):  # type: ignore[name-defined]
        """Which attacks have run and which samples they left; JSON, written whole or not at all."""

        def to_disk(self, force: bool = False) -> None:
            if self.path is None:
                return
            self._last_saved = datetime.now()
            content = {field.name: getattr(self, field.name) for field in fields(self)}
            content |= {"path": str(self.path), "_last_saved": str(self._last_saved)}
            content |= {key: sorted(content[key]) for key in ("_attacks_to_run", "_run_attacks")}
            if self._robust_flags is not None:
                content["_robust_flags"] = self._robust_flags.tolist()
            write_json(self.path, content)

        @classmethod
        def from_disk(cls, path: str | os.PathLike) -> Any:
            try:
                content = json.loads(Path(path).read_text(encoding="utf-8"))
                attacks, flags = content["_attacks_to_run"], content["_robust_flags"]
                # The packages' own files hold the set as the text Python shows for it.
                content["_attacks_to_run"] = set(ast.literal_eval(attacks) if isinstance(attacks, str) else attacks)
                content["_run_attacks"] = set(content["_run_attacks"])
                if flags is not None:
                    content["_robust_flags"] = torch.tensor(flags, dtype=torch.bool).as_subclass(Flags)
                content["_last_saved"] = datetime.fromisoformat(content["_last_saved"])
                return cls(**{**content, "path": Path(path)})
            except (ValueError, KeyError, TypeError, SyntaxError, AttributeError, RecursionError, MemoryError) as error:
                raise InputError(f"{path} is no AutoAttack state ({error}); delete it or give another path") from error

    module.EvaluationState = EvaluationState


def _mend_driver(module: ModuleType) -> None:
    """Give pyautoattack's AutoAttack fra31's signatures and a resume that works."""
    if not _is_stand_in(module):
        return

    class DriverState(module.EvaluationState):  # type: ignore[name-defined]
        """The state as the driver meets it.

        With restored flags the driver skips the code that creates its `y_adv`, and fails. So it is shown none, predicts
        the clean labels again, and the flags it then stores are narrowed, in place, to the restored ones.
        """

        restored = None

        @classmethod
        def from_disk(cls, path: str | os.PathLike) -> Any:
            state = super().from_disk(path)
            state.restored, state._robust_flags = state._robust_flags, None
            return state

        @property
        def robust_flags(self) -> Any:
            return self._robust_flags

        @robust_flags.setter
        def robust_flags(self, flags: Any) -> None:
            if self.restored is not None:
                if len(flags) != len(self.restored):
                    what = f"is of {len(self.restored)} samples, not {len(flags)}"
                    raise InputError(f"the AutoAttack state {self.path} {what}; delete it or give another path")
                flags &= self.restored.to(flags.device)
                self.restored = None
            self._robust_flags = flags
            self.to_disk(force=True)

        @property
        def clean_accuracy(self) -> float:
            return self._clean_accuracy

        @clean_accuracy.setter
        def clean_accuracy(self, accuracy: float) -> None:
            if self._clean_accuracy != self._clean_accuracy:  # nan until first set
                self._clean_accuracy = accuracy
            self.to_disk(force=True)

    class AutoAttack(module.AutoAttack):  # type: ignore[name-defined]
        """AutoAttack (Croce & Hein, arXiv:2003.01690) with the call signatures of fra31's package."""

        def __init__(
            self,
            model: Any,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: Any = (),
            version: str = "standard",
            is_tf_model: bool = False,
            device: Any = "cuda",
            log_path: str | os.PathLike | None = None,
        ) -> None:
            if is_tf_model:
                raise InputError(
                    "is_tf_model=True needs fra31's autoattack; pyautoattack evaluates PyTorch models only"
                )
            if version != "custom" and attacks_to_run:
                raise InputError(f"attacks_to_run needs version='custom'; version={version!r} has its own attacks")
            settings = {"norm": norm, "eps": eps, "seed": seed, "device": device}
            super().__init__(model, attacks=list(attacks_to_run), version="custom", **settings)
            self.version, self.verbose, self.is_tf_model = version, verbose, False
            self.logger = self.apgd.logger = self.apgd_targeted.logger = _Log(verbose, log_path)
            if version != "custom":
                self.set_version(version)

        def set_version(self, version: str = "standard") -> None:
            self._set_version(version)

        def run_standard_evaluation(
            self, x_orig: Any, y_orig: Any, bs: int = 250, return_labels: bool = False, state_path: Any = None
        ) -> Any:
            path = None if state_path is None else Path(state_path)
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=path)
            return (x_adv, y_adv) if return_labels else x_adv

        def run_standard_evaluation_individual(
            self, x_orig: Any, y_orig: Any, bs: int = 250, return_labels: bool = False
        ) -> dict[str, Any]:
            attacks, verbose, found = self.attacks_to_run, self.verbose, {}
            try:
                for attack in attacks:
                    self.attacks_to_run, self.verbose = [attack], False
                    found[attack] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
                    if verbose:
                        x_adv = found[attack][0] if return_labels else found[attack]
                        accuracy = self.clean_accuracy(x_adv, y_orig, bs)
                        self.logger.log(f"robust accuracy by {attack.upper()}: {accuracy:.2%}")
            finally:
                self.attacks_to_run, self.verbose = attacks, verbose
            return found

    module.EvaluationState = DriverState
    module.AutoAttack = AutoAttack
