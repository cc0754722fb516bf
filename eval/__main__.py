"""`python -m eval --model …`: PGD-20, AutoAttack and the κ-calibration report, then the place on the leaderboard."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import typer

from eval import autoattack, calibration, common, leaderboard, pgd
from model_zoo.registry import enter_figures, read_cards


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
) -> None:
    """Everything that a card needs, in one go; run it again to go on after an interruption."""
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
            passes=pgd.STEPS + autoattack.PASSES + calibration.PASSES,
        )
        results: dict[str, Any] = {}
        # AutoAttack before calibration, which reads its verdicts.
        for evaluation in (pgd, autoattack, calibration):
            measured = evaluation.run(subject, seed=seed, batch_size=batch_size, out=out)
            results |= measured
            common.enter(subject, results if json_file else measured, json_file, out, replace)
        autoattack.forget_progress(subject, out)
        show_standing(subject, results)


def show_standing(subject: common.Subject, results: dict[str, Any]) -> None:
    """The leaderboard of the subject's data set and noise, with these figures as its own, and the card's other ones."""
    card = copy.deepcopy(subject.card)
    known = common.entered(subject).items()
    same = {name: figures for name, figures in known if figures["weights_sha256"] == subject.weights_sha256}
    for evaluation, figures in {**same, **results}.items():
        enter_figures(card, evaluation, figures)
    others = [other for other in read_cards(subject.zoo) if other["name"] != card["name"]]
    rows = leaderboard.leaderboard_rows([*others, card], leaderboard.published_rows(), dataset=card["dataset"])
    own = next(row for row in rows if row.measured and row.name == card["name"])
    for shown in leaderboard.render_terminal([row for row in rows if row.group == own.group], card["name"]):
        common.console.print(shown)
    common.console.print(leaderboard.standing(rows, card["name"]), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
