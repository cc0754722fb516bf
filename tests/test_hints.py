"""Every command that a user is told to run: in the README, on the page, in cards, in what is printed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from eval import page
from model_zoo.registry import BUILT_IN, read_cards
from rb_noisy.cli import app
from rb_noisy.hints import command_line

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for folder in ("rb_noisy", "eval", "model_zoo") for file in (ROOT / folder).rglob("*.py"))
COMMAND = re.compile(
    r"(?:python|launch|torchrun)\S* (?:\S+ )*?-m (?:-- )?(eval|rb_noisy)\b"
    # Where the name of the project is no command: "the rb-noisy zoo".
    r"|\brb-noisy (?!zoo\b|again\b|leaderboard\b|confidence 2)(?=[a-z])"
)
ELLIPSIS = ("…", "...")


def parse(words: list[str]) -> dict[str, Any]:
    """What the real parser makes of a command, which is not run. Its own exceptions, where it refuses it."""
    elided = any(word.endswith(ELLIPSIS) for word in words)
    values = [before.startswith("--") for before in ["", *words]]
    words = ["1" if word in ELLIPSIS and value else word for word, value in zip(words, values, strict=False)]
    words = [word for word in words if not word.endswith(ELLIPSIS)]
    if words[0] in ("rb-noisy", "rb_noisy"):
        if words[1:] == []:  # the program's name alone
            return {}
        group = typer.main.get_command(app)
        assert words[1] in group.commands, f"rb-noisy has no command {words[1]}"
        command, words = group.commands[words[1]], words[2:]
    else:
        module = importlib.import_module("eval.__main__" if words[0] == "eval" else words[0])
        single = getattr(module, "app", None)
        if single is None:
            single = typer.Typer()
            single.command()(module.main)  # as typer.run does
        command, words = typer.main.get_command(single), words[1:]
    try:
        return command.make_context("command", list(words)).params
    except Exception as error:
        if elided and type(error).__name__ == "MissingParameter":
            return {}
        raise


def command_words(text: str) -> list[str]:
    """The words from the module or program on: "python -m eval.pgd --model x" → ["eval.pgd", "--model", "x"]."""
    words = shlex.split(text, comments=True)
    for end in ("&&", "|", ">"):
        words = words[: words.index(end)] if end in words else words
    if "rb-noisy" in words:
        return words[words.index("rb-noisy") :]
    words = words[words.index("-m") + 1 :]
    return words[1:] if words[0] == "--" else words


def refusal(text: str) -> str:
    """Why the parser refuses a command; empty where it does not."""
    try:
        parse(command_words(text))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def or_name(text: str) -> str:
    """A command from prose; one without options and arguments only names the command."""
    text = text.rstrip(".,;:")
    return text if len(command_words(text)) > 1 + ("rb-noisy" in text) else f"{text} …"


def readme_commands() -> Iterator[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    for line in (line for block in blocks for line in block.splitlines()):
        # Of a line that sets up and then evaluates, the last command.
        yield from (part for part in line.split(" && ") if COMMAND.search(part))
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        span = " ".join(span.split())
        if COMMAND.match(span):
            yield or_name(span)
        elif re.match(r"eval\.\w+ --", span):
            yield f"python -m {span} …"


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the README is in the repository, not in the package")
def test_every_command_of_the_readme_is_one():
    commands = list(readme_commands())
    assert len(commands) > 50
    refused = [f"{command}: {error}" for command in commands if (error := refusal(command))]
    assert refused == []


def test_every_command_of_a_card_is_one_and_there_is_one_for_every_figure():
    cards = read_cards()
    assert len(cards) > 20
    for card in cards:
        train, *evaluations = page._commands(card, "a zoo")
        assert parse(command_words(train))["data"] == card["recipe"]["data"]
        assert len(evaluations) == len(card["results"])
        for (name, figures), command in zip(card["results"].items(), evaluations, strict=True):
            words = command_words(command)
            given = parse(words)
            assert words[0] == f"eval.{name.partition('-')[0].replace('confidence', 'calibration')}"
            assert (given["model"], given["zoo"], given["seed"]) == (card["name"], "a zoo", figures["seed"])
            assert given["n"] in (figures["n"], None)
            if name in ("confidence", "calibration"):
                assert given["target"] == {"confidence": "robust", "calibration": None}[name]


def test_figures_that_no_command_measures_are_given_none():
    card = {"name": "x", "results": {"fancy": {"n": 1, "of": 1}, "confidence": {"n": 5, "of": 9, "splits": 7}}}
    (command,) = page._commands(card, None)
    given = parse(command_words(command))
    assert (given["target"], given["splits"], given["n"]) == ("robust", 7, 5)


def test_what_cards_and_studies_say_to_run_can_be_run():
    texts = []

    def look(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)

    for file in BUILT_IN.rglob("*.json"):
        look(json.loads(file.read_text(encoding="utf-8")))
    assert texts
    for text in filter(COMMAND.search, texts):
        parse(command_words(text[COMMAND.search(text).start() :]))


def nodes(kind: type) -> Iterator[tuple[Path, Any]]:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield file, node


def test_every_command_that_is_put_together_is_one():
    """Values that are only known when it runs are a 1, which every kind of option takes."""
    commands = []
    for file, call in nodes(ast.Call):
        if ast.unparse(call.func) != "command_line" or isinstance(call.args[0], ast.Starred):
            continue  # those of the page are tried with every card
        words = [a.value if isinstance(a, ast.Constant) else "1" for a in call.args if not isinstance(a, ast.Starred)]
        if words[0] in ("rb-noisy", "python"):
            commands.append(f"{file.name} {words}")
            parse(words if words[0] == "rb-noisy" else words[2:])
    assert len(commands) >= 4


def test_every_command_that_is_written_out_is_one():
    """In messages, in help texts and, in backticks, in docstrings."""
    found, refused = 0, []
    for file, node in nodes(ast.Constant):
        if not isinstance(node.value, str) or not COMMAND.search(node.value):
            continue
        spans = re.findall(r"`([^`]+)`", node.value)
        spans = [span for span in spans if COMMAND.match(span)] or [node.value[COMMAND.search(node.value).start() :]]
        if ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) == node.value.strip() and "`" not in spans[0]:
            spans = [span for span in spans if "\n" not in span]
        for span in spans:
            if file.name == "gallery.py" or "\n" in span:  # the key that decisions are kept by; prose
                continue
            found += 1
            if error := refusal(or_name(span)):
                refused.append(f"{file.name}: {span}: {error}")
    assert refused == []
    assert found > 15


def test_no_command_is_put_together_by_hand():
    """An f-string would not quote for a shell what it puts in."""
    by_hand = []
    for file, node in nodes(ast.JoinedStr):
        texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        by_hand += [f"{file.name}: {text}" for text in texts if COMMAND.search(text) and file.name != "gallery.py"]
    assert by_hand == []


@pytest.mark.parametrize("name", ["a b", "it's; rm -rf ~", "$(x)", "ä"])
def test_a_shell_reads_the_words_that_were_meant(name):
    assert shlex.split(command_line("rb-noisy", "train", "--out", Path(name))) == ["rb-noisy", "train", "--out", name]


def test_a_printed_hint_is_quoted_for_a_shell(tmp_path, tiny_data):
    with np.load(tiny_data) as data:
        given = int(data["y_train"][0])
    corrections = tmp_path / "corrections.csv"
    corrections.write_text(f"index,given,label\n0,{given},{(given + 1) % 4}\n")
    out = tmp_path / "a name; with signs.npz"
    arguments = ["apply-corrections", "--data", f"npz:{tiny_data}", str(corrections), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert shlex.split(result.output.strip().rpartition(" as ")[2]) == ["--data", f"npz:{out}"]
