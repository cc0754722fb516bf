"""`rb-noisy apply-corrections`: the labels that a user corrected, in a copy of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rb_noisy.console import console, user_errors
from rb_noisy.hints import command_line


def apply_corrections(
    corrections: Annotated[Path, typer.Argument(help="corrections.csv, of the page that label-issues --html writes.")],
    data: Annotated[str, typer.Option(help="The data they are for: npz:FILE, imagefolder:DIR, digits, mnist, …")],
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write; none is overwritten.")],
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Write a copy of a data set with corrected training labels."""
    from rb_noisy import corrections as labels
    from rb_noisy.data import load_data
    from rb_noisy.training_data import training_files

    with user_errors():
        given = load_data(data, data_root)
        _, files = training_files(data, data_root) or (None, None)
        corrected = labels.apply_corrections(given, corrections, files)
        labels.save_npz(corrected, out)
        changed = int((corrected.y_train != given.y_train).sum())
        console.print(
            f"{out}: {changed} of {len(given.y_train)} training labels corrected, test labels as they were; "
            f"give it to other commands as {command_line('--data', f'npz:{out}')}",
            soft_wrap=True,
        )
