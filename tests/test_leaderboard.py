"""The leaderboard: ranking, grouping, rendering and the command."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from typer.testing import CliRunner

from eval import leaderboard as board
from rb_noisy.console import Terminal
from rb_noisy.errors import InputError
from rb_noisy.measures import wilson_interval

SYM = {"kind": "symmetric", "rate": 0.4, "seed": 0}


def card(name, autoattack=None, pgd=None, natural=0.97, n=540, **changes):
    results = {}
    if pgd is not None:
        rates = {"natural": natural, "final_iterate": pgd, "any_iterate": pgd - 0.01}
        results["pgd-20"] = {
            key: {"accuracy": value, "interval": [value - 0.02, value + 0.02]} for key, value in rates.items()
        }
        results["pgd-20"]["n"] = n
    if autoattack is not None:
        results["autoattack"] = {"accuracy": autoattack, "interval": [autoattack - 0.03, autoattack + 0.04], "n": n}
    return {
        "name": name,
        "additional_data": False,
        "dataset": "digits",
        "venue": "",
        "architecture": "digits_cnn",
        "eps": "0.15",
        "clean_acc": "",
        "threat_model": "Linf",
        "method": "pgd-at+sglr",
        "noise": None,
        "checkpoint": "final",
        "results": results,
        **changes,
    }


def names(rows):
    return [row.name for row in rows]


@pytest.fixture(scope="module")
def published():
    return board.published_rows()


def test_published_file_has_every_field_and_plausible_percentages(published):
    fields = {"method", "dataset", "threat_model", "eps", "architecture", "additional_data", "noise", "checkpoint"}
    fields |= {"clean_acc", "pgd20_acc", "pgd10_acc", "autoattack_acc", "source", "note"}
    for entry in published:
        assert set(entry) == fields
        assert entry["checkpoint"] in ("best", "final", None)
        robust = [entry[key] for key in ("pgd20_acc", "pgd10_acc", "autoattack_acc") if entry[key] is not None]
        assert robust
        assert all(10 < value < 100 for value in robust)
        if entry["autoattack_acc"] is not None:
            assert min(robust) == entry["autoattack_acc"]
        assert entry["clean_acc"] is None or entry["clean_acc"] > max(robust)


@pytest.mark.parametrize(
    ("dataset", "method", "checkpoint", "figures"),
    [
        ("cifar10", "PGD-AT", "best", (80.7, 50.7, 47.7)),
        ("cifar10", "PGD-AT", "final", (82.4, 41.4, 40.2)),
        ("cifar10", "PGD-AT + SGLR", "best", (82.9, 56.4, 51.2)),
        ("cifar10", "KD-SWA", "final", (85.4, 53.8, 49.4)),
        ("cifar10", "TRADES + SGLR", "final", (83.3, 55.4, 50.1)),
        ("cifar100", "PGD-AT", "final", (53.6, 19.8, 18.1)),
        ("cifar100", "TRADES", "best", (57.9, 29.9, 24.6)),
        ("cifar100", "TRADES + SGLR", "final", (57.4, 33.2, 26.4)),
    ],
)
def test_published_file_holds_the_tables_of_the_sglr_paper(published, dataset, method, checkpoint, figures):
    key = (dataset, method, checkpoint)
    found = [
        (entry["clean_acc"], entry["pgd20_acc"], entry["autoattack_acc"])
        for entry in published
        if (entry["dataset"], entry["method"], entry["checkpoint"]) == key and entry["source"].startswith("SGLR")
    ]
    assert found == [figures]


@pytest.mark.parametrize(
    ("method", "natural", "pgd20", "autoattack", "cifar100"),
    [  # arXiv 2604.22853: ResNet-18, 100 epochs, label smoothing, averaged weights, means of 3 seeds
        ("PGD-AT + WA", 82.36, 54.28, 50.49, 26.90),
        ("LIET", 80.68, 56.12, 49.99, 26.64),
        ("N-FGSM", 78.59, 53.13, 47.77, 24.86),
        ("FGSM-RS", 77.66, 48.38, 43.09, 21.42),
        ("NuAT", 80.98, 54.78, 50.10, 14.41),
    ],
)
def test_published_file_holds_the_one_step_methods_under_one_roof(
    published, method, natural, pgd20, autoattack, cifar100
):
    rows = {
        entry["dataset"]: [entry["clean_acc"], entry["pgd20_acc"], entry["autoattack_acc"]]
        for entry in published
        if entry["method"] == method and entry["source"].startswith("FastAT")
    }
    assert rows["cifar10"] == [natural, pgd20, autoattack]
    assert rows["cifar100"][2] == cifar100


def test_published_file_holds_both_checkpoints_of_thirteen_table_rows(published):
    sglr = [entry for entry in published if entry["source"].startswith("SGLR")]
    assert len(sglr) == 26
    assert len({(e["dataset"], e["method"], e["checkpoint"]) for e in sglr}) == 26


def test_rows_are_ranked_by_autoattack_and_those_without_come_last_by_pgd():
    cards = [
        card("pgd_low", pgd=0.6),
        card("weak", 0.5, 0.9),
        card("pgd_high", pgd=0.8),
        card("strong", 0.7, 0.6),
        card("new"),
    ]
    rows = board.leaderboard_rows(cards, [])
    assert names(rows) == ["strong", "weak", "pgd_high", "pgd_low", "new"]
    assert [row.rank for row in rows] == [1, 2, None, None, None]


def test_equal_accuracies_share_a_rank():
    rows = board.leaderboard_rows([card("c", 0.5), card("b", 0.7), card("a", 0.7)], [])
    assert [(row.name, row.rank) for row in rows] == [("a", 1), ("b", 1), ("c", 3)]


def test_data_sets_noises_and_threats_are_never_ranked_against_each_other(published):
    cards = [
        card("digits_clean", 0.7),
        card("digits_noisy", 0.8, noise=SYM),
        card("digits_large_eps", 0.1, eps="0.3"),
        card("mnist_clean", 0.9, dataset="mnist"),
        card("cifar", 0.501, dataset="cifar10", eps=str(8 / 255)),
    ]
    rows = board.leaderboard_rows(cards, published)
    groups = [row.group for row in rows]
    assert len(set(groups)) == 1 + sum(a != b for a, b in itertools.pairwise(groups))
    ranks = {row.name: row.rank for row in rows if row.measured}
    assert [ranks[name] for name in ("digits_clean", "digits_noisy", "digits_large_eps", "mnist_clean")] == [1, 1, 1, 1]
    # 8/255 written as a decimal is the same threat: below fifteen published rows, level with one of them.
    (own,) = (row for row in rows if row.name == "cifar")
    assert own.threat == "Linf 8/255"
    better = [e for e in published if e["dataset"] == "cifar10" and (e["autoattack_acc"] or 0) > 50.1]
    assert own.rank == len(better) + 1


def test_a_jpeg_copy_is_marked_and_never_ranked_with_the_original(published):
    copy = card("ours", 0.99, dataset="cifar10_jpeg", eps="8/255")
    rows = board.leaderboard_rows([copy], published)
    assert [row.rank for row in rows if row.measured] == [1]
    assert {row.name for row in rows if row.dataset == "cifar10_jpeg"} == {"ours"}
    assert "### cifar10 (JPEG copy), clean labels, Linf 8/255" in board.render_markdown(rows)
    assert "on cifar10 (JPEG copy)" in board.standing(rows, "ours")


def test_filters_keep_one_data_set_and_one_noise(published):
    cards = [card("clean", 0.7), card("noisy", 0.6, noise=SYM), card("human", 0.5, noise={"kind": "human"})]
    assert names(board.leaderboard_rows(cards, published, dataset="digits")) == ["clean", "human", "noisy"]
    assert names(board.leaderboard_rows(cards, published, dataset="digits", noise="none")) == ["clean"]
    for noise in ("symmetric", "symmetric 0.4"):
        assert names(board.leaderboard_rows(cards, published, noise=noise)) == ["noisy"]
    assert all(row.dataset == "cifar100" for row in board.leaderboard_rows(cards, published, dataset="cifar100"))


def test_unknown_filters_offer_what_is_there(published):
    with pytest.raises(InputError, match=r"'cifar1O'; did you mean cifar10"):
        board.leaderboard_rows([], published, dataset="cifar1O")
    with pytest.raises(InputError, match=r"'pair'; known: none, symmetric 0\.4"):
        board.leaderboard_rows([card("a", 0.5, noise=SYM)], published, noise="pair")


def test_measured_figures_carry_interval_and_count_and_come_from_the_final_iterate():
    (row,) = board.leaderboard_rows([card("a", 0.713, 0.72)], [])
    assert row.origin == "measured here"
    assert (row.autoattack.value, row.autoattack.low, row.autoattack.high) == pytest.approx((71.3, 68.3, 75.3))
    assert row.autoattack.n == 540
    assert row.pgd20.value == pytest.approx(72.0)
    assert row.clean.value == pytest.approx(97.0)


def test_a_missing_interval_is_worked_out_from_the_count():
    results = {"autoattack": {"accuracy": 0.5, "n": 100}}
    (row,) = board.leaderboard_rows([card("a", results=results)], [])
    assert (row.autoattack.low, row.autoattack.high) == pytest.approx([100 * end for end in wilson_interval(50, 100)])


def test_a_card_with_strings_only_still_ranks():
    rows = board.leaderboard_rows([card("a", clean_acc="97.04", autoattack_acc="71.30"), card("b", 0.7)], [])
    assert names(rows) == ["a", "b"]
    assert rows[0].clean == board.Rate(97.04)


def test_a_damaged_card_is_named_by_its_value():
    with pytest.raises(InputError, match="accuracy 'N/A'"):
        board.leaderboard_rows([card("a", autoattack_acc="N/A")], [])
    with pytest.raises(InputError, match="eps 'big'"):
        board.leaderboard_rows([card("a", eps="big")], [])


def test_standing_says_where_a_model_is_in_its_group():
    cards = [card(f"m{i}", 0.1 * i) for i in range(1, 6)] + [
        card("sglr_digits", 0.45),
        card("late", pgd=0.9),
        card("new"),
    ]
    rows = board.leaderboard_rows([*cards, card("noisy", 0.3, noise=SYM)], [])
    assert (
        board.standing(rows, "sglr_digits")
        == "sglr_digits is 2nd of 6 on digits, no label noise, by AutoAttack accuracy"
    )
    assert (
        board.standing(rows, "noisy")
        == "noisy is 1st of 1 on digits, symmetric 0.4 label noise, by AutoAttack accuracy"
    )
    assert board.standing(rows, "late") == (
        "late is 1st of 1 on digits, no label noise, by PGD-20 accuracy (AutoAttack not measured yet)"
    )
    assert "not ranked" in board.standing(rows, "new")
    with pytest.raises(InputError, match="'sglr_digit'; did you mean sglr_digits"):
        board.standing(rows, "sglr_digit")


@pytest.mark.parametrize(
    ("place", "word"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (12, "12th"), (22, "22nd"), (113, "113th")]
)
def test_places_are_spelt_as_people_say_them(place, word):
    cards = [card(f"m{i:03}", (500 - i) / 1000) for i in range(1, 114)]
    assert f" {word} of 113 " in board.standing(board.leaderboard_rows(cards, []), f"m{place:03}")


def test_markdown_has_a_table_per_group_and_the_same_number_of_cells_in_each_line(published):
    rows = board.leaderboard_rows([card("sglr|digits", 0.713, 0.72), card("noisy", noise=SYM)], published)
    text = board.render_markdown(rows, highlight="noisy")
    assert "### digits, clean labels, Linf 0.15" in text
    assert "### digits, symmetric 0.4, Linf 0.15" in text
    assert r"sglr\|digits" in text
    assert "71.30 [68.3, 75.3] n=540" in text
    assert "**noisy**" in text
    lines = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(board.COLUMNS) + 1}
    assert len(lines) == len(rows) + 2 * len({row.group for row in rows})


def test_published_figures_keep_their_digits_and_missing_ones_show_as_a_dash(published):
    text = board.render_markdown(board.leaderboard_rows([], published))
    assert "| 1 | DAT + AWP + SWA | DAT (NeurIPS 2024) | as published | ResNet-18 | – | – | – | 52.76 |" in text
    assert "| 82.9 | 56.4 | 51.2 |" in text
    assert "| 53.49 (PGD-10) | – |" in text


def test_latex_is_a_balanced_booktabs_table_with_everything_escaped(published):
    rows = board.leaderboard_rows(
        [card("a_b&50%#{x}", 0.7, method=r"pgd^2~\x", architecture="WideResNet-34")], published
    )
    lines = board.render_latex(rows, highlight="a_b&50%#{x}").splitlines()
    assert lines[0] == r"\begin{tabular}{rlrrrrcllll}"
    assert lines[-1] == r"\end{tabular}"
    assert lines[1] == r"\toprule"
    assert lines[-2] == r"\bottomrule"
    table = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(table) == len(rows) + 1
    assert {line.replace(r"\&", "").count("&") for line in table} == {10}
    (own,) = (line for line in table if "measured here" in line)
    assert r"\textbf{a\_b\&50\%\#\{x\}}" in own
    assert r"pgd\textasciicircum{}2\textasciitilde{}\textbackslash{}x" in own
    assert "WRN-34" in own
    assert any(r"$\pm$ 5.3" in line for line in table)
    assert "–" not in "".join(lines)


def test_terminal_shows_names_with_brackets_as_they_are():
    rows = board.leaderboard_rows([card("a[b]", 0.713), card("noisy", 0.5, noise=SYM)], [])
    tables = board.render_terminal(rows, highlight="a[b]")
    assert len(tables) == 2
    console = Terminal(width=160, record=True, file=io.StringIO())
    console.print(tables[0])
    text = console.export_text()
    assert "a[b]" in text
    assert "71.30" in text
    assert "[68.3, 75.3] n=540" in text


@pytest.fixture
def run(monkeypatch):
    cards = lambda zoo=None: [card(f"{zoo or 'built_in'}_at", 0.7), card("noisy", 0.5, noise=SYM)]  # noqa: E731
    monkeypatch.setattr(board, "read_cards", cards)
    return lambda *arguments: CliRunner().invoke(board.app, list(arguments))


def test_command_prints_the_table_and_the_standing(run):
    result = run("--dataset", "digits", "--highlight", "noisy")
    assert result.exit_code == 0
    assert "built_in_at" in result.stdout
    assert "noisy is 1st of 1 on digits, symmetric 0.4 label noise" in result.stdout


def test_command_reads_another_zoo_and_writes_other_formats(run):
    assert "| other_at |" in run("--zoo", "other", "--format", "markdown").stdout
    assert r"\toprule" in run("--format", "latex", "--noise", "none").stdout


@pytest.mark.parametrize(
    "wrong", [("--dataset", "digitz"), ("--format", "html"), ("--highlight", "nosy"), ("--noise", "x")]
)
def test_command_answers_bad_input_with_one_line_and_code_two(run, wrong):
    result = run(*wrong)
    assert result.exit_code == 2
    assert result.output.startswith("error: unknown ")
    assert result.output.count("\n") == 1


def test_published_file_is_plain_json_without_nan():
    json.loads(board.PUBLISHED.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


def test_the_top_30_percent_by_robust_confidence_stand_in_their_column():
    figure = {"mean": 0.974, "interval": [0.95, 1.01]}
    sure = {"confidence": {"rows": {"auto": {"kept_30": figure}}}}
    with_it, without = card("sure", 0.4), card("plain", 0.5)
    rows = board.leaderboard_rows([with_it | {"results": with_it["results"] | sure}, without], [])
    assert names(rows) == ["plain", "sure"], "it does not rank"
    lines = board.render_markdown(rows).splitlines()
    assert lines[2].endswith("| Top 30% |")
    assert lines[4].endswith("| – |")
    assert lines[5].endswith("| 97.40 [95.0, 100.0] |")
