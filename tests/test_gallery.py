"""The page of suspicious labels, in a real browser where there is one, and the way of its corrections into the data."""

import base64
import csv
import html
import io
import itertools
import json
import math
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rb_noisy.cli import app
from rb_noisy.corrections import save_npz
from rb_noisy.data import Dataset, load_data
from rb_noisy.errors import InputError
from rb_noisy.gallery import gallery, write_gallery
from rb_noisy.label_issues import LabelIssues
from tests.browser import (
    DOWN,
    ESCAPE,
    HOSTILE,
    LEFT,
    RIGHT,
    assert_quiet,
    assert_readable,
    needs_browser,
    open_browser,
    press,
    show,
)

NAMES = ("cat, tabby", 'the "dog"', HOSTILE, "Hündin\r\nalt", " =1+1")
N = 24
GIVEN = torch.arange(N) % 5
SUGGESTED = (GIVEN + torch.arange(N) // 5) % 5  # the first five agree with the given label
SEEDS = itertools.count()
FILES = [f"{c}/some folder/a,b {i:03d} {HOSTILE[:10]}.png" for i, c in enumerate(GIVEN.tolist())]


def issues(order=None):
    order = torch.arange(N).flip(0) if order is None else order
    kappa, score = torch.linspace(0, 9, N).double(), torch.linspace(1, 0, N).double()
    kappa[0] = math.nan
    return LabelIssues(order, GIVEN[order], SUGGESTED[order], kappa, 9 - kappa, score, 0.25, NAMES)


@pytest.fixture
def data():
    """Other images for each test, so that no page has the decisions of an earlier one."""
    x = torch.randint(0, 256, (N + 5, 3, 8, 8), generator=torch.Generator().manual_seed(next(SEEDS))).float() / 255
    return Dataset("mine", x[:N], GIVEN, x[N:], torch.arange(5), NAMES)


def facts(text):
    return json.loads(html.unescape(re.search(r'data-facts="([^"]*)"', text)[1]))


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_the_page_shows_the_worst_first_as_text_and_asks_for_nothing(data):
    text = gallery(issues(), data.x_train, "mine", top=10, files=FILES, command="do <this>")
    assert text.count('<li class="sample"') == 10
    found = facts(text)
    assert found["samples"][0] == [N - 1, int(GIVEN[-1]), int(SUGGESTED[-1]), FILES[-1]]
    assert found["classes"] == list(NAMES)
    assert "The 10 most suspicious of 24" in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;window.hacked" in text
    assert "do &lt;this&gt;" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {source.partition(",")[0] for source in sources} == {"#main", "data:", "data:image/png;base64"}
    assert not re.findall(r"https?:|@import|url\(", text)
    assert "default-src 'none'; img-src data:" in text


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_small_images_are_kept_exactly(channels, data):
    x = torch.randint(0, 256, (N, channels, 5, 7)) / 255
    text = gallery(issues(), x, "mine")
    found = re.findall(r'<img src="([^"]*)" width="(\d+)" height="(\d+)"', text)
    assert {(width, height) for _, width, height in found} == {("154", "110")}
    with picture(found[0][0]) as image:
        pixels = np.asarray(image)
    expected = (x[N - 1] * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(pixels, expected[:3].permute(1, 2, 0) if channels > 2 else expected[0])


def picture(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_large_images_are_reduced(data):
    text = gallery(issues(), torch.rand(N, 3, 300, 600), "mine", top=1)
    address, width, height = re.search(r'<img src="([^"]*)" width="(\d+)" height="(\d+)"', text).groups()
    assert (width, height) == ("160", "80")
    with picture(address) as image:
        assert (image.format, image.size) == ("JPEG", (256, 128))


def test_decisions_are_kept_by_data_and_not_by_ranking(data):
    key = facts(gallery(issues(), data.x_train, "mine"))["key"]
    assert facts(gallery(issues(torch.arange(N)), data.x_train, "other", top=3))["key"] == key
    assert facts(gallery(issues(), 1 - data.x_train, "mine"))["key"] != key


def test_a_page_of_nothing_or_without_its_images_is_refused(data):
    for images, files, top, words in ((data.x_train, None, 0, "top of at least 1"), (data.x_train[:9], None, 5, "23")):
        with pytest.raises(InputError, match=words):
            gallery(issues(), images, "mine", top=top, files=files)


def test_from_an_image_folder_to_its_page_and_back(tmp_path):
    random = np.random.default_rng(0)
    names = ('a "b", <b>', "dog")
    for split, count in (("train", 10), ("test", 4)):
        for name in names:
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random.integers(0, 256, (8, 8), np.uint8))
                image.save(tmp_path / "pets" / split / name / f"{i:02d}.png")
    settings = ["backbone=resnet8_narrow", "steps=2", "batch_size=16", "augment=false", "track=4", "track_steps=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    source = f"imagefolder:{tmp_path / 'pets'}"
    result = call("label-issues", "--data", source, "--epochs", 1, "--html", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "label_issues.html" in result.output
    text = (tmp_path / "out/label_issues.html").read_text(encoding="utf-8")
    found = facts(text)
    assert len(found["samples"]) == text.count('<li class="sample"') == 20
    assert "All 20 training samples" in text
    index, given, _, file = found["samples"][0]
    assert file == f"{names[given]}/{index % 10:02d}.png"
    assert f"rb-noisy apply-corrections --data {source} corrections.csv" in html.unescape(text)

    with open(tmp_path / "corrections.csv", "w", newline="", encoding="utf-8") as written:
        rows = [["index", "file", "given", "suggested", "label"], [index, file, names[given], "", names[1 - given]]]
        csv.writer(written).writerows(rows)
    asked = ["apply-corrections", "--data", source, tmp_path / "corrections.csv", "--out", tmp_path / "corrected.npz"]
    result = call(*asked)
    assert result.exit_code == 0, result.output
    assert "1 of 20 training labels corrected" in result.output
    before, after = load_data(source), load_data(f"npz:{tmp_path / 'corrected.npz'}")
    assert (after.y_train != before.y_train).nonzero().tolist() == [[index]]
    assert after.class_names == before.class_names
    for part in ("x_train", "x_test", "y_test"):
        assert torch.equal(getattr(after, part), getattr(before, part))
    again = call(*asked)
    assert again.exit_code == 2
    assert "is not overwritten" in again.output

    (tmp_path / "pets/train" / names[given] / "000.png").write_bytes(
        (tmp_path / "pets/train" / file).read_bytes()
    )  # it moves the other files on by one
    moved = call(*asked[:-1], tmp_path / "moved.npz")
    assert moved.exit_code == 2
    assert "files were added or removed" in moved.output
    assert not (tmp_path / "moved.npz").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(folder):
    with open_browser(folder) as driver:
        yield driver


@pytest.fixture
def page(data, folder):
    write_gallery(folder / "page.html", issues(), data.x_train, "mine", files=FILES)
    return folder / "page.html"


@pytest.fixture
def fresh(browser, page):
    return load(browser, page.as_uri())


def load(browser, address, **how):
    return loaded(show(browser, address, **how))


def loaded(browser):
    """The page with the decisions that the browser keeps, which come after it."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 10, 0.02).until(lambda b: not b.find_elements("css selector", "#samples[aria-busy=true]"))
    return browser


def states(browser):
    """{index: decision} of the samples that are shown, in their order."""
    return dict(
        browser.execute_script(
            """const { samples } = JSON.parse(document.querySelector('#main').dataset.facts);
            return [...document.querySelectorAll('.sample')].map((e, i) => [e, [samples[i][0], e.dataset.state]])
              .filter(([e]) => !e.hidden).map(([e, pair]) => pair)"""
        )
    )


def choose(browser, selector, value):
    browser.execute_script(
        """const e = document.querySelector(arguments[0]); e.value = arguments[1];
        for (const name of ['input', 'change']) e.dispatchEvent(new Event(name, {bubbles: true}))""",
        selector,
        str(value),
    )


def pick(browser, index, label):
    """Choose another class for a sample with the mouse, as a user does: the list is filled by that."""
    select = browser.find_element("css selector", sample(index) + " select")
    assert len(select.find_elements("css selector", "option")) == 1
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", select)
    select.click()
    select.find_element("css selector", f"option[value='{label}']").click()


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def focused(browser):
    """The index of the sample that has the focus, or what has it."""
    script = (
        "const e = document.activeElement; return e.matches('.sample') ? e.querySelector('h2').innerText : e.tagName"
    )
    return browser.execute_script(script)


def sample(index):
    return f".sample:nth-child({N - index})"


@needs_browser
def test_filters_by_class_decision_and_name_stand_in_the_address(fresh, browser):
    assert list(states(browser)) == list(range(N - 1, -1, -1))
    choose(browser, "[data-filter=given]", 2)
    assert list(states(browser)) == [22, 17, 12, 7, 2]
    choose(browser, "[data-filter=suggested]", 4)
    assert list(states(browser)) == [12]
    assert list(states(load(browser, browser.current_url))) == [12]
    choose(browser, "[data-filter=find]", "nothing like it")
    assert browser.find_element("id", "none").is_displayed()
    click(browser, "#reset-too")
    assert len(states(browser)) == N
    choose(browser, "[data-filter=find]", "A,B 01")
    assert list(states(browser)) == list(range(19, 9, -1))
    choose(browser, "[data-filter=find]", "#7")
    assert list(states(browser)) == [7]
    click(browser, sample(7) + " [data-choose=suggested]")
    choose(browser, "[data-filter=find]", "")
    choose(browser, "[data-filter=decision]", "accepted")
    assert states(browser) == {7: "accepted"}
    assert "1 of 24 samples shown" in browser.find_element("id", "count").text


@needs_browser
def test_keys_move_decide_and_undo(fresh, browser):
    browser.execute_script("document.querySelector('#reset').focus()")
    press(browser, "\ue004")
    assert focused(browser) == "1. #23"
    outline = "return getComputedStyle(document.activeElement).outline"
    assert "solid" in browser.execute_script(outline)
    press(browser, "a")
    assert focused(browser) == "2. #22"
    press(browser, "k")
    press(browser, RIGHT, RIGHT, LEFT)
    assert focused(browser) == "4. #20"
    columns = len(browser.execute_script("return getComputedStyle(samples).gridTemplateColumns").split())
    press(browser, DOWN)
    assert focused(browser).startswith(f"{4 + columns}.")
    press(browser, "c")
    assert focused(browser) == "SELECT"
    press(browser, "t")  # the class of that letter, and not a key of the page
    press(browser, ESCAPE)
    there = 20 - columns
    assert states(browser) == dict.fromkeys(range(N), "undecided") | {
        23: "accepted",
        22: "kept",
        there: "another class",
    }
    press(browser, "u")
    assert states(browser)[there] == "undecided"
    press(browser, "z", "z", "z", "z", "z")
    assert set(states(browser).values()) == {"undecided"}
    assert focused(browser) == "1. #23"
    press(browser, LEFT)
    assert focused(browser) == "1. #23"


@needs_browser
def test_all_shown_are_accepted_but_for_what_is_decided_and_that_is_undone(fresh, browser):
    click(browser, sample(17) + " [data-choose=given]")
    choose(browser, "[data-filter=given]", 2)
    click(browser, "#accept")
    assert states(browser) == {22: "accepted", 17: "kept", 12: "accepted", 7: "accepted", 2: "kept"}
    assert browser.find_element("id", "decided").text == "5 of 24 decided: 3 accepted, 2 kept, 0 other"
    assert not browser.find_element("id", "accept").is_enabled()
    click(browser, "#undo")
    assert states(browser) == dict.fromkeys([22, 12, 7, 2], "undecided") | {17: "kept"}
    click(browser, sample(17) + " [data-choose=given]")
    assert states(browser)[17] == "undecided", "a second click takes it back"


@needs_browser
def test_decisions_survive_a_reload_and_another_page_of_the_data(fresh, browser, data, folder):
    click(browser, sample(23) + " [data-choose=suggested]")
    click(browser, sample(1) + " [data-choose=given]")
    pick(browser, 9, 1)
    decided = {23: "accepted", 1: "kept", 9: "another class"}
    browser.refresh()
    loaded(browser)
    assert {index: state for index, state in states(browser).items() if state != "undecided"} == decided
    assert browser.execute_script("return document.querySelector(arguments[0]).value", sample(9) + " select") == "1"
    write_gallery(folder / "short.html", issues(), data.x_train, "mine", top=2)
    load(browser, (folder / "short.html").as_uri())
    assert states(browser) == {23: "accepted", 22: "undecided"}
    click(browser, ".sample:nth-child(2) [data-choose=given]")
    load(browser, (folder / "page.html").as_uri())
    assert {i: s for i, s in states(browser).items() if s != "undecided"} == decided | {22: "kept"}
    assert not browser.find_element("id", "unkept").is_displayed()


@needs_browser
def test_a_browser_that_keeps_nothing_says_so_and_goes_on(browser, data):
    text = gallery(issues(), data.x_train, "mine", top=3)
    load(browser, "data:text/html;base64," + base64.b64encode(text.encode()).decode())
    assert browser.find_element("id", "unkept").is_displayed()
    click(browser, "[data-choose=suggested]")
    assert states(browser) == {23: "accepted", 22: "undecided", 21: "undecided"}


@needs_browser
def test_the_downloaded_corrections_give_the_corrected_labels(fresh, browser, data, folder):
    assert not browser.find_element("id", "download").is_enabled()
    click(browser, sample(1) + " [data-choose=given]")
    for index in (23, 22, 21, 20, 19):
        click(browser, sample(index) + " [data-choose=suggested]")
    pick(browser, 9, 3)
    choose(browser, "[data-filter=decision]", "kept")
    click(browser, "#download")
    file = folder / "corrections.csv"
    for _ in range(100):
        if file.is_file():
            break
        time.sleep(0.05)
    with open(file, newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["index", "file", "given", "suggested", "label"]
    label = {index: int(SUGGESTED[index]) for index in (23, 22, 21, 20, 19)} | {9: 3}
    assert rows == [[str(i), FILES[i], NAMES[GIVEN[i]], NAMES[SUGGESTED[i]], NAMES[new]] for i, new in label.items()]

    save_npz(data, folder / "mine.npz")
    source, out = f"npz:{folder / 'mine.npz'}", folder / "corrected.npz"
    result = call("apply-corrections", "--data", source, file, "--out", out)
    assert result.exit_code == 0, result.output
    corrected = load_data(f"npz:{out}")
    expected = [label.get(i, int(given)) for i, given in enumerate(GIVEN)]
    assert corrected.y_train.tolist() == expected
    assert torch.equal(corrected.x_train, data.x_train)
    assert corrected.class_names == NAMES


@needs_browser
def test_a_phone_never_scrolls_sideways(fresh, browser, page):
    click(browser, sample(23) + " [data-choose=suggested]")
    load(browser, page.as_uri(), width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    click(browser, "summary")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360


@needs_browser
def test_text_is_readable_in_light_and_in_dark(fresh, browser, page):
    click(browser, sample(23) + " [data-choose=suggested]")
    click(browser, sample(22) + " [data-choose=given]")
    parts = ["body", ".muted", ".file", ".labels b", "dt", sample(23) + " .state", sample(22) + " .muted"]
    parts += ["[aria-pressed=true]", "[aria-pressed=false]", "footer p", "#download"]
    seen = [assert_readable(load(browser, page.as_uri(), scheme=scheme), parts) for scheme in ("light", "dark")]
    assert seen[0][0][2] != seen[1][0][2]


@needs_browser
def test_no_error_no_request_and_no_hostile_script(fresh, browser, page):
    assert_quiet(browser, lambda: load(browser, page.as_uri()))
