"""`rb-noisy sweep`: a grid of recipes, each as a run folder, several at a time; what is done is skipped."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from rb_noisy.commands.settings import parse_settings
from rb_noisy.console import console, errors, progress_bar, user_errors
from rb_noisy.errors import InputError

if TYPE_CHECKING:
    from rb_noisy.runs import Run
    from rb_noisy.studies import Grid

SPAN = "several, with commas between them, span a grid"


def sweep(
    out: Annotated[Path, typer.Option("--out", help="The folder of the run folders.")],
    data: Annotated[str | None, typer.Option(help=f"Data sets; {SPAN}.")] = None,
    method: Annotated[str | None, typer.Option(help=f"Methods, e.g. st,pgd-at,pgd-at+sglr; {SPAN}.")] = None,
    noise: Annotated[str | None, typer.Option(help=f"Kinds of label noise; {SPAN}.")] = None,
    noise_rate: Annotated[str | None, typer.Option(help=f"Noise rates, 0 for clean labels; {SPAN}.")] = None,
    backbone: Annotated[str | None, typer.Option(help=f"Networks; {SPAN}.")] = None,
    epochs: Annotated[str | None, typer.Option(help=f"Lengths of the run; {SPAN}.")] = None,
    seed: Annotated[str | None, typer.Option(help=f"Seeds; {SPAN}.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other recipe field, e.g. --set target_options.r=0,0.2,0.4 (repeatable)."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="A study of the papers (sglr-table2, sglr-table3, sglr-table4, sglr-noise, nl-noise, nl-annotator, "
            "methods), or a JSON file with a list of recipes, each merged over the options here."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Train every recipe of a grid; the same command goes on where it was interrupted."""
    from rb_noisy.runs import check_teacher
    from rb_noisy.sweep import Outcome, expand_grid, find_runs, run_sweep
    from rb_noisy.sweep_teachers import BESIDE, with_teachers

    # The seed first, so that it changes last and the whole grid is seen once before any of it again.
    named = {
        "seed": seed,
        "data": data,
        "method": method,
        "noise": noise,
        "noise_rate": noise_rate,
        "backbone": backbone,
        "epochs": epochs,
    }
    with user_errors():
        texts = [f"{name}={text}" for name, text in named.items() if text is not None]
        axes, entries = parse_axes([*texts, *(settings or [])]), None
        if grid is not None:
            named_grid = read_grid(grid, axes.get("data", []))
            axes, entries = {**named_grid.axes, **axes}, named_grid.recipes
        recipes = with_teachers(expand_grid(axes, entries))
        for name, recipe in recipes.items():
            for teacher in recipe.make_targets().teachers:
                if teacher.removeprefix(BESIDE) not in recipes:
                    check_teacher(teacher, out / name)
        found = find_runs(recipes, out)
        if dry_run:
            for name, run in found.items():
                console.print(f"{name}  {_state(run, recipes[name].epochs)}", soft_wrap=True, markup=False)
            return
        done = sum(run is not None and run.finished for run in found.values())
        if done:
            console.print(f"{done} of {len(recipes)} runs are finished already", soft_wrap=True)
        with progress_bar() as bar, stop_signals() as stopped:
            task = bar.add_task("runs", total=len(recipes), completed=done)

            def on_done(outcome: Outcome) -> None:
                bar.update(task, advance=1)
                line = f"{outcome.name}  failed" if outcome.run is None else result_line(outcome.name, outcome.run)
                console.print(line, soft_wrap=True, markup=False)

            outcomes = run_sweep(
                recipes, out, jobs=jobs, data_root=data_root, on_done=on_done, stop=lambda: bool(stopped)
            )
        failures = [outcome for outcome in outcomes if outcome.run is None]
        for outcome in failures:
            errors.print(f"[bold red]failed:[/] {escape(f'{outcome.name}: {outcome.problem}')}", soft_wrap=True)
        if stopped:
            raise KeyboardInterrupt
        if failures:
            errors.print(f"{len(failures)} of {len(recipes)} runs failed", soft_wrap=True)
            raise typer.Exit(1)


def parse_axes(settings: list[str]) -> dict[str, list[Any]]:
    """["target_options.r=0,0.2", "milestones=[5,8]"] → {"target_options.r": [0, 0.2], "milestones": [[5, 8]]}."""
    axes: dict[str, list[Any]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} is not FIELD=VALUE; write for example --set lr=0.05,0.1")
        field, dot, option = name.partition(".")
        parsed = [parse_settings([f"{name}={value}"])[field] for value in split_values(text, name)]
        axes[name] = [value[option] for value in parsed] if dot else parsed
    return axes


def split_values(text: str, name: str) -> list[str]:
    """Text at its commas, but for those within brackets, braces or double quotes (JSON lists, objects and strings)."""
    values, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        if not quoted:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not quoted and depth <= 0:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    if "" in values:
        raise InputError(f"{name} {text!r} has an empty value; write values with one comma between them")
    return values


def read_grid(name: str, data: Sequence[str]) -> Grid:
    """The recipes of a --grid file, or of a named study for these data sets."""
    from rb_noisy.studies import Grid, studies, study

    file = Path(name)
    if not file.is_file():
        if file.suffix == ".json":
            raise InputError(f"--grid {file} is no file; name a JSON list of recipes, or one of {', '.join(studies())}")
        return study(name, data)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--grid {file} is not valid JSON ({error}); mend it") from error
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise InputError(f"--grid {file} holds no list of JSON objects; write [{{...}}, {{...}}] of recipe fields")
    return Grid({}, entries)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the list instead of breaking in, so that none falls between a start and its record."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def result_line(name: str, run: Run) -> str:
    best, final = run.metrics[run.best_epoch], run.metrics[-1]

    def figures(line: dict[str, Any]) -> str:
        return f"PGD-{run.recipe.track_steps} {line['test_pgd_acc']:.2%} natural {line['test_natural_acc']:.2%}"

    seconds = sum(line["seconds"] for line in run.metrics)
    return f"{name}  best {figures(best)} (epoch {run.best_epoch + 1})  final {figures(final)}  {seconds:.0f} s"


def _state(run: Run | None, epochs: int) -> str:
    if run is None:
        return "to do"
    return "finished" if run.finished else f"{len(run.metrics)} of {epochs} epochs"
