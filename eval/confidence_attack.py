"""`python -m eval.confidence_attack --model …`: how often a wrong answer can be made to be believed."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common
from eval.batches import in_batches
from eval.calibration import autoattack_verdicts
from eval.confidence_measure import own_verdicts
from rb_noisy.calibrators import SOFTMAX, WIDE, Calibrator, Observed, fit_calibrator
from rb_noisy.confidence import DEFAULT_FEATURES, DEFAULT_STEPS, WITHSTANDS, observe
from rb_noisy.confidence_attack import believed_attack
from rb_noisy.errors import InputError
from rb_noisy.files import write_json
from rb_noisy.subsets import subset

DEFENCES = {
    "isotonic_max_softmax": ("isotonic on max-softmax", "isotonic", ("max_softmax",)),
    "logistic": ("logistic on softmax, margin, entropy", "logistic", SOFTMAX),
    "attack": ("logistic on all that rb_noisy.calibrate takes", "logistic", DEFAULT_FEATURES),
    "attack_2eps": ("the same, and those at 2ε", "logistic", (*DEFAULT_FEATURES, *WIDE)),
}
INNER = {"softmax": (0, 1.0), "joint": (5, 1.0), "joint_2eps": (5, 2.0)}
"""What the attackers raise: the wrong class's probability alone, or also along an attack of so many steps within so
many times ε of the point."""

STEPS, EVERY, TARGETS = 50, 25, 2
SHARES = (0.3, 0.5, 0.7)
FEATURES = tuple(dict.fromkeys(feature for _, _, features in DEFENCES.values() for feature in features))


def seen(subject: common.Subject, x: Tensor, batch_size: int) -> Observed:
    options = {"eps": subject.eps, "norm": subject.norm, "alpha": 2.5 * subject.eps / DEFAULT_STEPS}
    return observe(subject.fast, x, features=FEATURES, steps=DEFAULT_STEPS, batch_size=batch_size, **options)


def fit(subject: common.Subject, robust: Tensor, batch_size: int, rows: Tensor) -> dict[str, Calibrator]:
    found = seen(subject, subject.x[rows], batch_size)
    outcome = robust[rows] & (found.logits.argmax(1) == subject.y[rows])
    return {
        name: fit_calibrator(found, outcome, features=features, method=method, kappa_steps=DEFAULT_STEPS)
        for name, (_, method, features) in DEFENCES.items()
    }


def attack(
    subject: common.Subject, calibrators: dict[str, Calibrator], *, seed: int, batch_size: int, targets: int, out: Path
) -> dict[str, Tensor]:
    """Of every image in `subject` the highest confidence (N,) that each attacker gets for a wrong answer, 0 for none:
    `DEFENCE.ATTACKER`; without an attack `DEFENCE.natural`; and `DEFENCE.stated`, the natural answer's, right or wrong.
    """

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        def confidences(found: Observed) -> tuple[dict[str, Tensor], Tensor]:
            wrong = found.logits.argmax(1) != y.cpu()
            return {name: calibrator(found) for name, calibrator in calibrators.items()}, wrong

        natural = seen(subject, x, batch_size)
        stated, wrong = confidences(natural)
        best = {f"{name}.natural": torch.where(wrong, value, 0.0) for name, value in stated.items()}
        best |= {f"{name}.stated": value for name, value in stated.items()}
        others = natural.logits.scatter(1, y.cpu()[:, None], -torch.inf).topk(targets, dim=1).indices.to(x.device)
        for kind, (inner_steps, factor) in INNER.items():
            for name in calibrators:
                best[f"{name}.{kind}"] = best[f"{name}.natural"].clone()
            for target in others.unbind(1):
                options = {"inner_steps": inner_steps, "inner_eps": factor * subject.eps, "every": EVERY}
                options |= {"eps": subject.eps, "norm": subject.norm, "steps": STEPS, "seed": batch_seed}
                for points in believed_attack(subject.fast, x, target, **options):
                    found, wrong = confidences(seen(subject, points, batch_size))
                    for name, value in found.items():
                        so_far = best[f"{name}.{kind}"]
                        best[f"{name}.{kind}"] = torch.where(wrong, torch.maximum(so_far, value), so_far)
        return best

    settings = {"seed": seed, "targets": targets, "fitted": {n: dataclasses.asdict(c) for n, c in calibrators.items()}}
    return in_batches(subject, "confidence-attack", settings, batch_size, out, compute)


def evaluate(
    subject: common.Subject, robust: Tensor, source: str, *, seed: int, batch_size: int, attacked: int, out: Path
) -> dict[str, Any]:
    """Fit on half of the images, attack `attacked` of the other half: the first of each, of one's own data drawn."""
    half = len(subject.x) // 2
    if not 1 <= attacked <= len(subject.x) - half:
        raise InputError(f"--attacked is {attacked}, but {len(subject.x) - half} images are held out; raise --n")
    fitted = subset(subject.dataset, subject.y, half, seed).index
    others = torch.ones(len(subject.x), dtype=torch.bool).index_fill(0, fitted, False).nonzero()[:, 0]
    held_out = others[subset(subject.dataset, subject.y[others], attacked, seed).index]
    calibrators = fit(subject, robust, batch_size, fitted)
    images = {"x": subject.x[held_out], "y": subject.y[held_out], "index": subject.index[held_out]}
    part = dataclasses.replace(subject, **images, target=None)
    targets = min(TARGETS, len(subject.class_names) - 1)
    found = attack(part, calibrators, seed=seed, batch_size=batch_size, targets=targets, out=out)
    stands = robust[held_out]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, share in product(DEFENCES, SHARES):
        stated = found[f"{name}.stated"]
        least = stated.sort(descending=True).values[max(1, round(share * attacked)) - 1]
        fooled = {kind: found[f"{name}.{kind}"] >= least for kind in ("natural", *INNER)}
        fooled["any"] = torch.stack([fooled[kind] for kind in INNER]).any(0)
        row = {"share": share, "threshold": least.item(), "kept": common.rate(stated >= least)}
        row["robust_accuracy_of_kept"] = common.rate(stands[stated >= least])
        rows.setdefault(name, []).append(row | {"fooled": {k: common.rate(v) for k, v in fooled.items()}})
    return subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": f"{STEPS} steps of 2.5·ε/{STEPS} from a random start towards each of the {targets} likeliest wrong "
        f"classes, looked at every {EVERY} steps",
        "fitted_on": half,
        "attacked": attacked,
        "target_source": source,
        "rows": rows,
    }


def table(figures: dict[str, Any]) -> Table:
    shown = Table()
    shown.add_column("confidence")
    for share in SHARES:
        shown.add_column(f"top {share:.0%}: robust of kept", justify="right")
        shown.add_column("fooled, no attack", justify="right")
        shown.add_column("fooled (95%)", justify="right")
    for name, rows in figures["rows"].items():
        cells = []
        for row in rows:
            kept = f"{row['robust_accuracy_of_kept']['accuracy']:.1%} of {row['kept']['accuracy']:.0%}"
            cells.append(kept)  # ties may keep more
            cells += [f"{row['fooled']['natural']['accuracy']:.1%}", common.percent(row["fooled"]["any"])]
        shown.add_row(DEFENCES[name][0], *cells)
    return shown


def main(
    model: common.ModelOption,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    attacked: Annotated[int, typer.Option(help="Images to attack, of the half that is not fitted on.")] = 100,
    batch_size: common.BatchOption = 50,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    seed: common.SeedOption = 0,
    out: common.OutOption = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
    compiled: common.CompileOption = False,
) -> None:
    """How often an input within ε of a natural one is misclassified and believed, by an attacker who knows how."""
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
        )
        options = {"seed": seed, "batch_size": batch_size, "out": out}
        robust, source = autoattack_verdicts(subject, out), "AutoAttack"
        if robust is None:
            robust, source = own_verdicts(subject, subject.y, "withstands", **options), WITHSTANDS
        figures = evaluate(subject, robust, source, attacked=attacked, **options)
        title = f"Confident wrong answers of {subject.label}: {common.setting(subject, figures)}"
        text = (
            f"{figures['attacked']} held-out images; fooled: a wrong answer within ε is stated with as much confidence "
            f"as the most confident 30, 50, 70% of them have; fitted on {figures['fitted_on']} ({source})"
        )
        common.show(f"{title}\n{text}", table(figures))
        file = subject.folder(out) / "confidence-attack.json"
        if subject.processes.main:
            write_json(file, {"model": subject.label, "confidence-attack": figures})
        common.console.print(f"figures: {file}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
