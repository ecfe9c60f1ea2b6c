"""A real Chromium without a window, and a page of `wavedraft web` in it."""

import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

# As root, without a network: what Chromium looks for at Google's hosts is turned off.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1300"),
)
WAIT = 120.0  # seconds, on a busy machine
# Notes everything dim that was ever on the page, and how many requests went elsewhere.
WATCH = """
window.drafts = new Set();
new MutationObserver(() => document.querySelectorAll(".draft").forEach(e => window.drafts.add(e.textContent)))
    .observe(document.body, {childList: true, subtree: true});
"""


def open_browser(folder: Any) -> Any:
    """Chromium, with a new profile in a folder. Skips the test, with a warning, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        reason = f"the web page is NOT tested in a browser: no {' and no '.join(missing)} on this machine"
        warnings.warn(f"{reason} (apt-get install chromium chromium-driver)", stacklevel=2)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))


class RacePage:
    """What somebody does on the page, and sees."""

    def __init__(self, browser: Any, address: str):
        self.browser = browser
        browser.get(address)
        self.wait_for(lambda: self.shown("prompt") is not None, "the page")
        browser.execute_script(WATCH)

    def shown(self, name: str) -> str | None:
        """The text of a part of the page, by its id."""
        return self.browser.execute_script("return document.getElementById(arguments[0])?.innerText", name)

    def enter(self, name: str, text: str) -> None:
        """Types into a field, in place of what it held."""
        field = self.browser.find_element("css selector", f"#{name} textarea, #{name} input")
        field.clear()
        field.send_keys(text)

    def choose(self, name: str, word: str) -> None:
        """Chooses from a list."""
        self.browser.find_element("css selector", f"#{name} input").click()

        def is_chosen() -> bool:
            listed = self.browser.find_elements("css selector", "ul[role=listbox] li")
            options = [option for option in listed if option.text.strip() == word]
            if options:
                options[0].click()
            return bool(options)

        self.wait_for(is_chosen, word)

    def open_settings(self) -> None:
        self.click("settings")
        self.wait_for(lambda: self.shown("seed"), "the settings")

    def click(self, name: str) -> None:
        self.browser.find_element("css selector", f"#{name} button, button#{name}").click()

    def wait_for(self, is_there: Callable[[], Any], what: str) -> None:
        """Waits until a condition holds. An element that is drawn anew meanwhile is looked for again."""
        from selenium.common.exceptions import StaleElementReferenceException

        def holds() -> bool:
            try:
                return bool(is_there())
            except StaleElementReferenceException:
                return False

        end = time.monotonic() + WAIT
        while not holds():
            assert time.monotonic() < end, f"{what} did not come; the page shows: {self.shown('status')}"
            time.sleep(0.05)

    def wait_to_see(self, words: str, name: str = "status") -> str:
        """What a part of the page shows when these words are in it."""
        self.wait_for(lambda: words in (self.shown(name) or ""), words)
        return self.shown(name) or ""

    def text_of(self, lane: str) -> str:
        """The text of a lane, `parallel` or `plain`."""
        return self.browser.find_element("css selector", f"#{lane} .text").get_property("textContent")

    def trace(self) -> str:
        """All text of the trace. The frame is one that runs no scripts."""
        frame = self.browser.find_element("css selector", "#trace iframe")
        assert frame.get_attribute("sandbox") == ""
        return frame.get_attribute("srcdoc")
