"""Regenerated answers: an interrupted run ends with the same file as a full run, and loops are cut."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wavedraft.training.regeneration import answer_batch, batches_of, cut_at_loop, regenerate, usable_answer
from wavedraft.training.row_forms import prompt_row
from wavedraft.training.row_sources import read_json
from wavedraft.training.teaching import SHIPPED_PROMPTS

PROMPTS = [
    prompt_row("b" * number + " what?", f"prompt {number}", kind="chat" if number % 2 else "maths")
    for number in range(11)
]


def read_rows(path):
    return [row for _, row in read_json(path)]


def rows(*prompts):
    return [prompt_row(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def answer(model, tokenizer, path, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 7, "batch_size": 3, "has_progress_bar": False} | options
    return regenerate(model, tokenizer, prompts, path, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("share_written", [0.0, 0.2, 0.55, 0.99])
def test_a_run_that_was_cut_ends_with_the_file_of_a_straight_run(
    model, tokenizer, tmp_path, temperature, share_written
):
    straight, cut = tmp_path / "straight.jsonl", tmp_path / "cut.jsonl"
    num_tokens = answer(model, tokenizer, straight, temperature=temperature, seed=3)
    written = straight.read_bytes()
    cut.write_bytes(written[: int(len(written) * share_written)])  # mostly within a row, so that its line is torn

    assert answer(model, tokenizer, cut, temperature=temperature, seed=3) == num_tokens

    assert cut.read_bytes() == written
    rows = read_rows(cut)
    assert Counter(row["prompt"] for row in rows) == Counter(row.question for row in PROMPTS)
    assert sum(row["num_tokens"] for row in rows) == num_tokens


def test_the_seed_decides_what_is_sampled(model, tokenizer, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        answer(model, tokenizer, tmp_path / name, temperature=1.0, seed=seed)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_sampling_leaves_the_callers_randomness_alone(model, tokenizer, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answer(model, tokenizer, tmp_path / "answers.jsonl", temperature=1.0)
    assert torch.equal(torch.rand(1), expected)


def test_a_batch_answers_what_each_prompt_alone_is_answered(model, tokenizer):
    prompts = rows("why?", "a much longer prompt, so that the other is padded")
    options = {"max_new_tokens": 9, "temperature": 0.0, "seed": 0}
    together = answer_batch(model, tokenizer, prompts, **options)
    assert together == [answer_batch(model, tokenizer, [prompt], **options)[0] for prompt in prompts]


def test_an_answer_ends_with_eos_or_is_marked_as_cut(model, tokenizer):
    options = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    (cut,) = answer_batch(model, tokenizer, rows("why?"), **options)
    assert (cut["finished"], cut["num_tokens"]) == (False, 6)

    prompt_ids = tokenizer("why?", return_tensors="pt")["input_ids"]
    third_id = model.generate(prompt_ids, max_new_tokens=3, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [0, third_id]
    try:
        (ended,) = answer_batch(model, tokenizer, rows("why?"), **options)
    finally:
        model.generation_config.eos_token_id = 0
    assert ended["finished"]
    assert ended["num_tokens"] <= 3
    assert tokenizer.decode([third_id]) not in ended["answer"]


def test_prompts_go_through_the_chat_template(model, tokenizer, monkeypatch):
    options = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    expected = answer_batch(model, tokenizer, rows("User: why?\nYou: "), **options)
    template = "{% for message in messages %}User: {{ message['content'] }}\nYou: {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert answer_batch(model, tokenizer, rows("why?"), **options) == expected


def test_a_repeated_prompt_is_answered_once_and_a_finished_file_is_left_alone(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(model, tokenizer, path, [*PROMPTS, *PROMPTS])
    written = path.read_bytes()
    answer(None, tokenizer, path)  # nothing is left to answer: no model is needed
    assert path.read_bytes() == written
    assert len(read_rows(path)) == len(PROMPTS)


def test_a_run_stops_at_the_tokens_asked_for_and_goes_on(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    assert 21 <= answer(model, tokenizer, path, max_answer_tokens=16) < 16 + 3 * 7
    assert len(read_rows(path)) < len(PROMPTS)
    answer(model, tokenizer, path)
    assert len(read_rows(path)) == len(PROMPTS)


def test_batches_hold_every_prompt_once_and_like_with_like():
    batches = list(batches_of(PROMPTS, 3))
    assert sorted(row.place for batch in batches for row in batch) == sorted(row.place for row in PROMPTS)
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    assert {row.kind for row in batches[0]} == {"chat"}


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}])
def test_what_a_caller_can_get_wrong_is_said(model, tokenizer, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        answer(model, tokenizer, tmp_path / "answers.jsonl", **options)
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_loop_is_cut_after_its_first_round():
    words = [f"word{number}" for number in range(20)]
    round_ = "so it goes on and on for ever, "
    text = " ".join(words) + " " + round_ * 9
    assert cut_at_loop(text) == " ".join(words) + " " + round_.strip()
    assert cut_at_loop(" ".join(words) + " " + round_ * 6) == (" ".join(words) + " " + round_ * 6)
    assert cut_at_loop("no loop at all") == "no loop at all"
    assert cut_at_loop("") == ""


def test_answers_worth_learning_from():
    opening = "This answer begins as answers should, with a sentence long enough to be worth learning from at all: "
    looping = opening + "one two three four five six seven eight " * 20
    assert usable_answer("A plain answer.") == "A plain answer."
    assert usable_answer(looping) == opening + "one two three four five six seven eight"
    assert usable_answer("ha " * 80) is usable_answer(" ") is None


def test_the_committed_prompts_are_mixed_and_the_held_out_ones_are_not_among_the_train_ones():
    root = Path(__file__).parents[1]
    files = SHIPPED_PROMPTS, *(root / "benchmarks" / f"prompts_heldout{more}.jsonl" for more in ("", "_more"))
    train, heldout, heldout_more = map(read_rows, files)
    more = ["translation", "rewriting", "list", "sql", "dialogue", "puzzle"]
    assert Counter(row["kind"] for row in heldout) == dict.fromkeys(["chat", "code", "maths", "summary", "json"], 20)
    assert Counter(row["kind"] for row in heldout_more) == dict.fromkeys(more, 20)
    every = [json.dumps(row) for row in (*train, *heldout, *heldout_more)]
    assert len(set(every)) == len(every)
    assert len({row["kind"] for row in train[:80]}) == 11
