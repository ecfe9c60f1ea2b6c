"""`wavedraft web` in a real Chromium: load, type, race, stop, and what an error looks like."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers_browser import RacePage, open_browser
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer

pytest.importorskip("gradio", reason="no gradio: pip install 'wavedraft[web]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "checkpoints" / "austen-recurrent-6m"
COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from wavedraft_command import main; sys.exit(main())"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    tiny_tidar("qwen3").save_pretrained(folder)
    save_tokenizer(folder, num_words=61)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<tool> {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(checkpoint):
    """The address of the page, served by the command itself."""
    command = [sys.executable, "-c", COMMAND, str(ROOT), "web", str(checkpoint), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("The page is at http://127.0.0.1:"), line + process.stderr.read()
        yield re.search(r"http://\S+", line)[0]
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
        assert (process.returncode, printed) == (0, "") and said.startswith("Next: wavedraft bench"), said


def test_a_race_is_typed_run_and_traced(browser, served, checkpoint):
    page = RacePage(browser, served)
    assert str(checkpoint) in browser.find_element("tag name", "body").text
    page.open_settings()
    page.enter("max_new_tokens", "60")
    page.choose("num_branches", "all")
    page.enter("prompt", "w3 w1 w4 w1 w5")
    page.click("race")
    told = page.wait_to_see("times its speed")
    assert "60 tokens" in told and "The texts are identical." in told
    text = page.text_of("parallel")
    assert len(text.split()) > 20 and text == page.text_of("plain")
    assert "60 tokens" in page.shown("parallel") and "59 forwards" in page.shown("plain")
    trace = page.trace()
    assert trace.count('class="token"') == 60 and "Drafted tokens that were accepted" in trace
    sources = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert sources and all(source.startswith((served, "data:")) for source in sources), sources
    page.click("race")  # what was raced before needs no warming up
    page.wait_to_see("runs, alone")
    page.wait_to_see("times its speed")


def test_a_race_is_stopped_and_the_next_one_runs(browser, served):
    page = RacePage(browser, served)
    page.open_settings()
    page.enter("max_new_tokens", "100000")
    page.choose("num_branches", "all")
    page.enter("prompt", "w3 w1 w4")
    page.click("race")
    page.wait_for(lambda: len(browser.find_elements("css selector", "#parallel .odd")) > 2, "some text")
    drafts = "return window.drafts.size"
    page.wait_for(lambda: browser.execute_script(drafts) > 2, "drafts")
    page.click("stop")
    page.wait_to_see("Stopped.")
    assert page.text_of("parallel") and "stopped" in page.trace()
    page.enter("max_new_tokens", "8")
    page.click("race")
    page.wait_to_see("times its speed")


@pytest.mark.parametrize(
    ("prompt", "setting", "value", "error"),
    [
        ("", "max_new_tokens", "8", "There is no prompt. Type one above."),
        ("w1", "top_k", "3", "Top k is for sampling: give a Temperature above 0"),
        ("w1", "top_p", "7", "Top p must be a number from 0.0 to 1.0, but is '7'."),
        ("w1", "seed", "4", "Seed is for sampling"),
    ],
)
def test_a_wrong_input_is_told_on_the_page(browser, served, prompt, setting, value, error):
    page = RacePage(browser, served)
    page.open_settings()
    page.enter(setting, value)
    page.enter("prompt", prompt)
    page.click("race")
    assert error in page.wait_to_see(error)
    assert browser.find_element("css selector", "#status .failed").get_attribute("role") == "alert"


def test_a_list_of_settings_is_the_families(browser, served):
    page = RacePage(browser, served)
    page.open_settings()
    assert page.shown("draft_length") is not None and page.shown("policy") is None
    page.choose("draft_length", "0")
    page.choose("num_branches", "2")
    page.enter("prompt", "w1")
    page.click("race")
    assert "Branches has no effect with Draft length 0" in page.wait_to_see("no effect")


def test_a_recurrent_depth_model_races_its_policies(browser):
    from wavedraft.web.page import LOOK, web_page
    from wavedraft.web.racer import Racer

    fixed = {"adapter": None, "packed_weights": None, "compile": False, "dtype": "auto", "device": "cpu"}
    gradio_page = web_page(Racer.load(model=str(SHIPPED), **fixed))
    _, address, _ = gradio_page.launch(quiet=True, prevent_thread_lock=True, server_name="127.0.0.1", **LOOK)
    try:
        page = RacePage(browser, address)
        page.open_settings()
        assert page.shown("draft_length") is not None and page.shown("num_branches") is None
        page.choose("policy", "exact")
        page.enter("max_new_tokens", "24")
        page.enter("prompt", "Emma Woodhouse, handsome, clever, and rich, had")
        page.click("race")
        told = page.wait_to_see("times its speed")
        assert "core passes" in told and "The texts are identical." in told
        assert "forwards" not in page.shown("parallel").split("\n")[1]
        assert "The wavefront: places after the prompt" in page.trace()
    finally:
        gradio_page.close(verbose=False)
