"""The leaderboard's page: what stands in it, and what a real browser makes of it (skipped where there is none)."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from eval import leaderboard as board
from eval.page import page, train_command
from model_zoo.registry import read_cards
from rb_noisy.commands.settings import parse_settings
from rb_noisy.recipes import Recipe
from tests.browser import (
    ENTER,
    ESCAPE,
    HOSTILE,
    RIGHT,
    assert_quiet,
    assert_readable,
    needs_browser,
    open_browser,
    press,
)
from tests.browser import show as show_in

CARDS = read_cards()


def hostile_card():
    card = json.loads(json.dumps(CARDS[0]))
    return card | {"name": HOSTILE, "method": HOSTILE, "architecture": HOSTILE, "authors": HOSTILE, "venue": HOSTILE}


@pytest.fixture(scope="module")
def html():
    cards = [*CARDS, hostile_card()]
    return page(board.leaderboard_rows(cards, board.published_rows()), cards)


def test_every_row_stands_in_the_page_and_opens_a_card(html):
    published = len(board.published_rows())
    assert html.count("<dialog") == len(re.findall(r'<tr id="row-', html)) == len(CARDS) + 1 + published
    assert html.count("as published</span>") == 2 * published
    assert "<small>n=540</small>" in html


def test_nothing_outside_the_page_is_asked_for(html):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.extend(v for k, v in attributes if k in ("src", "href"))
    parser.feed(html)
    assert sorted(found) == ["#main", "data:,"]
    assert "default-src 'none'" in html
    assert not re.findall(r"@import|url\(", html)


def test_hostile_names_are_text(html):
    assert html.count("<script>") == 1
    assert "&lt;script&gt;window.hacked" in html
    assert "<img" not in html


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_the_command_of_a_card_gives_its_recipe_again(card):
    words = shlex.split(train_command(card["recipe"], "runs/x"))
    assert words[:2] == ["rb-noisy", "train"]
    named, settings = {}, []
    for option, value in zip(words[2::2], words[3::2], strict=True):
        if option == "--set":
            settings.append(value)
        elif option != "--out":
            named[option[2:].replace("-", "_")] = value
    numbers = {name: type_(named[name]) for name, type_ in (("noise_rate", float), ("epochs", int)) if name in named}
    assert Recipe.from_dict(named | numbers | parse_settings(settings)) == Recipe.from_dict(card["recipe"])


def test_the_command_writes_the_page(tmp_path):
    result = CliRunner().invoke(board.app, ["--dataset", "digits", "--html", str(tmp_path / "board.html")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert "sglr_digits" in text
    assert "KD-SWA" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def address(html, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "board.html"
    file.write_text(html, encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def show(browser, address):
    def open_page(state="", width=1280, scheme="light"):
        return show_in(browser, f"{address}{state}", width, scheme)

    return open_page


def column(browser, key):
    script = """const heads = [...document.querySelectorAll('#board th[data-key]')];
    const i = heads.findIndex(h => h.dataset.key === arguments[0]);
    return [...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden).map(r => r.cells[i].dataset.sort)"""
    return browser.execute_script(script, key)


@needs_browser
def test_columns_sort_by_click_and_by_keyboard_with_what_is_missing_last(show):
    browser = show()
    button = browser.find_element("css selector", "th[data-key=autoattack] button")
    button.click()
    values = column(browser, "autoattack")
    known = [float(value) for value in values if value]
    assert known == sorted(known, reverse=True)
    assert not any(values[len(known) :])
    press(browser, ENTER)
    values = column(browser, "autoattack")
    assert [float(value) for value in values[: len(known)]] == sorted(known)
    head = browser.find_element("css selector", "th[data-key=autoattack]")
    assert head.get_attribute("aria-sort") == "ascending"
    assert "sort=autoattack" in browser.current_url


@needs_browser
def test_filters_keep_their_state_in_the_address(show):
    browser = show()
    browser.execute_script(
        """const s = document.querySelector('[data-filter=dataset]');
        s.value = 'mnist'; s.dispatchEvent(new Event('change'))"""
    )
    assert set(column(browser, "dataset")) == {"mnist"}
    browser = show("#" + browser.current_url.partition("#")[2])
    assert set(column(browser, "dataset")) == {"mnist"}
    assert len(browser.find_elements("css selector", "#scatter .point")) == 2


@needs_browser
def test_a_card_opens_by_click_by_link_and_from_the_scatter_and_closes_by_escape(show):
    browser = show("#card=sglr_digits")
    opened = "return document.querySelector('dialog[open] h2')?.textContent ?? null"
    assert browser.execute_script(opened) == "sglr_digits"
    assert browser.find_elements("css selector", "dialog[open] svg[role=img]")[0].is_displayed()
    press(browser, ESCAPE)
    assert browser.execute_script(opened) is None
    assert "card=" not in browser.current_url
    browser.find_element("css selector", "#board tbody .name button").click()
    assert browser.execute_script(opened)
    press(browser, ESCAPE)
    browser.execute_script("document.querySelector('#scatter .point[tabindex=\"0\"]').focus()")
    press(browser, RIGHT)
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    assert "AutoAttack" in tip.text
    press(browser, ENTER)
    assert browser.execute_script(opened) == tip.get_attribute("textContent").split(",")[0]


@needs_browser
def test_no_error_no_request_and_no_hostile_script(browser, show):
    assert_quiet(browser, show)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@needs_browser
@pytest.mark.parametrize("state", ["", "#card=sglr_digits"])
def test_a_phone_never_scrolls_sideways(show, state):
    browser = show(state, width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    wide = "const d = document.querySelector('dialog[open]'); return d ? d.scrollWidth - d.clientWidth : 0"
    assert browser.execute_script(wide) == 0


@needs_browser
def test_text_is_readable_in_light_and_in_dark(show):
    parts = ["body", ".muted", "#board small", "#board .name button", "#board thead button"]
    seen = {scheme: assert_readable(show(scheme=scheme), parts) for scheme in ("light", "dark")}
    assert seen["light"][0][2] != seen["dark"][0][2]
