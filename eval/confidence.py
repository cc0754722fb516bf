"""`python -m eval.confidence --model …`: can a single prediction's confidence be calibrated, and where does κ help."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from eval import common
from eval.batches import in_batches
from eval.calibration import autoattack_verdicts
from rb_noisy import measures
from rb_noisy.attacks import pgd
from rb_noisy.calibration import BLUE, GREEN, GREY, ORANGE, VERMILLION, fit_temperature
from rb_noisy.confidence import fit_calibrator
from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path, write_json
from rb_noisy.geometry import kappa

INPUTS = {
    "natural": "natural",
    "pgd-20": "PGD-20",
    "margin": "targeted margin",
    "pgd-20-half": "PGD-20, 0.5ε",
    "pgd-20-more": "PGD-20, 1.5ε",
}
FITTED_ON = {"same": "the same kind of input", "natural": "natural inputs", "mixed": "natural and PGD-20 inputs"}
SOFTMAX = ("max_softmax", "margin", "entropy")
# Text, method and features of what `fit_calibrator` fits.
CALIBRATORS = {
    "isotonic_max_softmax": ("isotonic on max-softmax", "isotonic", ("max_softmax",)),
    "isotonic_kappa": ("isotonic on κ", "isotonic", ("kappa",)),
    "beta_max_softmax": ("beta on max-softmax", "beta", ("max_softmax",)),
    "beta_kappa": ("beta on κ", "beta", ("kappa",)),
    "logistic": ("logistic on softmax, margin, entropy", "logistic", SOFTMAX),
    "logistic_kappa": ("the same and κ", "logistic", (*SOFTMAX, "kappa")),
}
PLAIN = {"isotonic_kappa": "isotonic_max_softmax", "beta_kappa": "beta_max_softmax", "logistic_kappa": "logistic"}
TEXTS = {"uncalibrated": "softmax as it is", "temperature": "temperature scaling"}
TEXTS |= {name: text for name, (text, _, _) in CALIBRATORS.items()}
METRICS = {"ece": "ECE", "adaptive_ece": "adaptive ECE", "brier": "Brier", "nll": "NLL"}
METRICS |= {"auroc": "AUROC", "aurc": "AURC"}
# The ECE of a perfectly calibrated confidence is not 0 on a few hundred samples; one of few values has less of it.
CHANCE = {"ece_by_chance": "ECE by chance"}
STEPS, FACTORS = (5, 10, 20), (0.5, 1.0, 2.0)
MAIN = "10×1"
# Settings of κ by name; all of them are only taken where `GRID` compares them.
KAPPAS = {f"{steps}×{factor:g}": (steps, factor) for steps in STEPS for factor in FACTORS}
GRID = [f"{name}@{at}" for at in KAPPAS for name in ("isotonic_kappa", "logistic_kappa") if at != MAIN]
LEAST_IMAGES, LEAST_SPLITS = 20, 2
# What the tables show whole: target and kind of input.
RESULTS = (("right", "natural"), ("right", "pgd-20"), ("robust", "natural"))
Case = tuple[str, str, str]  # target, kind of input, what the calibrators were fitted on
Tensors = dict[str, Tensor]


def targeted_margin(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """z_t − z_y, t the likeliest wrong class of the natural image, for `pgd` to raise."""
    target = natural.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    return (logits.gather(1, target) - logits.gather(1, y[:, None])).sum()


def measure(subject: common.Subject, *, seed: int, batch_size: int, out: Path) -> Tensors:
    """All that needs the model, per sample, from the file of an earlier run where there is one.

    For every kind of input its logits and κ, `KIND.logits` (N, K) and `KIND.kappa@STEPS×FACTOR` (N,); and `stands`
    (N,) bool: right, and not turned by any iterate of PGD-20 and of the targeted margin attack.
    """
    file = subject.folder(out) / "confidence.npz"
    key = torch.tensor([1, seed, subject.eps, batch_size], dtype=torch.float64)
    if file.is_file():
        with np.load(file, allow_pickle=False) as saved:
            if (
                str(saved["weights_sha256"]) == subject.weights_sha256
                and np.array_equal(saved["y"], subject.y.numpy())
                and np.array_equal(saved["key"], key.numpy())
            ):
                return {name: torch.from_numpy(saved[name]) for name in saved.files if "." in name or name == "stands"}

    def attack(x: Tensor, y: Tensor, factor: float, **options: Any) -> Any:
        eps = factor * subject.eps
        return pgd(
            subject.fast, x, y, eps=eps, alpha=eps / 4, steps=20, norm=subject.norm, evaluate_final=True, **options
        )

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> Tensors:
        full = attack(x, y, 1.0, seed=batch_seed)
        margin = attack(x, y, 1.0, seed=batch_seed, loss=targeted_margin)
        given = {
            "natural": x,
            "pgd-20": full.x_adv,
            "margin": margin.x_adv,
            "pgd-20-half": attack(x, y, 0.5, seed=batch_seed).x_adv,
            "pgd-20-more": attack(x, y, 1.5, seed=batch_seed).x_adv,
        }
        found = {}
        for kind, images in given.items():
            with torch.no_grad():
                found[f"{kind}.logits"] = subject.fast(images)
            for name in KAPPAS if kind in ("natural", "pgd-20") else [MAIN]:
                steps, factor = KAPPAS[name]
                eps = factor * subject.eps
                ball = {"eps": eps, "alpha": 2.5 * eps / steps, "steps": steps, "norm": subject.norm}
                values = kappa(subject.fast, images, random_start=False, batch_size=batch_size, **ball)
                found[f"{kind}.kappa@{name}"] = values
        right = found["natural.logits"].argmax(1) == y
        return found | {"stands": right & ~full.broken & ~margin.broken}

    arrays = in_batches(subject, "confidence", {"seed": seed, "kappas": KAPPAS}, batch_size, out, compute)
    common.save_verdicts(out, "confidence", subject, key=key, **arrays)
    return arrays


def study(y: Tensor, arrays: Tensors, robust: Tensor, *, splits: int, seed: int) -> dict[str, Any]:
    """Fit every calibrator on half the images and test it on the other half, `splits` times.

    `arrays` as `measure` returns them, `robust` (N,) bool. Returns {target: {kind: {fitted on: {calibrator: row}}}},
    a row being {metric: {mean, interval, difference, difference_interval}} with the difference from temperature
    scaling in the same split, and "reliability" of the confidences of all splits; a calibrator with κ has
    `kappa_adds` and `kappa_adds_interval` too, the difference from the same without κ. None: no split had both
    outcomes to fit on.
    """
    generator = np.random.default_rng(seed)
    halves = [np.split(generator.permutation(len(y)), [len(y) // 2]) for _ in range(splits)]
    right = {kind: arrays[f"{kind}.logits"].argmax(1) == y for kind in INPUTS}
    cases: list[Case] = [("right", kind, on) for kind in INPUTS for on in FITTED_ON if (kind, on) != ("natural",) * 2]
    values: dict[Case, dict[str, list]] = {case: {} for case in [*cases, ("robust", "natural", "same")]}
    for fit, test in halves:
        fits: dict[tuple, Any] = {}
        for (target, kind, on), rows in values.items():
            sources = {"same": (kind,), "natural": ("natural",), "mixed": ("natural", "pgd-20")}[on]
            outcomes = right if target == "right" else {"natural": right["natural"] & robust}
            for name in [*TEXTS, *(GRID if on == "same" and kind in ("natural", "pgd-20") else [])]:
                key = (target, sources, name)
                if key not in fits:
                    fits[key] = _fit(name, y, arrays, outcomes, sources, fit)
                confidence = fits[key](kind, test) if fits[key] else None
                rows.setdefault(name, []).append((confidence, outcomes[kind][test]))
    result: dict[str, Any] = {"right": {}, "robust": {}}
    for (target, kind, on), rows in values.items():
        result[target].setdefault(kind, {})[on] = _summaries(rows)
    return result


def _fit(
    name: str, y: Tensor, arrays: Tensors, outcomes: Tensors, sources: tuple[str, ...], fit: np.ndarray
) -> Callable[[str, np.ndarray], Tensor] | None:
    """(kind of input, samples) → confidence, fitted on the `fit` samples of the sources; None if one outcome lacks."""

    def joined(what: Tensors, form: str) -> Tensor:
        return torch.cat([what[form.format(kind)][fit] for kind in sources])

    logits, outcome = joined(arrays, "{}.logits"), joined(outcomes, "{}")
    if name in ("uncalibrated", "temperature"):
        t = 1.0 if name == "uncalibrated" else fit_temperature(logits, torch.cat([y[fit]] * len(sources)))
        return lambda kind, test: (arrays[f"{kind}.logits"][test].double() / t).softmax(1).amax(1)
    if len(outcome.unique()) < 2:
        return None
    name, _, setting = name.partition("@")
    column, steps = f"kappa@{setting or MAIN}", KAPPAS[setting or MAIN][0]
    _, method, features = CALIBRATORS[name]
    calibrator = fit_calibrator(
        logits, joined(arrays, "{}." + column), outcome, features=features, method=method, kappa_steps=steps
    )
    return lambda kind, test: calibrator(arrays[f"{kind}.logits"][test], arrays[f"{kind}.{column}"][test])


def _summaries(rows: dict[str, list]) -> dict[str, Any]:
    """The rows of `study` from the confidences and outcomes of each split."""
    scores = {
        name: np.array([_metrics(*pair, seed) for seed, pair in enumerate(tested)]) for name, tested in rows.items()
    }
    summaries: dict[str, Any] = {}
    for name, tested in rows.items():
        without = PLAIN.get(name.partition("@")[0])
        known = [pair for pair in tested if pair[0] is not None]
        row: dict[str, Any] = {}
        for number, metric in enumerate(METRICS | CHANCE):
            row[metric] = _interval(scores[name][:, number], "mean", "interval")
            pairs = {"difference": "temperature"} | ({"kappa_adds": without} if without else {})
            for what, other in pairs.items():
                difference = scores[name][:, number] - scores[other][:, number]
                row[metric] |= _interval(difference, what, f"{what}_interval")
        row["splits"] = len(known)
        diagram = measures.reliability(*map(torch.cat, zip(*known, strict=True))) if known else None
        # None for the mean of an empty bin: JSON has no nan.
        row["reliability"] = diagram and {
            k: [None if v != v else v for v in t.tolist()] for k, t in vars(diagram).items()
        }
        summaries[name] = row
    return summaries


def _metrics(confidence: Tensor | None, outcome: Tensor, seed: int) -> list[float]:
    """In the order of `METRICS` and `CHANCE`; Brier and NLL are those of two classes, the outcome and its opposite."""
    if confidence is None:
        return [math.nan] * len(METRICS | CHANCE)
    drawn = torch.bernoulli(confidence, generator=torch.Generator().manual_seed(seed))
    hit, held = outcome.double(), confidence.clamp(1e-12, 1 - 1e-12)
    return [
        measures.expected_calibration_error(confidence, outcome),
        measures.adaptive_ece(confidence, outcome),
        (confidence - hit).square().mean().item(),
        torch.nn.functional.binary_cross_entropy(held, hit).item(),
        measures.auroc(confidence, outcome),
        measures.aurc(confidence, outcome),
        measures.expected_calibration_error(confidence, drawn),
    ]


def _interval(values: np.ndarray, mean_name: str, interval_name: str) -> dict[str, Any]:
    """Mean and 95% interval over random half splits, None for what the numbers do not give.

    The splits share their images, so the spread of the mean is not sd/√splits: its variance is taken as
    (1/splits + n_test/n_fit)·sd² (Nadeau & Bengio 2003), n_test = n_fit here, with Student's t.
    """
    from scipy.stats import t

    known = values[~np.isnan(values)]
    if len(known) < LEAST_SPLITS:
        return {mean_name: None, interval_name: None}
    mean = float(known.mean())
    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) * math.sqrt(1 / len(known) + 1))
    return {mean_name: mean, interval_name: [mean - half, mean + half]}


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The study as (title, header, rows) of text, for the terminal and for Markdown."""
    result = figures["study"]
    body = [[INPUTS[kind], common.percent(rate)] for kind, rate in figures["inputs"].items()]
    body.append([f"natural, and still after {figures['robust_source']}", common.percent(figures["robust"])])
    shown = [("what is right", ["inputs", "right (95% interval)"], body)]
    stays = f"right, and right still within ε ({figures['robust_source']})"
    for target, kind in RESULTS:
        rows = result[target][kind]["same"]
        what = "right" if target == "right" else stays
        title = f"{what}: {INPUTS[kind]} inputs, fitted on {FITTED_ON['same']}"
        for figure, names, text, columns in (
            ("mean", TEXTS, "", METRICS | CHANCE),
            ("difference", CALIBRATORS, "less temperature scaling, ", METRICS),
            ("kappa_adds", PLAIN, "with κ less without κ, ", METRICS),
        ):
            body = [[TEXTS[name], *(_cell(rows[name][m], figure) for m in columns)] for name in names]
            shown.append((text + title, ["confidence", *columns.values()], body))
    for metric in ("ece", "aurc"):
        body = []
        for name, text in TEXTS.items():
            for on, source in FITTED_ON.items():
                # On natural inputs, natural inputs are the same kind.
                cells = [kinds.get(on, kinds["same"])[name][metric]["mean"] for kinds in result["right"].values()]
                body.append([text, source, *map(_number, cells)])
        header = ["confidence", "fitted on", *INPUTS.values()]
        shown.append((f"right: {METRICS[metric]} by the kind of input tested on", header, body))
    parts = [(t, k, m) for t, k in RESULTS for m in ("ece", "brier", "aurc")]
    header = ["κ", *(f"{target}, {INPUTS[kind]}: {METRICS[m]}" for target, kind, m in parts)]
    body = []
    for at, (steps, factor) in KAPPAS.items():
        for name, text in (("isotonic_kappa", "isotonic on κ"), ("logistic_kappa", "logistic with κ")):
            row = name if at == MAIN else f"{name}@{at}"
            numbers = [_number(result[target][kind]["same"][row][m]["mean"]) for target, kind, m in parts]
            body.append([f"{text}, {steps} steps, {factor:g}ε", *numbers])
    shown.append(("κ by its steps and its ball, fitted on the same kind of input", header, body))
    return shown


def _cell(figure: dict[str, Any], name: str) -> str:
    """Mean and half the width of its interval; differences with their sign."""
    interval, sign = (figure["interval"], "") if name == "mean" else (figure[f"{name}_interval"], "+")
    width = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.3f}"
    return _number(figure[name], sign) + width


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def markdown(heading: str, shown: list[tuple[str, list[str], list[list[str]]]]) -> str:
    blocks = [f"# {heading}"]
    for title, header, body in shown:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        blocks.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks) + "\n"


CURVES = {"uncalibrated": (VERMILLION, "o"), "temperature": (BLUE, "s")}
CURVES |= {"isotonic_kappa": (GREEN, "^"), "logistic_kappa": (ORANGE, "D")}


def plot(figures: dict[str, Any], path: Path, title: str) -> None:
    """Reliability before and after: on natural and PGD-20 inputs, by what the calibrators were fitted on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.6), dpi=130, layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize=13)
    panels = [("right", "natural", "same"), ("right", "natural", "mixed"), ("robust", "natural", "same")]
    panels += [("right", "pgd-20", on) for on in ("same", "mixed", "natural")]
    for axis, (target, kind, on) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        rows = figures["study"][target][kind][on]
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for name, (colour, marker) in CURVES.items():
            bins, error = rows[name]["reliability"], rows[name]["ece"]["mean"]
            if bins is None:
                continue
            filled = [i for i, count in enumerate(bins["count"]) if count]
            confidence, share = ([bins[k][i] for i in filled] for k in ("confidence", "accuracy"))
            # The area of a marker says how many samples stand behind it.
            area = [8 + 150 * bins["count"][i] / sum(bins["count"]) for i in filled]
            axis.plot(confidence, share, color=colour, linewidth=1.2, alpha=0.7)
            label = f"{TEXTS[name] if name != 'logistic_kappa' else 'logistic with κ'}: ECE {error:.3f}"
            axis.scatter(confidence, share, s=area, color=colour, marker=marker, label=label, zorder=3)
        what = "right" if target == "right" else "right and stays right within ε"
        axis.set(xlabel="confidence", ylabel=f"share {what}", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axis.set_title(f"{INPUTS[kind]} inputs: {what},\nfitted on {FITTED_ON[on]}", fontsize=10)
        legend = axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def run(subject: common.Subject, *, seed: int, batch_size: int, out: Path, splits: int = 20) -> dict[str, Any]:
    """Measure, study, show, draw; the figures."""
    if splits < LEAST_SPLITS:
        raise InputError(f"--splits is {splits}; give at least {LEAST_SPLITS}, for an interval")
    if len(subject.x) < LEAST_IMAGES:
        raise InputError(f"{len(subject.x)} images are too few to fit on half of them; give --n {LEAST_IMAGES} or more")
    arrays = measure(subject, seed=seed, batch_size=batch_size, out=out)
    verdicts = autoattack_verdicts(subject, out)
    robust = arrays["stands"] if verdicts is None else verdicts
    figures = subject.describe(seed=seed, batch_size=batch_size) | {
        "attack": "PGD-20 and targeted margin PGD-20 (α = a quarter of the radius, one random start), eval mode",
        "kappa": f"PGD-{KAPPAS[MAIN][0]} on the predicted label, α = 2.5·ε/steps, no random start",
        "splits": splits,
        "intervals": "95% over random half splits, Nadeau & Bengio 2003",
        "robust_source": "AutoAttack" if verdicts is not None else "PGD-20 and targeted margin PGD-20, any iterate",
        "inputs": {k: common.rate(arrays[f"{k}.logits"].argmax(1) == subject.y) for k in INPUTS},
        "robust": common.rate(robust & (arrays["natural.logits"].argmax(1) == subject.y)),
        "study": study(subject.y, arrays, robust, splits=splits, seed=seed),
    }
    heading = f"Confidence of {subject.label}: {common.setting(subject, figures)}, {splits} half splits (mean ± 95%)"
    shown = tables(figures)
    common.console.print(f"\n{heading}", soft_wrap=True)
    for title, header, body in shown:
        table = Table()
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in body:
            table.add_row(*row)
        common.show(title, table)
    folder = subject.folder(out)
    with atomic_path(folder / "confidence.md") as temporary:
        temporary.write_text(markdown(heading, shown), encoding="utf-8")
    plot(figures, folder / "confidence.png", f"{subject.label}\n{common.setting(subject, figures)}")
    common.console.print(f"tables and plot: {folder}/confidence.md and .png", soft_wrap=True)
    return figures


def main(
    model: common.ModelOption,
    zoo: common.ZooOption = None,
    dataset: common.DatasetOption = None,
    n: common.CountOption = None,
    batch_size: common.BatchOption = 250,
    device: common.DeviceOption = None,
    eps: common.EpsOption = None,
    splits: Annotated[int, typer.Option(help="Random halves to fit on; the other half tests.")] = 20,
    seed: common.SeedOption = 0,
    json_file: common.JsonOption = None,
    out: common.OutOption = Path("eval-results"),
    data_root: common.RootOption = None,
    checkpoint: common.CheckpointOption = "final",
) -> None:
    """Sample-wise calibration: softmax, temperature scaling and calibrators with and without κ, also under attack."""
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
        figures = run(subject, seed=seed, batch_size=batch_size, out=out, splits=splits)
        # A study of thousands of figures has no place in a card.
        file = json_file or subject.folder(out) / "confidence.json"
        write_json(file, {"model": subject.label, "confidence": figures})
        common.console.print(f"figures: {file}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
