"""What the evaluation commands share: who is evaluated, on what, where the figures go, how they are shown."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from model_zoo.registry import (
    dataset_label,
    dataset_title,
    eps_label,
    load_model,
    read_card,
    read_cards,
    read_results,
    results_file,
    run_card,
    timm_names,
    write_result,
)
from rb_noisy.attacks import ATTACK_LOSSES, gradient_of
from rb_noisy.console import ZooOption, console, print_warning, progress_bar, user_errors
from rb_noisy.data import load_data
from rb_noisy.device import keep_freed_memory
from rb_noisy.errors import InputError, NetworkWarning, unknown_name
from rb_noisy.fast import FastForm, fast_form
from rb_noisy.files import UNREADABLE, atomic_path, sha256, tensors_digest, write_json
from rb_noisy.forward import all_finite, checked_images, doubts, image_shape_of, usable
from rb_noisy.hints import command_line
from rb_noisy.measures import wilson_interval
from rb_noisy.placement import best_layout, launched, relaunch, threads_are_given
from rb_noisy.processes import Processes
from rb_noisy.radius import parse_radius
from rb_noisy.radius import radius as in_range
from rb_noisy.runs import Run
from rb_noisy.same_data import check_classes
from rb_noisy.subsets import DRAWN, images_of, kind_of, subset

__all__ = ["ZooOption", "console", "progress_bar", "user_errors"]

ModelOption = Annotated[str, typer.Option("--model", help="A zoo model, a run folder, or a timm name.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Default: the model's own data set.")]
CountOption = Annotated[
    int | None,
    typer.Option(
        "--n",
        help="The first N test images; of npz: and imagefolder: N drawn by class, with --seed. Default: all.",
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images attacked at a time.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one, else cpu.")]
EpsOption = Annotated[
    float | None,
    typer.Option(
        "--eps",
        parser=parse_radius,
        metavar="FLOAT",
        help="Radius in [0, 1] units, or 8/255. Default: the model's own.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of every random number.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures here instead of into the card or run folder.")
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Replace figures over as many samples or more in the card or run folder.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Where verdicts, plots and what resumes an interrupted evaluation are kept.")
]
RootOption = Annotated[Path | None, typer.Option("--data-root", help="Where data sets are kept.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the network first (torch.compile): pays off in long evaluations.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes",
        help="Share the images among so many processes of one thread. Default on a CPU: what a short measurement says.",
    ),
]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="Of a run folder: final or best.")]


WORTH_PLACING = 120.0  # seconds of work from which on starting further processes pays
PLACED_ON = 32  # images of a measurement
CHECKED_ON = 16  # images that are looked at before an evaluation


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        label: what it is called in tables.
        model: in eval mode, on `device`.
        fast: its fast form, which the attacks use.
        processes: those that share the evaluation.
        x, y: the test images (n, C, H, W) and labels (n,), on the CPU.
        dataset: the name of the data set.
        eps, norm: the threat model.
        class_names: names of the K classes.
        card: the model's card, a preview of it for a run folder, the bare minimum for a timm model.
        target: where figures are entered: a zoo model's name, a run's results file, or None.
        zoo: the zoo of that name.
        weights_sha256: what the figures belong to.
        index: (n,) int64, ascending: which of the data set's test images they are.
        images: the same in words, see `rb_noisy.subsets.Subset`.
        total: how many test images there are.
    """

    label: str
    model: nn.Module
    x: Tensor
    y: Tensor
    dataset: str
    eps: float
    norm: str
    class_names: tuple[str, ...]
    device: torch.device
    card: dict[str, Any]
    target: str | Path | None
    zoo: str | None
    weights_sha256: str
    index: Tensor
    images: str
    total: int
    fast: FastForm
    processes: Processes

    def folder(self, out: Path) -> Path:
        """Where this model's verdicts are kept: one folder for each set of weights, images, ε and norm.

        A benchmark's name and number say which images they are; one's own data have digits of the images' SHA-256 too.
        """
        own = f"-{self._images_digest[:8]}" if kind_of(self.dataset) == DRAWN else ""
        return out / self._folder_name(f"{dataset_label(self.dataset)}-{len(self.x)}{own}")

    def old_folder(self, out: Path) -> Path:
        """Where they were kept before folders told one's own data apart."""
        kind, _, place = self.dataset.partition(":")
        return out / self._folder_name(f"{Path(place).stem.lower() if place else kind}-{len(self.x)}")

    def _folder_name(self, data: str) -> str:
        return f"{self.label}-{self.weights_sha256[:8]}-{data}-{self.norm}-{self.eps:g}"

    @cached_property
    def _images_digest(self) -> str:
        return images_digest(self)

    def describe(self, *, seed: int, batch_size: int) -> dict[str, Any]:
        """What every published figure carries."""
        return {
            "dataset": self.dataset,
            "split": "test",
            "n": len(self.x),
            "of": self.total,
            "norm": self.norm,
            "eps": self.eps,
            "seed": seed,
            "batch_size": batch_size,
            "date": datetime.date.today().isoformat(),
            "weights_sha256": self.weights_sha256,
            "torch": torch.__version__,
            "images": self.images,  # the last, where a state file has the digest of the images in its place
        }


@dataclass(frozen=True)
class _Found:
    label: str
    model: nn.Module
    data: str | None
    eps: float | None
    norm: str
    card: dict[str, Any]
    target: str | Path | None
    sha256: str


def load_subject(
    model: str,
    *,
    zoo: str | None,
    dataset: str | None,
    n: int | None,
    device: str | None,
    eps: float | None,
    data_root: Path | None,
    checkpoint: str,
    seed: int,
    batch_size: int,
    compiled: bool = False,
    processes: int | None = 1,
    passes: int = 0,
) -> Subject:
    """Find and load the model, its data and its threat model, and check the options that all evaluations share.

    Args:
        processes: share the work among so many, this command being run anew as each of them; None chooses what is
            fastest on this CPU, where the work is long enough.
        passes: about how many gradients the evaluation takes for an image: how long the work is.

    Raises:
        InputError: no such model; a data set or ε is needed and not given; it does not fit the model.
        typer.Exit: the work was done by several processes.
    """
    if processes is not None and processes != 1 and launched() == 1:
        raise typer.Exit(relaunch(processes, _command(), sys.argv[1:]))
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; give at least 1")
    if seed < 0:
        raise InputError(f"--seed is {seed}; give 0 or more")
    keep_freed_memory()
    sharing = Processes.launched()
    console.quiet = not sharing.main
    chosen = _device(device)
    found = _find(model, zoo, checkpoint, dataset, data_root)
    name = dataset or found.data
    if eps is None and found.eps is None:
        raise InputError(f"{model} has no ε of its own; give --eps, e.g. --eps 8/255")
    radius = in_range(found.eps if eps is None else eps, "--eps", found.norm, above_zero=True)
    try:
        data = load_data(name, data_root)
    except InputError as error:
        if dataset is not None:
            raise
        raise InputError(f"{error}. {model} is evaluated on {name}; for other images give --dataset") from error
    x, y = checked_images(data.x_test, image_shape_of(found.model)), data.y_test
    if n is not None and not 1 <= n <= len(x):
        raise InputError(f"--n is {n} but {name} has {len(x)} test images; give 1 to {len(x)}")
    part = subset(name, y, n, seed)
    # Convolutions are faster so, on a CPU by about a half; the values are the same but for rounding.
    network = found.model.to(chosen, memory_format=torch.channels_last).eval()
    try:
        network, logits = usable(network, x)
        classes = all_finite(logits).shape[1]
        for doubt in doubts(network, x[:CHECKED_ON].to(chosen)):
            warnings.warn(doubt, NetworkWarning, stacklevel=1)
    except InputError as error:
        raise InputError(f"{model} on {name}: {error}") from error
    if classes != data.num_classes:
        raise InputError(f"{model} tells {classes} classes apart but {name} has {data.num_classes}; give --dataset")
    on_own = found.data is not None and name == found.data
    if learnt := found.card.get("class_names"):  # timm does not say what its classes are
        way_out = "bring the classes of the data into the order that the model learnt"
        if on_own:
            way_out = "give the classes their names and order back, or train anew"
        doubt = check_classes(learnt, data.class_names, model, name, way_out, other_names=not on_own)
        if doubt is not None:
            warnings.warn(f"{doubt}; the figures take both for the same", NetworkWarning, stacklevel=1)
    # A figure on other data or another ε is not the card's figure.
    own = on_own and radius == found.eps
    subject = Subject(
        label=found.label,
        model=network,
        x=x if len(part.index) == len(x) else x[part.index],
        y=y[part.index],
        dataset=name,
        eps=radius,
        norm=found.norm,
        class_names=data.class_names,
        device=chosen,
        card=found.card | {"dataset": dataset_label(name), "eps": eps_label(radius), "clean_acc": "", "results": {}},
        target=found.target if own else None,
        zoo=zoo,
        weights_sha256=found.sha256,
        index=part.index,
        images=part.words,
        total=len(x),
        fast=fast_form(network, compiled=compiled),
        processes=sharing,
    )
    if processes is None and chosen.type == "cpu" and launched() == 1 and not threads_are_given():
        _place(subject, passes)
    return subject


def _command() -> str:
    """The name by which `python -m` started this command."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None or module.name.partition(".")[0] != __package__:
        raise InputError("--processes is for the command line: python -m eval.autoattack --processes 2 …")
    return module.name


def _place(subject: Subject, passes: int) -> None:
    """Choose threads, or run the command anew as several processes, if the work is long enough to measure it."""
    x, y = (tensor[:PLACED_ON].to(subject.device) for tensor in (subject.x, subject.y))

    def gradient() -> None:
        gradient_of(subject.fast, x, y, x, ATTACK_LOSSES["ce"])

    began = time.perf_counter()
    gradient()
    if (time.perf_counter() - began) / len(x) * passes * len(subject.x) < WORTH_PLACING or subject.fast.compiled:
        return
    layout = best_layout(gradient)
    torch.set_num_threads(layout.threads)
    what = f"{layout.processes} processes of one thread" if layout.processes > 1 else f"{layout.threads} thread"
    what += "s" if layout.threads > 1 else ""
    console.print(f"{what}: {layout.seconds:.3g} s for the gradients of {len(x)} images", soft_wrap=True)
    if layout.processes > 1:
        raise typer.Exit(relaunch(layout.processes, _command(), sys.argv[1:]))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # which the device "meta" has not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def _find(model: str, zoo: str | None, checkpoint: str, dataset: str | None, data_root: Path | None) -> _Found:
    if (Path(model) / "run.json").is_file():
        run, label = Run.open(model), Path(model).resolve().name
        network = run.load(checkpoint)
        return _Found(
            label=label,
            model=network,
            data=run.recipe.data,
            eps=run.recipe.eps,
            norm=run.recipe.norm,
            card=run_card(run, label, checkpoint),
            target=results_file(model, checkpoint),
            sha256=sha256(Path(model) / f"{checkpoint}.safetensors"),
        )
    cards = {name: card for card in read_cards(zoo) for name in timm_names(card)}
    if model in cards:
        card = cards[model]
        return _Found(
            label=card["name"],
            model=load_model(card["name"], zoo),
            data=card["recipe"]["data"],
            eps=card["recipe"]["eps"],
            norm=card["threat_model"],
            card=card,
            target=card["name"],
            sha256=card["weights"]["sha256"],
        )
    return _find_in_timm(model, {card["name"] for card in cards.values()}, dataset, data_root)


def _find_in_timm(model: str, zoo_names: set[str], dataset: str | None, data_root: Path | None) -> _Found:
    import timm

    import rb_noisy.backbones

    built_in = {name for card in read_cards() for name in timm_names(card)}
    if model in built_in or not timm.is_model(model):  # the built-in zoo's models are timm's too, but not this zoo's
        # Of timm's thousands only what is nearly it.
        near = difflib.get_close_matches(model, set(timm.list_models()) - built_in, n=2, cutoff=0.75)
        error = unknown_name("model", model, zoo_names | set(near))
        raise InputError(f"{error}; give a model of the zoo (or --zoo), a run folder (with run.json) or a timm name")
    if dataset is None:
        raise InputError(f"{model} is a timm model: name what to evaluate it on with --dataset")
    data = load_data(dataset, data_root)
    options: dict[str, Any] = {"num_classes": data.num_classes, "in_chans": data.in_chans}
    if timm.is_model_pretrained(model):
        cfg = timm.get_pretrained_cfg(model)
        if cfg.num_classes != data.num_classes:
            train = command_line("rb-noisy", "train", "--backbone", model, "--data", dataset, "--out", f"runs/{model}")
            raise InputError(
                f"{model} was trained for {cfg.num_classes} classes but {dataset} has {data.num_classes}; "
                f"train it first: {train}"
            )
        options |= {"pretrained": True, "mean": cfg.mean, "std": cfg.std}
    else:
        print_warning("warning:", f"{model} has no pretrained weights: a random network (seed 0) is evaluated")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            network = rb_noisy.backbones.build_backbone(model, **options)
        except (OSError, RuntimeError) as error:
            raise InputError(f"the weights of {model} cannot be loaded ({error}); check the network") from error
    card = {"name": model, "noise": None, "architecture": model, "threat_model": "Linf"}
    return _Found(model, network, None, None, "Linf", card, None, _state_hash(network))


def _state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def rate(hits: Tensor) -> dict[str, Any]:
    """An accuracy with its 95% Wilson interval, from (n,) bool."""
    count, n = int(hits.sum()), len(hits)
    return {"accuracy": count / n, "interval": list(wilson_interval(count, n))}


def percent(figures: dict[str, Any]) -> str:
    """ "71.30% (67.3–74.9)" of what `rate` returns."""
    low, high = figures["interval"]
    return f"{figures['accuracy']:.2%} ({100 * low:.1f}–{100 * high:.1f})"


def show(title: str, table: Table) -> None:
    """Print a table under its title, which a Rich table title would break at the table's width."""
    console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
    console.print(table)


def setting(subject: Subject, figures: dict[str, Any]) -> str:
    """Data set, which images, threat model, seed: the line under a title."""
    data = dataset_title(dataset_label(subject.dataset))
    return f"{data} test set, {images_of(figures)}, {subject.norm} ε = {eps_label(subject.eps)}, seed {figures['seed']}"


def entered(subject: Subject) -> dict[str, Any]:
    """The figures that its card or run folder has already, by evaluation; none for another data set or ε."""
    if subject.target is None:
        return {}
    if isinstance(subject.target, Path):
        return read_results(subject.target)
    return read_card(subject.target, subject.zoo)["results"]


def packed(verdicts: Tensor) -> str:
    """(n,) bool as hexadecimal text, eight images to a byte, the first in its highest bit."""
    return np.packbits(verdicts.numpy()).tobytes().hex()


def unpacked(text: str, n: int) -> Tensor:
    """The (n,) bool that `packed` was given."""
    bits = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=n).astype(bool))


def without_target(subject: Subject) -> Subject:
    """The same subject, whose figures then do not go into its card."""
    return dataclasses.replace(subject, target=None)


def enter(
    subject: Subject, results: dict[str, dict[str, Any]], json_file: Path | None, out: Path, replace: bool
) -> None:
    """Put the figures, by evaluation, where they belong, and say where that is."""
    if not subject.processes.main:
        return
    for evaluation, figures in results.items():
        write_json(subject.folder(out) / f"{evaluation}.json", {"model": subject.label, evaluation: figures})
    if json_file is not None:
        write_json(json_file, {"model": subject.label, **results})
        console.print(f"figures: {json_file}", soft_wrap=True)
        return
    if subject.target is None:
        console.print(
            f"figures: {subject.folder(out)}, not a card, which holds standard attacks in full precision, on its own "
            "data and at its own ε",
            soft_wrap=True,
        )
        return
    place = f"{subject.target}" if isinstance(subject.target, Path) else f"the card of {subject.target}"
    for evaluation, figures in results.items():
        try:
            entered = write_result(subject.target, evaluation, figures, subject.zoo, replace=replace)
        except OSError as error:
            raise InputError(f"{place} cannot be written ({error}); give --json FILE") from error
        kept = (
            f"in {subject.folder(out)}; {place} keeps those it has over as many samples or more (--replace to change)"
        )
        outcome = f"entered into {place}" if entered else kept
        console.print(f"{evaluation} figures {outcome}", soft_wrap=True)


def images_digest(subject: Subject) -> str:
    """SHA-256 of the images and labels, which data of the same name and number may not have."""
    return tensors_digest([("x", subject.x), ("y", subject.y)])


def _measured_on(subject: Subject) -> dict[str, np.ndarray]:
    return {
        "y": subject.y.numpy(),
        "images_sha256": np.array(tensors_digest([("x", subject.x)])),
        "weights_sha256": np.array(subject.weights_sha256),
    }


def saved_verdicts(folder: Path, evaluation: str, subject: Subject) -> dict[str, np.ndarray] | None:
    """The arrays that `save_verdicts` was given; None where there are none of these weights, images and labels."""
    files = [place / f"{evaluation}.npz" for place in (subject.folder(folder), subject.old_folder(folder))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files if name != "index"}
    except UNREADABLE as error:
        raise InputError(f"{file} is damaged ({error}); delete it and run this evaluation again") from error
    for name, wanted in _measured_on(subject).items():
        if name not in arrays or not np.array_equal(arrays.pop(name), wanted):
            return None
    return arrays


def save_verdicts(folder: Path, evaluation: str, subject: Subject, **arrays: Tensor | np.ndarray) -> Path:
    """Per-sample verdicts as an .npz; row i is of test image `index[i]` of the data set."""
    file, rows = subject.folder(folder) / f"{evaluation}.npz", {"index": subject.index, **arrays}
    if subject.processes.main:
        with atomic_path(file) as temporary:
            np.savez_compressed(
                temporary,
                **_measured_on(subject),
                **{name: v.cpu().numpy() if isinstance(v, Tensor) else v for name, v in rows.items()},
            )
    subject.processes.wait()  # another evaluation may read it
    console.print(f"verdicts: {file}", soft_wrap=True)
    return file
