"""The typed, serialisable description of a training run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rb_noisy.criteria import CRITERIA, Criterion, make_criterion
from rb_noisy.errors import InputError, make_named, unknown_name
from rb_noisy.label_files import split_label_file
from rb_noisy.objectives import OBJECTIVES, Objective, make_objective
from rb_noisy.radius import parse_radius, radius, step_size
from rb_noisy.reading import is_text, parse_json
from rb_noisy.subsets import DRAWN, FIRST, kind_of
from rb_noisy.targets import EPOCH_SHARES, TARGETS, TAUGHT, Targets, make_targets
from rb_noisy.weights import AVERAGING, AWP, AveragingRule

SCHEDULES = ("multistep", "onecycle", "cosine", "constant")
PRECISIONS = ("no", "bf16")
LARGEST = 2**63  # of whole numbers; what is larger than this fits nowhere
RADII = ("eps", "alpha", "track_alpha")
OPTION_FIELDS = (
    *("noise_options", "backbone_options", "objective_options", "target_options"),
    *("criterion_options", "awp_options", "averaging_options"),
)
# What a method is composed of: one objective, then at most one part of each kind, in any order.
PARTS: dict[str, tuple[str, ...]] = {
    "target": tuple(TARGETS),
    "criterion": tuple(CRITERIA),
    "weight perturbation": ("awp",),
    "weight averaging": tuple(AVERAGING),
}

# What a recipe means when only its data set is named, by `family_of` it.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    # [SGLR §4], but for the network: PreAct-ResNet-18 is that of Rice et al. 2020 and of [SGLR] Figure 1. Images are
    # not standardised: [SGLR]'s released code only turns them into numbers in [0, 1], and [NL App. C.1] divides by 255.
    "cifar": {
        "backbone": "preact_resnet18",
        "eps": 8 / 255,
        "alpha": 2 / 255,
        "steps": 10,
        "epochs": 200,
        "milestones": (0.5, 0.75),  # 100 and 150
        "lr": 0.1,
        "augment": True,
        "normalize": False,
    },
    "mnist": {  # [NL App. C.1] but for epochs, α and steps, which are for two CPU cores
        "backbone": "small_cnn",
        "eps": 0.3,
        "alpha": 0.06,
        "steps": 10,
        "epochs": 10,
        "milestones": (0.3, 0.6),  # 30 and 60 of the paper's 100
        "lr": 0.01,
        "augment": False,
        "normalize": False,
    },
    "digits": {  # ours
        "backbone": "preact_resnet8_narrow",
        "eps": 0.2,
        "alpha": 0.05,
        "steps": 10,
        "epochs": 60,
        "milestones": (0.5, 0.75),
        "lr": 0.1,
        "augment": False,
        "normalize": False,
    },
}


def family_of(data: str) -> str:
    """Whose defaults a data set has: "mnist", "digits", or "cifar" for CIFAR and for data of one's own."""
    return data if data in ("mnist", "digits") else "cifar"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run. Fields left None take the data set's default (`DATA_DEFAULTS`).

    Attributes:
        data: a name for `rb_noisy.data.load_data`.
        train_size: train on this many training images only; None for all.
        train_images: which those are, "first" or "drawn" by class (with seed 0, so that all runs have the same). None
            for the first of a benchmark, whose order is random, and drawn of npz: and imagefolder:.
        noise, noise_rate, noise_seed, noise_options: label noise, see `rb_noisy.corrupt`; "human:FILE:SET" is short for
            "human" with the options file and key.
        backbone, backbone_options: a timm name (ours or any) and its own options.
        method: an objective ("st", "pgd-at", "trades", "mart", "nrat", "fgsm-rs", "n-fgsm", "liet"), then in any order
            "+" and at most one part of each kind: a target ("ls", "sglr", "sglr-released", "sat", "te", "elr", "adr",
            "kd", "ard", "rslad", "annotator", "kgr"), a criterion ("sce"), "awp", and "wa" or "swa": e.g.
            "trades+sglr+awp".
        objective_options, target_options, criterion_options, awp_options, averaging_options: of those parts, e.g.
            {"beta": 6.0}; {"r": 0.2, "temperature": 1.5, "start_epoch": 0}; {"gamma": 0.01}; {"decay": 0.999}.
        eps, alpha: radius and step of the training attack, in units of the image range [0, 1]; "8/255" is read too.
        steps, norm: its number of steps, and "Linf" or "L2".
        attack_mode: BatchNorm during the attack, "eval" ([NL]'s lineage, SGLR's code) or "train" (Rice et al.).
        epochs, batch_size: the length of the run; samples per process and step.
        lr, momentum, weight_decay: SGD.
        schedule: "multistep" (at `milestones` times `decays`), "onecycle" (linear up over the first 30%, linear down),
            "cosine" or "constant".
        milestones: epochs, or shares of the run between 0 and 1, which become epochs.
        decays: what the learning rate is multiplied by at each milestone, above 0 to 1; None for 0.1 each.
        eps_warmup: share of the run over which ε and α grow linearly to their full size, 0 for none.
        augment: random crop with 4 pixels of padding and horizontal flip.
        normalize: standardise by the training set's statistics, inside the network.
        precision: "no" (fp32) or "bf16".
        validation: training images held out (with their given, maybe wrong labels) to choose *best* on; 0 chooses on
            the test set, as both papers do.
        track: samples of each kind (correct, incorrect, test) measured after each epoch; 0 for all.
        track_steps, track_alpha: of the PGD that measures them; the step defaults to α, for one-step training to ε/4.
        seed: initial weights, order of samples, augmentation and random starts.
    """

    data: str
    train_size: int | None = None
    train_images: str | None = None
    noise: str = "none"
    noise_rate: float | None = None
    noise_seed: int = 0
    noise_options: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    method: str = "pgd-at"
    objective_options: dict[str, float] = field(default_factory=dict)
    target_options: dict[str, Any] = field(default_factory=dict)
    criterion_options: dict[str, float] = field(default_factory=dict)
    awp_options: dict[str, float] = field(default_factory=dict)
    averaging_options: dict[str, float] = field(default_factory=dict)
    eps: float | None = None
    alpha: float | None = None
    steps: int | None = None
    norm: str = "Linf"
    attack_mode: str = "eval"
    epochs: int | None = None
    batch_size: int = 128
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "multistep"
    milestones: tuple[float, ...] | None = None
    decays: tuple[float, ...] | None = None
    eps_warmup: float = 0.0
    augment: bool | None = None
    normalize: bool | None = None
    precision: str = "no"
    validation: int = 0
    track: int = 1000
    track_steps: int = 10
    track_alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in RADII:
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, parse_radius(value, f"recipe: {name}"))
        for f in dataclasses.fields(self):
            _check_type(f.name, f.type, getattr(self, f.name))
        noise, rate = split_noise(self.noise)
        if rate is not None and self.noise_rate not in (None, rate):
            raise InputError(f"recipe: noise {self.noise!r} and noise_rate {self.noise_rate} differ; give one of them")
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "noise_rate", self.noise_rate if rate is None else rate)
        if self.noise.startswith("human:"):
            file, key = split_label_file(self.noise.removeprefix("human:"))
            object.__setattr__(self, "noise", "human")
            named = {"file": file} if key is None else {"file": file, "key": key}
            if twice := sorted(named.keys() & self.noise_options.keys()):
                raise InputError(f"recipe: noise and noise_options both give {', '.join(twice)}; drop one of them")
            object.__setattr__(self, "noise_options", named | self.noise_options)
        self._check_parts()
        self._fill_in()
        for name in OPTION_FIELDS:  # in the form that JSON gives back, so that a saved recipe is the same recipe
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        self._check()

    def _fill_in(self) -> None:
        """Give the fields left out their defaults: of the method first, then of the data set."""
        defaults = dict(DATA_DEFAULTS[family_of(self.data)])
        objective = self.make_objective()
        if objective.steps is not None:
            eps = defaults["eps"] if self.eps is None else self.eps
            defaults |= {"steps": objective.steps, "alpha": objective.alpha_ratio * eps, "track_alpha": eps / 4}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.train_images is None or (self.train_size is None and self.train_images == DRAWN):
            object.__setattr__(self, "train_images", FIRST if self.train_size is None else kind_of(self.data))
        if self.track_alpha is None:
            object.__setattr__(self, "track_alpha", self.alpha)
        self._check_milestones()
        epochs = (max(1, _epoch_at(m, self.epochs)) if 0 < m < 1 else m for m in self.milestones)
        object.__setattr__(self, "milestones", tuple(epochs))
        if self.decays is not None:
            object.__setattr__(self, "decays", tuple(self.decays))
        if self.objective_name == "trades" and "awp" in self.parts:
            own = {"gamma": 0.005, "warmup": self.epochs // 20}  # 10 of 200 epochs (Wu et al. 2020)
            object.__setattr__(self, "awp_options", own | self.awp_options)
        shares = EPOCH_SHARES.get(self.targets_name, {})
        epochs = {name: _epoch_at(share, self.epochs) for name, share in shares.items()}
        object.__setattr__(self, "target_options", epochs | self.target_options)

    def _check_milestones(self) -> None:
        for value in self.milestones:
            if not (_is_number(value) and value >= 0):
                raise InputError(f"recipe: milestones holds {value!r}; give epochs, or shares of the run")
        for value in self.decays or ():
            if not (_is_number(value) and 0 < value <= 1):
                raise InputError(f"recipe: decays holds {value!r}; give factors above 0, at most 1")
        if self.decays is not None and len(self.decays) != len(self.milestones):
            raise InputError(
                f"recipe: {len(self.decays)} decays for {len(self.milestones)} milestones; give one for each"
            )

    def _check_parts(self) -> None:
        if self.objective_name not in OBJECTIVES:
            raise unknown_name("objective (the first part of the method)", self.objective_name, OBJECTIVES)
        kinds = {part: kind for kind, parts in PARTS.items() for part in parts}
        seen: dict[str, str] = {}
        for part in self.parts:
            if part not in kinds:
                raise unknown_name(f"part of the method {self.method!r}:", part, kinds)
            if kinds[part] in seen:
                raise InputError(f"method {self.method!r} has two parts of one kind, {seen[kinds[part]]} and {part}")
            seen[kinds[part]] = part
        if self.targets_name == "kd" and (self._part("criterion") or self.objective_name in ("mart", "nrat")):
            raise InputError(f"method {self.method!r}: kd needs the plain cross entropy of st, pgd-at or trades")
        if self.targets_name in ("ard", "rslad") and (self.objective_name != "pgd-at" or self._part("criterion")):
            raise InputError(
                f"method {self.method!r}: {self.targets_name} is a loss of its own; write pgd-at+{self.targets_name}"
            )
        # One name for one method, however its parts were ordered.
        kinds_in_order = list(PARTS)
        parts = sorted(self.parts, key=lambda part: kinds_in_order.index(kinds[part]))
        object.__setattr__(self, "method", "+".join([self.objective_name, *parts]))
        if self.targets_name == "adr" and self.averaging_name != "wa":
            raise InputError(f"method {self.method!r}: adr's teacher are the averaged weights; write {self.method}+wa")

    def _check(self) -> None:
        positive = {"lr": self.lr, "epochs": self.epochs, "batch_size": self.batch_size}
        if self.train_size is not None:
            positive["train_size"] = self.train_size
        at_least_zero = {
            name: getattr(self, name)
            for name in (
                *("steps", "momentum", "weight_decay"),
                *("validation", "track", "track_steps", "seed", "noise_seed"),
            )
        }
        for name, value in (positive | at_least_zero).items():
            if not (math.isfinite(value) and value >= 0 and (value > 0 or name not in positive)):
                bound = "above 0" if name in positive else "of at least 0"
                raise InputError(f"recipe: {name} is {value}; give a number {bound}")
        for name, known in (
            ("train_images", (FIRST, DRAWN)),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("norm", ("Linf", "L2")),
            ("attack_mode", ("eval", "train")),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(f"{name} in the recipe", str(getattr(self, name)), known)
        radius(self.eps, "recipe: eps", self.norm)
        for name in ("alpha", "track_alpha"):
            step_size(getattr(self, name), self.eps, f"recipe: {name}", self.norm)
        if not 0 <= self.eps_warmup <= 1:
            raise InputError(f"recipe: eps_warmup is {self.eps_warmup}; give a share of the run, from 0 to 1")
        objective = self.make_objective()
        if self.norm == "L2" and (objective.start_ratio != 1 or objective.trains_start):
            raise InputError(f"recipe: {self.objective_name} is defined for norm Linf only; give norm Linf")
        if objective.steps not in (None, self.steps):
            raise InputError(
                f"recipe: steps is {self.steps} but {self.objective_name} takes {objective.steps}; leave steps out"
            )
        if self.awp_options and "awp" not in self.parts:
            raise InputError(f"recipe: awp_options are given but the method {self.method!r} has no awp")
        if self.averaging_options and self.averaging_name is None:
            raise InputError(
                f"recipe: averaging_options are given but the method {self.method!r} has neither wa nor swa"
            )
        for name in self.make_targets().teachers:
            if not isinstance(name, str):
                raise InputError(f"recipe: {name!r} in target_options is no teacher; name a run folder or a model")
        if named := sorted({"name", "num_classes", "in_chans"} & self.backbone_options.keys()):
            raise InputError(f"recipe: backbone_options give {named[0]}, which backbone and data decide; leave it out")
        for make in (self.make_criterion, self.make_awp, self.make_averaging):
            make()
        if (awp := self.make_awp()) is not None and awp.warmup >= self.epochs:
            raise InputError(f"recipe: awp's warmup of {awp.warmup} epochs fills the run of {self.epochs}; shorten it")

    @property
    def objective_name(self) -> str:
        return self.method.partition("+")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """What the method composes with its objective."""
        return tuple(self.method.split("+")[1:])

    @property
    def trained_on(self) -> str:
        """Which training images, in words."""
        if self.train_size is None:
            return "all training images"
        if self.train_images == DRAWN:
            return f"{self.train_size} training images drawn by class"
        return f"first {self.train_size} training images"

    def _part(self, kind: str) -> str | None:
        return next((part for part in self.parts if part in PARTS[kind]), None)

    @property
    def targets_name(self) -> str:
        return self._part("target") or "hard"

    @property
    def averaging_name(self) -> str | None:
        return self._part("weight averaging")

    def make_objective(self) -> Objective:
        return make_objective(self.objective_name, **self.objective_options)

    def make_targets(self) -> Targets:
        return make_targets(self.targets_name, **self.target_options)

    def make_criterion(self) -> Criterion:
        return make_criterion(self._part("criterion") or "ce", **self.criterion_options)

    def make_awp(self) -> AWP | None:
        return make_named("method part", "awp", {"awp": AWP}, self.awp_options) if "awp" in self.parts else None

    def make_averaging(self) -> AveragingRule | None:
        name = self.averaging_name
        return None if name is None else make_named("method part", name, AVERAGING, self.averaging_options)

    def learning_rate(self, progress: float) -> float:
        """The learning rate at `progress` epochs (a fraction within an epoch) into the run."""
        share = progress / self.epochs
        if self.schedule == "multistep":
            passed = [progress >= milestone for milestone in self.milestones]
            if self.decays is None:
                return self.lr * 0.1 ** sum(passed)
            return self.lr * math.prod(itertools.compress(self.decays, passed))
        if self.schedule == "onecycle":
            return self.lr * (share / 0.3 if share < 0.3 else (1 - share) / 0.7)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        return self.lr

    def changes(self) -> dict[str, Any]:
        """The fields that differ from what data set, method and length fill in by themselves.

        What to build another recipe on: with another `epochs` the milestones then move too.
        """
        given = self.to_dict()
        # What is taught has no teacher by default, and no recipe without one.
        needed = self.target_options if self.targets_name in TAUGHT else {}
        base = Recipe(data=self.data, method=self.method, epochs=self.epochs, target_options=needed).to_dict()
        base["target_options"] = {k: v for k, v in base["target_options"].items() if k not in needed}
        changes = {name: value for name, value in given.items() if value != base[name]}
        for name in OPTION_FIELDS:
            options = {key: value for key, value in given[name].items() if base[name].get(key) != value}
            changes = {k: v for k, v in changes.items() if k != name} | ({name: options} if options else {})
        always = {"data": self.data, "method": self.method}
        if self.epochs != DATA_DEFAULTS[family_of(self.data)]["epochs"]:
            always["epochs"] = self.epochs
        result = always | changes
        # A field that was left out may be filled in from one that was given (the tracking step from α): name it then.
        again = Recipe.from_dict(result).to_dict()
        return result | {name: value for name, value in given.items() if again[name] != value}

    def to_dict(self) -> dict[str, Any]:
        decays = None if self.decays is None else list(self.decays)
        return dataclasses.asdict(self) | {"milestones": list(self.milestones), "decays": decays}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Raises:
            InputError: a field is unknown or missing.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("recipe field", name, known)
        if "data" not in values:
            raise InputError("the recipe names no data set; give --data, or the field data")
        return cls(**values)

    @classmethod
    def recorded(cls, values: dict[str, Any]) -> Recipe:
        """The recipe in the record of a run or in a card; one that is older than `train_images` took the first."""
        return cls.from_dict({"train_images": FIRST} | values)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the recipe", *, recorded: bool = False) -> Recipe:
        """The recipe in JSON text; `recorded` as in a run's record."""
        values = parse_json(text, source, "mend it or write it again")
        if not isinstance(values, dict):
            raise InputError(f"{source} holds {type(values).__name__}, not a JSON object of recipe fields")
        return cls.recorded(values) if recorded else cls.from_dict(values)


def split_noise(text: str) -> tuple[str, float | None]:
    """Kind and rate of a label noise as tables write it: "symmetric 0.4"; None where there is no rate in it.

    Clean labels are "none", or "clean labels".
    """
    if text == "clean labels":
        return "none", None
    rated = re.fullmatch(r"([a-z]+) +(\d*\.?\d+)", text)  # no file of human labels, which comes after a colon
    return (rated[1], float(rated[2])) if rated else (text, None)


def _epoch_at(share: float, epochs: int) -> int:
    """The epoch, counted from 0, at a share of the run; rounded down, but not for the share's own rounding."""
    return int(share * epochs + 1e-6)


def based_on(base: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe like another one but for `values`; with other `epochs` its epochs move in proportion."""
    fields, epochs = base.changes(), values.get("epochs")
    if isinstance(epochs, int) and abs(epochs) < LARGEST and epochs != base.epochs:
        scale = epochs / base.epochs
        options = fields.get("target_options", {})
        moved = {
            name: _epoch_at(scale, options[name]) for name in EPOCH_SHARES.get(base.targets_name, {}).keys() & options
        }
        fields |= {"target_options": options | moved} if moved else {}
        if "milestones" in fields:
            fields["milestones"] = [max(1, _epoch_at(scale, milestone)) for milestone in fields["milestones"]]
    return merge(fields, values)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, option by option."""
    both = {k: base[k] | v for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both


def flatten(point: Mapping[str, Any]) -> dict[str, Any]:
    """{"lr": 0.1, "target_options": {"r": 0.4}} → {"lr": 0.1, "target_options.r": 0.4}."""
    flat: dict[str, Any] = {}
    for name, value in point.items():
        if name in OPTION_FIELDS and isinstance(value, dict):
            flat |= {f"{name}.{option}": setting for option, setting in value.items()}
        else:
            flat[name] = value
    return flat


def _as_json(name: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return parse_json(json.dumps(options), "what they hold", "give other values")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"recipe: {name} cannot be written as JSON ({error}); give text, numbers and lists, e.g. a file's name"
        ) from error


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)


def _check_type(name: str, annotation: str, value: Any) -> None:
    kinds = {"str": str, "int": int, "float": int | float, "bool": bool, "dict": dict, "tuple": list | tuple}
    parts = annotation.split(" | ")
    kind = parts[0].partition("[")[0]
    if value is None and "None" in parts:
        return
    # A bool is an int to Python, but not to the author of a recipe.
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InputError(f"recipe: {name} is {value!r}; give {annotation.replace(' | None', '')}")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise InputError(f"recipe: {name} has {len(str(abs(value)))} digits; give a smaller number")
    if isinstance(value, str) and not is_text(value):
        raise InputError(f"recipe: {name} is {value!a}, which is no UTF-8 text; give another name")
