"""`wavedraft chat` in a real pseudo-terminal: editing, history, commands, Ctrl-C and a window that changes its size."""

import json
import re

import pytest
from transformers import AutoTokenizer

from helpers_terminal import Terminal
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer

UP, LEFT, ALT_ENTER, CTRL_C, CTRL_D = "\033[A", "\033[D", "\033\r", "\x03", "\x04"
TEMPLATE = "{% for m in messages %}{{ '<tool> ' if m.role == 'user' else ' ' }}{{ m.content }} {% endfor %}"
ENDLESS = "100000"  # tokens: an answer that only Ctrl-C ends


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_terminal")
    model = tiny_tidar("qwen3")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    save_tokenizer(folder, num_words=61)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def chat(checkpoint, num_tokens="6", **size):
    return Terminal(["chat", str(checkpoint), "--max-new-tokens", num_tokens, "--draft-length", "4"], **size)


def said(terminal, keys, until):
    """What the terminal shows after these keys, up to some words of the answer. Then it prompts again."""
    terminal.type(keys)
    came = terminal.wait_for(until)
    terminal.wait_for(">")
    return came


def saved(terminal, path):
    """The messages, as /save writes them."""
    said(terminal, f"/save {path}\r", "messages are in")
    return json.loads(path.read_text())["messages"]


def test_keys_edit_and_call_up_what_was_sent(checkpoint, tmp_path):
    with chat(checkpoint) as terminal:
        terminal.wait_for(">")
        said(terminal, f"w3 w{LEFT}w7 {ALT_ENTER}w9\r", "from the cache")
        said(terminal, f"{UP}{UP}\r", "from the cache")
        said(terminal, f"w1 w2{CTRL_C}", "/exit ends the conversation")
        messages = saved(terminal, tmp_path / "talk.json")
        assert [m["content"] for m in messages[::2]] == ["w3 w7 \nw9w"] * 2
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2
        assert all(m["content"] for m in messages)
        said(terminal, "\033[200~w1 w2\rw3\033[201~\r", "from the cache")
        pasted, _ = saved(terminal, tmp_path / "talk.json")[4:]
        assert pasted["content"] == "w1 w2\nw3", "pasted lines are one message"
        assert "^[[" not in terminal.read
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(checkpoint, tmp_path):
    with chat(checkpoint, ENDLESS) as terminal:
        terminal.wait_for(">")
        terminal.type("w3 w9\r")
        for width, height in ((40, 10), (12, 3), (100, 30)) * 3:  # the window changes its size meanwhile
            terminal.wait_for(" tokens")
            terminal.resize(width, height)
        terminal.type("typed meanwhile")
        terminal.wait_for("forwards")
        said(terminal, CTRL_C, "stopped; what was written stays")
        assert "^C" not in terminal.read and "typed" not in terminal.read
        said(terminal, "/set max_new_tokens 4\r", "max_new_tokens is 4")
        said(terminal, "w4\r", "from the cache")
        question, answer, *more = saved(terminal, tmp_path / "talk.json")
        assert question == {"role": "user", "content": "w3 w9"}
        assert answer["role"] == "assistant" and len(answer["content"].split()) > 4
        assert more[0] == {"role": "user", "content": "w4"} and len(more[1]["content"].split()) <= 4
        terminal.type("/exit\r")
        assert terminal.wait() == 0


def test_commands_are_obeyed_and_not_sent(checkpoint, tmp_path):
    path = tmp_path / "talk.json"
    with chat(checkpoint) as terminal:
        terminal.wait_for(">")

        def told(line, until):
            return said(terminal, line + "\r", until)

        assert "/save FILE" in told("/help", "with a space before it.")
        told("/stats", "No answer has been written to its end.")
        told("/load", "/load needs a file")
        told("/nothing", "There is no /nothing. /help lists")
        told("/reset now", "/reset takes nothing after it")
        told("w3 w9", "0 of 3 prompt tokens from the cache")
        told("/stats", "w3 w9")
        assert len(saved(terminal, path)) == 2
        told("/set", "num_branches default")
        told("/set colour red", "/set takes one of max_new_tokens")
        told("/set temperature much", "temperature must be a number from 0.0 up, but is 'much'.")
        told("/set temperature -1", "must be a number from 0.0 up, but is '-1'.")
        told("/set top_p 1.5", "top_p must be a number from 0.0 to 1.0")
        told("/set seed x", "seed must be a whole number from 0 up")
        told("/set num_branches some", "--num-branches must be")
        told("/set top_k 3", "--top-k is for sampling")
        told("/set temperature 0.7", "(temperature is 0.7.)")
        told("/set top-k 3", "(top_k is 3.)")
        told("w4", "from the cache")
        told("/set num-recurrences 4", "--num-recurrences is for recurrent-depth models")
        told("/set draft_length 9", "between 1 and")
        told("/reset", "begins anew")
        assert saved(terminal, path) == []
        other = tmp_path / "other.json"
        other.write_text('{"precious": 1}')
        told(f"/save {other}", "is not a saved conversation")
        assert other.read_text() == '{"precious": 1}'
        path.write_text(json.dumps({"messages": [{"role": "user", "content": "w5"}]}))
        told(f"/load {path}", "1 messages of")
        assert [m["content"] for m in saved(terminal, path)] == ["w5"]
        told(f"/load {tmp_path / 'nowhere'}", "No such file")
        terminal.type("/exit\r")
        assert terminal.wait() == 0


def test_piped_lines_are_answered_in_a_terminal(checkpoint):
    with chat(checkpoint, lines="w3 w9\nw4\n", NO_COLOR="1") as terminal:
        terminal.wait_for("tokens/forward")
        terminal.wait_for("from the cache")
        terminal.wait_for("from the cache")
        assert terminal.wait() == 0
        assert set(re.findall(r"\033\[(\d*)m", terminal.raw)) == {"0", "2"}, "without colour, drafts are dim"
