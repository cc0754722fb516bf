"""`python -m eval.autoattack --model …`: the standard AutoAttack, resumable at any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table

from eval import common
from rb_noisy.autoattack import ATTACKS, AutoAttackResult, run_autoattack

NAMES = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}


def evaluate(
    subject: common.Subject, *, seed: int, batch_size: int, out: Path
) -> tuple[dict[str, Any], AutoAttackResult]:
    """The standard AutoAttack: the figures, and per-sample verdicts."""
    state = _state_file(subject, out)
    # APGD-T's loss compares with the third and fourth largest logits.
    attacks = ATTACKS if len(subject.class_names) >= 4 else tuple(a for a in ATTACKS if a != "apgd-t")
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(NAMES.get(stage, stage), total=total)
            bar.update(tasks[stage], completed=done)

        result = run_autoattack(
            subject.model,
            subject.x,
            subject.y,
            eps=subject.eps,
            norm=subject.norm,
            seed=seed,
            batch_size=batch_size,
            device=subject.device,
            attacks=attacks,
            state_path=state,
            progress=progress,
        )
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": "AutoAttack, standard version"
        + ("" if attacks == ATTACKS else " without APGD-T, whose loss needs 4 classes"),
        "natural": common.rate(result.clean_correct),
        **common.rate(result.robust),
        "after": {
            name: common.rate((result.broken_by == -1) | (result.broken_by > ATTACKS.index(name) + 1))
            for name in attacks
        },
        "broken_by": {name: int((result.broken_by == ATTACKS.index(name) + 1).sum()) for name in attacks},
        "warnings": list(result.warnings),
    }
    return figures, result


def run(subject: common.Subject, *, seed: int, batch_size: int, out: Path) -> dict[str, dict[str, Any]]:
    """Evaluate, show, keep the verdicts; the figures by evaluation."""
    figures, result = evaluate(subject, seed=seed, batch_size=batch_size, out=out)
    common.show(heading(subject, figures), table(subject, figures))
    for warning in figures["warnings"]:
        common.console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    eps = torch.tensor(subject.eps, dtype=torch.float64)
    common.save_verdicts(out, "autoattack", subject, robust=result.robust, broken_by=result.broken_by, eps=eps)
    return {"autoattack": figures}


def _state_file(subject: common.Subject, out: Path) -> Path:
    return subject.folder(out) / ".autoattack.state.npz"


def forget_progress(subject: common.Subject, out: Path) -> None:
    """Remove what resumes the attack; only once its figures are kept."""
    _state_file(subject, out).unlink(missing_ok=True)


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
        )
        results = run(subject, seed=seed, batch_size=batch_size, out=out)
        common.enter(subject, results, json_file, out, replace)
        forget_progress(subject, out)


def heading(subject: common.Subject, figures: dict[str, Any]) -> str:
    return f"{figures['attack']}\n{common.setting(subject, figures)}"


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
