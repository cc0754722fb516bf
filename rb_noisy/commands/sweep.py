"""`rb-noisy sweep`: recipes, each as a run folder, and evaluations, several at a time; what is done is skipped."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rb_noisy.commands.settings import parse_settings
from rb_noisy.console import console, errors, print_error, progress_bar, user_errors
from rb_noisy.errors import InputError

if TYPE_CHECKING:
    from rb_noisy.jobs import Job, Outcome
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
            "methods), or a JSON file with a list of recipes, each merged over the options here, and of evaluations of "
            'them: {"evaluate": "autoattack", "model": NAME, "n": 500}.'
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 1,
    tune: Annotated[
        bool, typer.Option("--tune", help="On a CPU, measure first which convolutions are faster as matrix products.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only say how far each is, and how long the rest will take.")
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Train every recipe of a grid; the same command goes on where it was interrupted."""
    from rb_noisy.jobs import carry_out, make_jobs
    from rb_noisy.runs import check_teacher
    from rb_noisy.sweep import expand_grid
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
        if jobs < 1:
            raise InputError(f"--jobs is {jobs}; give the number of runs at a time, from 1 up")
        texts = [f"{name}={text}" for name, text in named.items() if text is not None]
        axes, entries, evaluations = parse_axes([*texts, *(settings or [])]), None, []
        if grid is not None:
            named_grid = read_grid(grid, axes.get("data", []))
            axes, entries = {**named_grid.axes, **axes}, [e for e in named_grid.recipes if "evaluate" not in e]
            evaluations = [e for e in named_grid.recipes if "evaluate" in e]
        recipes = with_teachers(expand_grid(axes, entries))
        for name, recipe in recipes.items():
            for teacher in recipe.make_targets().teachers:
                if not (teacher.startswith(BESIDE) and teacher.removeprefix(BESIDE) in recipes):
                    check_teacher(teacher, out / name)
        work = make_jobs(recipes, out, evaluations, tune=tune)
        if dry_run or status:
            show_status(work, jobs, times=status)
            return
        done = sum(job.done() for job in work)
        if done:
            console.print(f"{done} of {len(work)} runs are finished already", soft_wrap=True)
        with progress_bar() as bar, stop_signals() as stopped:
            task = bar.add_task("runs", total=len(work), completed=done)

            def on_done(outcome: Outcome) -> None:
                bar.update(task, advance=1)
                console.print(result_line(outcome), soft_wrap=True)

            outcomes = carry_out(
                work, out, at_a_time=jobs, data_root=data_root, on_done=on_done, stop=lambda: bool(stopped)
            )
        failures = [outcome for outcome in outcomes if outcome.problem]
        for outcome in failures:
            print_error("failed:", f"{outcome.job.name}: {outcome.problem}")
        if stopped:
            raise KeyboardInterrupt
        if failures:
            errors.print(f"{len(failures)} of {len(work)} runs failed", soft_wrap=True)
            raise typer.Exit(1)


def show_status(work: list[Job], at_a_time: int, times: bool) -> None:
    """A line for each job: how far it is, and with `times` how long it and all of them will take."""
    from rb_noisy.jobs import seconds_left

    left = seconds_left(work) if times else {}
    for job in work:
        state = job.state()
        seconds = left.get(job.name)
        if times and state != "finished":
            state += ", time not known yet" if seconds is None else f", about {duration(seconds)} left"
        console.print(f"{job.name}  {state}", soft_wrap=True)
    if times:
        known = [seconds for seconds in left.values() if seconds]
        unknown = sum(seconds is None for seconds in left.values())
        rest = f"about {duration(max(sum(known) / at_a_time, max(known, default=0.0)))} left with --jobs {at_a_time}"
        rest += f", and {unknown} whose time is not known yet" if unknown else ""
        console.print(rest if known or unknown else "all is done", soft_wrap=True)


def duration(seconds: float) -> str:
    """ "2 min", "3.5 h" or "1.2 days"."""
    minutes = seconds / 60
    if minutes < 90:
        return f"{max(1, round(minutes))} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


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
    from rb_noisy.reading import read_json
    from rb_noisy.studies import Grid, studies, study

    file = Path(name)
    if not file.is_file():
        if file.suffix == ".json":
            raise InputError(f"--grid {file} is no file; name a JSON list of recipes, or one of {', '.join(studies())}")
        return study(name, data)
    entries = read_json(file, "--grid", "mend it")
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


def result_line(outcome: Outcome) -> str:
    """How a job ended, in a line."""
    from rb_noisy.jobs import Evaluation

    job = outcome.job
    if outcome.problem:
        return f"{job.name}  failed"
    if isinstance(job, Evaluation):
        figures = job.figures()
        accuracy = figures.get("accuracy", figures.get("final_iterate", {}).get("accuracy"))
        return f"{job.name}  finished" + ("" if accuracy is None else f": {accuracy:.2%} of {figures['n']} images")
    run = job.run()
    best, final = run.metrics[run.best_epoch], run.metrics[-1]

    def accuracies(line: dict[str, Any]) -> str:
        return f"PGD-{run.recipe.track_steps} {line['test_pgd_acc']:.2%} natural {line['test_natural_acc']:.2%}"

    seconds = sum(line["seconds"] for line in run.metrics)
    return (
        f"{job.name}  best {accuracies(best)} (epoch {run.best_epoch + 1})  final {accuracies(final)}  {seconds:.0f} s"
    )
