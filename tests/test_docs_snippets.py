"""What README and docs show is run: Python on a tiny model, commands as far as the command line reads them.

A block that is not run has the reason before it: `<!-- not run: needs a GPU -->`.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import logging as transformers_logging

from helpers_commands import VERBS, check_command, check_script
from helpers_tidar import gated, tiny_tidar, with_random_head
from helpers_tokenizers import WORDS, word_tokenizer
from wavedraft import TiDARForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^(make|wavedraft|python|pip|accelerate|\.venv/bin/\w+) ", re.M)
INLINE = re.compile(r"`([^`]+)`")
MODEL = "models/SmolLM2-135M-Instruct-TiDAR"
ADAPTER = "adapters/smollm2-135m-instruct-gated"


class Block(NamedTuple):
    """A fenced block of a page; `reason` says why it is not run."""

    language: str
    text: str
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    return [Block(found["language"], found["text"], found["reason"]) for found in BLOCK.finditer(text)]


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command of a block of them, continued lines joined, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder that has what the snippets load: tiny random models in the places of the real ones."""
    folder, tokenizer = tmp_path_factory.mktemp("snippets"), word_tokenizer(unk_token="the")
    shape = {"vocab_size": len(WORDS), "draft_length": 8, "eos_token_id": 1}
    model = tiny_tidar(**shape)
    model.generation_config.num_branches = None
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    gated(tiny_tidar(**shape)).save_pretrained(folder / "peft")
    model = TiDARForCausalLM.from_pretrained(folder / MODEL)
    model.load_adapter(str(folder / "peft"))
    with_random_head(model).save_pretrained(folder / ADAPTER)
    row = {"prompt": "the cat sat", "answer": "on a mat and slept all day on the mat and slept on a cat"}
    (folder / ADAPTER / "self_written.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


def run_python(page: Path, monkeypatch, folder: Path) -> None:
    """Runs the Python of a page, each block after those before it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["snippet"])
    names: dict = {"__name__": "snippet"}
    for number, block in enumerate(blocks_of(page.read_text(encoding="utf-8"))):
        if block.language == "python" and block.reason is None:
            exec(compile(block.text, f"{name_of(page)}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_the_python_of_a_page_runs(page, folders, monkeypatch, capsys):
    state = torch.random.get_rng_state()
    run_python(page, monkeypatch, folders)
    torch.random.set_rng_state(state)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / MODEL).is_dir(), reason="no real checkpoint: run `make demo` first")
def test_the_snippet_of_the_readme_prints_only_a_real_answer(monkeypatch, capfd):
    transformers_logging.disable_progress_bar()
    run_python(ROOT / "README.md", monkeypatch, ROOT)
    transformers_logging.enable_progress_bar()
    printed = capfd.readouterr()
    assert "def count_vowels" in printed.out and "counts the vowels in a string" not in printed.out
    assert not printed.err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_are_ones(page):
    """Each line of a block of commands is a verb of ours with its options, a target of make, or a script with its
    options. Others stand in blocks with a reason."""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "" and (block.reason or COMMAND.search(block.text)):
            for words in commands_of(block.text):
                check_command(words, block.reason)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_a_sentence_have_their_options(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)  # tables that a command wrote tell how it was called
    for code in INLINE.findall(text):
        words = code.split()
        if words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            check_script(words)
        if words[:1] != ["wavedraft"] or len(words) < 2 or not words[1].islower() or words[1].startswith("-"):
            continue
        command = VERBS
        for verb in words[1:]:
            if not hasattr(command, "commands"):
                break
            assert verb in command.commands, code
            command = command.commands[verb]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert not {word for word in words if word.startswith("--")} - known - {"--help"}, code


def test_a_block_that_is_not_run_is_seen_with_its_reason():
    text = "<!-- not run: a server -->\n```\nfoo\n```\n\n```python\nbar\n```\n"
    assert blocks_of(text) == [Block("", "foo\n", "a server"), Block("python", "bar\n", None)]
    for words in (["make", "nothing"], ["wavedraft", "generate", "m", "--no-such-option"], ["rm", "-r", "x"]):
        with pytest.raises(Exception, match=r"nothing|no-such-option|not run"):
            check_command(words, None)


def test_the_readme_is_short_and_no_page_tells_history():
    """Figures of earlier commits are gone, not dated. Tables that `make bench` writes say when."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 120
    for page in PAGES:
        text = re.sub(r"<!-- ([\w. ]+) -->.*?<!-- end of \1 -->", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r"20\d\d-\d\d-\d\d|commit [0-9a-f]{7}", text), page


def test_a_message_of_the_troubleshooting_page_is_one_of_ours():
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in (
            "generation",
            "modeling_tidar",
            "modeling_recurrent",
            "hub",
            "conversion",
            "training",
            "wavedraft",
        )
        for path in (ROOT / folder).rglob("*.py")
    )
    messages = re.findall(r"^\| (?:`` (.+?) ``|`(.+?)`) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    found = [one or other for one, other in messages]
    assert len(found) >= 30
    assert not [message for message in found if message.strip() not in sources]
