"""`python -m eval.calibration --model …`: what κ tells about a prediction, beside softmax and temperature scaling.

With `--target right` or `--target robust`: the confidence of single predictions, a study of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common, confidence_right, confidence_robust
from eval.batches import in_batches
from eval.confidence_splits import SPLITS
from rb_noisy.attacks import pgd
from rb_noisy.calibration import calibration_report, plot_calibration
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import write_json
from rb_noisy.geometry import kappa
from rb_noisy.subsets import images_of, in_words

MNIST_STEPS, MNIST_ALPHA = 40, 0.01  # [NL App. D.2]
PASSES = 60  # gradients for an image, about: κ on natural and attacked images, and the attack
KINDS = (("natural", "natural"), ("pgd-20", "PGD-20"))
SCORES = {"kappa": "κ", "max_softmax": "max-softmax", "margin": "margin"}
CALIBRATIONS = {
    "uncalibrated": "as it is",
    "temperature": "temperature scaling",
    "isotonic_kappa": "isotonic on κ",
    "isotonic_max_softmax": "isotonic on max-softmax",
}


def evaluate(
    subject: common.Subject,
    *,
    kappa_steps: int,
    alpha: float,
    seed: int,
    batch_size: int,
    out: Path,
    robust: Tensor | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The κ-calibration report.

    κ is taken against the predicted label, without a random start, with α = 2.5·ε/n [NL App. D.3] (on MNIST by default
    with [NL]'s own n = 40, α = 0.01), on natural inputs and on the final iterates of PGD-20.

    Returns:
        The figures with all that a published figure carries, and per-sample logits and κ.
    """
    settings = {"seed": seed, "eps": subject.eps, "kappa_steps": kappa_steps, "alpha": alpha}
    measure = {"eps": subject.eps, "alpha": alpha, "steps": kappa_steps, "norm": subject.norm, "random_start": False}

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        attack = pgd(
            subject.fast, x, y, eps=subject.eps, alpha=subject.eps / 4, steps=20, norm=subject.norm, seed=batch_seed
        )
        with torch.no_grad():
            natural, adversarial = subject.fast(x), subject.fast(attack.x_adv)
        return {
            "natural_logits": natural,
            "adversarial_logits": adversarial,
            "natural_kappa": kappa(subject.fast, x, batch_size=batch_size, **measure),
            "adversarial_kappa": kappa(subject.fast, attack.x_adv, batch_size=batch_size, **measure),
        }

    arrays = in_batches(subject, "calibration", settings, batch_size, out, compute)
    report = calibration_report(y=subject.y, steps=kappa_steps, seed=seed, robust=robust, **arrays)
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": f"κ from PGD-{kappa_steps}, predicted label, no random start; PGD-20 inputs with α = ε/4",
        "alpha": alpha,
        "steps": kappa_steps,
        "report": report,
    }
    return figures, arrays


def run(
    subject: common.Subject, *, seed: int, batch_size: int, out: Path, kappa_steps: int | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate, show, draw, keep the per-sample values; the figures by evaluation."""
    steps = kappa_steps
    if steps is None:
        steps = MNIST_STEPS if subject.dataset == "mnist" else 10
    if steps < 1:
        raise InputError(f"--kappa-steps is {steps}; give at least 1")
    alpha = MNIST_ALPHA if (subject.dataset, steps) == ("mnist", MNIST_STEPS) else 2.5 * subject.eps / steps
    robust = autoattack_verdicts(subject, out)
    figures, arrays = evaluate(
        subject, kappa_steps=steps, alpha=alpha, seed=seed, batch_size=batch_size, out=out, robust=robust
    )
    show(subject, figures)
    plot = subject.folder(out) / "calibration.png"
    if subject.processes.main:
        plot_calibration(figures["report"], plot, f"{subject.label}\n{common.setting(subject, figures)}")
    common.console.print(f"plot: {plot}", soft_wrap=True)
    common.save_verdicts(out, "calibration", subject, **arrays)
    return {"calibration": figures}


def main(
    model: common.ModelOption,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    batch_size: common.BatchOption = 250,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    kappa_steps: Annotated[int | None, typer.Option(help="n of κ. Default: 10, and 40 on mnist, as in [NL].")] = None,
    seed: common.SeedOption = 0,
    json_file: common.JsonOption = None,
    replace: common.ReplaceOption = False,
    out: common.OutOption = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
    compiled: common.CompileOption = False,
    processes: common.ProcessesOption = None,
    target: Annotated[
        str | None,
        typer.Option(help="Study single predictions: how likely each is right, or is robust (right and stays so)."),
    ] = None,
    splits: Annotated[
        int | None,
        typer.Option(help=f"With --target: random halves to fit on; the other half tests. Default: {SPLITS}."),
    ] = None,
    clever: Annotated[bool, typer.Option("--clever", help="With --target robust: CLEVER too, by ART. Slow.")] = False,
    label_noise: Annotated[
        float | None,
        typer.Option(help="With --target robust: also what is left where this share of the fitted labels is wrong."),
    ] = None,
) -> None:
    """κ-calibration report: how far κ, softmax and margin can be trusted, on natural and attacked inputs.

    With --target: a calibrated probability for every single prediction, by softmax, by κ and by both.
    """
    with common.user_errors():
        if target not in (None, "right", "robust"):
            raise unknown_name("--target", target, ("right", "robust"))
        for option, given in (("--clever", clever), ("--label-noise", label_noise is not None)):
            if given and target != "robust":
                raise InputError(f"{option} is a part of --target robust; give both")
        if splits is not None and target is None:
            raise InputError(f"--splits {splits} is a part of --target; give --target right or --target robust too")
        if kappa_steps is not None and target is not None:
            raise InputError(f"--kappa-steps {kappa_steps} is for the report; --target compares several of its own")
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
            passes=PASSES if target is None else 0,
        )
        options = {"seed": seed, "batch_size": batch_size, "out": out}
        splits = SPLITS if splits is None else splits
        if target == "right":
            figures = confidence_right.run(subject, splits=splits, **options)
            if json_file is not None and subject.processes.main:
                write_json(json_file, {"model": subject.label, "confidence-right": figures})
            return
        if target == "robust":
            verdicts = autoattack_verdicts(subject, out)
            options |= {"splits": splits, "with_clever": clever, "label_noise": label_noise}
            results = confidence_robust.run(subject, verdicts, **options)
        else:
            results = run(subject, kappa_steps=kappa_steps, **options)
        common.enter(subject, results, json_file, out, replace)


def autoattack_verdicts(subject: common.Subject, out: Path) -> Tensor | None:
    """Which samples AutoAttack left standing (n,), if it has been run on these weights, images and ε: by the verdicts
    that it keeps, else by those in the card."""
    saved = common.saved_verdicts(out, "autoattack", subject)
    if saved is not None and np.isclose(float(saved["eps"]), subject.eps):
        return torch.from_numpy(saved["robust"])
    figures = common.entered(subject).get("autoattack", {})
    if "verdicts" not in figures or figures["weights_sha256"] != subject.weights_sha256:
        return None
    verdicts = common.unpacked(figures["verdicts"], figures["n"])
    if images_of(figures) == subject.images:
        return verdicts
    firsts = images_of(figures) == in_words(figures["n"], figures["of"])
    return verdicts[subject.index] if firsts and int(subject.index.max()) < len(verdicts) else None


def show(subject: common.Subject, figures: dict[str, Any]) -> None:
    """Print the report, a table for each question."""
    report = figures["report"]
    heading = common.setting(subject, figures)
    quality = Table()
    quality.add_column("inputs")
    for column in ("accuracy", "ECE", "adaptive ECE", "NLL", "Brier"):
        quality.add_column(column, justify="right")
    for key, text in KINDS:
        part = report[key]
        numbers = (f"{part[m]:.3f}" for m in ("ece", "adaptive_ece", "nll", "brier"))
        quality.add_row(text, common.percent(part), *numbers)
    common.show(f"Calibration of {subject.label}\n{heading}", quality)

    ranking = Table()
    ranking.add_column("inputs")
    for text in SCORES.values():
        ranking.add_column(text, justify="right")
    for key, text in KINDS:
        scores = report[key]["scores"]
        ranking.add_row(text, *(f"{_show(scores[s]['auroc'])} / {_show(scores[s]['aurc'])}" for s in SCORES))
    common.show("Right from wrong predictions: AUROC (high is good) / AURC (low is good)", ranking)

    after = Table()
    after.add_column("inputs")
    for text in CALIBRATIONS.values():
        after.add_column(text, justify="right")
    for key, text in KINDS:
        errors = [report[key]["calibrated"][name]["ece"] for name in CALIBRATIONS]
        after.add_row(text, *(f"{_show(error['mean'])} ± {_show(error['std'])}" for error in errors))
    common.show("ECE after calibrating on half the images, tested on the other (mean ± sd of 20 splits)", after)

    by_kappa = Table()
    by_kappa.add_column("κ", justify="right")
    for _, text in KINDS:
        by_kappa.add_column(f"{text}: images", justify="right")
        by_kappa.add_column("right", justify="right")
        by_kappa.add_column(f"in {report['subsets']} subsets", justify="right")
    for value in range(report["steps"] + 1):
        row = []
        for key, _ in KINDS:
            part = report[key]["by_kappa"]
            mean, deviation = part["subset_accuracy_mean"][value], part["subset_accuracy_std"][value]
            row += [str(part["count"][value]), _show(part["accuracy"][value]), f"{_show(mean)} ± {_show(deviation)}"]
        by_kappa.add_row(str(value), *row)
    common.show(f"Accuracy by κ (subsets of {report['subset_size']} images: mean ± sd)", by_kappa)

    stays = report["natural"]["robust"]
    if stays is None:
        common.console.print("run eval.autoattack first to see how well κ tells what is right and stays right within ε")
        return
    lasting = Table()
    for column in ("score", "AUROC", "AURC", "Brier of isotonic on it"):
        lasting.add_column(column, justify="right")
    for name, text in SCORES.items():
        fitted = stays.get(f"isotonic_{name}")
        brier = _show(fitted["brier"]["mean"]) if fitted else "–"
        lasting.add_row(text, _show(stays["scores"][name]["auroc"]), _show(stays["scores"][name]["aurc"]), brier)
    share = common.percent({"accuracy": stays["share"], "interval": stays["interval"]})
    common.show(f"Right and still right after AutoAttack: {share} of the images", lasting)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    typer.run(main)
