"""A picture of the page of `wavedraft web` in the middle of a race, from a real race in a real Chromium."""

import argparse
import shutil
import sys
import tempfile
import time
from io import BytesIO

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from wavedraft.web.page import LOOK, web_page
from wavedraft.web.race import BESIDE
from wavedraft.web.racer import Racer

PROMPT = "Give a JSON object that describes a small bookshop: name, address and three books with their prices."
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1100,1200")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--output", required=True)
    parser.add_argument("--num-tokens", type=int, default=24, help="plain decoding has so many when it is drawn")
    arguments = parser.parse_args()
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        sys.exit("The picture of the web page needs Chromium: apt-get install chromium chromium-driver")
    racer = Racer.load(
        model=arguments.model, adapter=arguments.adapter, dtype="auto", device="cpu", packed_weights=None, compile=False
    )
    page = web_page(racer)
    _, address, _ = page.launch(quiet=True, prevent_thread_lock=True, server_name="127.0.0.1", **LOOK)
    Image.open(BytesIO(picture(address, arguments.num_tokens))).convert("RGB").quantize(64).save(
        arguments.output, optimize=True
    )
    racer.stop_all()
    page.close(verbose=False)


def picture(address: str, num_tokens: int) -> bytes:
    """A PNG of the page when plain decoding has written so many tokens, and ours is shown beside it."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def shown(part: str) -> str:
        return browser.execute_script("return document.getElementById(arguments[0])?.innerText", part) or ""

    try:
        browser.get(address)
        while not shown("prompt"):
            time.sleep(0.1)
        browser.find_element("css selector", "#prompt textarea").send_keys(PROMPT)
        browser.find_element("id", "race").click()
        words = f" {num_tokens} tokens"
        while BESIDE not in shown("status") or words not in shown("plain"):
            time.sleep(0.02)
        browser.execute_script("document.getElementById('prompt').scrollIntoView()")
        return browser.get_screenshot_as_png()
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
