"""`python -m eval.pgd --model …`: PGD-20, final-iterate and any-iterate accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common
from eval.batches import in_batches
from rb_noisy.attacks import pgd
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.forward import attack_doubts, natural_logits
from rb_noisy.geometry import resistance
from rb_noisy.radius import parse_radius

# Both papers' test attack on CIFAR: ε and α in units of [0, 1]. Other models keep their own ε, with α = ε/4 as in both.
STEPS = 20
ACCURACIES = ("final_iterate", "any_iterate")
PRESETS = {"sglr": (8 / 255, 2 / 255), "nl": (0.031, 0.031 / 4)}


def evaluate(
    subject: common.Subject,
    *,
    alpha: float,
    steps: int,
    seed: int,
    batch_size: int,
    out: Path,
    any_iterate: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PGD from one random start: the figures, and per-sample verdicts by name.

    *Final iterate* scores x⁽ⁿ⁾ alone, as papers do; *any iterate* counts a sample as broken if x or any of x⁽⁰⁾ … x⁽ⁿ⁾
    is misclassified, which is lower or equal. With `any_iterate` only that is measured, of the same random starts:
    samples are left alone once they are broken.
    """
    settings = {"seed": seed, "eps": subject.eps, "alpha": alpha, "steps": steps, "any_iterate": any_iterate}
    settings["masked"] = True  # a state of before these were kept is of no use
    ball = {"eps": subject.eps, "alpha": alpha, "steps": steps, "norm": subject.norm}

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        natural = natural_logits(subject.fast, x).argmax(1) == y
        if any_iterate:
            # κ of one more step than the attack takes looks at x⁽ⁿ⁾ too.
            one_more = ball | {"steps": steps + 1, "batch_size": len(x), "seed": batch_seed, "check": False}
            met = resistance(subject.fast, x, y, **one_more)
            found = {"any_iterate": (met.kappa > steps) & natural}
            return {"natural": natural, "masked": met.masked, "spoiled": met.spoiled} | found
        attack = pgd(subject.fast, x, y, seed=batch_seed, evaluate_final=True, check=False, **ball)
        return {
            "natural": natural,
            "masked": attack.masked if steps else torch.zeros_like(natural),
            "spoiled": attack.spoiled,
            "final_iterate": attack.final_correct,
            "any_iterate": ~attack.broken & natural,  # x itself is in the ball too
            "kappa": attack.kappa,
        }

    verdicts = in_batches(subject, f"pgd-{steps}", settings, batch_size, out, compute)
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": f"PGD-{steps}, cross entropy, one random start, eval mode",
        "alpha": alpha,
        "steps": steps,
        **{name: common.rate(verdicts[name]) for name in ("natural", *ACCURACIES) if name in verdicts},
        "masked_gradients": verdicts["masked"].double().mean().item(),
        "warnings": attack_doubts(verdicts["masked"], verdicts["spoiled"]),
    }
    return figures, verdicts


def run(
    subject: common.Subject,
    *,
    seed: int,
    batch_size: int,
    out: Path,
    alpha: float | None = None,
    steps: int = STEPS,
    any_iterate: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate, show, keep the verdicts; the figures by evaluation."""
    step = subject.eps / 4 if alpha is None else alpha
    figures, verdicts = evaluate(
        subject, alpha=step, steps=steps, seed=seed, batch_size=batch_size, out=out, any_iterate=any_iterate
    )
    common.show(heading(subject, figures), table(subject, figures))
    for warning in figures["warnings"]:
        common.print_warning("warning:", warning)
    name = f"pgd-{steps}" + ("-any" if any_iterate else "")
    common.save_verdicts(out, name, subject, **verdicts)
    return {name: figures}


def _alpha(text: str) -> float:
    return parse_radius(text, "--alpha")


def main(
    model: common.ModelOption,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    batch_size: common.BatchOption = 250,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    preset: Annotated[str | None, typer.Option(help="sglr (8/255, 2/255) or nl (0.031, ε/4).")] = None,
    alpha: Annotated[
        float | None, typer.Option(parser=_alpha, metavar="FLOAT", help="Step size, also 2/255. Default: ε/4.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = STEPS,
    seed: common.SeedOption = 0,
    json_file: common.JsonOption = None,
    replace: common.ReplaceOption = False,
    out: common.OutOption = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
    compiled: common.CompileOption = False,
    processes: common.ProcessesOption = None,
    any_iterate: Annotated[
        bool, typer.Option("--any-iterate", help="Only the any-iterate accuracy, which is had sooner.")
    ] = False,
) -> None:
    """PGD-20 on a model's test set."""
    with common.user_errors():
        if preset is not None:
            if preset not in PRESETS:
                raise unknown_name("preset", preset, PRESETS)
            if eps is not None or alpha is not None:
                raise InputError(f"--preset {preset} sets ε and α; give it alone, or --eps and --alpha without it")
            eps, alpha = PRESETS[preset]
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
            passes=steps,
        )
        results = run(
            subject, alpha=alpha, steps=steps, seed=seed, batch_size=batch_size, out=out, any_iterate=any_iterate
        )
        # Only the standard setting may stand in a card as PGD-n.
        keeps = not any_iterate and (alpha is None or abs(alpha - subject.eps / 4) < 1e-12)
        common.enter(subject if keeps else common.without_target(subject), results, json_file, out, replace)


def heading(subject: common.Subject, figures: dict[str, Any]) -> str:
    return f"{figures['attack']}\n{common.setting(subject, figures)}, α = {figures['alpha']:.4g}"


def table(subject: common.Subject, figures: dict[str, Any]) -> Table:
    result = Table()
    result.add_column("accuracy of")
    result.add_column(f"{subject.label} (95% interval)", justify="right")
    for name, text in (
        ("natural", "natural images"),
        ("final_iterate", "final iterate"),
        ("any_iterate", "any iterate"),
    ):
        if name in figures:
            result.add_row(text, common.percent(figures[name]))
    return result


if __name__ == "__main__":
    typer.run(main)
