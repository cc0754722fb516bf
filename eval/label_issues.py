"""`python -m eval.label_issues RUN...`: how well each score finds the wrong labels, where the true ones are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from eval.common import RootOption, console, show, user_errors
from eval.leaderboard import FORMATS, latex_line, markdown_line
from rb_noisy.console import print_text
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import write_json
from rb_noisy.label_issues import SCORES, OutOfFold, check_score, estimate_noise_rate, scores
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run
from rb_noisy.training_data import run_data, same_training_set

MEASURES = {"auroc": "AUROC", "average_precision": "average precision", "precision": "precision at the true rate"}
COLUMNS = ("data", "method", "noise", "judged by", "score", "runs", *MEASURES.values(), "estimated rate", "true rate")
RESAMPLES = 200


@dataclass(frozen=True)
class Judged:
    """One run or set of out-of-fold models: its `setting`, the scores by name, which labels are wrong, the estimate."""

    setting: tuple[str, str, str, str]
    scores: dict[str, np.ndarray]
    wrong: np.ndarray
    estimated_rate: float


class Ranking:
    """How well a score (N,), high = suspicious, ranks the wrong labels (N,) bool above the right ones.

    Calling it gives AUROC, average precision and the precision among as many samples as there are wrong ones, each
    0..1 (good), as (3,); `weights` (N,) counts how often each sample is there, for the bootstrap. Of tied samples,
    AUROC and precision at the true rate count what random order gives on average, average precision takes all at once.
    """

    def __init__(self, score: np.ndarray, wrong: np.ndarray):
        values, group = np.unique(-score, return_inverse=True)
        self.group, self.groups, self.wrong = group, len(values), wrong

    def __call__(self, weights: np.ndarray | None = None) -> np.ndarray:
        weights = np.ones(len(self.wrong)) if weights is None else weights
        size = np.bincount(self.group, weights, self.groups)
        hits = np.bincount(self.group, weights * self.wrong, self.groups)
        total, found = size.cumsum(), hits.cumsum()
        wrong, right = found[-1], total[-1] - found[-1]
        if not wrong or not right:
            return np.full(3, math.nan)
        below = right - (total - found)
        auroc = (hits * (below + (size - hits) / 2)).sum() / (wrong * right)
        average_precision = (hits * found / np.maximum(total, 1)).sum() / wrong
        last = int(np.searchsorted(total, wrong))
        share = (wrong - (total[last] - size[last])) / size[last]
        return np.array([auroc, average_precision, (found[last] - hits[last] + share * hits[last]) / wrong])


def judge(path: Path, data_root: Path | None = None) -> Judged:
    """Read a run folder, or a folder of `rb-noisy label-issues` (its out-of-fold models, else its run).

    Raises:
        InputError: neither is there, the true labels are not known, or the data are not those that it was trained on.
    """
    source: Any
    file = path / "out_of_fold.npz"
    if file.is_file():
        found = OutOfFold.open(file)
        recipe, source, by, epochs = found.recipe, found, f"{int(found.fold.max()) + 1} folds", found.recipe.epochs
        known = (found.class_names, found.data_sha256, str(file), data_root, len(found.given))
        labels = same_training_set(recipe, *known)[1]
    else:
        run = Run.open(path / "run" if (path / "run" / "run.json").is_file() else path)
        recipe, source, by, epochs = run.recipe, run.history(), "history", len(run.metrics)
        labels = run_data(run, data_root, source.loss.shape[1])[1]
    wrong, rate = labels.is_wrong.numpy(), estimate_noise_rate(source, labels.given)
    values = {}
    for name in SCORES:
        try:
            check_score(name, out_of_fold=isinstance(source, OutOfFold))
            values[name] = scores(source, name).numpy()
        except InputError:  # this source has no such score: no κ, no probabilities, no cleanlab
            continue
    seen = np.isfinite(values["loss"])
    return Judged(_setting(recipe, by, epochs), {k: v[seen] for k, v in values.items()}, wrong[seen], rate)


def _setting(recipe: Recipe, by: str, epochs: int) -> tuple[str, str, str, str]:
    """Files in full: cats/train.npz and dogs/train.npz are two data sets."""
    size = "" if recipe.train_size is None else f" ({recipe.trained_on})"
    rate = recipe.noise_options.get("file", "") if recipe.noise_rate is None else f"{recipe.noise_rate:g}"
    noise = f"{recipe.noise} {rate}".strip()
    if key := recipe.noise_options.get("key"):
        noise += f" {key}"
    return f"{recipe.data}{size}", f"{recipe.method}, {recipe.backbone}, {epochs} epochs", noise, by


def tabulate(judged: list[Judged]) -> dict[str, Any]:
    """The table and the comparison of κ with the loss, for JSON; intervals are 95%, None where there is no value.

    `rows`: one for each setting and score: means over its runs. `kappa_less_loss`: for each setting the paired
    difference in each measure. The interval is Student's over the runs of a setting; for a single run it is the
    percentile bootstrap over its samples (the same resamples for both scores).
    """
    rows, differences = [], []
    for setting, group in groupby(sorted(judged, key=lambda j: j.setting), key=lambda j: j.setting):
        runs = list(group)
        keys = dict(zip(("data", "method", "noise", "judged_by"), setting, strict=True)) | {"runs": len(runs)}
        rates = {
            "estimated_rate": float(np.mean([j.estimated_rate for j in runs])),
            "true_rate": float(np.mean([j.wrong.mean() for j in runs])),
        }
        for name in [s for s in SCORES if all(s in j.scores for j in runs)]:
            rankings = [Ranking(j.scores[name], j.wrong) for j in runs]
            rows.append(keys | {"score": name} | _figures(rankings, len(runs[0].wrong), lowest=0) | rates)
        if all("kappa" in j.scores for j in runs):
            pairs = [(Ranking(j.scores["kappa"], j.wrong), Ranking(j.scores["loss"], j.wrong)) for j in runs]
            differences.append(keys | _figures([_difference(*pair) for pair in pairs], len(runs[0].wrong), lowest=-1))
    return {"rows": rows, "kappa_less_loss": differences}


def _difference(kappa: Ranking, loss: Ranking) -> Callable[..., np.ndarray]:
    return lambda weights=None: kappa(weights) - loss(weights)


def _figures(measures: list[Callable[..., np.ndarray]], n: int, lowest: float) -> dict[str, Any]:
    """{measure: {"value", "interval"}} of what each run's `measures` returns, (3,), within `lowest`..1."""
    values = np.stack([measure() for measure in measures])
    if np.isnan(values).any():  # no label is wrong: there is nothing to find
        return {name: {"value": None, "interval": None} for name in MEASURES}
    if len(measures) > 1:
        from scipy.stats import t

        half = t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / math.sqrt(len(values))
        low, high = values.mean(0) - half, values.mean(0) + half
    else:
        random = np.random.default_rng(0)
        draws = (np.bincount(random.integers(0, n, n), minlength=n) for _ in range(RESAMPLES))
        low, high = np.nanpercentile([measures[0](weights) for weights in draws], (2.5, 97.5), axis=0)
    low, high = np.clip((low, high), lowest, 1)
    return {
        name: {"value": float(values.mean(0)[i]), "interval": [float(low[i]), float(high[i])]}
        for i, name in enumerate(MEASURES)
    }


def verdicts(table: dict[str, Any]) -> list[str]:
    """For each setting one sentence: does κ beat the loss?"""
    sentences = []
    for line in table["kappa_less_loss"]:
        figures = line["auroc"]
        if figures["value"] is None:
            continue
        low, high = figures["interval"]
        outcome = "κ beats the loss" if low > 0 else "the loss beats κ" if high < 0 else "κ and the loss are level"
        where = f"{line['data']}, {line['method']}, {line['noise']}, by {line['judged_by']}"
        sentences.append(
            f"{where}: {outcome}: AUROC {figures['value']:+.3f} [{low:+.3f}, {high:+.3f}], average precision "
            f"{_cell(line['average_precision'], '+.3f')}"
        )
    return sentences


def _cells(row: dict[str, Any]) -> list[str]:
    texts = [row["data"], row["method"], row["noise"], row["judged_by"], row["score"], str(row["runs"])]
    figures = [_cell(row[name], ".3f") for name in MEASURES]
    return [*texts, *figures, f"{row['estimated_rate']:.3f}", f"{row['true_rate']:.3f}"]


def _cell(figures: dict[str, Any], form: str) -> str:
    if figures["value"] is None:
        return "–"
    low, high = figures["interval"]
    return f"{figures['value']:{form}} [{low:{form}}, {high:{form}}]"


def render(table: dict[str, Any], format: str) -> str:
    """The table as Markdown or LaTeX."""
    lines: Iterable[list[str]] = map(_cells, table["rows"])
    if format == "markdown":
        return "\n".join(map(markdown_line, [COLUMNS, ["---"] * len(COLUMNS), *lines]))
    body = [latex_line(COLUMNS), r"\hline", *map(latex_line, lines)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(COLUMNS)}}}", *body, r"\end{tabular}"])


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of rb-noisy label-issues.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "terminal",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    data_root: RootOption = None,
) -> None:
    """Measure how well each score finds the wrong labels of runs whose true labels are known."""
    with user_errors():
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        table = tabulate([judge(path, data_root) for path in runs])
        if json_file is not None:
            write_json(json_file, table)
        sentences = verdicts(table)
        if format != "terminal":
            mark = "* " if format == "markdown" else "% "
            lines = [render(table, format), "", *(mark + sentence for sentence in sentences)]
            print_text("\n".join(lines) + "\n")
            return
        shown = Table(*COLUMNS)
        for row in table["rows"]:
            shown.add_row(*_cells(row))
        show("Which labels are wrong? 95% intervals: over runs, or over samples where there is one run", shown)
        for sentence in sentences:
            console.print(sentence, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
