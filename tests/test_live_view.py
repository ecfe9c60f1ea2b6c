"""The view of an answer in a terminal: what stands on the screen after each forward, whatever its size."""

import random

import pytest
import torch
from rich.cells import cell_len

from helpers_terminal import Screen
from wavedraft import live_view
from wavedraft.growing_text import GrowingText
from wavedraft.live_view import CYAN, LiveView, fitting, printable

WORDS = ["a", " the", "\n", "日本", "語", " wide", "\n\n", ".", " e\u0301", "x" * 23, "🙂", " of"]


class Words:
    """A tokenizer whose tokens are words; with `BYTES`, single bytes of UTF-8 as well."""

    def decode(self, ids, skip_special_tokens):
        return b"".join(WORDS[i].encode() if i < len(WORDS) else bytes([i - len(WORDS)]) for i in ids).decode(
            errors="replace"
        )


@pytest.fixture
def terminal(monkeypatch):
    """Makes a screen of some size, and shows there what `LiveView` writes."""

    def terminal(width, height):
        screen = Screen(width, height)
        monkeypatch.setattr(live_view.shutil, "get_terminal_size", lambda: (screen.width, screen.height))
        monkeypatch.setattr(LiveView, "_write", lambda self, text: screen.write(text))
        return screen

    return terminal


def without_empty(rows):
    """Rows up to the last that has something."""
    return rows[: max((number for number, row in enumerate(rows, 1) if row), default=0)]


def wrapped(text, width):
    """The rows of a text in a terminal that wraps at `width` columns."""
    screen = Screen(width, 1000)
    screen.write(text)
    return screen.shown


def tokens(ids):
    return torch.tensor(ids)


@pytest.mark.parametrize("size", [(80, 24), (20, 6), (7, 5), (24, 3), (2, 2), (40, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_the_text_stays_and_the_draft_and_the_status_are_below_it(terminal, size, seed):
    numbers, screen, text = random.Random(seed), terminal(*size), ""
    view = LiveView(Words())
    view.put(tokens([[1, 2, 3]]))
    for _ in range(40):
        ids, draft = (numbers.choices(range(len(WORDS)), k=numbers.randint(1, 4)) for _ in range(2))
        view.put(tokens(ids))
        text += "".join(WORDS[i] for i in ids)
        for drafted in ("", "".join(WORDS[i] for i in draft)):
            if drafted:
                view.put_draft(value=tokens([draft]))
            status = screen.shown[-1]
            is_drawn = status.startswith(f"{view.num_tokens} tokens"[: size[0] - 1])
            if size[1] > 3 and size[0] > 2:
                assert is_drawn and cell_len(status) < size[0]
            if size[1] > 20:  # there is room for every draft
                assert without_empty(screen.shown[:-1]) == wrapped(text + drafted, size[0])
    view.end()
    assert screen.shown == wrapped(text, size[0])
    assert view.text == text
    view.end()
    assert screen.shown == wrapped(text, size[0])


def test_a_resized_terminal_loses_nothing(terminal):
    screen = terminal(30, 8)
    view = LiveView(Words())
    for width in (30, 50, 50, 40):
        screen.width = width  # rows that were written stay as they are
        view.put(tokens([1, 5, 2]))
        view.put_draft(value=tokens([[0, 1]]))
    view.end()
    assert "".join(screen.shown) == " the wide" * 4


def test_tokens_of_one_forward_share_a_shade(monkeypatch):
    written = []
    monkeypatch.setattr(LiveView, "_write", lambda self, text: written.append(text))
    view = LiveView(Words())
    for ids in ([0], [1, 5], [11], [1]):
        view.put(tokens(ids))
    view.end()
    settled = "".join(text.removeprefix(live_view.ERASE_BELOW).split("\033D")[0] for text in written)
    assert settled == f"a\033[{CYAN}m the wide\033[0m of\033[{CYAN}m the\033[0m\n"
    drawn = len(written)
    view.put_draft(value=tokens([[0, 1]]))
    assert f"\033[{live_view.DIM}ma the" in written[drawn]


def test_a_model_cannot_command_the_terminal():
    assert printable("a\033]0;title\007b\x9b1A\tc\r\n") == "a\ufffd]0;title\ufffdb\ufffd1A    c\n"


def test_characters_of_several_tokens_appear_when_they_are_whole():
    growing, num_words = GrowingText(Words()), len(WORDS)
    ids = [0, *(num_words + byte for byte in "é日🙂".encode()), 1]
    assert [growing.add([i]) for i in ids] == ["a", "", "é", "", "", "日", "", "", "", "🙂", " the"]
    assert growing.add([num_words + 0xE6]) == "" and growing.preview([0]) == "\ufffda"
    assert growing.rest() == "\ufffd" and growing.rest() == ""


def test_the_status_tells_what_fits():
    parts = ["9 tokens", "4 forwards", "2.00 tokens/forward"]
    assert fitting(parts, 99) == "9 tokens, 4 forwards, 2.00 tokens/forward"
    assert fitting(parts, 25) == "9 tokens, 4 forwards"
    assert fitting(parts, 4) == "9 to" and fitting(parts, -1) == ""
