"""Which given labels are probably wrong: from the history that one training run leaves, or from out-of-fold models.

Every score is (N,) float64 and *high where the label is suspicious*; it is NaN where a sample was never trained on.
A window (first, stop) is a range of epochs counted from 0, stop excluded; None is the second half of the run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rb_noisy import measures
from rb_noisy.csv_files import write_csv
from rb_noisy.data import Dataset, open_npz
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, only_writer
from rb_noisy.forward import ask
from rb_noisy.geometry import kappa as measure_kappa
from rb_noisy.noise import NoisyLabels
from rb_noisy.placement import SECONDS_TO_END, is_main
from rb_noisy.recipes import Recipe
from rb_noisy.record import PERSISTENT
from rb_noisy.runs import History, Run, check_folder
from rb_noisy.same_data import check_digest
from rb_noisy.training import train
from rb_noisy.training_data import data_digest, digest_of, run_data, training_set

HISTORY_SCORES = ("joint", "kappa", "loss")
SCORES = (*HISTORY_SCORES, "self-confidence", "cleanlab")
MOST_NOISE = 0.5  # an estimated noise rate above it is none

Window = tuple[int, int] | None


def kappa_score(history: History, window: Window = None) -> Tensor:
    """Minus the mean κ against the given label over the epochs of the window: −steps .. 0 (suspicious).

    Raises `InputError` where the run's method does not attack, or the window lies outside the run.
    """
    kappa = history.kappa[_epochs(history, window)]
    seen = kappa >= 0
    if not seen.any():
        raise InputError("the history has no κ (its method does not attack); score by loss, or train with pgd-at")
    total = kappa.double().where(seen, torch.zeros(())).sum(0)
    return -total / seen.sum(0)  # 0 / 0 is the NaN of a sample that was never trained on


def loss_score(history: History, window: Window = None) -> Tensor:
    """The mean cross entropy with the given label over the epochs of the window: 0 .. ∞ (suspicious)."""
    return history.loss[_epochs(history, window)].double().nanmean(0)


def joint_score(history: History, window: Window = None) -> Tensor:
    """Rank by mean κ; samples of equal mean κ by mean loss: 0 .. 1 (suspicious), the share of samples ranked below.

    κ alone leaves many samples, wrong ones and hard ones, at exactly 0; the loss hardly sees pair noise. AUROC on
    digits (PGD-AT, 16 epochs; symmetric 0.2, 0.4, pair 0.4): this 0.998, 0.982, 0.925; κ 0.980, 0.925, 0.938; loss
    0.995, 0.981, 0.665; mean of the two ranks 0.997, 0.982, 0.82; log odds of a two-component Gaussian mixture
    0.957, 0.983, 0.949 (its wider component may take in hard samples).
    """
    return _joint(kappa_score(history, window), loss_score(history, window))


def self_confidence_score(probabilities: Any, given: Any) -> Tensor:
    """1 − p of the given label, 0 .. 1 (suspicious), from out-of-fold probabilities (N, K) and labels (N,)."""
    probabilities, given = _checked(probabilities, given)
    return 1 - probabilities.gather(1, given[:, None])[:, 0]


def cleanlab_score(probabilities: Any, given: Any, method: str = "normalized_margin") -> Tensor:
    """1 − cleanlab's label quality, 0 .. 1 (suspicious), from out-of-fold probabilities (N, K) and labels (N,).

    `method` is one of `cleanlab.rank.get_label_quality_scores`; its "self_confidence" is `self_confidence_score`.
    Raises `InputError` where cleanlab is not installed: it is no dependency of this package.
    """
    probabilities, given = _checked(probabilities, given)
    quality = _cleanlab()(given.numpy(), probabilities.numpy(), method=method)
    return 1 - torch.from_numpy(np.asarray(quality, np.float64))


def suggested_labels(history: History, window: Window = None) -> Tensor:
    """(N,) int64: the label predicted in most epochs of the window (the lower one on a tie); −1 if never trained on."""
    return _votes(history.prediction[_epochs(history, window)])[0]


def estimate_noise_rate(evidence: History | OutOfFold, given: Any = None, window: Window = None) -> float:
    """The estimated share (0 .. 1) of wrong labels. An estimate: read it as the order of magnitude.

    * `History` with the given labels (N,): the share of samples whose κ is 0 in most epochs of the window (where there
      is a κ) and for which one and the same *other* label is predicted in at least three quarters of them. What the
      network has not learnt counts as noise, what it has memorised does not. Ours; measured on digits (PGD-AT, 16
      epochs, 2 seeds): true 0, estimated 0.016; symmetric 0.201 → 0.224, 0.405 → 0.443; pair 0.214 → 0.210, 0.410 →
      0.354; and on 4,000 MNIST images after 8 epochs (78% accuracy: too early) pair 0.397 → 0.285.
    * `OutOfFold`: the off-diagonal share of the calibrated confident joint (Northcutt et al. 2021, eq. 1–3).
    """
    if isinstance(evidence, History):
        if given is None:
            raise InputError("a noise rate from a history needs the given labels; pass given")
        return _rate_from_history(evidence, torch.as_tensor(given).cpu(), _epochs(evidence, window))
    return _rate_from_probabilities(evidence.probabilities, evidence.given)


@dataclass(frozen=True, repr=False, eq=False)
class OutOfFold:
    """What models say of samples that they were not trained on.

    Attributes:
        given: (N,) int64, the labels as given.
        probabilities: (N, K) float64, softmax on the natural image by the model that has not seen it.
        kappa: (N,) int64, its κ against the given label, 0..steps (small = suspicious).
        fold: (N,) int64, which model that was.
        class_names: names of the K classes.
        recipe: what each model was trained by, on the data set it names less one fold.
        index: (N,) int64, which of the data set's training images they are; None for all, or the first N.
        data_sha256: the digest of the data set, see `rb_noisy.training_data.digest_of`; None in an older file.
    """

    given: Tensor
    probabilities: Tensor
    kappa: Tensor
    fold: Tensor
    class_names: tuple[str, ...]
    recipe: Recipe
    index: Tensor | None = None
    data_sha256: str | None = None

    @property
    def loss(self) -> Tensor:
        """(N,) float64, cross entropy with the given label."""
        own = self.probabilities.gather(1, self.given[:, None])[:, 0]
        return -own.clamp_min(torch.finfo(torch.float64).tiny).log()

    def save(self, path: str | Path) -> None:
        tensors = {name: getattr(self, name) for name in ("given", "probabilities", "kappa", "fold", "index")}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        arrays |= {"class_names": np.array(self.class_names), "recipe": np.array(json.dumps(self.recipe.to_dict()))}
        if self.data_sha256 is not None:
            arrays["data_sha256"] = np.array(self.data_sha256)
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **arrays)

    @classmethod
    def open(cls, path: str | Path) -> OutOfFold:
        """Read what `save` wrote. Raises `InputError` for a file that is missing, damaged or another's."""
        with open_npz(Path(path)) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("given", "probabilities", "kappa", "fold")]
            recipe = Recipe.from_json(str(file["recipe"]), str(path), recorded=True)
            index = torch.from_numpy(file["index"]) if "index" in file else None
            names = tuple(map(str, file["class_names"].tolist()))
            digest = str(file["data_sha256"]) if "data_sha256" in file else None
        given, probabilities, kappa, fold = arrays
        per_sample = all(values.shape == given.shape and not values.is_floating_point() for values in (kappa, fold))
        whole = per_sample and probabilities.shape == (len(given), len(names)) and probabilities.dtype == torch.float64
        numbered = index is None or (index.shape == given.shape and index.dtype == torch.int64)
        if given.dtype != torch.int64 or not whole or not numbered or not ((given >= 0) & (given < len(names))).all():
            raise InputError(f"{path} is damaged (its arrays are not of one set of samples); measure it again")
        return cls(*arrays, names, recipe, index, digest)


@dataclass(frozen=True, repr=False, eq=False)
class LabelIssues:
    """The samples of a training set, the most suspicious label first; all tensors (N,) in that order.

    Attributes:
        index: int64, which of the data set's training samples, also where a run had a part of them.
        given, suggested: int64, the label it has and the one the model would give it.
        kappa: float64, (mean) κ against the given label, 0..steps (small = suspicious), NaN where nothing attacked.
        loss: float64, (mean) cross entropy with the given label (large = suspicious).
        score: float64, what they are ranked by (large = suspicious).
        noise_rate: the estimated share of wrong labels, see `estimate_noise_rate`.
        class_names: names of the K classes.
    """

    index: Tensor
    given: Tensor
    suggested: Tensor
    kappa: Tensor
    loss: Tensor
    score: Tensor
    noise_rate: float
    class_names: tuple[str, ...]

    @property
    def suspicious(self) -> int:
        """How many samples, from the first on, the estimated noise rate makes suspicious."""
        return round(self.noise_rate * len(self.index))

    @property
    def warning(self) -> str | None:
        """Why the ranking is not to be relied on; None where nothing says so."""
        if self.noise_rate <= MOST_NOISE:
            return None
        return "that is more than can be told: the network may have learnt too little; train longer (--epochs)"

    def to_csv(self, path: str | Path, files: Sequence[str] | None = None) -> None:
        """Write one line per sample, worst first; `files` (by sample index) adds a column of file names."""
        columns = ("index", "given", "given_name", "suggested", "suggested_name", "kappa", "loss", "score")
        numbers = [t.tolist() for t in (self.index, self.given, self.suggested, self.kappa, self.loss, self.score)]
        names = self.class_names
        rows = [
            [index, given, names[given], suggested, names[suggested], *(f"{v:.6g}" for v in figures)]
            for index, given, suggested, *figures in zip(*numbers, strict=True)
        ]
        if files is not None:
            columns, rows = (*columns, "file"), [[*row, files[row[0]]] for row in rows]
        write_csv(path, columns, rows)


def find_label_issues(
    source: Run | OutOfFold | str | Path,
    *,
    score: str = "joint",
    window: Window = None,
    data_root: str | Path | None = None,
) -> LabelIssues:
    """Rank the samples of a training set by how likely their given label is wrong.

    `source`: a run (or its folder), judged by the history of its epochs in `window`, or `out_of_fold`'s result.
    `score`: "joint", "kappa" or "loss"; out of fold also "self-confidence" and "cleanlab". Samples that were never
    trained on (held out for validation) are left out. Raises `InputError` for a score that the source does not have,
    and for a run whose images, labels or classes are others now.
    """
    check_score(score, out_of_fold=isinstance(source, OutOfFold))
    if isinstance(source, OutOfFold):
        values, rate = scores(source, score), estimate_noise_rate(source)
        columns = (source.given, source.probabilities.argmax(1), source.kappa.double(), source.loss, values)
        return _ranked(columns, rate, source.class_names, source.index)
    run = source if isinstance(source, Run) else Run.open(source)
    history = run.history()
    data, labels = run_data(run, data_root, history.kappa.shape[1])
    given = labels.given
    values, loss = scores(history, score, window), loss_score(history, window)
    attacked = (history.kappa >= 0).any()
    kappa = -kappa_score(history, window) if attacked else torch.full_like(loss, torch.nan)
    rate = estimate_noise_rate(history, given, window)
    columns = (given, suggested_labels(history, window), kappa, loss, values)
    return _ranked(columns, rate, run.class_names, data.train_index)


def scores(source: History | OutOfFold, score: str, window: Window = None) -> Tensor:
    """A score by name, (N,) float64, large = suspicious."""
    check_score(score, out_of_fold=isinstance(source, OutOfFold))
    if isinstance(source, History):
        return {"joint": joint_score, "kappa": kappa_score, "loss": loss_score}[score](source, window)
    if score in ("self-confidence", "cleanlab"):
        function = self_confidence_score if score == "self-confidence" else cleanlab_score
        return function(source.probabilities, source.given)
    kappa, loss = -source.kappa.double(), source.loss
    return {"joint": _joint(kappa, loss), "kappa": kappa, "loss": loss}[score]


def check_score(score: str, *, out_of_fold: bool) -> None:
    """Raise `InputError` unless there is such a score for that source."""
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)
    if score not in HISTORY_SCORES and not out_of_fold:
        raise InputError(f"score {score!r} needs out-of-fold models: give --folds 5, or --score {HISTORY_SCORES[0]}")
    if score == "cleanlab":
        _cleanlab()


def fold_of(given: Tensor, folds: int, seed: int = 0) -> Tensor:
    """(N,) int64: a random fold 0..folds−1 for every sample; fold sizes, also within a class, differ by 1 at most."""
    if not 2 <= folds <= len(given):
        raise InputError(f"folds is {folds} but there are {len(given)} samples; give 2 or more, usually 3 or 5")
    # Raw PCG64 words are the same in every NumPy version; its distributions need not be.
    draws = np.random.PCG64(seed).random_raw(len(given))
    order = np.lexsort((draws, given.numpy()))
    fold = np.empty(len(given), np.int64)
    fold[order] = np.arange(len(given)) % folds
    return torch.from_numpy(fold)


def out_of_fold(
    recipe: Recipe,
    folds: int,
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    threads: int | Literal["measured"] | None = None,
    on_batch: Callable[[int, int, int, int], None] | None = None,
    on_epoch: Callable[[int, dict[str, Any]], None] | None = None,
) -> OutOfFold:
    """Train one model for each fold on all the others, and let it judge the fold it has not seen.

    `path` gets, for each k, the data k.npz (training images: the other folds; test images: fold k, so that no image is
    in both) and the run k, which the same call goes on with. The *final* weights judge: *best* ones were chosen by
    their accuracy on the very fold. `threads`, `on_batch` and `on_epoch` are those of `rb_noisy.train`, the last two
    after the fold's number.

    Raises `InputError`, before anything is written, where `path` has folds of other data or of another recipe.
    """
    path = Path(path).resolve()  # the runs remember where their data are
    data, labels = training_set(recipe, data_root)
    fold = fold_of(labels.given, folds, recipe.seed)
    probabilities = torch.empty(len(fold), data.num_classes, dtype=torch.float64)
    kappa = torch.empty(len(fold), dtype=torch.int64)
    path.mkdir(parents=True, exist_ok=True)
    # Of several processes that a launcher started, all look and the first keeps the others' callers out.
    with only_writer(path, SECONDS_TO_END) if is_main() else contextlib.nullcontext():
        recipes = [_fold_recipe(recipe, path / f"{k}.npz") for k in range(folds)]
        there = [_is_there(path / str(k), recipes[k], data, labels, fold == k) for k in range(folds)]
        for k in range(folds):
            held_out = fold == k
            if not there[k]:
                with atomic_path(path / f"{k}.npz") as temporary:
                    np.savez(temporary, **_fold_arrays(data, labels, held_out))
            run = train(
                recipes[k],
                path / str(k),
                resume=True,
                threads=threads,
                on_batch=on_batch and (lambda *done, k=k: on_batch(k, *done)),
                on_epoch=on_epoch and (lambda line, k=k: on_epoch(k, line)),
            )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, x, y = run.load("final").to(device), data.x_train[held_out], labels.given[held_out]
            probabilities[held_out] = ask(model, x, y).logits.double().softmax(1)
            attack = {"alpha": recipe.track_alpha, "steps": recipe.track_steps}  # fast training attacks in one step
            attack |= {"eps": recipe.eps, "norm": recipe.norm, "seed": recipe.seed}
            kappa[held_out] = measure_kappa(model, x, y, check=False, **attack)
    digest = digest_of(data, labels)
    return OutOfFold(labels.given, probabilities, kappa, fold, data.class_names, recipe, data.train_index, digest)


def _fold_recipe(recipe: Recipe, file: Path) -> Recipe:
    changes = {"noise": "none", "noise_rate": None, "noise_options": {}, "train_size": None, "data": f"npz:{file}"}
    return Recipe.from_dict(recipe.to_dict() | changes)


def _fold_arrays(data: Dataset, labels: NoisyLabels, held_out: Tensor) -> dict[str, np.ndarray]:
    """What the data file of a fold holds."""
    images = data.x_train.permute(0, 2, 3, 1)
    # 8-bit images are kept as such, at a quarter of the size, if that gives the very same floats back.
    whole = (images * 255).round().to(torch.uint8)
    images = whole if torch.equal(whole.float() / 255, images) else images
    arrays = {"x_train": images[~held_out], "x_test": images[held_out]}
    arrays |= {"y_train": labels.given[~held_out], "y_test": labels.given[held_out]}
    return {"class_names": np.array(data.class_names)} | {name: values.numpy() for name, values in arrays.items()}


def _is_there(folder: Path, recipe: Recipe, data: Dataset, labels: NoisyLabels, held_out: Tensor) -> bool:
    """Whether the data file of a fold is there already; the fold's run in `folder`, if any, may only be one on it.

    Raises:
        InputError: the run is of another recipe or other data, or the file is damaged.
    """
    file, fresh = Path(recipe.data.removeprefix("npz:")), check_folder(folder, recipe, resume=True)
    if not file.is_file():
        if not fresh:
            x, y = data.x_train, labels.given
            digest = data_digest(x[~held_out], y[~held_out], x[held_out], y[held_out])
            check_digest(Run.open(folder).data_digest(), digest, data.name, str(folder))
        return False
    arrays = _fold_arrays(data, labels, held_out)
    try:
        with open_npz(file) as saved:
            same = set(saved.files) == set(arrays) and all(_equal(saved[name], arrays[name]) for name in arrays)
    except InputError as error:
        raise InputError(f"{error}; or delete it, and this command writes it anew") from error
    if not same and not fresh:
        raise InputError(
            f"{file} has other images, labels or classes than {data.name} gives; put them back, or name another folder"
        )
    return same


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _epochs(history: History, window: Window) -> slice:
    count = len(history.loss)
    first, stop = (count // 2, count) if window is None else window
    if not 0 <= first < stop <= count:
        raise InputError(
            f"window {first}..{stop} is no range of the {count} epochs of the history (from 0, end excluded)"
        )
    return slice(first, stop)


def _joint(kappa: Tensor, loss: Tensor) -> Tensor:
    pairs = torch.stack((kappa, loss), 1)
    seen = ~pairs.isnan().any(1)
    # Sorted rows of unique pairs are in lexicographic order: κ decides, loss breaks its ties.
    _, place, count = torch.unique(pairs[seen], dim=0, return_inverse=True, return_counts=True)
    below = (count.cumsum(0) - count) / max(1, int(seen.sum()) - 1)
    score = torch.full_like(loss, torch.nan)
    score[seen] = below.double()[place]
    return score


def _votes(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The label predicted most often (N,), −1 where none was, and how often, as a share of the epochs seen (N,)."""
    votes = torch.zeros(max(1, int(prediction.max()) + 1) + 1, prediction.shape[1])
    votes.scatter_add_(0, prediction.long() + 1, torch.ones(prediction.shape))  # row 0: not trained on
    most = votes[1:].max(0)
    seen = len(prediction) - votes[0]
    return most.indices.where(seen > 0, torch.tensor(-1)), most.values / seen.clamp_min(1)


def _rate_from_history(history: History, given: Tensor, epochs: slice) -> float:
    kappa = history.kappa[epochs]
    label, share = _votes(history.prediction[epochs])
    seen = label >= 0
    if given.shape != label.shape or not seen.any():
        raise InputError(
            f"given has shape {tuple(given.shape)} but the history {len(label)} samples; give one label each"
        )
    wrong = (label != given) & (share >= PERSISTENT)
    if (kappa >= 0).any():
        wrong &= (kappa == 0).sum(0) > (kappa > 0).sum(0)
    return (wrong & seen).sum().item() / seen.sum().item()


def _rate_from_probabilities(probabilities: Tensor, given: Tensor) -> float:
    probabilities, given = _checked(probabilities, given)
    classes = probabilities.shape[1]
    members = torch.bincount(given, minlength=classes)
    own = probabilities.gather(1, given[:, None])[:, 0]
    sums = torch.zeros(classes, dtype=torch.float64).index_add(0, given, own)
    confident = probabilities >= sums / members  # NaN for a class that no sample has: nothing is above it
    judged = confident.any(1)
    label = (probabilities * confident).argmax(1)
    joint = torch.bincount(given[judged] * classes + label[judged], minlength=classes**2).view(classes, classes)
    # Every row is scaled to the number of samples that were given its label.
    wrong_share = 1 - joint.diagonal() / joint.sum(1).clamp_min(1)
    return (wrong_share * members * (joint.sum(1) > 0)).sum().item() / len(given)


def _ranked(
    columns: tuple[Tensor, ...], noise_rate: float, class_names: tuple[str, ...], index: Tensor | None
) -> LabelIssues:
    score = columns[-1]
    order = score.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    order = order[~score[order].isnan()]
    number = order if index is None else index[order]
    return LabelIssues(number, *(column[order] for column in columns), noise_rate, class_names)


def _checked(probabilities: Any, given: Any) -> tuple[Tensor, Tensor]:
    probabilities, given = measures.logits_and_labels(probabilities, given)
    if not (probabilities.min() >= 0 and ((probabilities.sum(1) - 1).abs() < 1e-4).all()):
        raise InputError("probabilities must lie in 0..1 and each row sum to 1; pass softmax of the logits")
    return probabilities, given


def _cleanlab() -> Callable[..., np.ndarray]:
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise InputError(
            f"score 'cleanlab' needs cleanlab ({error}); pip install cleanlab, or use another score"
        ) from error
    return get_label_quality_scores
