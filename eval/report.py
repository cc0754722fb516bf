"""`python -m eval.report RUN…`: best, final and their difference over any runs, in the papers' columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from eval.leaderboard import MISSING
from eval.report_table import FORMATS, Figure, Group, Report, Row
from model_zoo.registry import dataset_label, dataset_title, eps_label, read_results, results_file
from rb_noisy.console import console, errors, print_text, print_warning, user_errors
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import atomic_path, sha256
from rb_noisy.recipes import Recipe, flatten
from rb_noisy.runs import CHECKPOINTS, Run
from rb_noisy.subsets import DRAWN, images_of

SEEDS = ("seed", "noise_seed")  # runs that differ only in these are repetitions of one another
# What a published figure carries: in the caption where it is the same for all rows, a column where it is not.
SETTING = {
    "data": "{}",
    "train_size": "{} training images",
    "validation": "{} of them held out",
    "norm": "{}",
    "eps": "ε = {}",
    "alpha": "α = {}",
    "steps": "{} steps",
    "epochs": "{} epochs",
    "track": "{} samples of each kind tracked",
    "track_steps": "tracked attack PGD-{} (final iterate)",
}
LESS = "Each run less that of {} with the same labels and seed"
Values = dict[str, float]  # by "group name", such as "natural best"; NaN where there is none


def collect_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders, a folder of runs taken apart; `run.json` and `metrics.jsonl` make a run.

    Raises:
        InputError: no run in a folder, a damaged run, or two runs of one recipe and seed.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [path] if (path / "run.json").is_file() else sorted(file.parent for file in path.rglob("run.json"))
        if not found:
            raise InputError(f"{path} holds no run; name a run folder that `train` wrote, or a folder of them")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    runs, seen = [Run.open(folder) for folder in folders.values()], {}
    for run in runs:
        if (other := seen.setdefault(repr(run.recipe), run.path)) is not run.path:
            raise InputError(f"{other} and {run.path} are runs of the same recipe and seed; name one of them")
    return runs


def sglr_report(runs: Sequence[Run], against: str | None = None) -> Report:
    """[SGLR] Tables 2 and 3: natural, PGD and AutoAttack accuracy of the best and the final weights, in percent.

    `against`: a method; every other row is shown less the runs of this method with the same label noise and seeds.

    *best* is the epoch of the highest robust accuracy on the selection set, for all columns. PGD is PGD-20 as evaluated
    where both weights of all runs of a row have it; else the PGD of training, marked unless it is so in every row.
    """
    rows = group_seeds(runs)
    results = {run.path: evaluations(run) for run in runs}
    complete = [row for row in rows if all("pgd-20" in results[run.path][w] for run in row for w in CHECKPOINTS)]
    evaluated = {run.path for row in complete for run in row}
    values = [[_sglr_values(run, results[run.path], run.path in evaluated) for run in row] for row in rows]
    tracked, names = _tracked_pgd(runs), ("best", "final", "diff")
    groups = [Group("natural", "Natural", names)]
    groups.append(Group("pgd", "PGD-20" if evaluated else f"{tracked} (tracked)", names))
    chosen = sorted({"validation" if run.recipe.validation else "test" for run in runs})
    notes = [f"Best: the epoch of highest tracked robust accuracy on the {' or '.join(chosen)} images"]
    if figures := [results[path][which]["pgd-20"] for path in evaluated for which in CHECKPOINTS]:
        notes.append(f"Natural and PGD-20 (α = ε/4, final iterate) on {_images(figures)}")
    if figures := [r["autoattack"] for found in results.values() for r in found.values() if "autoattack" in r]:
        groups.append(Group("autoattack", "AutoAttack", names))
        notes.append(f"AutoAttack on {_images(figures)}")
    if against is not None:
        rows, values = _less(rows, values, against)
        notes.insert(0, LESS.format(against))
        theirs = [run.path for run in runs if run.recipe.method == against]
        if evaluated and not evaluated.issuperset([*theirs, *(run.path for row in rows for run in row)]):
            raise InputError("some of these runs have PGD-20 and some have not; run eval.pgd on best and final of all")
    marked = [bool(evaluated) and row[0].path not in evaluated for row in rows]
    if any(marked):
        notes.append(f"†: as tracked in training, with {tracked}")
    unsaid = ("track", "track_steps") if evaluated and not any(marked) else ()
    return _report(rows, values, groups, notes, marked, unsaid=unsaid)


def nl_report(runs: Sequence[Run], against: str | None = None) -> Report:
    """[NL]'s experiments: test accuracy, its drop from best to final, and how the training data is fitted at the end.

    `against` as in `sglr_report`.

    *best* is the maximum over epochs of that accuracy itself. Accuracy on training data is natural accuracy against the
    given label: on incorrect data it says how far wrong labels are learnt. κ is that of the tracked PGD.
    """
    rows = group_seeds(runs)
    values = [[_nl_values(run) for run in row] for row in rows]
    names, kinds = ("best", "final", "drop"), ("correct", "incorrect")
    groups = [
        Group("natural", "Test natural", names),
        Group("pgd", f"Test {_tracked_pgd(runs)}", names),
        Group("train", "Final training accuracy", kinds),
        Group("kappa", "Final mean κ", kinds, digits=2),
    ]
    notes = ["Best: the maximum over epochs of each accuracy; drop = best − final"]
    notes += ["Training accuracy: on natural images, against the given label"]
    if against is not None:
        rows, values = _less(rows, values, against)
        notes.insert(0, LESS.format(against))
    return _report(rows, values, groups, notes, [False] * len(rows), noise_column=True)


COLUMNS = {"sglr": sglr_report, "nl": nl_report}


def group_seeds(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but seeds, together; clean labels first, then by kind and rate of the noise.

    Rows of one method are in the order of its numbers, 1 before 1.5, which folder names are not.
    """
    runs = list(runs)
    methods = list(dict.fromkeys(run.recipe.method for run in runs))
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {name: value for name, value in run.recipe.to_dict().items() if name not in SEEDS}
        groups.setdefault(repr(same), []).append(run)

    def order(row: list[Run]) -> tuple:
        recipe = row[0].recipe
        options = sorted((k, v) for k, v in recipe.target_options.items() if isinstance(v, int | float))
        return recipe.noise != "none", recipe.noise, recipe.noise_rate or 0.0, methods.index(recipe.method), options

    return sorted((sorted(row, key=lambda run: run.recipe.seed) for row in groups.values()), key=order)


def evaluations(run: Run) -> dict[str, dict[str, Any]]:
    """Measured figures by checkpoint and evaluation; without those of weights that the run no longer has."""
    found: dict[str, dict[str, Any]] = {}
    for which in CHECKPOINTS:
        weights = run.path / f"{which}.safetensors"
        results = read_results(results_file(run.path, which))
        digest = sha256(weights) if results and weights.is_file() else None
        found[which] = {k: v for k, v in results.items() if digest in (None, v["weights_sha256"])}
    return found


def summary(values: Sequence[float]) -> Figure | None:
    """Mean and 95% t-interval over what is not NaN."""
    from scipy.stats import t

    there = np.array(values)[~np.isnan(values)]
    if not len(there):
        return None
    spread = t.ppf(0.975, len(there) - 1) * there.std(ddof=1) / math.sqrt(len(there)) if len(there) > 1 else None
    return Figure(float(there.mean()), spread, len(there))


def _sglr_values(run: Run, results: dict[str, dict[str, Any]], has_pgd20: bool) -> Values:
    lines = run.metrics[run.best_epoch], run.metrics[-1]
    pairs = {key: [line[f"test_{key}_acc"] for line in lines] for key in ("natural", "pgd")}
    if has_pgd20:
        for key, name in (("natural", "natural"), ("pgd", "final_iterate")):
            pairs[key] = [results[which]["pgd-20"][name]["accuracy"] for which in CHECKPOINTS]
    pairs["autoattack"] = [results[which].get("autoattack", {}).get("accuracy", math.nan) for which in CHECKPOINTS]
    return {k: v for key, pair in pairs.items() for k, v in _three(key, "diff", *pair).items()}


def _nl_values(run: Run) -> Values:
    final, values = run.metrics[-1], {}
    for key in ("natural", "pgd"):
        name = f"test_{key}_acc"
        values |= _three(key, "drop", max(line[name] for line in run.metrics), final[name])
    for kind in ("correct", "incorrect"):  # None without label noise
        values[f"train {kind}"] = 100 * (math.nan if (acc := final[f"train_{kind}_natural_acc"]) is None else acc)
        values[f"kappa {kind}"] = math.nan if (kappa := final[f"train_{kind}_kappa"]) is None else kappa
    return values


def _three(key: str, difference: str, best: float, final: float) -> Values:
    """Best, final and best − final in percent."""
    return {f"{key} best": 100 * best, f"{key} final": 100 * final, f"{key} {difference}": 100 * (best - final)}


def _less(rows: list[list[Run]], values: list[list[Values]], method: str) -> tuple[list[list[Run]], list[list[Values]]]:
    """Rows of other methods, their values less those of `method` on the same labels and seed; runs without it go."""

    def setting(run: Run) -> tuple:
        recipe = run.recipe
        return recipe.data, recipe.noise, recipe.noise_rate, recipe.noise_seed, recipe.seed

    figures = {
        run.path: found for row, line in zip(rows, values, strict=True) for run, found in zip(row, line, strict=True)
    }
    theirs: dict[tuple, Values] = {}
    for run in (run for row in rows for run in row if run.recipe.method == method):
        if setting(run) in theirs:
            raise InputError(f"several runs of {method} have the same labels and seed; name only one of them")
        theirs[setting(run)] = figures[run.path]
    if not theirs:
        raise unknown_name("method", method, {row[0].recipe.method for row in rows})
    others = [[run for run in row if setting(run) in theirs and run.recipe.method != method] for row in rows]
    if not any(others):
        raise InputError(f"no other method has a run with the labels and seed of one of {method}; name some")
    others = [row for row in others if row]
    return others, [
        [{name: own - theirs[setting(run)][name] for name, own in figures[run.path].items()} for run in row]
        for row in others
    ]


def _tracked_pgd(runs: Sequence[Run]) -> str:
    steps = {run.recipe.track_steps for run in runs}
    return f"PGD-{steps.pop()}" if len(steps) == 1 else "PGD"


def _report(
    rows: list[list[Run]],
    values: list[list[Values]],
    groups: list[Group],
    notes: list[str],
    marked: list[bool],
    *,
    unsaid: Sequence[str] = (),
    noise_column: bool = False,
) -> Report:
    """The table of `values` (row by row, run by run); `unsaid`: settings that its figures do not depend on."""
    recipes = [row[0].recipe for row in rows]
    varying = _varying(recipes, unsaid)
    columns: dict[str, list[str]] = {"Noise": [_noise(r) for r in recipes], "Method": [r.method for r in recipes]}
    for name in varying:
        short = name.rpartition(".")[2]
        columns[name if short in columns else short] = [_text(name, _value(r, name)) for r in recipes]
    counts = [len(row) for row in rows]
    caption = ["Accuracy in percent"]
    if len(set(columns["Noise"])) == 1 and not noise_column:
        (noise,) = set(columns.pop("Noise"))
        caption.append("clean labels" if noise == "none" else f"{noise} label noise")
    said = {*varying, *unsaid} | (set() if recipes[0].validation else {"validation"})
    settings = {n: text.format(_text(n, _value(recipes[0], n))) for n, text in SETTING.items() if n not in said}
    if "train_size" in settings and "train_images" not in varying:
        settings["train_size"] = recipes[0].trained_on
    caption += settings.values()
    for name in SEEDS:
        seeds = sorted({getattr(run.recipe, name) for row in rows for run in row})
        if name == "seed" or len(seeds) > 1:
            caption.append(f"{name.replace('_', ' ')}{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    if max(counts) > 1:
        caption.append(f"mean ± half-width of the 95% t-interval over n = {_span(counts)} seeds")
    if len(set(counts)) > 1:
        columns["n"] = [str(count) for count in counts]
    made = []
    for labels, runs, mark in zip(zip(*columns.values(), strict=True), values, marked, strict=True):
        figures = {key: summary([run[key] for run in runs]) for group in groups for key in group.keys}
        made.append(Row(labels, figures, len(runs), mark))
    return Report(list(columns), groups, made, f"{', '.join(caption)}. {' '.join(f'{note}.' for note in notes)}")


def _varying(recipes: list[Recipe], unsaid: Sequence[str]) -> list[str]:
    """The recipe fields and options that tell rows apart, beyond method, noise and seeds."""
    # Not what a field's neighbours fill in by themselves: milestones move with the length of the run.
    chosen = [flatten(recipe.changes()) for recipe in recipes]
    names = dict.fromkeys([*SETTING, *sorted({name for changes in chosen for name in changes})])
    skipped = {"method", "noise", "noise_rate", *SEEDS, *unsaid}
    return [n for n in names if n not in skipped and len({repr(_value(recipe, n)) for recipe in recipes}) > 1]


def _value(recipe: Recipe, name: str) -> Any:
    """A field or option of a recipe; of an option that was not given, the default where the method has one."""
    field, dot, option = name.partition(".")
    if not dot:
        return getattr(recipe, field)
    made = {
        "target_options": recipe.make_targets,
        "objective_options": recipe.make_objective,
        "criterion_options": recipe.make_criterion,
        "awp_options": recipe.make_awp,
        "averaging_options": recipe.make_averaging,
    }
    default = getattr(made[field](), option, None) if field in made else None
    return getattr(recipe, field).get(option, default)


def _text(name: str, value: Any) -> str:
    if value is None or (name == "track" and not value):
        return "all" if name in ("train_size", "track") else MISSING
    if name == "train_images":
        return "drawn by class" if value == DRAWN else "the first"
    if name == "data":
        return dataset_title(dataset_label(value))
    if name in ("eps", "alpha"):
        return eps_label(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _noise(recipe: Recipe) -> str:
    bare = recipe.noise == "none" or recipe.noise_rate is None
    return recipe.noise if bare else f"{recipe.noise} {recipe.noise_rate:g}"


def _images(figures: Sequence[dict[str, Any]]) -> str:
    """Which test images figures are of, where that is the same for all; else how many."""
    if all("of" in f for f in figures) and len(words := {images_of(f) for f in figures}) == 1:
        return words.pop().replace("images", "test images")
    return f"{_span([f['n'] for f in figures])} test images"


def _span(counts: Iterable[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "terminal",
    columns: Annotated[str, typer.Option(help="sglr, or nl (drop, fit of training data, κ).")] = "sglr",
    against: Annotated[str | None, typer.Option(help="A method: show the others less it, seed by seed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the table here.")] = None,
) -> None:
    """Best, final and their difference over runs; runs that differ only by seed are one row."""
    with user_errors():
        for kind, name, known in (("format", format, FORMATS), ("columns", columns, COLUMNS)):
            if name not in known:
                raise unknown_name(kind, name, known)
        if out is not None and format == "terminal":
            raise InputError(f"--out {out} needs a format for files; give --format markdown, latex or csv")
        finished = []
        for run in collect_runs(runs):
            if len(run.metrics) == run.recipe.epochs:
                finished.append(run)
            else:
                said = f"{run.path} has {len(run.metrics)} of {run.recipe.epochs} epochs"
                print_warning("skipped:", said, errors)
        if not finished:
            raise InputError("none of the runs is finished; continue them with --resume, or sweep again")
        report = COLUMNS[columns](finished, against)
        text = FORMATS[format](report)
        if format == "terminal":
            console.print(text, report.caption)
        elif out is None:
            print_text(text)
        else:
            with atomic_path(out) as temporary:
                temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
