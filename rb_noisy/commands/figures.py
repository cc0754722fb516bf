"""`rb-noisy figures`: the papers' figures from a user's own runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rb_noisy.console import ZooOption, console, progress_bar, user_errors
from rb_noisy.errors import InputError

if TYPE_CHECKING:
    from rb_noisy.figures import Source

NAMES = (
    "toy (NL 1, 11; needs no run), learning-curves (NL 4, 15, 16, 19, 20), train-accuracy (NL 3, 13, 14, 18), "
    "kappa-over-epochs (NL 5, 21, 22), neighbourhood-entropy (NL 2, 12), densities (NL 7, 23, 24), "
    "kappa-against-loss (NL 6, 27, 28), gallery (NL 8, 25, 26), annotators (NL 9), "
    "accuracy-by-kappa (NL 10), loss-landscape (NL 17), "
    "gradient-norm (SGLR 1), label-assignment (SGLR 2), confidence (SGLR 3), memorisation (SGLR 4), features (SGLR 5)"
)


def figures(
    out: Annotated[Path, typer.Option("--out", help="The folder to write: PNG, SVG and CSV of each figure.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders, folders of run folders, zoo models, or shipped records (model_zoo/studies/…)."
        ),
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help=f"Only these, with commas between them. Default: all. {NAMES}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples, directions and random starts drawn.")] = 0,
    zoo: ZooOption = None,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Redraw the figures of both papers from your own runs; those without data are listed with what they need."""
    from rb_noisy.figures import FIGURES, NEEDS_NO_RUN, Context, NotDrawn, check_names, draw

    with user_errors():
        names = list(FIGURES) if figure is None else [name.strip() for name in figure.split(",")]
        check_names(names)
        if not runs and set(names) - set(NEEDS_NO_RUN):
            raise InputError(
                "no run is named; name run folders or zoo models, or draw --figure toy, which needs none of them"
            )
        if seed < 0:
            raise InputError(f"--seed is {seed}; give a whole number of at least 0")
        sources = _told_apart([source for run in runs or () for source in open_sources(run, zoo)])
        missing: list[tuple[str, NotDrawn]] = []
        with progress_bar() as bar:
            task = bar.add_task("figures", total=len(names))

            def on_progress(text: str) -> None:
                bar.update(task, description=text)

            for name, found in draw(names, Context(sources, data_root, seed, on_progress)):
                bar.advance(task)
                if isinstance(found, NotDrawn):
                    missing.append((name, found))
                    continue
                for drawing in found:
                    path = drawing.save(out)[0]
                    console.print(f"{path} (also .svg, .csv): {FIGURES[name].papers}", soft_wrap=True)
        for name, reason in missing:
            console.print(
                f"not drawn: {name} ({FIGURES[name].papers}): {reason.reason}; to have it: {reason.command}",
                soft_wrap=True,
            )


def _told_apart(sources: list[Source]) -> list[Source]:
    """Runs of one name, from two folders, get the folder's name too, and if need be a number."""
    seen: dict[str, int] = {}
    found = []
    for source in sources:
        same = sum(source.name == other.name for other in sources) > 1
        name = f"{source.run.path.parent.name}-{source.name}" if same and source.run is not None else source.name
        seen[name] = seen.get(name, 0) + 1
        found.append(replace(source, name=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return found


def open_sources(name: str, zoo: str | None) -> list[Source]:
    """The runs of a folder, or one zoo model.

    Raises:
        InputError: neither.
    """
    from model_zoo.registry import load_model, read_card
    from rb_noisy.figures import Source
    from rb_noisy.recipes import Recipe
    from rb_noisy.runs import Run

    path = Path(name)
    if (path / "run.json").is_file():
        return [Source.from_run(Run.open(path))]
    if path.is_dir():
        found = sorted(file.parent for file in path.glob("**/run.json"))
        if not found:
            raise InputError(f"{name} holds no run folder (with a run.json); name the folder that `train` wrote")
        return [Source.from_run(Run.open(folder)) for folder in found]
    card = read_card(name, zoo)
    recipe = Recipe.recorded(card["recipe"])
    return [Source(name, recipe, tuple(card["class_names"]), load=lambda: load_model(name, zoo))]
