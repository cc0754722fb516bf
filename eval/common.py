"""What the evaluation commands share: who is evaluated, on what, where the figures go, how they are shown."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from model_zoo.registry import card_files, dataset_label, eps_label, read_card, run_card, write_result
from rb_noisy.cli import ZooOption, console, progress_bar, user_errors
from rb_noisy.data import load_data
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, write_json
from rb_noisy.measures import wilson_interval
from rb_noisy.runs import Run

__all__ = ["ZooOption", "console", "progress_bar", "user_errors"]

ModelOption = Annotated[str, typer.Option("--model", help="A zoo model, a run folder, or a timm name.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Default: the model's own data set.")]
CountOption = Annotated[int | None, typer.Option("--n", help="The first N test images. Default: all.")]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images attacked at a time.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one, else cpu.")]
EpsOption = Annotated[float | None, typer.Option("--eps", help="Radius in [0, 1] units. Default: the model's own.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of every random number.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures here instead of into the card or run folder.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Where verdicts, plots and what resumes an interrupted evaluation are kept.")
]
RootOption = Annotated[Path | None, typer.Option("--data-root", help="Where data sets are kept.")]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="Of a run folder: final or best.")]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        label: what it is called in tables and file names.
        model: in eval mode, on `device`.
        x, y: the test images (n, C, H, W) and labels (n,), on the CPU.
        dataset: the name of the data set.
        eps, alpha, norm: the threat model; α is the training attack's step, None where it is not known.
        class_names: names of the K classes.
        target: where figures are entered: a zoo model's name, a run folder, or None.
        zoo: the zoo of that name.
        weights_sha256: what the figures belong to.
    """

    label: str
    model: nn.Module
    x: Tensor
    y: Tensor
    dataset: str
    eps: float
    alpha: float | None
    norm: str
    class_names: tuple[str, ...]
    device: torch.device
    target: str | Path | None
    zoo: str | None
    weights_sha256: str
    total: int

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
        }


def load_subject(
    model: str,
    *,
    zoo: str | None,
    dataset: str | None,
    n: int | None,
    device: str | None,
    eps: float | None,
    data_root: Path | None,
    checkpoint: str = "final",
) -> Subject:
    """Find and load the model, its data and its threat model.

    Raises:
        InputError: no such model; a data set or ε is needed and not given; it does not fit the model.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device} is not there; PyTorch sees no GPU; use --device cpu")
    found = _find(model, zoo, checkpoint, dataset, data_root)
    name = dataset or found["data"]
    if name is None:
        raise InputError(f"{model} is a timm model: name what to evaluate it on with --dataset")
    if eps is None and found["eps"] is None:
        raise InputError(f"{model} has no ε of its own; give --eps, e.g. --eps {8 / 255:.6f}")
    data = load_data(name, data_root)
    x, y = data.x_test, data.y_test
    if n is not None and not 1 <= n <= len(x):
        raise InputError(f"--n is {n} but {name} has {len(x)} test images; give 1 to {len(x)}")
    # Convolutions are faster so, on a CPU by about a half; the values are the same but for rounding.
    network = found["model"].to(chosen, memory_format=torch.channels_last).eval()
    with torch.no_grad():
        try:
            classes = network(x[:2].to(chosen)).shape[1]
        except RuntimeError as error:
            raise InputError(f"{model} cannot take the images of {name}, {tuple(x.shape[1:])}: {error}") from error
    if classes != data.num_classes:
        raise InputError(f"{model} tells {classes} classes apart but {name} has {data.num_classes}; give --dataset")
    own_data = found["data"] is not None and (dataset is None or dataset == found["data"])
    own_threat = eps is None or eps == found["eps"]
    return Subject(
        label=found["label"],
        model=network,
        x=x[:n],
        y=y[:n],
        dataset=name,
        eps=found["eps"] if eps is None else eps,
        alpha=found["alpha"],
        norm=found["norm"],
        class_names=data.class_names,
        device=chosen,
        # A figure on other data or another ε is not the card's figure.
        target=found["target"] if own_data and own_threat else None,
        zoo=zoo,
        weights_sha256=found["sha256"],
        total=len(x),
    )


def _find(model: str, zoo: str | None, checkpoint: str, dataset: str | None, data_root: Path | None) -> dict[str, Any]:
    from rb_noisy.files import sha256

    if (Path(model) / "run.json").is_file():
        run = Run.open(model)
        return {
            "label": Path(model).resolve().name,
            "model": run.load(checkpoint),
            "data": run.recipe.data,
            "eps": run.recipe.eps,
            "alpha": run.recipe.alpha,
            "norm": run.recipe.norm,
            "target": Path(model),
            "sha256": sha256(Path(model) / f"{checkpoint}.safetensors"),
        }
    if model in card_files(zoo):
        from model_zoo.registry import load_model

        card = read_card(model, zoo)
        recipe = card["recipe"]
        return {
            "label": model,
            "model": load_model(model, zoo),
            "data": recipe["data"],
            "eps": recipe["eps"],
            "alpha": recipe["alpha"],
            "norm": card["threat_model"],
            "target": model,
            "sha256": card["weights"]["sha256"],
        }
    import timm

    import rb_noisy.backbones  # noqa: F401 - registers our networks

    if not timm.is_model(model):
        known = [*card_files(zoo), *timm.list_models()]
        error = unknown_name("model", model, known)
        raise InputError(f"{error}; give a zoo model, a run folder (with run.json) or a timm name")
    if dataset is None:
        raise InputError(f"{model} is a timm model: name what to evaluate it on with --dataset")
    data = load_data(dataset, data_root)
    has_weights = timm.is_model_pretrained(model)
    network = timm.create_model(model, pretrained=has_weights, num_classes=data.num_classes, in_chans=data.in_chans)
    if not has_weights:
        console.print(f"[yellow]{model} has no pretrained weights: a random network is evaluated[/]")
    return {
        "label": model,
        "model": network,
        "data": None,
        "eps": None,
        "alpha": None,
        "norm": "Linf",
        "target": None,
        "sha256": _state_hash(network),
    }


def _state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def rate(hits: Tensor) -> dict[str, Any]:
    """An accuracy with its 95% Wilson interval, from (n,) bool."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {"accuracy": hits.double().mean().item(), "interval": [low, high]}


def percent(figures: dict[str, Any]) -> str:
    """ "71.30% (67.3–74.9)" of what `rate` returns."""
    low, high = figures["interval"]
    return f"{figures['accuracy']:.2%} ({100 * low:.1f}–{100 * high:.1f})"


def show(title: str, table: Table) -> None:
    """Print a table under its title, which a Rich table title would break at the table's width."""
    console.print(f"\n[bold]{title}[/]", soft_wrap=True)
    console.print(table)


def setting(subject: Subject, figures: dict[str, Any]) -> str:
    """Data set, sample count, threat model, seed: the line under a title."""
    samples = f"{figures['n']} of {figures['of']} images"
    return f"{subject.dataset} test set, {samples}, {subject.norm} ε = {eps_label(subject.eps)}, seed {figures['seed']}"


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; give at least 1")


def without_target(subject: Subject) -> Subject:
    """The same subject, whose figures then do not go into its card."""
    return dataclasses.replace(subject, target=None)


def card_of(subject: Subject, checkpoint: str) -> dict[str, Any]:
    """A card to show the subject by: its own, its run's, or for a timm model the bare minimum. Without figures."""
    if isinstance(subject.target, Path):
        card = run_card(Run.open(subject.target), subject.label, checkpoint)
    elif subject.target is not None:
        card = read_card(subject.target, subject.zoo)
    else:
        card = {"name": subject.label, "noise": None, "architecture": subject.label, "clean_acc": ""}
        card |= {"dataset": dataset_label(subject.dataset), "threat_model": subject.norm, "eps": eps_label(subject.eps)}
    return card | {"results": {}}


def enter(subject: Subject, results: dict[str, dict[str, Any]], json_file: Path | None) -> None:
    """Put the figures, by evaluation, where they belong, and say where that is."""
    if json_file is not None:
        write_json(json_file, {"model": subject.label, **results})
        console.print(f"figures: {json_file}", soft_wrap=True)
        return
    if subject.target is None:
        console.print("figures not kept (not the model's own data set and threat model); give --json FILE to keep them")
        return
    is_run = isinstance(subject.target, Path)
    place = f"{subject.target / 'results.json'}" if is_run else f"the card of {subject.target}"
    for evaluation, figures in results.items():
        try:
            entered = write_result(subject.target, evaluation, figures, subject.zoo)
        except OSError as error:
            raise InputError(f"{place} cannot be written ({error}); give --json FILE") from error
        outcome = f"entered into {place}" if entered else f"not entered: {place} has them over more samples"
        console.print(f"{evaluation} figures {outcome}", soft_wrap=True)


def save_verdicts(folder: Path, evaluation: str, subject: Subject, **arrays: Tensor) -> Path:
    """Per-sample verdicts as an .npz, row i for test image i."""
    file = folder / subject.label / f"{evaluation}.npz"
    with atomic_path(file) as temporary:
        np.savez_compressed(
            temporary,
            y=subject.y.numpy(),
            weights_sha256=subject.weights_sha256,
            **{name: values.cpu().numpy() for name, values in arrays.items()},
        )
    console.print(f"verdicts: {file}", soft_wrap=True)
    return file


def in_batches(
    subject: Subject,
    stage: str,
    settings: dict[str, Any],
    batch_size: int,
    folder: Path,
    compute: Callable[[Tensor, Tensor, int], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Run `compute` over the test images batch by batch, with a progress bar, so that a kill loses one batch at most.

    Args:
        stage: names the progress bar and the state file, which goes once all is done.
        settings: what decides the outcome; a state file of other settings is started over.
        compute: (x on the device, y on the device, seed of this batch) → per-sample tensors.
    """
    file = folder / subject.label / f".{stage}.state.npz"
    key = json.dumps({**subject.describe(seed=settings["seed"], batch_size=batch_size), **settings, "date": None})
    parts = _read_state(file, key)
    starts = range(0, len(subject.x), batch_size)
    with progress_bar() as bar:
        task = bar.add_task(stage, total=len(subject.x), completed=min(len(parts) * batch_size, len(subject.x)))
        for number in range(len(parts), len(starts)):
            at = slice(starts[number], starts[number] + batch_size)
            x, y = subject.x[at].to(subject.device), subject.y[at].to(subject.device)
            seed = int(np.random.SeedSequence((settings["seed"], number)).generate_state(1)[0])
            parts.append({name: values.cpu() for name, values in compute(x, y, seed).items()})
            arrays = {f"{i}.{name}": v.numpy() for i, part in enumerate(parts) for name, v in part.items()}
            with atomic_path(file) as temporary:
                np.savez(temporary, key=key, **arrays)
            bar.update(task, advance=len(x))
    file.unlink(missing_ok=True)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _read_state(file: Path, key: str) -> list[dict[str, Tensor]]:
    if not file.is_file():
        return []
    try:
        with np.load(file, allow_pickle=False) as state:
            if str(state["key"]) != key:
                return []
            parts: dict[int, dict[str, Tensor]] = {}
            for name in state.files:
                number, dot, array = name.partition(".")
                if dot:
                    parts.setdefault(int(number), {})[array] = torch.from_numpy(state[name])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({error}); delete it to start this evaluation over") from error
    return [parts[number] for number in sorted(parts)]
