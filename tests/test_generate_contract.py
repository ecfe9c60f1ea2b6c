"""Drafting keeps the contract of `generate`: the same call with and without drafts gives the same text."""

import copy
import time
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from helpers_generate import KEYWORDS, StopsAfterSureTokens, StopsAfterTheSum
from helpers_stock import tiny_config
from helpers_tidar import VOCAB_SIZE, plain_greedy_loop, random_prompts, tiny_tidar
from helpers_tokenizers import LETTERS, LetterTokenizer, letter_tokenizer
from wavedraft import TiDARForCausalLM
from wavedraft.generation import RowStreamer, tidar
from wavedraft.generation.drafting import options_tidar
from wavedraft.generation.processed_scores import ProcessedScores
from wavedraft.generation.stock_model import CACHE
from wavedraft.generation.transcript import Transcript


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A drafting model and the stock model of the same weights."""
    model = tiny_tidar("qwen3", draft_length=4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", KEYWORDS)
def test_greedy_text_equals_transformers_own_generate(models, name, batch_size):
    model, stock = models
    keywords = {"max_new_tokens": 24, "do_sample": False, **KEYWORDS[name]}
    for seed in range(3):
        prompts = random_prompts(batch_size, 8, seed)
        attention_mask = torch.ones_like(prompts)
        attention_mask[-1, : 2 * (batch_size - 1)] = 0
        prompts = prompts.masked_fill(attention_mask == 0, 0)
        expected = stock.generate(prompts, attention_mask=attention_mask, **keywords)
        found = model.generate(prompts, attention_mask=attention_mask, **keywords)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stopping_criteria_see_the_prefixes_plain_decoding_shows(models, batch_size):
    model, stock = models
    prompts = random_prompts(batch_size, 6, seed=3)
    mine, theirs = StopsAfterTheSum(600), StopsAfterTheSum(600)
    common = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 25}
    found = model.generate(prompts, stopping_criteria=StoppingCriteriaList([mine]), **common)
    expected = stock.generate(prompts, stopping_criteria=StoppingCriteriaList([theirs]), **common)
    assert found.tolist() == expected.tolist()
    assert [ids.tolist() for ids in mine.seen] == [ids.tolist() for ids in theirs.seen[: len(mine.seen)]]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("eos_token_id", [None, 25])
def test_stopping_criteria_get_the_scores_a_caller_asked_for(models, batch_size, eos_token_id):
    """Without an end token transformers goes on writing the rows that were stopped until the last one is."""
    model, stock = models
    prompts = random_prompts(batch_size, 6, seed=3)
    mine, theirs = StopsAfterSureTokens(60.0), StopsAfterSureTokens(60.0)
    common = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": eos_token_id}
    common |= {"output_scores": True, "return_dict_in_generate": True}
    found = model.generate(prompts, stopping_criteria=[mine], **common)
    expected = stock.generate(prompts, stopping_criteria=[theirs], **common)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert mine.num_steps == theirs.num_steps
    assert len(mine.num_steps) < 30, "nothing was stopped"


def test_stop_strings_stop_where_they_do_in_transformers(models):
    model, stock = models
    prompts = random_prompts(3, 6, seed=4)
    text = plain_greedy_loop(model, prompts[1], num_new=20)
    stop = LETTERS[int(text[16])] + LETTERS[int(text[17])]
    # Without an end token transformers goes on writing rows that were stopped, until the last one is.
    common = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": 99}
    common |= {"stop_strings": [stop], "tokenizer": letter_tokenizer()}
    expected = stock.generate(prompts, **common)
    assert model.generate(prompts, **common).tolist() == expected.tolist()
    assert (expected[1] == 0).any() or expected.shape[1] < 31, "nothing was stopped"


def test_streamers_get_the_text_and_draft_aware_ones_the_drafts(models, capsys):
    model, _ = models
    prompts = random_prompts(1, 5)
    expected = plain_greedy_loop(model, prompts[0], num_new=20)

    class Recorder(TextStreamer):
        def __init__(self):
            super().__init__(LetterTokenizer(), skip_prompt=True)
            self.pieces, self.drafts = [], []

        def put(self, value):
            self.pieces.append(value)

        def put_draft(self, value):
            self.drafts.append(value)

    recorder = Recorder()
    output = model.generate(
        prompts, max_new_tokens=20, do_sample=False, streamer=recorder, return_dict_in_generate=True
    )
    prompt, *pieces = recorder.pieces
    assert prompt.tolist() == prompts.tolist()
    assert all(piece.dim() == 1 for piece in pieces)
    assert torch.cat(pieces).tolist() == expected[5:].tolist()
    assert len(recorder.drafts) == output.num_forwards
    assert all(draft.shape == (1, 3) for draft in recorder.drafts)

    iterator = TextIteratorStreamer(LetterTokenizer(), skip_prompt=True)
    model.generate(prompts, max_new_tokens=20, do_sample=False, streamer=iterator)
    assert "".join(iterator) == LetterTokenizer().decode(expected[5:])


def test_a_batch_streams_row_by_row(models):
    model, _ = models
    prompts = random_prompts(3, 5)
    texts = ["", "", ""]

    def on_text(row, text, is_end):
        texts[row] += text

    found = model.generate(
        prompts, max_new_tokens=15, do_sample=False, streamer=RowStreamer(LetterTokenizer(), on_text)
    )
    assert texts == [LetterTokenizer().decode(row[5:]) for row in found]


def test_scores_and_logits_are_plain_decodings(models):
    model, stock = models
    prompts = random_prompts(2, 6, seed=5)
    common = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    common |= {"output_scores": True, "output_logits": True}
    found, expected = model.generate(prompts, **common), stock.generate(prompts, **common)
    assert len(found.scores) == len(found.logits) == 12
    for mine, theirs in zip(found.scores + found.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    transition = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    assert transition.shape == (2, 12)


def test_num_return_sequences_and_greedy_rows_are_equal(models):
    model, _ = models
    prompts = random_prompts(2, 5)
    sampled = model.generate(
        prompts, do_sample=True, num_return_sequences=3, max_new_tokens=10, seed=[1, 2, 1, 1, 2, 1]
    )
    assert sampled.shape == (6, 15)
    assert sampled[0].tolist() == sampled[2].tolist() != sampled[1].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_second_turn_goes_on_from_the_first_turns_cache(models, batch_size):
    model, stock = models
    prompts, more = random_prompts(batch_size, 6), random_prompts(batch_size, 4, seed=9)
    first = model.generate(prompts, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert first[CACHE].get_seq_length() == 6 + 9 - 1
    second_ids = torch.cat([first.sequences, more], dim=1)
    expected = stock.generate(second_ids, max_new_tokens=9, do_sample=False)
    queries = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: queries.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = model.generate(second_ids, **{CACHE: first[CACHE]}, max_new_tokens=9, do_sample=False)
    handle.remove()
    assert found.tolist() == expected.tolist()
    assert queries[0] == 1 + 4 + 4  # the first turn's last token, the new ones, and a block of masks

    own = DynamicCache()
    model.generate(prompts, **{CACHE: own}, max_new_tokens=9, do_sample=False)
    assert own.get_seq_length() == 6 + 9 - 1
    assert model.generate(second_ids, **{CACHE: own}, max_new_tokens=9, do_sample=False).tolist() == found.tolist()
    handed_over = model.generate(prompts, max_new_tokens=9, return_dict_in_generate=True)[CACHE]
    stock_text = stock.generate(second_ids, **{CACHE: handed_over}, max_new_tokens=9, do_sample=False)
    assert stock_text.tolist() == found.tolist()


@pytest.mark.parametrize("options", [{}, {"num_branches": 1}, {"draft_length": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("is_padded", [False, True])
def test_rows_that_end_early_leave_their_cache_whole_and_the_next_turn_goes_on_from_it(models, options, is_padded):
    """As transformers does, which reads an early row's last token beside the other rows' next ones."""
    model, stock = models
    prompts = random_prompts(4, 6, seed=2)
    mask = torch.ones_like(prompts)
    mask[2, :2] = mask[3, :3] = int(not is_padded)
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 2, "return_dict_in_generate": True}
    queries = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: queries.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = model.generate(prompts, attention_mask=mask, **common, **options)
    handle.remove()
    expected = stock.generate(prompts, attention_mask=mask, **common)
    assert found.sequences.tolist() == expected.sequences.tolist()
    lengths = [6 + int((text[6:] != 0).sum()) for text in found.sequences]
    assert len(set(lengths)) > 2
    assert len(queries) == found.num_forwards + found.num_prefill_forwards
    for mine, theirs in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        for row, length in enumerate(lengths):
            told = slice(int((mask[row] == 0).sum()), min(length, max(lengths) - 1))
            torch.testing.assert_close(mine.keys[row, :, told], theirs.keys[row, :, told], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values[row, :, told], theirs.values[row, :, told], atol=1e-4, rtol=1e-4)
    second_ids = torch.cat([found.sequences, random_prompts(4, 3, seed=5)], dim=1)
    is_text = torch.tensor([[i < length for i in range(max(lengths))] + [True] * 3 for length in lengths]).long()
    is_text[:, :6] = mask
    second = {"attention_mask": is_text, "max_new_tokens": 8, "do_sample": False}
    texts = [
        of.generate(second_ids, **{CACHE: cache}, **second).tolist()
        for of, cache in ((model, found[CACHE]), (stock, expected[CACHE]), (stock, None))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_max_time_ends_the_text(models):
    model, _ = models
    start = time.monotonic()
    output = model.generate(random_prompts(1, 4), max_new_tokens=200, max_time=0.05, do_sample=False)
    assert output.shape[1] < 204 and time.monotonic() - start < 5


def test_finished_rows_leave_the_forward(models):
    model, _ = models
    prompts = random_prompts(5, 5)
    alone = [plain_greedy_loop(model, row, num_new=30, eos_token_ids=(25, 36)) for row in prompts]
    rows = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    model.generate(prompts, max_new_tokens=30, do_sample=False, eos_token_id=[25, 36])
    handle.remove()
    assert rows[0] == 5 and rows[-1] < 5 and sorted(rows, reverse=True) == rows
    assert len({len(row) for row in alone}) > 1


def test_no_cache_is_plain_decoding_and_says_so(models, caplog):
    model, _ = models
    prompts = random_prompts(1, 5)
    expected = plain_greedy_loop(model, prompts[0], num_new=8).tolist()
    assert model.generate(prompts, max_new_tokens=8, do_sample=False, use_cache=False)[0].tolist() == expected
    assert model.generate(prompts, max_new_tokens=8, do_sample=False, cache_implementation="static")[0].tolist() == (
        expected
    )


@pytest.mark.parametrize("lengths", [(6, 4), (7, 0)], ids=["on the right", "nothing else"])
def test_a_prompt_that_ends_on_padding_is_decoded_plainly(models, lengths):
    model, stock = models
    prompts = random_prompts(2, 7)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert model.generate(prompts, **common).tolist() == stock.generate(prompts, **common).tolist()


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"output_attentions": True}, "`output_attentions`"),
        ({"output_hidden_states": True}, "`output_hidden_states`"),
        ({"use_cache": False}, "no cache"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "ends on padding"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "`inputs_embeds`"),
        ({"num_beams": 2}, "num_beams"),
    ],
    ids=str,
)
def test_a_custom_decode_refuses_what_it_has_no_answer_to(models, keywords, words):
    with pytest.raises(ValueError, match=words):
        models[1].generate(random_prompts(1, 5), max_new_tokens=5, custom_generate=tidar, **keywords)


def test_a_custom_decode_refuses_ranks_that_share_the_model(models):
    """What several ranks do is in helpers_two_ranks.py; a lone one has no group to ask."""
    _, stock = models
    with pytest.raises(ValueError, match="`synced_gpus`"):
        stock.generate(random_prompts(1, 5), max_new_tokens=5, custom_generate=partial(tidar, synced_gpus=True))


def test_a_text_ends_with_an_error_where_the_position_table_does():
    torch.manual_seed(0)
    config = tiny_config("gpt2")
    config.tidar_config = {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 3}
    model, prompts = TiDARForCausalLM.from_config(config).eval(), random_prompts(2, 56)
    assert model.generate(prompts, max_new_tokens=9, do_sample=False).shape == (2, 65)  # the last token is never read
    with pytest.raises(ValueError, match="at most 64 tokens"):
        model.generate(prompts, max_new_tokens=10, do_sample=False)


def test_generating_leaves_gradients_modes_and_hooks_as_they_were(models):
    model, _ = models
    num_hooks = len(model.model._forward_hooks)
    model.train()
    model.generate(random_prompts(1, 5), max_new_tokens=5, do_sample=False)
    assert model.training and torch.is_grad_enabled()
    model.eval()
    with torch.inference_mode():
        model.generate(random_prompts(1, 5), max_new_tokens=5, do_sample=False)
    assert len(model.model._forward_hooks) == num_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stock_model_drafts_through_custom_generate(models):
    _, stock = models
    prompts = random_prompts(3, 6)
    expected = stock.generate(prompts, max_new_tokens=15, do_sample=False)
    found = stock.generate(
        prompts, max_new_tokens=15, do_sample=False, custom_generate=tidar, return_dict_in_generate=True
    )
    assert found.sequences.tolist() == expected.tolist()
    assert found.num_forwards <= 14
    assert stock.generate(prompts, max_new_tokens=9, custom_generate=tidar, draft_length=2).shape == (3, 15)


def test_a_custom_decode_streams_where_the_streamer_is_bound_to_it(models):
    """transformers keeps the streamer of `generate` from a custom decode."""
    _, stock = models
    prompts, iterator = random_prompts(1, 5), TextIteratorStreamer(LetterTokenizer(), skip_prompt=True)
    found = stock.generate(
        prompts, max_new_tokens=15, do_sample=False, custom_generate=partial(tidar, streamer=iterator)
    )
    assert "".join(iterator) == LetterTokenizer().decode(found[0, 5:])
    texts = ["", ""]
    rows = RowStreamer(LetterTokenizer(), lambda row, text, is_end: texts.__setitem__(row, texts[row] + text))
    found = stock.generate(
        random_prompts(2, 5), max_new_tokens=9, do_sample=False, custom_generate=partial(tidar, streamer=rows)
    )
    assert texts == [LetterTokenizer().decode(row[5:]) for row in found]


def test_ids_of_32_bits_are_read_as_others_are(models):
    model, stock = models
    prompts = random_prompts(2, 5)
    expected = stock.generate(prompts.int(), max_new_tokens=9, do_sample=False)
    for found in (
        model.generate(prompts.int(), max_new_tokens=9, do_sample=False),
        stock.generate(prompts.int(), max_new_tokens=9, do_sample=False, custom_generate=tidar),
    ):
        assert found.tolist() == expected.tolist() and found.dtype == expected.dtype


def test_a_stock_model_without_a_tidar_config_needs_its_adapters_options(models):
    _, stock = models
    original = copy.deepcopy(stock)
    del original.config.tidar_config
    prompts = random_prompts(1, 6)
    with pytest.raises(ValueError, match="mask_embedding_id"):
        original.generate(prompts, max_new_tokens=5, custom_generate=tidar)
    found = original.generate(
        prompts, max_new_tokens=15, do_sample=False, custom_generate=tidar, draft_length=4, mask_embedding_id=3
    )
    assert found.tolist() == stock.generate(prompts, max_new_tokens=15, do_sample=False).tolist()


def test_rows_are_padded_with_an_end_token_where_no_pad_token_is_named(models):
    model, stock = (copy.deepcopy(one) for one in models)
    for one in (model, stock):
        one.config.pad_token_id = one.generation_config.pad_token_id = None
    prompts = random_prompts(4, 6, seed=2)
    common = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 20, "eos_token_id": [25, 36, 44]}
    found = model.generate(prompts, do_sample=False, **common)
    assert found.tolist() == stock.generate(prompts, do_sample=False, **common).tolist()
    assert (found[:, -1] == 25).any(), "no row was padded"


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "all"])
def test_processors_that_look_at_scores_alone_are_called_once_for_all_positions(name, models):
    values = {"top_k": 5, "top_p": 0.7, "min_p": 0.1, "typical_p": 0.6, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01}
    chosen = values if name == "all" else {name: values[name]}
    config = GenerationConfig(do_sample=True, temperature=0.7, suppress_tokens=[3, 9], **{"top_k": 0, **chosen})
    processors = models[0]._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    transcript = Transcript(random_prompts(2, 4), StoppingCriteriaList([MaxLengthCriteria(20)]), 0, draft_length=4)
    logits = torch.randn(2, 3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3
    at_once = ProcessedScores(processors, transcript)
    one_by_one = ProcessedScores(processors, transcript)
    assert not at_once.depend_on_prefix
    one_by_one.depend_on_prefix = True
    assert torch.equal(at_once(logits.clone()), one_by_one(logits.clone()))


def test_our_keywords_that_change_nothing_are_said(models, monkeypatch):
    said, (model, _), prompts = [], models, random_prompts(1, 5)
    monkeypatch.setattr(options_tidar.logger, "warning_once", said.append)
    common = {"max_new_tokens": 6, "do_sample": False}
    model.generate(prompts, **common, num_branches=2, exact="tie-safe")
    assert not said
    model.generate(prompts, **common, draft_length=0, num_branches=2)
    assert "`num_branches` is left aside" in said.pop()
    model.generate(prompts, **common, draft_length=0, num_branches=2, exact="tie-safe", tie_margin=0.1)
    assert "`exact`, `num_branches`, `tie_margin` are left aside" in said.pop()
    model.generate(prompts, **common, seed=3)
    assert "`seed` is left aside: greedy" in said.pop() and not said


@pytest.mark.parametrize("keywords", [{"draft_length": 0}, {"use_cache": False}])
def test_a_seed_is_refused_where_plain_decoding_samples(models, keywords):
    with pytest.raises(ValueError, match=r"`seed` must be left out where plain decoding samples"):
        models[0].generate(random_prompts(1, 5), max_new_tokens=3, do_sample=True, seed=1, **keywords)
