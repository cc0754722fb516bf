"""The console command `rb-noisy label-issues`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rb_noisy.commands.settings import parse_settings
from rb_noisy.console import console, print_warning, progress_bar, user_errors
from rb_noisy.errors import InputError
from rb_noisy.hints import command_line
from rb_noisy.placement import is_main

if TYPE_CHECKING:
    from rb_noisy.label_issues import LabelIssues, OutOfFold
    from rb_noisy.recipes import Recipe
    from rb_noisy.runs import Run

SHEET, PAGE, LARGEST = 64, 500, 1000  # images of the contact sheet and of the page, and at most of either


def label_issues(
    data: Annotated[
        str | None, typer.Option(help="digits, mnist, cifar10, cifar100, cifar100-coarse, npz:FILE or imagefolder:DIR.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Judge by the history of this run instead of training one.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Train this many out-of-fold models, e.g. 5; 0: one run's history.")] = 0,
    score: Annotated[
        str, typer.Option(help="joint, kappa or loss; with --folds also self-confidence or cleanlab.")
    ] = "joint",
    html: Annotated[
        bool, typer.Option("--html", help="Also write label_issues.html, a page to look through and correct labels.")
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(help=f"How many of the worst images are shown. Default: {SHEET}, in the page {PAGE}."),
    ] = None,
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
        if top is not None and not 1 <= top <= LARGEST:
            raise InputError(f"--top is {top}; give 1 to {LARGEST}")
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
        if not is_main():  # of several that a launcher started to train: the first one writes
            return
        issues = find_label_issues(source, score=score, data_root=data_root)
        _write(issues, recipe, score, top, html, out, data_root)


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
    from rb_noisy.placement import default_threads
    from rb_noisy.training import train

    options = {"data_root": data_root, "threads": default_threads()}

    with progress_bar() as bar:
        task = bar.add_task("epoch 1", total=None)

        def on_batch(fold: int | None, epoch: int, done: int, total: int) -> None:
            part = "" if fold is None else f"fold {fold + 1}/{folds} "
            bar.update(task, completed=done, total=total, description=f"{part}epoch {epoch + 1}/{recipe.epochs}")

        if not folds:
            return train(recipe, out / "run", resume=True, on_batch=lambda *done: on_batch(None, *done), **options)
        found = out_of_fold(recipe, folds, out / "folds", on_batch=on_batch, **options)
    if is_main():
        found.save(out / "out_of_fold.npz")
    return found


def _write(
    issues: LabelIssues, recipe: Recipe, score: str, top: int | None, html: bool, out: Path, data_root: Path | None
) -> None:
    from rb_noisy.contact_sheet import contact_sheet
    from rb_noisy.data import load_data
    from rb_noisy.gallery import write_gallery
    from rb_noisy.training_data import training_files

    folder, files = training_files(recipe.data, data_root) or (None, None)
    issues.to_csv(out / "label_issues.csv", files and [str(folder / file) for file in files])
    images = load_data(recipe.data, data_root).x_train
    name = Path(recipe.data).name
    worst = issues.index[: top or SHEET]
    captions = [
        f"#{index}  κ {kappa:.1f}\n{_short(issues, given)} → {_short(issues, suggested)}"
        for index, kappa, given, suggested in zip(
            worst.tolist(), *(t.tolist() for t in (issues.kappa, issues.given, issues.suggested)), strict=False
        )
    ]
    title = f"{name}: the {len(worst)} most suspicious of {len(issues.index)} labels, by {score}"
    contact_sheet(images[worst], captions, out / "label_issues.png", title)
    if html:
        page = {"top": top or PAGE, "score": score, "files": files, "command": _way_back(recipe)}
        write_gallery(out / "label_issues.html", issues, images, name, **page)
    _show(issues, out)
    if html:
        console.print(f"to look through and correct them: {out / 'label_issues.html'}", soft_wrap=True)


def _way_back(recipe: Recipe) -> str | None:
    """The command that takes the page's corrections; None where a recipe's own noise made the labels it shows."""
    if recipe.noise != "none":
        return None
    return command_line(
        "rb-noisy", "apply-corrections", "--data", recipe.data, "corrections.csv", "--out", "corrected.npz"
    )


def _show(issues: LabelIssues, out: Path) -> None:
    table = Table(*("rank", "index", "given", "suggested", "κ", "loss", "score"))
    for rank in range(min(10, len(issues.index))):
        names = (issues.class_names[int(labels[rank])] for labels in (issues.given, issues.suggested))
        numbers = (f"{float(values[rank]):.3f}" for values in (issues.kappa, issues.loss, issues.score))
        table.add_row(str(rank + 1), str(int(issues.index[rank])), *names, *numbers)
    console.print(table)
    share = f"{issues.suspicious} of {len(issues.index)} labels are suspicious"
    console.print(f"estimated noise rate {issues.noise_rate:.1%}: {share}", soft_wrap=True)
    if issues.warning:
        print_warning("warning:", issues.warning)
    console.print(f"all of them: {out / 'label_issues.csv'}; the worst: {out / 'label_issues.png'}", soft_wrap=True)


def _short(issues: LabelIssues, label: int, length: int = 11) -> str:
    name = issues.class_names[label]
    return name if len(name) <= length else f"{name[: length - 1]}…"
