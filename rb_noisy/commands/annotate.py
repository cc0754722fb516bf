"""`rb-noisy annotate`: labels for a user's unlabelled images, with κ and confidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rb_noisy.console import ZooOption, console, progress_bar, user_errors
from rb_noisy.errors import InputError
from rb_noisy.radius import parse_radius

STEPS = 10


def annotate(
    model: Annotated[str, typer.Option("--model", help="A zoo model or a run folder.")],
    images: Annotated[
        str, typer.Option("--images", help="A folder of images, npz:FILE (x or x_test), imagefolder:DIR.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The CSV file to write.")],
    eps: Annotated[
        float | None,
        typer.Option(
            "--eps",
            parser=parse_radius,
            metavar="FLOAT",
            help="Radius for κ in [0, 1] units, or 8/255. Default: the model's own.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help=f"PGD steps for κ, which is their largest value. Default: {STEPS}.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Of a run folder: final or best.")] = "final",
    zoo: ZooOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 256,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="What Calibrated.save wrote for this model: its confidence, with the ε and the steps of its own κ.",
        ),
    ] = None,
) -> None:
    """Label your own unlabelled images, which may be under attack: label, κ and confidence of each, as CSV."""
    import torch

    from model_zoo.registry import load_model, read_card
    from rb_noisy.annotation import annotate as label_images
    from rb_noisy.annotation import load_images
    from rb_noisy.confidence import Calibrated
    from rb_noisy.runs import Run

    with user_errors():
        if (Path(model) / "run.json").is_file():
            run = Run.open(model)
            network, recipe, class_names = run.load(checkpoint), run.recipe.to_dict(), run.class_names
        else:
            card = read_card(model, zoo)
            network, recipe, class_names = load_model(model, zoo), card["recipe"], card["class_names"]
        x, files = load_images(images)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        calibrated = None if calibration is None else Calibrated.load(calibration, network)
        ball = {"eps": recipe["eps"], "steps": STEPS, "norm": recipe["norm"]}
        if calibrated is not None:
            ball = {"eps": calibrated.eps, "steps": calibrated.calibrator.kappa_steps, "norm": calibrated.norm}
        for name, given in (("eps", eps), ("steps", steps)):
            if given is not None and calibrated is not None and given != ball[name]:
                raise InputError(f"--{name} is {given:g} but {calibration} is for {ball[name]:g}; leave out --{name}")
            ball[name] = ball[name] if given is None else given
        with progress_bar() as bar:
            task = bar.add_task("images", total=len(x))
            found = label_images(
                network,
                x,
                **ball,
                calibrator=calibrated,
                batch_size=batch_size,
                progress=lambda done: bar.advance(task, done),
            )
        found.to_csv(out, class_names, files)
        steps, radius = ball["steps"], ball["eps"]
        kept = int((found.kappa == steps).sum())
        # A calibrated confidence has taken κ into account: then there is one thing to go by, not two.
        trust = "a small κ means do not trust the label; the confidence is max-softmax, not calibrated"
        if calibrated is not None:
            trust = f"the confidence is the calibrated probability of {calibrated.target!r}: go by it, not by κ"
        console.print(
            f"{out}: {len(x)} images, {kept} of them with κ = {steps} (PGD-{steps} within ε = {radius:g} left the "
            f"label); {trust}",
            soft_wrap=True,
        )
