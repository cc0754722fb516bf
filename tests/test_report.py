"""Best, final and diff over run folders: what is averaged, what is marked, what the caption says."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from eval import leaderboard, report
from rb_noisy.files import sha256
from rb_noisy.recipes import Recipe

app = typer.Typer()
app.command()(report.main)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(report, "console", Console(width=300))


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_run(folder, natural=(0.9, 0.8, 0.7), pgd=(0.3, 0.6, 0.5), finished=True, **fields):
    """A run folder with these accuracies on test data, epoch by epoch."""
    recipe = Recipe(**{"data": "digits", "epochs": len(natural), "track": 100} | fields)
    folder.mkdir(parents=True)
    description = {"recipe": recipe.to_dict(), "class_names": ["a", "b"]}
    description["model_options"] = {"name": recipe.backbone, "num_classes": 2, "in_chans": 1}
    (folder / "run.json").write_text(json.dumps(description))
    lines = []
    for epoch, (clean, robust) in enumerate(zip(natural, pgd, strict=True)):
        line = {"epoch": epoch, "test_natural_acc": clean, "test_pgd_acc": robust, "selection_pgd_acc": robust}
        line |= {"train_correct_natural_acc": 0.95, "train_correct_kappa": 8.25, "seconds": 1.0}
        noisy = recipe.noise != "none"
        line |= {"train_incorrect_natural_acc": 0.1 if noisy else None, "train_incorrect_kappa": 1.5 if noisy else None}
        line |= dict.fromkeys(("learning_rate", "train_loss", "gradient_norm", "test_loss", "test_kappa"), 1.0)
        for kind in ("correct", "incorrect"):
            line |= {f"train_{kind}_pgd_acc": None, f"train_{kind}_loss": None}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines if finished else lines[:-1]))
    for which in ("best", "final"):
        (folder / f"{which}.safetensors").write_bytes(f"{which} {folder}".encode())
    return folder


def write_results(folder, which, digest=None, n=500, **accuracies):
    """`accuracies`: natural and pgd20, or natural and autoattack."""
    digest = digest or sha256(folder / f"{which}.safetensors")
    file = folder / f"results-{which}.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    same = {"n": n, "weights_sha256": digest, "natural": {"accuracy": accuracies["natural"]}}
    if "pgd20" in accuracies:
        results["pgd-20"] = same | {"final_iterate": {"accuracy": accuracies["pgd20"]}}
    if "autoattack" in accuracies:
        results["autoattack"] = same | {"accuracy": accuracies["autoattack"]}
    file.write_text(json.dumps(results))


def markdown(*arguments):
    """The rows of the Markdown table as dicts by heading, and the caption."""
    result = call(*arguments, "--format", "markdown")
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]], lines[-1]


def test_sglr_columns_take_both_accuracies_from_the_checkpoint_of_best_pgd(tmp_path):
    write_run(tmp_path / "a")
    rows, caption = markdown(tmp_path)
    assert rows == [
        {
            "Method": "pgd-at",
            **{"Natural best": "80.0", "Natural final": "70.0", "Natural diff": "10.0"},
            **{"PGD-10 (tracked) best": "60.0", "PGD-10 (tracked) final": "50.0", "PGD-10 (tracked) diff": "10.0"},
        }
    ]
    for said in ("digits", "clean labels", "all training images", "ε = 0.2", "α = 0.05", "10 steps", "3 epochs"):
        assert said in caption
    for said in ("seed 0", "100 samples of each kind tracked", "highest tracked robust accuracy on the test images"):
        assert said in caption


def test_nl_columns_take_each_maximum_over_epochs(tmp_path):
    write_run(tmp_path / "clean")
    write_run(tmp_path / "pair", method="st", noise="pair", noise_rate=0.4)
    rows, caption = markdown(tmp_path / "pair", tmp_path / "clean", "--columns", "nl")
    assert list(rows[0])[:2] == ["Noise", "Method"]
    assert [(row["Noise"], row["Method"]) for row in rows] == [("none", "pgd-at"), ("pair 0.4", "st")]
    assert [rows[1][f"Test natural {name}"] for name in ("best", "final", "drop")] == ["90.0", "70.0", "20.0"]
    assert [rows[1][f"Test PGD-10 {name}"] for name in ("best", "final", "drop")] == ["60.0", "50.0", "10.0"]
    fit = ["Final training accuracy correct", "Final training accuracy incorrect"]
    fit += ["Final mean κ correct", "Final mean κ incorrect"]
    assert [rows[1][name] for name in fit] == ["95.0", "10.0", "8.25", "1.50"]
    assert [rows[0][name] for name in fit] == ["95.0", "–", "8.25", "–"]
    assert "maximum over epochs of each accuracy; drop = best − final" in caption


def test_seeds_are_one_row_with_a_t_interval_of_the_paired_differences(tmp_path):
    finals = (0.50, 0.52, 0.57)
    for seed, final in enumerate(finals):
        write_run(tmp_path / f"{seed}", (0.8, 0.8), (final + 0.1, final), seed=seed, noise_seed=seed)
    rows, caption = markdown(tmp_path)
    # mean 53, s = 3.605551 points, t(0.975, 2) = 4.302653: 4.302653 * 3.605551 / sqrt(3) = 8.9567
    assert rows[0]["PGD-10 (tracked) final"] == "53.0 ± 9.0"
    assert rows[0]["PGD-10 (tracked) diff"] == "10.0 ± 0.0"
    assert "seeds 0, 1, 2" in caption
    assert "n = 3" in caption
    write_run(tmp_path / "other", (0.8, 0.8), (0.6, 0.5), method="trades")
    rows, _ = markdown(tmp_path)
    assert [(row["Method"], row["n"]) for row in rows] == [("pgd-at", "3"), ("trades", "1")]
    assert rows[1]["PGD-10 (tracked) final"] == "50.0"


def test_evaluated_pgd20_replaces_the_tracked_pgd_and_never_mixes_without_a_mark(tmp_path):
    both, half, stale = (write_run(tmp_path / name, method=name) for name in ("pgd-at", "trades", "st"))
    for which, robust in (("best", 0.55), ("final", 0.45)):
        write_results(both, which, natural=0.75, pgd20=robust)
        write_results(stale, which, natural=0.75, pgd20=robust, digest="of weights that are no longer there")
    write_results(half, "best", natural=0.75, pgd20=0.99)
    rows, caption = markdown(both, half, stale)
    assert [(row["Natural best"], row["PGD-20 best"], row["PGD-20 diff"]) for row in rows] == [
        ("75.0", "55.0", "10.0"),
        ("80.0†", "60.0†", "10.0†"),
        ("80.0†", "60.0†", "10.0†"),
    ]
    assert "†: as tracked in training, with PGD-10" in caption
    assert "on 500 test images" in caption
    rows, caption = markdown(both)
    assert "†" not in caption + str(rows)
    assert "tracked attack" not in caption


def test_autoattack_has_columns_only_where_there_is_some_and_gaps_where_not(tmp_path):
    one, two = (write_run(tmp_path / name, method=name) for name in ("pgd-at", "trades"))
    assert "AutoAttack best" not in markdown(one, two)[0][0]
    write_results(one, "best", natural=0.8, autoattack=0.4, n=200)
    rows, caption = markdown(one, two)
    assert [[row[f"AutoAttack {name}"] for name in ("best", "final", "diff")] for row in rows] == [
        ["40.0", "–", "–"],
        ["–", "–", "–"],
    ]
    assert "AutoAttack on 200 test images" in caption
    write_run(tmp_path / "again", method="pgd-at", seed=1)
    rows, _ = markdown(tmp_path)
    assert rows[0]["AutoAttack best"] == "40.0 (n=1)", "one of two seeds"


def test_what_varies_becomes_a_column_and_leaves_the_caption(tmp_path):
    sglr = {"method": "pgd-at+sglr", "natural": (0.8, 0.8), "pgd": (0.5, 0.5)}
    write_run(tmp_path / "a", **sglr, target_options={"r": 0.4})
    write_run(tmp_path / "b", **sglr)
    write_run(tmp_path / "c", **sglr, eps=8 / 255)
    write_run(tmp_path / "d", data="npz:/some/cifar10_jpeg.npz", eps=0.2, alpha=0.05)
    rows, caption = markdown(tmp_path)
    assert [row["r"] for row in rows] == ["0.4", "0.2", "0.2", "–"], "a default is a value too"
    assert [row["eps"] for row in rows] == ["0.2", "0.2", "8/255", "0.2"]
    assert rows[3]["data"] == "cifar10 (JPEG copy)"
    assert [row["epochs"] for row in rows] == ["2", "2", "2", "3"]
    assert "milestones" not in rows[0], "they only follow the length of the run"
    for gone in ("digits", "ε =", "epochs"):
        assert gone not in caption
    assert "α = 0.05" in caption


def test_unfinished_runs_are_skipped_by_name_and_damage_is_an_error(tmp_path):
    write_run(tmp_path / "sweep" / "done")
    write_run(tmp_path / "sweep" / "half", finished=False, method="st")
    result = call(tmp_path / "sweep", "--format", "markdown")
    assert result.exit_code == 0, result.output
    assert re.search(r"skipped: \S+half has 2 of 3 epochs", result.output)
    assert "| st |" not in result.output
    for arguments, words in (
        ([tmp_path / "sweep" / "half"], "none of the runs is finished"),
        ([tmp_path / "nowhere"], "holds no run"),
        ([tmp_path / "sweep", "--format", "html"], "unknown format"),
        ([tmp_path / "sweep", "--columns", "sgrl"], "did you mean sglr"),
        ([tmp_path / "sweep", "--out", tmp_path / "t.txt"], "give --format markdown"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 2, refused.output
        assert words in refused.output
    once = markdown(tmp_path / "sweep", tmp_path / "sweep" / "done")
    assert once == markdown(tmp_path / "sweep"), "a folder named twice counts once"
    write_run(tmp_path / "sweep" / "copy")
    copied = call(tmp_path / "sweep")
    assert copied.exit_code == 2, copied.output
    assert "runs of the same recipe and seed" in copied.output


def test_against_a_method_every_run_is_less_that_methods_run_with_the_same_labels_and_seed(tmp_path):
    noise = {"noise": "pair", "noise_rate": 0.4}
    for seed, (ours, theirs) in enumerate([(0.5, 0.4), (0.7, 0.5)]):
        write_run(tmp_path / f"ours{seed}", (0.9,), (ours,), seed=seed, noise_seed=seed, method="pgd-at+kgr", **noise)
        write_run(tmp_path / f"theirs{seed}", (0.8,), (theirs,), seed=seed, noise_seed=seed, method="pgd-at", **noise)
    write_run(tmp_path / "clean", (0.9,), (0.8,))  # no run of kgr has its labels
    write_run(tmp_path / "alone", (0.9,), (0.8,), seed=7, noise_seed=7, method="pgd-at", **noise)  # nor its seed
    for columns, group in (("sglr", "pgd"), ("nl", "pgd")):
        result = call(tmp_path, "--columns", columns, "--against", "pgd-at+kgr", "--format", "csv")
        (row,) = csv.DictReader(io.StringIO(result.stdout))
        assert row["Method"] == "pgd-at"
        assert float(row[f"{group} final"]) == pytest.approx(-15)
        assert float(row[f"{group} final half-width"]) == pytest.approx(
            12.706 * 5, rel=1e-3
        )  # t of 1 degree of freedom
        assert float(row["natural final"]) == pytest.approx(-10)
        assert "less that of pgd-at+kgr" in row["caption"]
    for method, words in (("pgd-at+kgn", "did you mean pgd-at+kgr"), ("pgd-at", None)):
        result = call(tmp_path, "--against", method)
        assert (result.exit_code == 0) == (words is None)
        assert words is None or words in result.stderr
    for which in ("best", "final"):
        write_results(tmp_path / "ours0", which, natural=0.9, pgd20=0.3)
        write_results(tmp_path / "ours1", which, natural=0.9, pgd20=0.3)
    mixed = call(tmp_path, "--against", "pgd-at+kgr")  # PGD-20 less the PGD of training is no difference
    assert mixed.exit_code == 2
    assert "some of these runs have PGD-20" in mixed.stderr
    nobody = call(tmp_path / "clean", "--against", "pgd-at")
    assert nobody.exit_code == 2
    assert "no other method has a run with the labels and seed" in nobody.stderr


def test_every_format_shows_the_same_figures(tmp_path):
    run = write_run(tmp_path / "run", noise="symmetric", noise_rate=0.4)
    terminal = call(run, "--columns", "nl")
    assert terminal.exit_code == 0, terminal.output
    assert "Test PGD-10" in terminal.stdout
    assert "8.25" in terminal.stdout
    out = tmp_path / "tables" / "nl.tex"
    written = call(run, "--columns", "nl", "--format", "latex", "--out", out)
    assert written.exit_code == 0, written.output
    latex = out.read_text()
    assert latex.isascii() or not set("εακ−†–") & set(latex)
    assert r"\multicolumn{3}{c}{Test natural} & \multicolumn{3}{c}{Test PGD-10}" in latex
    assert r"symmetric 0.4 & pgd-at & 90.0 & 70.0 & 20.0 & 60.0 & 50.0 & 10.0 & 95.0 & 10.0 & 8.25 & 1.50 \\" in latex
    assert leaderboard.MISSING not in latex
    (row,) = csv.DictReader(io.StringIO(call(run, "--columns", "nl", "--format", "csv").stdout))
    assert float(row["natural drop"]) == pytest.approx(20)
    assert (row["natural drop half-width"], row["natural drop n"]) == ("", "1")
    assert "10 steps" in row["caption"]


def test_rows_of_one_method_are_in_the_order_of_its_numbers(tmp_path):
    for r in (0.2, 0):
        for temperature in (1.5, 1):
            options = {"r": r, "temperature": temperature}
            write_run(tmp_path / f"r{r}_{temperature}", (0.9,), (0.8,), method="pgd-at+sglr", target_options=options)
    rows = report.sglr_report(report.collect_runs([tmp_path])).rows
    assert [row.labels[1:] for row in rows] == [("0", "1"), ("0", "1.5"), ("0.2", "1"), ("0.2", "1.5")]
