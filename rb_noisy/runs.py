"""The run folder that training leaves: how it is read, and how weights are saved and loaded."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rb_noisy.data import SHAPES
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path
from rb_noisy.reading import checked, parse_json, read_bytes, read_json, read_tensors
from rb_noisy.recipes import Recipe
from rb_noisy.same_data import check_classes
from rb_noisy.schemas import MetricsLine, Results, RunFile, without_pretrained

CHECKPOINTS = ("best", "final")
HISTORY = {"kappa": torch.int16, "loss": torch.float32, "prediction": torch.int16}


@dataclass(frozen=True)
class History:
    """What training saw of every sample, epoch by epoch; column i is training sample i.

    Attributes:
        kappa: (E, N) int16, κ of the training attack against the *given* label, 0..steps; −1 where the sample was not
            trained on, or the method does not attack (small = suspicious label).
        loss: (E, N) float32, cross entropy with the given label in the training pass (on x̃ where the method attacks,
            else on x); NaN where the sample was not trained on (large = suspicious label).
        prediction: (E, N) int16, the predicted label of the attack's random start (of x where the method does not
            attack); −1 where the sample was not trained on.
    """

    kappa: Tensor
    loss: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder.
        recipe: what was asked for.
        model_options: what `rb_noisy.backbones.build_backbone` takes to build the network again.
        class_names: names of the K classes.
        image_shape: (C, H, W) of the images, None where an older run does not say.
        metrics: one dict per finished epoch.
        data_sha256: of the images and labels, see `data_digest`.
    """

    path: Path
    recipe: Recipe
    model_options: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    metrics: tuple[dict[str, Any], ...]
    data_sha256: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a run folder.

        Raises:
            InputError: no run there, or its files are damaged.
        """
        path = Path(path)
        description = path / "run.json"
        if not description.is_file():
            raise InputError(f"{path} is no run folder: it has no run.json; name the folder that `train` wrote")
        way_out = "train again into another folder"
        values = read_json(description, "the run", way_out)
        checked(RunFile, without_pretrained(values), f"the run {description}", way_out)
        recipe, class_names = Recipe.recorded(values["recipe"]), tuple(values["class_names"])
        shape = values.get("image_shape") or SHAPES.get(recipe.data)
        metrics = read_metrics(path)
        if len(metrics) > recipe.epochs:
            raise InputError(f"{path} has the metrics of {len(metrics)} epochs, its recipe {recipe.epochs}; {way_out}")
        shape = shape and tuple(shape)
        digest = values.get("data_sha256")
        return cls(path, recipe, values["model_options"], class_names, shape, tuple(metrics), digest)

    @property
    def finished(self) -> bool:
        return len(self.metrics) == self.recipe.epochs and (self.path / "final.safetensors").is_file()

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the highest robust accuracy on the selection set, counted from 0 (the first on a tie)."""
        scores = [line["selection_pgd_acc"] for line in self.metrics]
        return int(np.argmax(scores)) if scores else None

    def data_digest(self) -> str | None:
        """SHA-256 of the images and labels that it was trained on (`rb_noisy.training_data.data_digest`).

        Of a run of an earlier version the state knows it; None where it does not either.
        """
        state = self.path / "state.safetensors"
        if self.data_sha256 is not None or not state.is_file():
            return self.data_sha256
        try:
            with safe_open(state, framework="pt") as opened:
                return (opened.metadata() or {}).get("data_sha256")
        except (SafetensorError, OSError):  # what it would be resumed from, which nobody asks for here
            return None

    def history(self) -> History:
        """κ, loss and prediction of every training sample in every finished epoch.

        Raises:
            InputError: an epoch's file is missing or damaged.
        """
        epochs: list[dict[str, Tensor]] = []
        way_out = "train again into another folder"
        for epoch in range(len(self.metrics)):
            file = history_file(self.path, epoch)
            found = read_tensors(file, way_out)
            for name, dtype in HISTORY.items():
                shape = (epochs or [found])[0].get("loss", torch.empty(0)).shape
                if name not in found or found[name].dtype != dtype or found[name].shape != shape or len(shape) != 1:
                    raise InputError(f"{file} is no history of this run ({name} has another form); {way_out}")
            if found["prediction"].max() >= len(self.class_names):
                raise InputError(f"{file} is the history of another network, with more classes; {way_out}")
            epochs.append(found)
        if not epochs:
            raise InputError(f"{self.path} has no finished epoch; continue it with --resume")
        return History(*(torch.stack([epoch[name] for epoch in epochs]) for name in HISTORY))

    def load(self, checkpoint: str = "final") -> nn.Module:
        """The network with the *best* or *final* weights, in eval mode.

        Raises:
            InputError: that checkpoint is not there, or is damaged.
        """
        from rb_noisy.backbones import build_backbone

        if checkpoint not in CHECKPOINTS:
            raise InputError(f"checkpoint is {checkpoint!r}; give 'best' or 'final'")
        file = self.path / f"{checkpoint}.safetensors"
        if not file.is_file():
            raise InputError(f"{self.path} has no {checkpoint} weights yet; continue it with --resume")
        model = build_backbone(**self.model_options)
        load_weights(model, file)
        model.image_shape, model.class_names = self.image_shape, self.class_names
        return model.eval()


def check_folder(path: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether the run folder is yet to be begun.

    Raises:
        InputError: it holds a run that is not to be resumed, or one of another recipe.
    """
    if not (path / "run.json").exists():
        return True
    if not resume:
        raise InputError(f"{path} already holds a run; continue it with --resume, or name another folder")
    found = Run.open(path).recipe.to_dict()
    if differing := [name for name, value in recipe.to_dict().items() if found.get(name) != value]:
        raise InputError(
            f"{path} holds a run of another recipe ({', '.join(differing)} differ); "
            "resume with the recipe of its run.json, or name another folder"
        )
    return False


def results_file(run_dir: str | Path, checkpoint: str) -> Path:
    """Where the figures measured on a checkpoint of a run folder are kept."""
    return Path(run_dir) / f"results-{checkpoint}.json"


def read_results(file: Path) -> dict[str, Any]:
    """The figures in a `results_file`, by evaluation; none if it is not there."""
    if not file.is_file():
        return {}
    way_out = "delete it and evaluate again"
    return checked(Results, read_json(file, "the figures", way_out), f"the figures {file}", way_out)


def history_file(path: Path, epoch: int) -> Path:
    """Where a run folder keeps what an epoch (from 0) showed of every training sample."""
    return path / "history" / f"{epoch:04d}.safetensors"


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a network, all of it or none.

    Raises:
        InputError: the file is damaged, its tensors are not the network's, or they are not finite.
    """
    state = read_tensors(file, "get it again")
    check_tensors(state, model.state_dict(), str(file))
    # In float32, since PyTorch cannot ask this of every format of 8 bits.
    if bad := [k for k, v in state.items() if v.is_floating_point() and not v.float().isfinite().all()]:
        raise InputError(f"{file} has weights that are not finite, the first in {bad[0]!r}; get or train others")
    model.load_state_dict(state)


def check_tensors(state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Raise `InputError` unless two sets of tensors have the same names, shapes and kinds of numbers."""
    wrong = sorted(expected.keys() ^ state.keys()) or [
        name
        for name, tensor in state.items()
        if tensor.shape != expected[name].shape
        or tensor.is_floating_point() != expected[name].is_floating_point()
        or tensor.is_complex()
    ]
    if wrong:
        raise InputError(f"{source} does not fit the network: {len(wrong)} tensors differ, the first is {wrong[0]!r}")


def save_weights(model: nn.Module, file: Path) -> None:
    """Save a network's state as safetensors, whole or not at all."""
    save_tensors(model.state_dict(), file, {})


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Save tensors and a header of strings as safetensors, whole or not at all."""
    # safetensors refuses channels_last tensors, and tensors that share memory.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(file) as temporary:
        save_file(plain, temporary, metadata)


def load_groups(file: Path, keys: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """What `save_tensors` saved under the names "group.name", by group (those missing are empty), and its header.

    Raises:
        InputError: the file is damaged, or one of `keys` is not in its header.
    """
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in read_tensors(file, "delete it to start over, or restore a copy").items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        missing = [key for key in keys if key not in metadata]
        if missing:
            raise KeyError(missing[0])
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error}); delete it to start over, or restore a copy") from error
    return groups, metadata


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's `metrics.jsonl`, one per finished epoch."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return []
    way_out, lines = "delete the folder and train again", []
    for number, text in enumerate(read_bytes(file, "the metrics", way_out).splitlines()):
        source = f"line {number + 1} of {file}"
        line = checked(MetricsLine, parse_json(text, source, way_out), source, way_out)
        if line["epoch"] != number:
            raise InputError(f"{source} is of epoch {line['epoch']}, not {number}; {way_out}")
        lines.append(line)
    return lines


def check_teacher(name: str, student: Path | None = None) -> None:
    """Raise `InputError` unless this can name a teacher: "average" (ADR), a run folder, or a timm name.

    A run folder's name may be relative to the student's run folder, such as "../pgd-at_clean_seed0", or to where we
    are.
    """
    from rb_noisy.backbones import is_backbone

    if name != "average" and _teacher_folder(name, student) is None and not is_backbone(name):
        raise InputError(
            f"teacher {name!r} is neither a run folder (with run.json) nor a model of the zoo or of timm; name one by "
            "target_options.robust (and .standard)"
        )


def _teacher_folder(name: str, student: Path | None) -> Path | None:
    # Normalised, because the student's folder may not be there yet, and no ".." leads out of what is not there.
    places = [Path(os.path.normpath(student / name))] if student is not None else []
    return next((place for place in [*places, Path(name)] if (place / "run.json").is_file()), None)


def load_teacher(
    name: str,
    images: Tensor,
    num_classes: int,
    student: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """The network of a run folder (final weights) or of a timm name with weights, in eval mode, without gradients.

    Every model of our zoo has a timm name. `images` (n, C, H, W) and `num_classes` are what it has to take and to tell
    apart; `class_names`, where they are given, are the names of these classes. `student` is the run folder that a
    folder's name may be relative to, see `check_teacher`.

    Raises:
        InputError: neither of the two, no weights in safetensors, or a network for other data: it does not take the
            images, or its classes are others or in another order.
    """
    from rb_noisy.backbones import pretrained_network

    if (folder := _teacher_folder(name, student)) is not None:
        model = Run.open(folder).load()
    else:
        check_teacher(name)
        model = pretrained_network(name)
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    try:
        classes = model(images).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"teacher {name!r} cannot take images of {tuple(images.shape[1:])} ({error})") from error
    if classes != num_classes:
        raise InputError(f"teacher {name!r} tells {classes} classes apart, not {num_classes}; name one for this data")
    learnt = getattr(model, "class_names", None)  # timm does not say what its classes are
    if learnt is not None and class_names is not None:
        way_out = "name a teacher for these classes, or bring the classes into its order"
        check_classes(learnt, class_names, f"teacher {name!r}", "the data", way_out)
    return model
