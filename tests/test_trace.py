"""`wavedraft generate --trace`: a picture has every token once, by its forward, and shows hostile text as text."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoTokenizer

from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft.cli import main
from wavedraft.generation.recurrent.outputs_recurrent import WavefrontStep
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM
from wavedraft.trace import Trace, TracedForward, TraceStreamer, WavefrontCell, wavefront_cells
from wavedraft.trace_picture import NUM_COLUMNS, Layout, cells, write_picture

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "austen-recurrent-6m"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "</title>",
    "<script>alert(1)</script>",
    "&lt;",
    "]]>",
    "\"'><img src=x>",
    "\x00\x1b]0;\x9b",
    "\ufffe",
    "日\n",
    "",
]
SIGNS = {"\x00\x1b]0;\x9b": "␀␛]0;\ufffd", "\ufffe": "\ufffd", "日\n": "日⏎", "": "·"}
ELEMENTS = {"html", "head", "meta", "title", "style", "body", "section", "svg", "g", "rect", "text"}


class Words:
    """A tokenizer whose tokens are hostile words."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(HOSTILE[i] for i in ids)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each token."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tokens = [("", {})], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.tokens += [""] * ("data-token" in dict(attributes))

    def handle_data(self, data):
        tag, attributes = self.elements[-1]
        if tag == "text" and "class" not in attributes and data.strip("\n"):
            self.tokens[-1] += data


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_the_page_of_a_drafting_model_has_every_token_and_forward(run, tmp_path):
    tiny_tidar(vocab_size=61).save_pretrained(tmp_path / "tidar")
    save_tokenizer(tmp_path / "tidar", num_words=56)
    path, plain = tmp_path / "trace.html", tmp_path / "trace.SVG"
    words = ["generate", tmp_path / "tidar", "w1 w2 w3", "w7 <b>", "--max-new-tokens", 9, "--raw", "--output", "json"]
    rows = [json.loads(line) for line in run(*words, "--trace", path).splitlines()]
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in run(*words).splitlines()]
    page = Page(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements[1:]} == ELEMENTS
    sections = re.findall("<section>.*?</section>", path.read_text(encoding="utf-8"), re.S)
    assert len(sections) == len(rows) == 2
    for section, row in zip(sections, rows, strict=True):
        forwards = re.findall(r'data-forward="(\d+)"', section)
        assert forwards == [str(number) for number in range(row["forwards"] + 1)]
        assert section.count("data-token") == row["tokens"]
        assert f">&gt; {row['prompt'].replace('<', '&lt;').replace('>', '&gt;')}</text>" in section
        assert f"{row['tokens']} tokens, {row['forwards']} forwards" in section
        assert row["forwards"] < 2 or "drafted: w" in section
    text = "".join(page.tokens)
    assert text.replace(" ", "") == "".join(row["text"] for row in rows).replace(" ", "")
    run(*words[:-2], "--trace", plain, "--compare")
    root = ElementTree.parse(plain).getroot()
    assert root.tag == f"{SVG}svg"
    assert sum("data-token" in element.attrib for element in root.iter()) == sum(row["tokens"] for row in rows)


@pytest.mark.parametrize("policy", ["exact", "diffusion-forcing", "self-speculative", "adaptive", "published"])
def test_the_picture_of_a_recurrent_model_has_every_token_and_decode_step(run, tmp_path, policy):
    path = tmp_path / "trace.svg"
    words = ["generate", SHIPPED, "It was a", "--policy", policy, "--max-new-tokens", 12, "--output", "json"]
    row = json.loads(run(*words, "--trace", path))
    root = ElementTree.parse(path).getroot()
    tokens = [element for element in root.iter() if "data-token" in element.attrib]
    assert [int(element.get("data-token")) for element in tokens] == list(range(row["tokens"]))
    shown = "".join(text.text for token in tokens for text in token.iter(f"{SVG}text"))
    assert shown == row["text"]
    titles = [element.text for element in root.iter(f"{SVG}title")]
    has_front = policy in ("exact", "diffusion-forcing", "published")
    assert has_front == any(title.startswith("Decode step") for title in titles)
    assert has_front == any(re.fullmatch(r"step \d+, place 1: .*, frozen", title, re.S) for title in titles)
    assert (policy == "self-speculative") == any("accepted: " in title for title in titles)


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_hostile_text_is_shown_and_not_obeyed(tmp_path, suffix):
    ids = list(range(len(HOSTILE)))
    forwards = [TracedForward([], [0]), TracedForward([1, 2, 3], ids[1:])]
    steps = [WavefrontStep(5, [0], ids[1:3], 1), WavefrontStep(6, ids[1:3], ids[3:], len(ids) - 2)]
    path = tmp_path / f"trace{suffix}"
    prompt = "".join(HOSTILE)
    write_picture(path, [Trace(prompt, "told", forwards, steps), Trace(prompt, "told", forwards)], Words())
    written = path.read_text(encoding="utf-8")
    page = Page(written)
    assert {tag for tag, _ in page.elements[1:]} <= ELEMENTS
    names = {name for _, attributes in page.elements for name in attributes}
    assert not any(name.startswith("on") or name in ("href", "src", "xlink:href") for name in names)
    assert "http" not in written.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    if suffix == ".html":
        assert page.tokens == [SIGNS.get(word, word) for word in HOSTILE] * 2
    else:
        root = ElementTree.parse(path).getroot()
        tokens = [element for element in root.iter() if "data-token" in element.attrib]
        shown = ["".join(text.text for text in token.iter(f"{SVG}text")) for token in tokens]
        assert shown == [SIGNS.get(word, word) for word in HOSTILE] * 2


def test_slots_count_what_was_accepted_and_judged():
    forwards = [
        TracedForward([], [9]),
        TracedForward([1, 2, 3], [1, 2, 3, 4]),  # all accepted
        TracedForward([1, 2, 3], [1, 7]),  # one accepted, two rejected
        TracedForward([1], [8]),
        TracedForward([], [5]),
        TracedForward([1, 2, 3], [1, 2]),  # the text ended before the third
    ]
    assert [forward.num_accepted for forward in forwards] == [0, 3, 1, 0, 0, 2]
    assert Trace("", "", forwards).slots() == [(3, 4), (2, 3), (1, 2)]


def test_a_trace_accepts_what_the_decode_accepted():
    torch.manual_seed(0)
    model, accepted = tiny_tidar(vocab_size=5), torch.zeros(4, dtype=torch.long)
    for prompt in torch.randint(4, (6, 1, 5)):
        recorder = TraceStreamer()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=25,
            streamer=recorder,
            return_dict_in_generate=True,
        )
        prefill, *forwards = recorder.forwards
        assert [*prefill.new_ids, *(i for f in forwards for i in f.new_ids)] == output.sequences[0, 5:].tolist()
        assert len(forwards) == output.num_forwards
        counts = torch.zeros(4, dtype=torch.long)
        for forward in forwards[:-1]:  # the last one may have accepted more than the text has room for
            counts[len(forward.new_ids) - 1] += 1
            assert len(forward.new_ids) == forward.num_accepted + 1
        more = output.accepted_lengths[0] - counts
        assert more.min() == 0 and more.sum() == 1
        accepted += counts
    assert accepted[1:].sum() > 0, "no draft was accepted: the test shows nothing"


def test_the_wavefront_tells_what_became_of_each_token():
    steps = [WavefrontStep(7, [1], [2], 0), WavefrontStep(7, [1, 2], [2, 3], 1), WavefrontStep(8, [2, 3], [4, 5], 0)]
    assert wavefront_cells(steps) == [
        [WavefrontCell(1, 2, "guessed")],
        [WavefrontCell(1, 2, "frozen"), WavefrontCell(2, 3, "guessed")],
        [WavefrontCell(2, 4, "changed"), WavefrontCell(3, 5, "guessed")],
    ]
    steps[2].predicted_ids[0] = 3
    assert wavefront_cells(steps)[2][0].state == "kept"


def test_tokens_are_laid_out_in_rows():
    layout = Layout()
    assert layout.place("ab\n\nc") == [(0, 0, "ab⏎"), (1, 0, "⏎"), (2, 0, "c")]
    assert layout.place("x" * NUM_COLUMNS) == [(3, 0, "x" * NUM_COLUMNS)], "it fits into a row of its own"
    parts = layout.place("日" * NUM_COLUMNS)
    assert "".join(part for *_, part in parts) == "日" * NUM_COLUMNS
    assert all(column + cells(part) <= NUM_COLUMNS for _, column, part in parts)


def test_the_published_decode_streams_its_first_token():
    model, tokenizer = RecurrentDepthForCausalLM.from_pretrained(SHIPPED).eval(), AutoTokenizer.from_pretrained(SHIPPED)
    inputs, recorder = tokenizer("It was a", return_tensors="pt"), TraceStreamer()
    ids = model.generate(**inputs, max_new_tokens=6, policy="published", streamer=recorder)[0]
    streamed = [token for forward in recorder.forwards for token in forward.new_ids]
    assert streamed == ids[inputs["input_ids"].shape[1] :].tolist()
