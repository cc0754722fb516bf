"""A headless Chromium for tests of pages; they are skipped where there is none."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on the PATH")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"&"
ENTER, ESCAPE, LEFT, UP, RIGHT, DOWN = "\ue007", "\ue00c", "\ue012", "\ue013", "\ue014", "\ue015"


@contextmanager
def open_browser(folder):
    """A browser that downloads into `folder` and keeps its profile there."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        downloads = {"behavior": "allow", "downloadPath": str(folder)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
        yield driver
    finally:
        driver.quit()


def show(browser, address, width=1280, scheme="light"):
    """Load a page afresh, at a width of the window and in a colour scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get(address)
    return browser


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def assert_quiet(browser, open_page):
    """The page that `open_page` opens, like those before it, logs no error; it asks for nothing and runs no name."""
    browser.get_log("performance")  # the browser's own start page
    open_page()
    assert browser.execute_script("return window.hacked ?? null") is None
    assert [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "about:", "data:"))] == []


def assert_readable(browser, selectors):
    """The text of each selector's first element has a contrast of at least 4.5 to what is behind it."""
    script = """return arguments[0].map(s => {
      let e = document.querySelector(s); const text = getComputedStyle(e).color;
      while (e.parentElement && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
      return [s, text, getComputedStyle(e).backgroundColor]})"""
    colours = browser.execute_script(script, selectors)
    for selector, text, ground in colours:
        assert _contrast(text, ground) >= 4.5, (selector, text, ground)
    return colours


def _contrast(first, second):
    def luminance(colour):
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
