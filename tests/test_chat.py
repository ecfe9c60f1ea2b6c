"""A conversation: each turn's text equals that of reading the whole conversation, but only new tokens are read."""

import io

import pytest
import torch
from transformers import AutoTokenizer, CompileConfig

from helpers_family import tiny_model
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft.chat import Chat, read_messages
from wavedraft.cli import main

# Answers stand in the template as they were written; or after a word of its own, which the cache does not have.
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


def test_what_was_written_of_an_interrupted_answer_can_stay(tokenizer):
    tokenizer.chat_template = TEMPLATES["faithful"]
    conversation, fresh = (Chat(tiny_tidar("qwen3"), tokenizer, max_new_tokens=6, do_sample=False) for _ in range(2))
    conversation.answer("w3 w9")

    class Interrupts:
        num_puts = 0

        def put(self, value):
            self.num_puts += 1
            if self.num_puts == 3:  # the prompt's, the prefill's and the first forward's
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("w8", Interrupts())
    conversation.add_turn("w8", "w5 w6")
    fresh.messages = list(conversation.messages)
    assert torch.equal(conversation.answer("w4").sequences, fresh.answer("w4").sequences)


def test_a_conversation_is_saved_loaded_and_forgotten(tokenizer, tmp_path):
    refuses = "{% if messages[0].role == 'assistant' %}{{ raise_exception('who asked?') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATES["faithful"]
    model, path = tiny_tidar("qwen3"), tmp_path / "talk.json"
    conversation = Chat(model, tokenizer, "w9 w9", max_new_tokens=6, do_sample=False)
    conversation.answer("w3")
    conversation.save(path)
    before = conversation.answer("w4").sequences
    conversation.load(path)
    assert torch.equal(conversation.answer("w4").sequences, before) and conversation.num_cached > 0
    conversation.save(path)  # over a conversation
    assert len(read_messages(path)) == 5
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "w9 w9"}]
    conversation.set_options({"max_new_tokens": 2, "do_sample": False})
    assert conversation.answer("w4").sequences.shape[1] == conversation.num_prompt + 2 and conversation.num_cached == 0
    messages = list(conversation.messages)
    for text, message in [
        ("no json", "is not a saved conversation"),
        ('{"messages": [{"role": "user"}]}', "is not a saved conversation"),
        ('{"messages": 3}', "is not a saved conversation"),
        ('{"messages": [{"role": "assistant", "content": "w1"}]}', "who asked?"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            conversation.load(path)
        assert conversation.messages == messages
    path.write_text("precious")
    with pytest.raises(ValueError, match="is not a saved conversation"):
        conversation.save(path)
    assert path.read_text() == "precious"


def test_the_command_talks_until_the_end_of_input(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_tidar("qwen3").save_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATES["faithful"]
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w9\n\n/help\n/set max_new_tokens 3\nw4\n"))
    monkeypatch.setattr("sys.argv", ["wavedraft", "chat", str(tmp_path), "--max-new-tokens", "6"])
    with pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert not caught.value.code
    assert not any("\033" in line for line in lines), "no control codes without a terminal"
    told = [line for line in lines if "from the cache" in line]
    assert told[1].startswith("(3 tokens")
    assert len(told) == 2 and "; 0 of 3 prompt tokens" in told[0] and "; 0 of" in told[1]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Chat(tiny_tidar("qwen3"), tokenizer)
