"""`python -m eval.autoattack --model …`: the standard AutoAttack, resumable at any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common
from eval.budget import attack_for
from rb_noisy.autoattack import ATTACKS, AutoAttackResult, run_autoattack
from rb_noisy.console import print_warning
from rb_noisy.errors import InputError
from rb_noisy.fast import fast_form
from rb_noisy.processes import forget_state

PASSES = 1000  # gradients for an image, about: some 2,500 where it stands, hardly any where it does not
NAMES = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}


def evaluate(
    subject: common.Subject,
    *,
    seed: int,
    batch_size: int,
    out: Path,
    reference: bool = False,
    estimate: bool = False,
    minutes: float | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The standard AutoAttack: the figures, and per-sample verdicts by name.

    Args:
        reference: none of the reference's passes is spared.
        estimate: the attacks use a bf16 form of the network. What they find is confirmed by the network itself; what
            they miss, the attack in fp32 might have found.
        minutes: attack a random part of the images, stratified by class, as large as the time allows.
    """
    # APGD-T's loss compares with the third and fourth largest logits.
    attacks = ATTACKS if len(subject.class_names) >= 4 else tuple(a for a in ATTACKS if a != "apgd-t")
    fast = fast_form(subject.model, half=True) if estimate else subject.fast
    state = _state_file(subject, out, estimate, minutes)
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(NAMES.get(stage, stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)

        def attack(x: Tensor, y: Tensor, batch_size: int, state: Path) -> AutoAttackResult:
            return run_autoattack(
                subject.model,
                x,
                y,
                eps=subject.eps,
                norm=subject.norm,
                seed=seed,
                batch_size=batch_size,
                device=subject.device,
                attacks=attacks,
                state_path=state,
                progress=progress,
                reference=reference,
                fast=fast,
                processes=subject.processes,
            )

        if minutes is None:
            result = attack(subject.x, subject.y, batch_size, state)
            rows, broken_by, warnings = torch.arange(len(subject.x)), result.broken_by, list(result.warnings)
        else:
            options = {"seed": seed, "batch_size": batch_size, "file": state}
            settings = {"reference": reference, "attacks": list(attacks)}
            rows, broken_by, warnings = attack_for(minutes, subject, attack, settings=settings, **options)
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "n": len(rows),
        "attack": ("AutoAttack in bf16: an estimate" if estimate else "AutoAttack, standard version")
        + ("" if attacks == ATTACKS else " without APGD-T, whose loss needs 4 classes"),
        "natural": common.rate(broken_by != 0),
        **common.rate(broken_by == -1),
        "after": {name: common.rate((broken_by == -1) | (broken_by > ATTACKS.index(name) + 1)) for name in attacks},
        "broken_by": {name: int((broken_by == ATTACKS.index(name) + 1).sum()) for name in attacks},
        "warnings": warnings,
    }
    if minutes is None and not estimate:
        figures["verdicts"] = common.packed(broken_by == -1)  # for eval.calibration
    if minutes is not None:
        figures["of"] = len(subject.x)
        figures["subset"] = "random, stratified by class"
        if len(rows) < len(subject.x):
            figures["images"] = f"{len(rows)} drawn by class, seed {seed}, of {subject.images}"
    if estimate:
        figures["precision"] = "bf16"
    return figures, {"index": subject.index[rows], "robust": broken_by == -1, "broken_by": broken_by}


def run(subject: common.Subject, *, seed: int, batch_size: int, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Evaluate (`options` as there), show, keep the verdicts; the figures by evaluation."""
    figures, verdicts = evaluate(subject, seed=seed, batch_size=batch_size, out=out, **options)
    common.show(heading(subject, figures), table(subject, figures))
    if figures["n"] < len(subject.x):
        left = len(subject.x) - figures["n"]
        common.console.print(f"not attacked: {left} images; the same command goes on with them", soft_wrap=True)
    for warning in figures["warnings"]:
        print_warning("warning:", warning)
    name = "autoattack" + ("-estimate" if "precision" in figures else "") + ("-subset" if "subset" in figures else "")
    eps = torch.tensor(subject.eps, dtype=torch.float64)
    common.save_verdicts(out, name, subject, **verdicts, eps=eps)
    return {name: figures}


def _state_file(subject: common.Subject, out: Path, estimate: bool = False, minutes: float | None = None) -> Path:
    kind = "autoattack" + ("-estimate" if estimate else "") + ("-subset" if minutes is not None else "")
    return subject.folder(out) / f".{kind}.state.npz"


def forget_progress(subject: common.Subject, out: Path, estimate: bool = False) -> None:
    """Remove what resumes the attack; only once its figures are kept."""
    if subject.processes.main:
        forget_state(_state_file(subject, out, estimate))


def main(
    model: common.ModelOption,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    batch_size: common.BatchOption = 250,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    seed: common.SeedOption = 0,
    json_file: common.JsonOption = None,
    replace: common.ReplaceOption = False,
    out: common.OutOption = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
    compiled: common.CompileOption = False,
    processes: common.ProcessesOption = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="The reference's own passes on the plain network, none spared.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Attack in bf16: sooner, and only an estimate.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Attack a random part of the images for so long.")
    ] = None,
) -> None:
    """AutoAttack (APGD-CE, APGD-T, FAB-T, Square) on a model's test set; run it again to go on after a kill."""
    with common.user_errors():
        subject = common.load_subject(
            model,
            zoo=zoo,
            dataset=dataset,
            n=n,
            device=device,
            eps=eps,
            data_root=data_root,
            checkpoint=checkpoint,
            seed=seed,
            batch_size=batch_size,
            compiled=compiled,
            processes=processes,
            passes=PASSES,
        )
        if reference and (estimate or compiled):
            raise InputError("--reference is the plain network; leave out --estimate and --compile")
        options = {"reference": reference, "estimate": estimate, "minutes": minutes}
        results = run(subject, seed=seed, batch_size=batch_size, out=out, **options)
        # A card's figure is that of all the images that --n says, in full precision.
        keeps = not estimate and minutes is None
        common.enter(subject if keeps else common.without_target(subject), results, json_file, out, replace)
        if minutes is None:
            forget_progress(subject, out, estimate)


def heading(subject: common.Subject, figures: dict[str, Any]) -> str:
    part = f" ({figures['subset']})" if "subset" in figures else ""
    return f"{figures['attack']}\n{common.setting(subject, figures)}{part}"


def table(subject: common.Subject, figures: dict[str, Any]) -> Table:
    result = Table()
    result.add_column("after")
    result.add_column(f"{subject.label}: accuracy", justify="right")
    result.add_column("broken by it", justify="right")
    result.add_row("no attack", common.percent(figures["natural"]), "")
    for name, left in figures["after"].items():
        result.add_row(NAMES[name], common.percent(left), str(figures["broken_by"][name]))
    return result


if __name__ == "__main__":
    typer.run(main)
