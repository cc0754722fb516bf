"""`python -m eval.annotators`: label accuracy against the share of the unlabelled data under attack ([NL] Figure 9)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common
from eval.batches import in_batches
from eval.leaderboard import FORMATS, MISSING, latex, latex_line, markdown_line
from model_zoo.registry import eps_label
from rb_noisy import csv_files
from rb_noisy.annotation import Answers, accuracy_by_share, annotate, kept_accuracy
from rb_noisy.attacks import pgd
from rb_noisy.console import errors, print_text
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.figures.annotators import ANNOTATORS, STEPS, shares_figure
from rb_noisy.files import atomic_path, write_json

KAPPA_STEPS = 10
KEPT_AT = (0.0, 0.5, 1.0)
"""Shares under attack for which the accuracy of the labels that are kept is shown."""
SHARES = ",".join(f"{tenth / 10:g}" for tenth in range(11))


def measure(
    annotators: dict[str, list[common.Subject]], together: common.Subject, *, seed: int, batch_size: int, out: Path
) -> dict[str, list[Answers]]:
    """What every annotator says of every test image, natural and under PGD-20 with its own gradients.

    `transfer-right` (only with a standard annotator) is of images attacked with the first standard annotator's
    gradients. κ is that of `annotate`: against the predicted label, PGD-10, no random start.
    """
    eps, norm = together.eps, together.norm

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        transferred = None
        for key, subjects in annotators.items():  # the standard one comes first
            for number, subject in enumerate(subjects):
                name = f"{key}-{number}"
                attack = pgd(subject.model, x, y, eps=eps, alpha=eps / 4, steps=STEPS, norm=norm, seed=batch_seed)
                for kind, images in (("natural", x), ("attacked", attack.x_adv)):
                    notes = annotate(subject.model, images, eps=eps, steps=KAPPA_STEPS, norm=norm, batch_size=len(x))
                    found[f"{name}-{kind}-right"] = notes.label == y.cpu()
                    found[f"{name}-{kind}-kappa"] = notes.kappa
                    found[f"{name}-{kind}-confidence"] = notes.confidence
                if key == "standard" and transferred is None:
                    transferred = attack.x_adv
                if transferred is not None:
                    with torch.no_grad():
                        found[f"{name}-transfer-right"] = subject.model(transferred).argmax(1) == y
        return found

    settings = {"seed": seed, "steps": STEPS, "kappa_steps": KAPPA_STEPS}
    arrays = in_batches(together, "annotators", settings, batch_size, out, compute)
    with contextlib.suppress(OSError):
        together.folder(out).rmdir()  # only the state of an interrupted evaluation was in it
    if together.processes.main:
        with atomic_path(out / "annotators.npz") as temporary:
            np.savez_compressed(temporary, y=together.y.numpy(), **{name: v.numpy() for name, v in arrays.items()})
    return {
        key: [
            {
                name.removeprefix(f"{key}-{i}-"): v.numpy()
                for name, v in arrays.items()
                if name.startswith(f"{key}-{i}-")
            }
            for i in range(len(subjects))
        ]
        for key, subjects in annotators.items()
    }


@dataclass(frozen=True)
class Grid:
    """A table before it is rendered: lines of cells under a title and a header."""

    title: str
    header: list[str]
    lines: list[list[str]]


def grids(figures: dict[str, Any]) -> list[Grid]:
    """The tables: accuracy by share, the same for transferred attacks, and accuracy of the labels that are kept."""
    annotators = figures["annotators"]
    names = [part["name"] for part in annotators.values()]
    counts = [len(part["models"]) for part in annotators.values()]
    names = [name if count == 1 else f"{name}, {count} models" for name, count in zip(names, counts, strict=True)]
    result = []
    for kind, title in (
        ("accuracy", f"Accuracy of the labels (%) by the share of images under PGD-{STEPS}"),
        ("transfer", "The same, attacked with the standard annotator's gradients"),
    ):
        columns = [part[kind] for part in annotators.values()]
        if all(columns):
            lines = [[f"{row[0]['share']:.0%}", *map(_accuracy, row)] for row in zip(*columns, strict=True)]
            result.append(Grid(title, ["attacked", *names], lines))
    for at, share in enumerate(KEPT_AT):
        # Without a random start κ is at least 1.
        columns = [part["kept"][at]["by_kappa"][1:] for part in annotators.values()]
        lines = [[f"κ ≥ {row[0]['kappa_at_least']}", *map(_kept, row)] for row in zip(*columns, strict=True)]
        title = f"{share:.0%} attacked: labels kept (%): their accuracy / that of as many most confident ones"
        result.append(Grid(title, ["kept", *names], lines))
    return result


def setting(figures: dict[str, Any]) -> str:
    """The line that stands with the tables."""
    return (
        f"{figures['dataset']} test set, {figures['n']} of {figures['of']} images, {figures['norm']} "
        f"ε = {eps_label(figures['eps'])}, seed {figures['seed']}; mean ± standard deviation of {figures['draws']} "
        "random subsets (95% interval); confidence is max-softmax"
    )


def _accuracy(line: dict[str, Any]) -> str:
    deviation = "" if line["sd_over_draws"] is None else f" ± {100 * line['sd_over_draws']:.2f}"
    low, high = line["interval"]
    return f"{100 * line['accuracy']:.2f}{deviation} ({100 * low:.1f}–{100 * high:.1f})"


def _kept(line: dict[str, Any]) -> str:
    rates = [line["by_kappa"]["accuracy"], line["by_confidence"]["accuracy"]]
    right = " / ".join(MISSING if rate is None else f"{100 * rate:.2f}" for rate in rates)
    return f"{100 * line['kept']:.1f}: {right}"


def to_terminal(grid: Grid) -> Table:
    table = Table()
    for column in grid.header:
        table.add_column(column, justify="right")
    for line in grid.lines:
        table.add_row(*line)
    return table


def to_markdown(tables: list[Grid], note: str) -> str:
    """One heading and one table per grid."""
    lines = [note, ""]
    for grid in tables:
        lines += [f"### {grid.title}", "", markdown_line(grid.header), markdown_line(["---:"] * len(grid.header))]
        lines += [*map(markdown_line, grid.lines), ""]
    return "\n".join(lines)


def to_latex(tables: list[Grid], note: str) -> str:
    r"""One booktabs `tabular`; needs `\usepackage{booktabs}`."""
    width = len(tables[0].header)
    lines = [f"% {note}", rf"\begin{{tabular}}{{{'r' * width}}}"]
    for grid in tables:
        title = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex(grid.title)}}}}} \\"
        lines += [r"\toprule", title, r"\midrule", latex_line(grid.header), r"\midrule", *map(latex_line, grid.lines)]
    text = "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
    for sign, command in (("κ", r"$\kappa$"), ("≥", r"$\geq$")):
        text = text.replace(sign, command)
    return text


def write_csv(figures: dict[str, Any], out: Path) -> None:
    """annotators.csv and annotators-kept.csv: the figures of the tables, shares of 1, a line each."""
    shares, kept = [], []
    for key, part in figures["annotators"].items():
        for attack, lines in (("own", part["accuracy"]), ("transfer", part["transfer"])):
            for line in lines or ():
                about = {"annotator": key, "models": len(part["models"]), "attack": attack, "share": line["share"]}
                shares.append(about | _flat("", line) | {"sd_over_draws": line["sd_over_draws"]})
        for pool in part["kept"]:
            for line in pool["by_kappa"]:
                about = {"annotator": key, "models": len(part["models"]), "share": pool["share"]}
                plain = {name: line[name] for name in ("kappa_at_least", "confidence_at_least", "kept")}
                by = _flat("by_kappa_", line["by_kappa"]) | _flat("by_confidence_", line["by_confidence"])
                kept.append(about | plain | by)
    for name, lines in (("annotators.csv", shares), ("annotators-kept.csv", kept)):
        csv_files.write_csv(out / name, list(lines[0]), ([line[column] for column in lines[0]] for line in lines))


def _flat(prefix: str, line: dict[str, Any]) -> dict[str, Any]:
    low, high = line["interval"] or (None, None)
    return {f"{prefix}accuracy": line["accuracy"], f"{prefix}low": low, f"{prefix}high": high}


def plot(figures: dict[str, Any], out: Path) -> None:
    """annotators.png ([NL] Figure 9, with its zoom without the standard annotator) and annotators-kept.png."""
    from matplotlib.figure import Figure

    annotators = figures["annotators"]
    heading = (
        f"{figures['dataset']} test set, {figures['n']} images, {figures['norm']} ε = {eps_label(figures['eps'])}, "
        f"PGD-{STEPS} with each annotator's own gradients"
    )
    lines = {key: part["accuracy"] for key, part in annotators.items()}
    _save(shares_figure(lines, heading), out / "annotators.png")

    figure = Figure(figsize=(5 * len(KEPT_AT), 5), dpi=150, layout="constrained")
    title = "Accuracy of the labels that are kept: the most confident ones (line), or those with κ ≥ k (markers)"
    figure.suptitle(f"{title}\n{heading}", fontsize=11, parse_math=False)
    axes = figure.subplots(1, len(KEPT_AT), squeeze=False, sharey=True)[0]
    for at, axis in enumerate(axes):
        for key, part in annotators.items():
            name, colour, line, marker = ANNOTATORS[key]
            pool = part["kept"][at]
            most, least = pool["by_confidence"], [p for p in pool["by_kappa"] if p["kept"] > 0]
            kept, right = [p["kept"] for p in most], [100 * p["accuracy"] for p in most]
            look = {"color": colour, "marker": marker, "markersize": 6, "fillstyle": "none"}
            axis.plot(kept, right, linestyle=line, linewidth=1.3, markevery=[], label=name, **look)
            kept, right = [p["kept"] for p in least], [100 * p["by_kappa"]["accuracy"] for p in least]
            axis.plot(kept, right, linestyle="", **look)
        axis.set(xlabel="share of the labels kept", title=f"{KEPT_AT[at]:.0%} of the images attacked")
    axes[0].set(ylabel="accuracy of the kept labels (%)", ylim=(-3, 103))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, out / "annotators-kept.png")


def _save(figure: Any, file: Path) -> None:
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png")


def _parse_shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"--shares is {text!r}; give numbers from 0 to 1 with commas between them, e.g. 0,0.5,1")
    return shares


def _together(annotators: dict[str, list[common.Subject]]) -> common.Subject:
    """One subject for what all share, whose hash stands for all the weights."""
    subjects = [subject for group in annotators.values() for subject in group]
    first = subjects[0]
    for other in subjects[1:]:
        ours, theirs = ((s.dataset, s.norm, s.eps) for s in (first, other))
        if ours != theirs:
            raise InputError(f"{first.label} has {ours} but {other.label} has {theirs}; give --dataset and --eps")
    roles = [f"{key} {subject.weights_sha256}" for key, group in annotators.items() for subject in group]
    digest = hashlib.sha256("\n".join(roles).encode()).hexdigest()
    return dataclasses.replace(first, label="annotators", weights_sha256=digest)


def collect(
    annotators: dict[str, list[common.Subject]],
    answers: dict[str, list[Answers]],
    together: common.Subject,
    *,
    shares: list[float],
    draws: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """All figures, with what every published figure carries."""
    n = len(together.x)
    orders = [np.random.default_rng((seed, draw)).permutation(n) for draw in range(draws)]
    figures = together.describe(seed=seed, batch_size=batch_size) | {
        "attack": f"PGD-{STEPS}, cross entropy, one random start, final iterate, each annotator's own gradients",
        "alpha": together.eps / 4,
        "steps": STEPS,
        "kappa": f"PGD-{KAPPA_STEPS}, predicted label, no random start, α = 2.5·ε/n",
        "confidence": "max-softmax, not calibrated",
        "draws": draws,
        "annotators": {},
    }
    for key, subjects in annotators.items():
        models = []
        for subject, found in zip(subjects, answers[key], strict=True):
            rates = {kind: common.rate(torch.from_numpy(found[f"{kind}-right"])) for kind in ("natural", "attacked")}
            about = {name: subject.card.get(name) for name in ("method", "noise", "architecture", "checkpoint")}
            models.append({"label": subject.label, "weights_sha256": subject.weights_sha256, **about, **rates})
        transferred = "transfer-right" in answers[key][0]
        figures["annotators"][key] = {
            "name": ANNOTATORS[key][0],
            "models": models,
            "accuracy": accuracy_by_share(answers[key], shares, orders),
            "transfer": accuracy_by_share(answers[key], shares, orders, "transfer") if transferred else None,
            "kept": [kept_accuracy(answers[key], share, orders, KAPPA_STEPS) for share in KEPT_AT],
        }
    return figures


Models = Annotated[list[str] | None, typer.Option(help="A zoo model or a run folder; repeat it for several seeds.")]


def main(
    standard: Models = None,
    oracle: Models = None,
    noisy: Models = None,
    robust: Models = None,
    shares: Annotated[str, typer.Option(help="Shares of the test images under attack.")] = SHARES,
    seeds: Annotated[int, typer.Option(help="Random subsets drawn for each share.")] = 5,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    batch_size: common.BatchOption = 250,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    seed: common.SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Where tables, figures and plots go.")] = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
    format: Annotated[str, typer.Option(help=f"What is printed: one of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Label accuracy of up to four annotators as more and more of the unlabelled images are under attack."""
    with common.user_errors():
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        if seeds < 1:
            raise InputError(f"--seeds is {seeds}; give at least 1")
        chosen = _parse_shares(shares)
        named = {"standard": standard, "oracle": oracle, "noisy": noisy, "robust": robust}
        if not any(named.values()):
            raise InputError("no annotator is given; name at least one of --standard, --oracle, --noisy, --robust")
        options = {"zoo": zoo, "dataset": dataset, "n": n, "device": device, "eps": eps, "data_root": data_root}
        options |= {"checkpoint": checkpoint, "seed": seed, "batch_size": batch_size}
        annotators: dict[str, list[common.Subject]] = {}
        images: Tensor | None = None
        for key, models in named.items():
            for model in models or ():
                subject = common.load_subject(model, **options)
                # One copy of the images for all.
                images = subject.x if images is None or images.shape != subject.x.shape else images
                annotators.setdefault(key, []).append(dataclasses.replace(subject, x=images))
        together = _together(annotators)
        answers = measure(annotators, together, seed=seed, batch_size=batch_size, out=out)
        if not together.processes.main:
            return
        figures = collect(annotators, answers, together, shares=chosen, draws=seeds, seed=seed, batch_size=batch_size)
        write_json(out / "annotators.json", figures)
        write_csv(figures, out)
        plot(figures, out)
        tables = grids(figures)
        note = setting(figures)
        texts = {"markdown": to_markdown(tables, note), "latex": to_latex(tables, note)}
        for name, suffix in (("markdown", "md"), ("latex", "tex")):
            with atomic_path(out / f"annotators.{suffix}") as temporary:
                temporary.write_text(texts[name] + "\n", encoding="utf-8")
        if format == "terminal":
            common.console.print(note, soft_wrap=True)
            for grid in tables:
                common.show(grid.title, to_terminal(grid))
        else:
            print_text(texts[format] + "\n")
        errors.print(f"tables, figures and plots: {out}/annotators*", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
