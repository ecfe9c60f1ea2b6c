"""A conversation: each turn's text equals that of reading the whole conversation, but only new tokens are read."""

import io

import pytest
import torch
from transformers import AutoTokenizer, CompileConfig

from helpers_family import tiny_model
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft.chat import Chat
from wavedraft.cli import main

# Answers stand in the template as they were written; or behind a word of its own, which the cache does not have.
TEMPLATES = {
    "faithful": "{% for m in messages %}{{ '<tool> ' if m.role == 'user' else ' ' }}{{ m.content }} {% endfor %}",
    "rewriting": "{% for m in messages %}{{ '<tool> ' if m.role == 'user' else ' w0 ' }}{{ m.content }} {% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder, num_words=61)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["tidar", "recurrent"])
def test_a_turn_goes_on_from_the_cache_and_says_what_it_would_have_said(tokenizer, kind, template):
    tokenizer.chat_template = TEMPLATES[template]
    if kind == "tidar":
        model, options, words = tiny_tidar("qwen3"), {}, ["w3 w9", "w7 w7 w1", "w2"]
    else:
        model, options, words = tiny_model("llama"), {"policy": "exact", "init_scale": 0.0}, ["w3 w9", "w7", "w2"]
    conversation = Chat(model, tokenizer, max_new_tokens=6, do_sample=False, **options)
    for turn, text in enumerate(words):
        output = conversation.answer(text)
        messages = conversation.messages[:-1]
        assert [m["role"] for m in messages] == ["user", "assistant"] * turn + ["user"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
        assert conversation.num_prompt == ids.shape[1]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
        assert output.sequences.tolist() == expected.tolist()
        if turn and kind == "tidar":
            assert 0 < conversation.num_cached < ids.shape[1]
    if kind == "tidar" and template == "rewriting":
        assert conversation.num_cached < ids.shape[1] - 1


def test_a_compiled_conversation_reads_each_turn_whole_and_says_the_same(tokenizer):
    tokenizer.chat_template = TEMPLATES["faithful"]
    model, length = tiny_tidar("qwen3"), {"max_new_tokens": 6, "do_sample": False}
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode="default")}
    plain, static = Chat(model, tokenizer, **length), Chat(model, tokenizer, **length, **compiled)
    for text in ("w3 w9", "w7 w7 w1"):
        assert torch.equal(static.answer(text).sequences, plain.answer(text).sequences)
        assert static.num_cached == 0
    assert plain.num_cached > 0


def test_an_interrupted_turn_leaves_no_trace(tokenizer):
    tokenizer.chat_template = TEMPLATES["faithful"]
    conversation = Chat(tiny_tidar("qwen3"), tokenizer, max_new_tokens=6, do_sample=False)
    conversation.answer("w3 w9")
    messages = list(conversation.messages)

    class Interrupts:
        def put(self, value):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("w8", Interrupts())
    assert conversation.messages == messages
    found = conversation.answer("w4").sequences
    fresh = Chat(tiny_tidar("qwen3"), tokenizer, max_new_tokens=6, do_sample=False)
    fresh.messages = messages
    assert torch.equal(found, fresh.answer("w4").sequences)


def test_the_command_talks_until_the_end_of_input(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_tidar("qwen3").save_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATES["faithful"]
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w9\n\nw4\n"))
    monkeypatch.setattr("sys.argv", ["wavedraft", "chat", str(tmp_path), "--max-new-tokens", "6"])
    with pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert not caught.value.code
    told = [line for line in lines if "from the cache" in line]
    assert len(told) == 2 and "; 0 of 3 prompt tokens" in told[0] and "; 0 of" not in told[1]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Chat(tiny_tidar("qwen3"), tokenizer)
