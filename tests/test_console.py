"""What reaches a terminal: text that is only text, names that are whole, and nothing that dependencies say."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

import rb_noisy.console
from eval.leaderboard import app as leaderboard
from model_zoo.registry import BUILT_IN
from rb_noisy.cli import app
from rb_noisy.console import Terminal, progress_bar, user_errors, visible
from rb_noisy.errors import InputError

ROOT = Path(__file__).parents[1]
HOSTILE = "[/bold]\x1b[31m\x9b2J:smile:"
SHOWN = r"[/bold]\x1b[31m\x9b2J:smile:"


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def terminal(**options):
    return Terminal(file=io.StringIO(), **{"width": 80, "force_terminal": True, **options})


@pytest.fixture
def zoo(tmp_path):
    """A zoo of two models, one of which has hostile text in every field that tables show."""
    folder = tmp_path / "zoo/model_info/digits/Linf"
    folder.mkdir(parents=True)
    shutil.copy(BUILT_IN / "model_info/digits/Linf/at_digits.json", folder)
    card = json.loads((folder / "at_digits.json").read_text())
    card |= {"name": "hostile", "method": HOSTILE, "architecture": HOSTILE, "venue": HOSTILE, "checkpoint": HOSTILE}
    (folder / "hostile.json").write_text(json.dumps(card))
    return tmp_path / "zoo"


def test_what_a_card_says_is_shown_and_neither_styles_nor_steers_the_terminal(zoo):
    for command, *arguments in ((app, "models"), (leaderboard,), (leaderboard, "--format", "markdown")):
        result = call(command, *arguments, "--zoo", zoo)
        assert result.exit_code == 0, result.output
        assert "at_digits" in result.output
        assert SHOWN in result.output
        assert visible(result.output) == result.output


@pytest.mark.parametrize(
    "shown",
    [HOSTILE, Text(HOSTILE), Text(HOSTILE, "red"), Table(HOSTILE), Table(title=HOSTILE)],
    ids=["string", "text", "styled", "header", "title"],
)
def test_no_way_of_printing_lets_control_characters_through(shown):
    console = terminal(color_system=None)
    if isinstance(shown, Table):
        shown.add_row(HOSTILE)
    console.print(shown, soft_wrap=True)
    text = console.file.getvalue()
    assert SHOWN in text
    assert visible(text) == text


def test_a_progress_bar_shows_its_description_as_it_is(monkeypatch):
    console = terminal(color_system=None, width=160)
    monkeypatch.setattr(rb_noisy.console, "errors", console)
    bar = progress_bar()
    bar.add_task(HOSTILE, total=2)
    console.print(bar.make_tasks_table(bar.tasks))
    text = console.file.getvalue()
    assert text.startswith(SHOWN[:10])
    assert visible(text) == text


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    with pytest.raises(typer.Exit), user_errors():
        raise InputError(f"no model {HOSTILE}\n   error: all is well")
    line = capsys.readouterr().err
    assert line == f"error: no model {SHOWN} error: all is well\n"


def test_every_console_is_a_terminal_of_ours_and_none_is_told_to_read_markup():
    """So that no command gets round them: no other console, no print, no markup."""
    made, printed, markup = [], [], []
    for file in (file for folder in ("rb_noisy", "eval", "model_zoo") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            made += [file.name] if name in ("Console", "rich.console.Console") else []
            printed += [file.name] if name in ("print", "rich.print", "typer.echo", "typer.secho") else []
            markup += [file.name for keyword in node.keywords if keyword.arg == "markup" and file.name != "console.py"]
            markup += [file.name] if name.endswith("from_markup") else []
    assert (made, markup) == ([], [])
    assert printed == ["compat.py"]  # the log of AutoAttack under RobustBench, as it is there


@pytest.mark.parametrize("width", [20, 60, 200])
def test_no_name_in_a_table_is_cut_however_narrow_the_terminal(width):
    names = ["a_very_long_model_name_that_is_copied", "preact_resnet18", "two words of a name"]
    console = terminal(width=width, color_system=None)
    table = Table("model", "backbone", "words")
    table.add_row(*names)
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text
    for word in " ".join(names).split():
        assert word in text
    if width > 100:
        assert "two words of a name" in text
    if width == 60:  # narrowed as far as the words allow: no wider than it has to be
        assert max(map(len, text.splitlines())) <= 3 * 3 + 1 + len(names[0]) + len(names[1]) + len("words")


def test_names_are_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    done = subprocess.run(
        [sys.executable, "-m", "rb_noisy", "models"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "sglr_released_digits_sym40" in done.stdout
    assert "trades+sglr" in done.stdout
    assert "…" not in done.stdout


def test_future_warnings_of_dependencies_do_not_reach_users():
    """The interpreter's own filters, as users have them; pytest has others."""
    code = [
        "import rb_noisy; rb_noisy.load_model('at_digits')",
        "import rb_noisy, robustbench.utils, timm",
        "import rb_noisy.console, warnings; warnings.warn('of a dependency', FutureWarning)",
    ]
    for line in code:
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stderr == "", line
    asked = subprocess.run([sys.executable, "-W", "default", "-c", code[2]], capture_output=True, text=True, cwd=ROOT)
    assert "of a dependency" in asked.stderr
