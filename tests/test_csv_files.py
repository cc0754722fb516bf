"""CSV files that a spreadsheet may open, and what comes back from them."""

from __future__ import annotations

import ast
import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.report_table import Group, Report, Row, render_csv
from rb_noisy.annotation import Annotations
from rb_noisy.corrections import apply_corrections
from rb_noisy.csv_files import csv_text, from_cell, write_csv
from rb_noisy.data import load_data
from rb_noisy.figures.base import Drawing
from rb_noisy.label_issues import LabelIssues

ROOT = Path(__file__).parents[1]
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-x", "-dog"]
PLAIN = ["", "dog", "'s", "a=b", "-1", "+2.5", "-1e-05", "-inf", "nan", "ä–", "'"]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_formulas_get_an_apostrophe_numbers_stay_and_all_come_back(tmp_path):
    numbers = [-3, -2.5, float("-inf"), None]
    write_csv(tmp_path / "a.csv", ["=name"], [[text] for text in [*FORMULAS, *PLAIN, *numbers]])
    header, *rows = rows_of(tmp_path / "a.csv")
    assert header == ["'=name"]
    cells = [row[0] if row else "" for row in rows]
    assert cells[: len(FORMULAS)] == [f"'{text}" for text in FORMULAS]
    assert cells[len(FORMULAS) : -len(numbers)] == PLAIN
    assert cells[-len(numbers) :] == ["-3", "-2.5", "-inf", ""]
    assert [from_cell(cell) for cell in cells[: -len(numbers)]] == [*FORMULAS, *PLAIN]


def test_nothing_else_writes_csv():
    users = []
    for file in (file for folder in ("rb_noisy", "eval", "model_zoo") for file in (ROOT / folder).rglob("*.py")):
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
        users += [file.name for name in calls if name in ("csv.writer", "csv.DictWriter")]
    assert users == ["csv_files.py"]


def issues(names):
    index = torch.tensor([1, 0])
    values = torch.tensor([-0.5, 1.0], dtype=torch.float64)
    return LabelIssues(index, index, 1 - index, values, values, values, 0.1, names)


def test_every_kind_of_csv_is_harmless(tmp_path):
    names = ("=1+1", "-dog")
    issues(names).to_csv(tmp_path / "issues.csv", ["@a.png", "b.png"])
    one = torch.ones(2, dtype=torch.int64)
    Annotations(one, one, one.double()).to_csv(tmp_path / "labels.csv", names, ["+a.png", "b.png"])
    from matplotlib.figure import Figure

    Drawing("figure", Figure(), [{"run": "=x", "-loss": -0.5}]).save(tmp_path)
    report = Report(["Method"], [Group("a", "A", ())], [Row(("=x",), {}, 1)], "-caption")
    (tmp_path / "report.csv").write_text(render_csv(report), newline="")
    for file in ("issues", "labels", "figure", "report"):
        rows = rows_of(tmp_path / f"{file}.csv")
        for cell in (cell for row in rows for cell in row):
            assert cell[:1] not in ("=", "+", "-", "@") or float(cell) < 0, (file, cell)
    assert "-0.5" in rows_of(tmp_path / "issues.csv")[1]
    assert rows_of(tmp_path / "figure.csv") == [["run", "'-loss"], ["'=x", "-0.5"]]


def test_corrections_of_classes_that_look_like_formulas_come_back(tmp_path):
    """By the page's own script, and as a ranking's names stand in its CSV."""
    names = ("=1+1", "-dog", "'-dog", "-1", "plain", *"fghij")
    data = replace(load_data("digits"), class_names=names)
    assert apply_corrections_of(data, tmp_path, by_page=False) == [1, 2, 3, 0]
    if shutil.which("node") is None:
        pytest.skip("the page's script needs node to be run without a browser")
    assert apply_corrections_of(data, tmp_path, by_page=True) == [1, 2, 3, 0]


def apply_corrections_of(data, folder, *, by_page):
    """The new labels of four samples, from label i % 4 to the next."""
    data = replace(data, y_train=torch.tensor([0, 1, 2, 3]), x_train=data.x_train[:4])
    files = ["-a.png", "=b.png", "c.png", "@d.png"]
    columns = ["index", "file", "given", "suggested", "label"]
    rows = []
    for i in range(4):
        now, to = data.class_names[i], data.class_names[(i + 1) % 4]
        rows.append([str(i), files[i], now, to, to])
    text = written_by_page([columns, *rows]) if by_page else csv_text(columns, rows)
    (folder / "corrections.csv").write_text(text, encoding="utf-8", newline="")
    assert "'=1+1" in text
    return apply_corrections(data, folder / "corrections.csv", files).y_train.tolist()


def written_by_page(lines):
    script = (ROOT / "rb_noisy/templates/gallery.js").read_text(encoding="utf-8")
    parts = ("formula =", "numeric =", "harmless =", "quoted =", "text = lines")
    wanted = [line for line in script.splitlines() if line.strip().startswith(tuple(f"const {p}" for p in parts))]
    assert len(wanted) == len(parts)
    code = "\n".join([f"const lines = {json.dumps(lines)};", *wanted, "process.stdout.write(text);"])
    return subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout
