"""Cards and weights: list, load, publish.

A zoo is a folder with `model_info/<dataset>/<threat model>/<name>.json` and `weights/<file>.safetensors`. The one that
ships with the package is used unless another place is named: a folder, or `hf://USER/REPO` on the Hugging Face Hub.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from rb_noisy.data import SHAPES
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, only_changer, remove_abandoned, remove_left_by_killed, sha256, write_json
from rb_noisy.forward import ask
from rb_noisy.label_files import split_label_file
from rb_noisy.reading import checked, read_json
from rb_noisy.recipes import Recipe, split_noise
from rb_noisy.runs import Run, load_weights, read_results, results_file
from rb_noisy.schemas import CardFile, without_pretrained

BUILT_IN = Path(__file__).parent
CLEAN_LABELS = "clean labels"
BENCHMARKS = (*SHAPES, "imagenet")
Card = dict[str, Any]
Entry = TypeVar("Entry")


def load_model(name: str, zoo: str | Path | None = None) -> nn.Module:
    """A finished model in eval mode: images (N, C, H, W) in [0, 1] in, logits (N, K) out.

    Its attribute `image_shape` is the (C, H, W) that it was trained on, which the attacks and evaluations insist on;
    `class_names` are the K names of its classes.

    The weights are checked by their SHA-256 before they are read.

    Args:
        name: a name of `list_models`.
        zoo: another zoo's folder, or "hf://USER/REPO"; None for the zoo that ships with the package.

    Raises:
        InputError: unknown name (the nearest are offered); a damaged card, or one whose network no option of ours or
            timm's architectures builds; weights missing, truncated, altered or not finite.
    """
    from rb_noisy.backbones import build_backbone

    root = zoo_folder(zoo)
    card = read_card(name, root)
    file = weights_file(card, root)
    model = build_backbone(**card["model_options"])
    load_weights(model, file)
    shape = card.get("image_shape", SHAPES.get(card["recipe"]["data"]))
    model.image_shape, model.class_names = shape and tuple(shape), tuple(card["class_names"])
    return model.eval()


def list_models(
    dataset: str | None = None, noise: str | None = None, method: str | None = None, zoo: str | Path | None = None
) -> list[str]:
    """Names of the models of a zoo, in alphabetical order.

    Args:
        dataset: only this data set ("digits", "mnist", …).
        noise: only this label noise: a kind ("symmetric"), or a kind with its rate ("symmetric 0.4"); "none" for clean
            labels.
        method: only this method ("pgd-at+sglr", …).
    """
    return sorted(
        card["name"]
        for card in read_cards(zoo)
        if (dataset is None or is_dataset(card["dataset"], dataset))
        and (noise is None or is_noise(noise_title(card["noise"]), noise))
        and (method is None or card["method"] == method)
    )


def choose_cards(
    cards: Iterable[Card], dataset: str | None = None, noise: str | None = None, method: str | None = None
) -> list[Card]:
    """Those cards that `list_models` would name.

    Raises:
        InputError: none has this data set, or of those none this noise, or of those none this method.
    """
    chosen = choose(cards, "data set of a model", dataset, lambda card: card["dataset"], is_dataset)
    chosen = choose(chosen, "label noise of these models", noise, lambda card: noise_title(card["noise"]), is_noise)
    return choose(chosen, "method of these models", method, lambda card: card["method"])


def choose(
    entries: Iterable[Entry],
    kind: str,
    wanted: str | None,
    name: Callable[[Entry], str],
    is_wanted: Callable[[str, str], bool] = str.__eq__,
) -> list[Entry]:
    """The entries whose name is the wanted one, all of them for None.

    Raises:
        InputError: no entry has it; the nearest names are offered.
    """
    entries = list(entries)
    chosen = [entry for entry in entries if wanted is None or is_wanted(name(entry), wanted)]
    if wanted is not None and not chosen:
        raise unknown_name(kind, wanted, {name(entry) for entry in entries})
    return chosen


def is_dataset(label: str, wanted: str) -> bool:
    """Whether a `dataset_label` is what somebody asks for, who may have copied its title from a table."""
    return wanted in (label, dataset_title(label))


def is_noise(title: str, wanted: str) -> bool:
    """Whether a `noise_title` is the noise that somebody asks for: "symmetric" asks for every rate.

    Every spelling of `train --noise` will do, "human:FILE:worse" too; clean labels are "none" or "clean labels".
    """
    kind, rate = split_noise(wanted)
    human, _, place = kind.partition(":")
    if human == "human" and place:
        kind = f"human {split_label_file(place)[1] or ''}".strip()
    named, _, given = ("none" if title == CLEAN_LABELS else title).partition(" ")
    if rate is None:
        return kind in (named, f"{named} {given}")
    return (named, given) == (kind, f"{rate:g}")


def timm_names(card: Card) -> tuple[str, ...]:
    """What a card's model is called in timm: its own name, and the names that RobustBench forms from it."""
    datasets = dict.fromkeys((card["dataset"], robustbench_dataset(card)))
    return card["name"], *(f"{card['name']}_{dataset}_{card['threat_model']}".lower() for dataset in datasets)


def robustbench_dataset(card: Card) -> str:
    """The data set under which RobustBench finds a model: of a JPEG copy, the original. The card says which it was."""
    return _original(card["dataset"]) or card["dataset"]


def noise_kind(card: Card) -> str:
    """The kind of label noise a card's model was trained on, "none" for clean labels."""
    return card["noise"]["kind"] if card["noise"] else "none"


def noise_title(noise: dict[str, Any] | None) -> str:
    """Kind and rate of a card's label noise, or the set of a file of labels: "symmetric 0.4", "human worse", "none"."""
    if not noise:
        return "none"
    rate, key = noise.get("rate"), noise.get("key")
    if rate is not None:
        return f"{noise['kind']} {rate:g}"
    return f"{noise['kind']} {key}" if key else noise["kind"]


def zoo_folder(zoo: str | Path | None) -> Path:
    """The local folder of a zoo; a zoo on the Hugging Face Hub is downloaded to the Hub's cache first.

    Raises:
        InputError: no zoo there, or the Hub cannot be reached.
    """
    if zoo is None:
        return BUILT_IN
    if str(zoo).startswith("hf://"):
        return _hub_folder(str(zoo))
    if not (Path(zoo) / "model_info").is_dir():
        raise InputError(f"{zoo} is no zoo: it has no folder model_info; publish a run into it first")
    return Path(zoo)


def hub_repository(place: str) -> str:
    """USER/REPO of a place on the Hugging Face Hub, with or without hf:// before it.

    Raises:
        InputError: no repository can be called so.
    """
    from huggingface_hub.utils import validate_repo_id

    repo = place.removeprefix("hf://")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise InputError(f"{place!r} is no place on the Hugging Face Hub ({error}); give USER/REPO") from error
    if "/" not in repo:
        raise InputError(f"{place!r} is no place on the Hugging Face Hub; give USER/REPO")
    return repo


def _hub_folder(place: str) -> Path:
    from huggingface_hub import snapshot_download

    repo = hub_repository(place)
    try:
        return Path(snapshot_download(repo, allow_patterns=["model_info/**/*.json", "weights/*.safetensors"]))
    except Exception as error:  # the errors of whichever HTTP client the Hub's library has, of no common kind
        raise InputError(
            f"the zoo hf://{repo} cannot be fetched ({type(error).__name__}); check the name and the network, "
            "or copy the repository and name its folder"
        ) from error


def card_files(zoo: str | Path | None = None) -> dict[str, Path]:
    """Model name → card file, from the file names alone."""
    files = sorted(zoo_folder(zoo).glob("model_info/*/*/*.json"))
    named = (file for file in files if not file.name.startswith("."))  # a dot: not finished being written
    return {file.stem: file for file in named if file.is_file() or not file.exists()}  # no pipe; a lost link is missed


def read_cards(zoo: str | Path | None = None) -> list[Card]:
    """Every card of a zoo, in the order of the names."""
    return [_read(file) for _, file in sorted(card_files(zoo).items())]


def read_card(name: str, zoo: str | Path | None = None) -> Card:
    """One card.

    Raises:
        InputError: unknown name, with the nearest names; a damaged card.
    """
    files = card_files(zoo)
    if name not in files:
        raise unknown_name("model", name, files)
    return _read(files[name])


def _read(file: Path) -> Card:
    """The one reader of cards: what it returns has the form of `CardFile`."""
    content = without_pretrained(read_json(file, "the card", "get it again"))
    card = checked(CardFile, content, f"the card {file}", "get it again")
    if card["name"] != file.stem:
        raise InputError(f"the card {file} is that of {card['name']!r}; give the file that name again")
    return card


def weights_file(card: Card, zoo: str | Path | None = None) -> Path:
    """The weights of a card, once their SHA-256 is what the card says.

    Where the zoo has only the card, and the card names a place on the Hub, they are fetched into the Hub's cache, with
    a progress bar; where the connection breaks, the same call goes on from there a few times.

    Raises:
        InputError: missing, truncated or altered weights, no way to the Hub.
    """
    weights = card["weights"]
    file = zoo_folder(zoo) / "weights" / weights["file"]
    if not file.is_file() and weights.get("hub"):
        file = _from_hub(card["name"], weights["hub"], weights["file"])
    if not file.is_file():
        raise InputError(f"the weights of {card['name']} are missing ({file}); install again, or get the file again")
    if file.stat().st_size != weights["bytes"]:
        raise InputError(
            f"the weights of {card['name']} are truncated or altered ({file} has {file.stat().st_size} bytes, "
            f"the card says {weights['bytes']}); get the file again"
        )
    if sha256(file) != weights["sha256"]:
        raise InputError(f"the weights of {card['name']} are altered ({file} has another SHA-256); get the file again")
    return file


def _from_hub(name: str, repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo = hub_repository(repo)
    try:
        return Path(hf_hub_download(repo, f"weights/{file}"))
    except Exception as error:  # the errors of whichever HTTP client the Hub's library has, of no common kind
        raise InputError(
            f"the weights of {name} cannot be fetched from hf://{repo} ({type(error).__name__}); check the network and "
            f"try again, or put {file} into the zoo's folder weights"
        ) from error


def publish(
    run_dir: str | Path,
    name: str,
    *,
    zoo: str | Path | None = None,
    checkpoint: str = "final",
    half: bool = False,
    hub: str | None = None,
    authors: str = "",
    link: str = "",
    overwrite: bool = False,
) -> Path:
    """Copy a run's weights into a zoo and write its card; the card's path.

    Figures that the evaluation commands measured on that checkpoint of the run come along, unless `half` changes it.

    Args:
        name: lower-case letters, digits and underscores; what `load_model` takes.
        checkpoint: "final", or "best" (chosen on the test set unless the recipe held out a validation set).
        half: round the weights to half precision (fp16), half the bytes; `load_model` gives an fp32 network of them.
        hub: "USER/REPO" on the Hugging Face Hub, for a zoo that keeps only the card of large weights. They are written
            here as always; upload the file to `weights/` there before it is deleted here.
        overwrite: replace a model of that name; its measured figures are dropped.

    Raises:
        InputError: an unfinished run, a name that is taken or malformed, weights that are not finite or beyond the
            range of fp16, a data set whose name leaves the zoo.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"{name!r} cannot be a model's name; use lower-case letters, digits and underscores")
    hub = hub and hub_repository(hub)
    run = Run.open(run_dir)
    if not run.finished:
        raise InputError(f"{run_dir} has {len(run.metrics)} of {run.recipe.epochs} epochs; continue it with --resume")
    model = run.load(checkpoint)  # read it once, so that no broken file is published
    if run.image_shape is not None:  # nor a network that answers with no numbers
        ask(model, torch.rand(4, *run.image_shape, generator=torch.Generator().manual_seed(0)), warn=False)
    root = BUILT_IN if zoo is None else Path(zoo)
    if str(zoo).startswith("hf://"):
        raise InputError("publish into a folder, then upload it with: hf upload USER/REPO FOLDER")
    old = card_files(root).get(name) if (root / "model_info").is_dir() else None
    if old and not overwrite:
        raise InputError(f"{root} has a model {name!r} already; give another name or --overwrite")

    label = dataset_label(run.recipe.data)
    if not re.fullmatch(r"\w[\w.+ -]*", label):
        raise InputError(f"{label!r} cannot be the folder of a data set; train on a file with a plain name")

    weights = _halved(model) if half else (run.path / f"{checkpoint}.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    card = run_card(run, name, checkpoint) | {"authors": authors, "link": link}
    card["parameters"] = sum(p.numel() for p in model.parameters())
    # The hash in the file name lets the card switch from old weights to new ones in one rename.
    card["weights"] = {"file": f"{name}-{digest[:8]}.safetensors", "sha256": digest, "bytes": len(weights)}
    card["weights"] |= {"precision": "fp16" if half else "fp32"} | ({"hub": hub} if hub else {})
    for evaluation, figures in read_results(results_file(run.path, checkpoint)).items():
        if figures["weights_sha256"] == digest:
            enter_figures(card, evaluation, figures)
    with _only_changer_of_cards(root):
        return _put(root, card, weights, overwrite)


def _only_changer_of_cards(root: Path) -> AbstractContextManager[None]:
    """One lock for all cards of a zoo: a model's card may move from folder to folder."""
    return only_changer(root / "model_info")


def _put(root: Path, card: Card, weights: bytes, overwrite: bool) -> Path:
    """Write weights and card into a zoo that nobody else changes; then remove what no card of that name needs."""
    name = card["name"]
    file = root / "model_info" / card["dataset"] / card["threat_model"] / f"{name}.json"
    old = list((root / "model_info").glob(f"*/*/{name}.json"))
    if old and not overwrite:  # meanwhile
        raise InputError(f"{root} has a model {name!r} already; give another name or --overwrite")
    with atomic_path(root / "weights" / card["weights"]["file"]) as temporary:
        temporary.write_bytes(weights)
    write_json(file, card)
    for other in {*old} - {file}:
        other.unlink()
        remove_left_by_killed(other)
    # Names have no hyphen, so these are its own alone: what an earlier one had, or one that was killed has left.
    for other in (root / "weights").glob(f"{name}-{'[0-9a-f]' * 8}.safetensors"):
        if other.name != card["weights"]["file"]:
            other.unlink()
    for left in (root / "weights").glob(f".{name}-*.tmp.safetensors"):
        remove_abandoned(left)
    return file


def _halved(model: nn.Module) -> bytes:
    """A network's state in fp16, as the bytes of a safetensors file."""
    state = {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    if beyond := [name for name, v in state.items() if not v.isfinite().all()]:
        raise InputError(f"{beyond[0]} has values beyond the range of fp16 (65504); publish in full precision")
    return save(state)


def run_card(run: Run, name: str, checkpoint: str) -> Card:
    """The card of a run, as yet without weights and figures."""
    recipe = run.recipe
    noise = None
    if recipe.noise != "none":
        options = {k: Path(v).name if k == "file" else v for k, v in recipe.noise_options.items()}
        noise = {"kind": recipe.noise, "rate": recipe.noise_rate, "seed": recipe.noise_seed, **options}
    return {
        # RobustBench's fields, in its units (strings, percent).
        "link": "",
        "name": name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset_label(recipe.data),
        "venue": "",
        "architecture": _architecture(recipe),
        "eps": eps_label(recipe.eps),
        "clean_acc": "",
        "reported": "",
        "autoattack_acc": "",
        "unreliable": False,
        # Ours.
        "threat_model": recipe.norm,
        "method": recipe.method,
        "noise": noise,
        "checkpoint": checkpoint,
        "parameters": 0,
        "weights": {},
        "model_options": run.model_options,
        "class_names": list(run.class_names),
        "image_shape": run.image_shape and list(run.image_shape),
        "recipe": recipe.to_dict(),
        "training": _training_summary(run),
        "published": datetime.date.today().isoformat(),
        "results": {},
    }


def _architecture(recipe: Recipe) -> str:
    """The backbone, and what makes it another than its name says."""
    changed = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in recipe.backbone_options.items()]
    return f"{recipe.backbone} ({', '.join(changed)})" if changed else recipe.backbone


def _training_summary(run: Run) -> dict[str, Any]:
    """Best, final and their difference, as tracked during training [SGLR Tables 2, 3]."""
    best, final = run.metrics[run.best_epoch], run.metrics[-1]

    def figures(line: dict[str, Any]) -> dict[str, Any]:
        return {k: line[k] for k in ("epoch", "test_natural_acc", "test_pgd_acc")}

    return {
        "best_chosen_on": "validation" if run.recipe.validation else "test",
        "tracked_test_samples": run.recipe.track or "all",
        "attack": f"PGD-{run.recipe.track_steps}, final iterate",
        "best": figures(best),
        "final": figures(final),
        "pgd_acc_diff": best["test_pgd_acc"] - final["test_pgd_acc"],
        "seconds": round(sum(line["seconds"] for line in run.metrics), 1),
        # A step's batch is that of all processes together; each normalised its own part.
        "processes": sorted({line.get("processes", 1) for line in run.metrics}),
        "threads": sorted({count for line in run.metrics for count in line.get("threads", [])}),  # of a CPU
        "tuned": any("matrix_products" in line for line in run.metrics),
    }


def dataset_label(data: str) -> str:
    """The folder name of a data set: "digits" for "digits", "mine" for "npz:/data/mine.npz".

    No file or folder of one's own is called as a benchmark is: "npz:/data/digits.npz" is "own-digits".
    """
    kind, _, place = data.partition(":")
    if not place:
        return kind
    name = Path(place).name.lower()
    label = name.removesuffix(".npz") if kind == "npz" else name
    return f"own-{label}" if label in BENCHMARKS else label


def dataset_title(label: str) -> str:
    """What tables call the data set of a `dataset_label`; a copy that went through JPEG is not the original."""
    original = _original(label)
    return f"{original} (JPEG copy)" if original else label


def _original(label: str) -> str | None:
    """The data set that the `dataset_label` of a JPEG copy is a copy of."""
    original = re.sub("[-_]?jpeg", "", label).strip("-_")
    return None if original == label else original


def eps_label(eps: float) -> str:
    """RobustBench's way of writing ε: "0.3" where that is all there is to say, "8/255" where that is exact."""
    short, scaled = f"{eps:.4g}", eps * 255
    return f"{round(scaled)}/255" if float(short) != eps and abs(scaled - round(scaled)) < 1e-6 else f"{eps:g}"


def write_result(
    target: str | Path,
    evaluation: str,
    figures: dict[str, Any],
    zoo: str | Path | None = None,
    *,
    replace: bool = False,
) -> bool:
    """Enter an evaluation's figures into the card of a model, or into the `results_file` of a run folder.

    Figures that are there already, over as many samples or more of the same weights, stay unless `replace`: evaluating
    a shipped model again does not change its card.

    Args:
        target: a model's name, or the `Path` of a `results_file`.
        evaluation: "autoattack", "pgd-20" or "calibration".
        figures: JSON-able; with "n" (samples), and with "weights_sha256".

    Returns:
        Whether the figures were entered.
    """
    in_zoo = not isinstance(target, Path)

    def place() -> tuple[Path, dict[str, Any]]:
        """Where the figures are, and what is there now."""
        file = card_files(zoo)[target] if in_zoo else target
        return file, _read(file) if in_zoo else read_results(file)

    def kept(content: dict[str, Any]) -> bool:
        return not replace and _keeps(content["results"] if in_zoo else content, evaluation, figures)

    file, content = place()
    if kept(content):  # also where nothing can be written
        remove_left_by_killed(file)
        return False
    with _only_changer_of_cards(zoo_folder(zoo)) if in_zoo else only_changer(file):
        file, content = place()  # another evaluation may have changed it meanwhile
        if kept(content):
            return False
        if in_zoo:
            enter_figures(content, evaluation, figures)
        else:
            content[evaluation] = figures
        write_json(file, content)
    return True


def _keeps(results: dict[str, Any], evaluation: str, figures: dict[str, Any]) -> bool:
    old = results.get(evaluation)
    return bool(old and old["weights_sha256"] == figures["weights_sha256"] and old["n"] >= figures["n"])


def enter_figures(card: Card, evaluation: str, figures: dict[str, Any]) -> None:
    """Put an evaluation's figures into a card in memory, RobustBench's own fields included."""
    card["results"][evaluation] = figures
    measured = [card["results"][name] for name in ("pgd-20", "autoattack") if name in card["results"]]
    if measured:
        natural = max(measured, key=lambda result: result["n"])["natural"]
        card["clean_acc"] = f"{100 * natural['accuracy']:.2f}"
    if evaluation == "autoattack":
        card["autoattack_acc"] = f"{100 * figures['accuracy']:.2f}"
