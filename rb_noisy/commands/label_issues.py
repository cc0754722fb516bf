"""The console command `rb-noisy label-issues`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rb_noisy.commands.settings import parse_settings
from rb_noisy.console import console, progress_bar, user_errors
from rb_noisy.errors import InputError

if TYPE_CHECKING:
    from rb_noisy.label_issues import LabelIssues, OutOfFold
    from rb_noisy.recipes import Recipe
    from rb_noisy.runs import Run

LARGEST_SHEET = 1000


def label_issues(
    data: Annotated[
        str | None, typer.Option(help="digits, mnist, cifar10, cifar100, npz:FILE or imagefolder:DIR.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Judge by the history of this run instead of training one.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Train this many out-of-fold models, e.g. 5; 0: one run's history.")] = 0,
    score: Annotated[
        str, typer.Option(help="joint, kappa or loss; with --folds also self-confidence or cleanlab.")
    ] = "joint",
    top: Annotated[int, typer.Option(help="How many of the worst images the contact sheet shows.")] = 64,
    method: Annotated[str | None, typer.Option(help="How to train. Default: pgd-at.")] = None,
    noise: Annotated[
        str | None, typer.Option(help="For experiments: corrupt the labels first. Default: the labels as given.")
    ] = None,
    noise_rate: Annotated[float | None, typer.Option(help="Noise rate, 0 to 1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the training.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other recipe field, e.g. --set lr=0.05 (repeatable).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; the same command goes on in it.")] = Path(
        "label-issues"
    ),
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Rank the training samples of a data set by how likely their label is wrong."""
    from rb_noisy.label_issues import check_score, find_label_issues
    from rb_noisy.recipes import Recipe

    named = {"data": data, "method": method, "noise": noise, "noise_rate": noise_rate, "epochs": epochs}
    with user_errors():
        values = {k: v for k, v in named.items() if v is not None} | parse_settings(settings or [])
        if not 1 <= top <= LARGEST_SHEET:
            raise InputError(f"--top is {top}; give 1 to {LARGEST_SHEET}")
        if folds < 0 or folds == 1:
            raise InputError(f"--folds is {folds}; give 0 for one run's history, or 2 and more, usually 3 or 5")
        check_score(score, out_of_fold=folds > 0)
        source: Run | OutOfFold
        if run is not None:
            source = _given_run(run, values, folds)
            recipe = source.recipe
        else:
            recipe = Recipe.from_dict(values)
            if not folds and score != "loss" and recipe.make_objective().attack_loss is None:
                raise InputError(
                    f"method {recipe.method} leaves no κ for score {score!r}; give --score loss, or --folds 5"
                )
            source = _judge(recipe, folds, out, data_root)
        issues = find_label_issues(source, score=score, data_root=data_root)
        _write(issues, recipe, score, top, out, data_root)


def _given_run(path: Path, values: dict[str, Any], folds: int) -> Run:
    from rb_noisy.runs import Run

    run = Run.open(path)
    if folds:
        raise InputError("--run and --folds are two ways to judge the labels; give one of them")
    if others := [name for name, value in values.items() if (name, value) != ("data", run.recipe.data)]:
        raise InputError(f"{path} was trained on {run.recipe.data} by its own recipe; leave out {', '.join(others)}")
    return run


def _judge(recipe: Recipe, folds: int, out: Path, data_root: Path | None) -> Run | OutOfFold:
    """Train what judges the labels, or go on with it."""
    from rb_noisy.label_issues import out_of_fold
    from rb_noisy.training import train

    with progress_bar() as bar:
        task = bar.add_task("epoch 1", total=None)

        def on_batch(fold: int | None, epoch: int, done: int, total: int) -> None:
            part = "" if fold is None else f"fold {fold + 1}/{folds} "
            bar.update(task, completed=done, total=total, description=f"{part}epoch {epoch + 1}/{recipe.epochs}")

        if not folds:
            return train(
                recipe, out / "run", resume=True, data_root=data_root, on_batch=lambda *done: on_batch(None, *done)
            )
        found = out_of_fold(recipe, folds, out / "folds", data_root=data_root, on_batch=on_batch)
    found.save(out / "out_of_fold.npz")
    return found


def _write(issues: LabelIssues, recipe: Recipe, score: str, top: int, out: Path, data_root: Path | None) -> None:
    from rb_noisy.contact_sheet import contact_sheet
    from rb_noisy.data import load_data

    files = _image_names(recipe.data, data_root)
    issues.to_csv(out / "label_issues.csv", files)
    worst = issues.index[:top]
    images = load_data(recipe.data, data_root).x_train[worst]
    captions = [
        f"#{index}  κ {kappa:.1f}\n{_short(issues, given)} → {_short(issues, suggested)}"
        for index, kappa, given, suggested in zip(
            worst.tolist(), *(t.tolist() for t in (issues.kappa, issues.given, issues.suggested)), strict=False
        )
    ]
    title = f"{Path(recipe.data).name}: the {len(worst)} most suspicious of {len(issues.index)} labels, by {score}"
    contact_sheet(images, captions, out / "label_issues.png", title)
    _show(issues, out)


def _show(issues: LabelIssues, out: Path) -> None:
    table = Table(*("rank", "index", "given", "suggested", "κ", "loss", "score"))
    for rank in range(min(10, len(issues.index))):
        names = (issues.class_names[int(labels[rank])] for labels in (issues.given, issues.suggested))
        numbers = (f"{float(values[rank]):.3f}" for values in (issues.kappa, issues.loss, issues.score))
        table.add_row(str(rank + 1), str(int(issues.index[rank])), *map(escape, names), *numbers)
    console.print(table)
    share = f"{issues.suspicious} of {len(issues.index)} labels are suspicious"
    console.print(f"estimated noise rate {issues.noise_rate:.1%}: {share}", soft_wrap=True)
    console.print(f"all of them: {out / 'label_issues.csv'}; the worst: {out / 'label_issues.png'}", soft_wrap=True)


def _short(issues: LabelIssues, label: int, length: int = 11) -> str:
    name = issues.class_names[label]
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _image_names(data: str, root: Path | None) -> list[str] | None:
    """The training files of an image folder, in the order of its samples; None for other data."""
    from rb_noisy.data import class_folders, image_files, local_path

    kind, _, folder = data.partition(":")
    if kind != "imagefolder":
        return None
    return [str(file) for group in class_folders(local_path(folder, root) / "train") for file in image_files(group)]
