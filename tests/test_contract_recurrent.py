"""The recurrent policies keep the contract of `generate`: the same call at full depth, token by token, gives the same
text. Diffusion forcing is tested where it must agree: a wavefront of one position frozen at full depth, and a wide
wavefront over settled states.
"""

import itertools
import time

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from helpers_generate import KEYWORDS, ForbidsTheLastTokenAgain, StopsAfterSureTokens, StopsAfterTheSum
from helpers_policies import DEPTH, FORCED, POLICIES, padded_prompts, tiny_model
from helpers_recurrent import random_model, settling_model
from helpers_tidar import VOCAB_SIZE
from helpers_tokenizers import LETTERS, LetterTokenizer, letter_tokenizer
from wavedraft.generation import RowStreamer
from wavedraft.generation.stock_model import CACHE
from wavedraft.modeling_recurrent import RecurrentCache, RecurrentDepthForCausalLM


def ragged_first_turn(model, prompts, **options):
    """Output of rows of four lengths, of 9 new tokens and fewer, and the mask of its tokens."""
    options = {"return_dict_in_generate": True, "pad_token_id": 0, "suppress_tokens": [0], **options}
    ends = model.generate(**prompts, max_new_tokens=9, **options).sequences
    num_prompt = prompts["input_ids"].shape[1]
    options["eos_token_id"] = [int(ends[0, num_prompt + 1]), int(ends[1, num_prompt + 4])]
    first = model.generate(**prompts, max_new_tokens=9, **options)
    mask = (first.sequences != 0).long()
    mask[:, :num_prompt] = prompts["attention_mask"]
    assert len(set(mask[:, num_prompt:].sum(dim=1).tolist())) > 2
    return first, mask


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", KEYWORDS)
def test_greedy_text_equals_transformers_own_loop(name, policy):
    model = tiny_model()
    keywords = {"max_new_tokens": 14, "do_sample": False, **KEYWORDS[name]}
    for batch_size in (1, 3):
        prompts = padded_prompts(batch_size)
        expected = model.generate(**prompts, **keywords)
        assert model.generate(**prompts, **keywords, **POLICIES[policy]).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size", "prefix_allowed_tokens_fn", "several"])
def test_a_wide_wavefront_of_settled_states_writes_the_text_of_full_depth(name):
    model = settling_model(21)
    keywords = {"max_new_tokens": 10, "num_recurrences": 24, **KEYWORDS[name]}
    if name == "prefix_allowed_tokens_fn":  # of this model's vocabulary
        keywords["prefix_allowed_tokens_fn"] = lambda row, prefix: list(range(1 + (row + int(prefix[-1])) % 3, 37, 3))
    prompts = padded_prompts(3)
    prompts["input_ids"] %= 37
    options = {"policy": "diffusion-forcing", "inner_recurrence": 24, "embedding_ema": 0.0, "exit_threshold": 1e-4}
    options |= {"record_wavefront": True, "return_dict_in_generate": True}
    output = model.generate(**prompts, **keywords, **options)
    assert output.sequences.tolist() == model.generate(**prompts, **keywords).tolist()
    assert max(len(step.fed_ids) for step in output.wavefront) > 1


@pytest.mark.parametrize("policy", POLICIES)
def test_stopping_criteria_see_the_prefixes_plain_decoding_shows(policy):
    model, prompts = tiny_model(), padded_prompts(4, seed=3)
    mine, theirs = StopsAfterTheSum(400), StopsAfterTheSum(400)
    common = {"max_new_tokens": 20, "eos_token_id": [25, 36], "pad_token_id": 0}
    found = model.generate(**prompts, stopping_criteria=StoppingCriteriaList([mine]), **common, **POLICIES[policy])
    expected = model.generate(**prompts, stopping_criteria=StoppingCriteriaList([theirs]), **common)
    assert found.tolist() == expected.tolist()
    assert [ids.tolist() for ids in mine.seen] == [ids.tolist() for ids in theirs.seen[: len(mine.seen)]]
    assert any(row.sum() > 400 and row[-1] == 0 for row in found), "nothing was stopped"


@pytest.mark.parametrize("eos_token_id", [None, 25])
@pytest.mark.parametrize("policy", POLICIES)
def test_stopping_criteria_get_the_scores_a_caller_asked_for(policy, eos_token_id):
    model, prompts = tiny_model(), padded_prompts(4, seed=3)
    mine, theirs = StopsAfterSureTokens(12.0), StopsAfterSureTokens(12.0)
    common = {"max_new_tokens": 20, "eos_token_id": eos_token_id, "pad_token_id": 0}
    common |= {"output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**prompts, stopping_criteria=[mine], **common, **POLICIES[policy])
    expected = model.generate(**prompts, stopping_criteria=[theirs], **common)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert mine.num_steps == theirs.num_steps
    assert len(mine.num_steps) < 20, "nothing was stopped"


@pytest.mark.parametrize(
    "given", [{"stopping_criteria": [StopsAfterTheSum(400)]}, {"max_time": 9.0}], ids=["criterion", "time"]
)
def test_the_published_decode_refuses_criteria_it_does_not_know(given):
    options = {"policy": "diffusion-forcing", "reference_compat": True, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="only at end tokens"):
        tiny_model().generate(torch.tensor([[5, 6, 7]]), **options, **given)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_users_processor_is_shown_every_prefix_of_the_text(policy):
    shown = set()

    class Recorder(ForbidsTheLastTokenAgain):
        def __call__(self, input_ids, scores):
            shown.update(tuple(row) for row in input_ids.tolist())
            return super().__call__(input_ids, scores)

    prompts = padded_prompts(3)
    recorder = LogitsProcessorList([Recorder()])
    text = tiny_model().generate(**prompts, max_new_tokens=9, logits_processor=recorder, **POLICIES[policy])
    assert shown >= {tuple(row[:end]) for row in text.tolist() for end in range(7, 16)}


@pytest.mark.parametrize("policy", POLICIES)
def test_stop_strings_stop_where_they_do_in_transformers(policy):
    model, prompts = tiny_model(), padded_prompts(3, seed=4)
    text = model.generate(**prompts, max_new_tokens=20)[1].tolist()
    common = {"max_new_tokens": 20, "eos_token_id": 99, "pad_token_id": 0, "tokenizer": letter_tokenizer()}
    common["stop_strings"] = [LETTERS[text[12]] + LETTERS[text[13]]]
    expected = model.generate(**prompts, **common)
    assert model.generate(**prompts, **common, **POLICIES[policy]).tolist() == expected.tolist()
    assert (expected[:, 7:] == 0).any() or expected.shape[1] < 27, "nothing was stopped"


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_and_logits_are_plain_decodings(policy):
    model, prompts = tiny_model(), padded_prompts(2, seed=5)
    common = {"max_new_tokens": 9, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    common |= {"output_scores": True, "output_logits": True}
    found, expected = model.generate(**prompts, **common, **POLICIES[policy]), model.generate(**prompts, **common)
    assert len(found.scores) == len(found.logits) == 9
    for mine, theirs in zip(found.scores + found.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    assert model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True).shape == (2, 9)
    only = model.generate(**prompts, **{**common, "output_logits": False}, **POLICIES[policy])
    assert only.logits is None and len(only.scores) == 9


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}, {"use_cache": False}],
    ids=str,
)
def test_transformers_own_loops_stay_at_hand(options):
    """With plain decoding; the wavefronts refuse them."""
    model, prompts = tiny_model(), {"input_ids": padded_prompts(1)["input_ids"]}
    reference = {"num_beams": 3, "use_cache": False} if "num_beams" in options else {}
    expected = model.generate(**prompts, max_new_tokens=12, **reference).tolist()
    assert model.generate(**prompts, max_new_tokens=12, **options).tolist() == expected
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(**prompts, max_new_tokens=12, policy="exact", **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_max_time_ends_the_text(policy):
    start = time.monotonic()
    text = tiny_model().generate(**padded_prompts(1), max_new_tokens=150, max_time=0.02, **POLICIES[policy])
    assert 7 < text.shape[1] < 157 and time.monotonic() - start < 20


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_turn_goes_on_from_the_first_turns_cache(policy):
    model, options = tiny_model(), POLICIES[policy]
    for batch_size in (1, 3):
        prompts, more = padded_prompts(batch_size), torch.randint(1, VOCAB_SIZE, (batch_size, 4))
        common = {"return_dict_in_generate": True, "eos_token_id": [25, 36, 44], "pad_token_id": 0}
        common["suppress_tokens"] = [0]  # so that 0 is padding wherever it stands
        first = model.generate(**prompts, max_new_tokens=9, **common, **options)
        length = first.sequences.shape[1]
        assert first[CACHE].get_seq_length() == length - 1
        ids = torch.cat([first.sequences, more], dim=1)
        mask = (ids != 0).long()
        alone = model.generate(ids, attention_mask=mask, max_new_tokens=6, **common, **options)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, **common)
        cache = first[CACHE]
        second = model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=6, **common, **options)
        assert second.sequences.tolist() == alone.sequences.tolist() == plain.sequences.tolist()
        assert alone.num_prefill_positions == int(mask.sum())
        assert second.num_prefill_positions == int(mask[:, length - 1 :].sum()) < alone.num_prefill_positions
        assert second[CACHE] is cache and cache.get_seq_length() == second.sequences.shape[1] - 1


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        *itertools.product(("exact", "self-speculative", "forced"), ({}, {"init_scale": 1.0})),
        ("self-speculative", {"cache_implementation": "static"}),
    ],
)
def test_rows_that_end_early_leave_their_cache_whole(policy, more):
    model, options, prompts = tiny_model(), POLICIES[policy] | more, padded_prompts(4)
    first, mask = ragged_first_turn(model, prompts, **options)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]]).expand(4, 3)], dim=1)
    second = {"attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1), "max_new_tokens": 6, **options}
    alone = model.generate(ids, return_dict_in_generate=True, **second)
    found = model.generate(ids, **{CACHE: first[CACHE]}, return_dict_in_generate=True, **second)
    assert found.sequences.tolist() == alone.sequences.tolist()
    assert found.num_prefill_positions < alone.num_prefill_positions


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("adaptive", {}),
        ("diffusion-forcing", {}),
        ("diffusion-forcing", {"cache_implementation": "static"}),
        ("diffusion-forcing", {"max_wavefront": 1}),  # the last token has never been in the wavefront
        ("self-speculative", {"kv_cache": "latest-only"}),
    ],
)
def test_rows_that_end_early_leave_what_a_fresh_call_would_have_read(policy, more):
    """States at rest are the same however they were reached, a prompt's or a wavefront's."""
    model, prompts = settling_model(21), padded_prompts(4)
    prompts["input_ids"] %= 37
    options = {"policy": policy, "num_recurrences": 24, **more}
    options |= {"exit_threshold": 1e-5} if policy != "self-speculative" else {}
    first, mask = ragged_first_turn(model, prompts, **options)
    cache, num_cached = first[CACHE], first.sequences.shape[1] - 1
    fresh = RecurrentCache.latest_only(model.config, 4, num_cached, torch.float32, "cpu")
    read = {"num_recurrences": 24, "attention_mask": mask[:, :num_cached], "init_scale": 0.0}
    with torch.no_grad():
        model(
            first.sequences[:, :num_cached],
            **{CACHE: fresh},
            position_ids=(mask.cumsum(1) - 1).clamp(0)[:, :-1],
            **read,
        )
    is_token = mask[:, :num_cached].bool()
    for mine, theirs in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
        mine, theirs = (tensor[0, :, :, :num_cached].transpose(1, 2)[is_token] for tensor in (mine, theirs))
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)

    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]]).expand(4, 3)], dim=1)
    second = {"attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1), "max_new_tokens": 6, **options}
    alone = model.generate(ids, return_dict_in_generate=True, **second)
    found = model.generate(ids, **{CACHE: cache}, return_dict_in_generate=True, **second)
    assert found.sequences.tolist() == alone.sequences.tolist()
    assert found.num_prefill_positions == int(mask[:, num_cached:].sum()) + 12 < alone.num_prefill_positions


def test_the_cache_of_a_shallow_wavefront_is_that_of_the_row_alone():
    model, prompts = tiny_model(), padded_prompts(4)
    options = FORCED | {"inner_recurrence": 2, "kv_cache": "every-recurrence"}
    first, mask = ragged_first_turn(model, prompts, **options)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]]).expand(4, 3)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    second = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    given = {"attention_mask": mask, CACHE: first[CACHE], **second}
    with pytest.raises(ValueError, match="with 3 recurrences"):
        model.generate(ids, **given)
    found = model.generate(ids, num_recurrences=2, **given)
    for row in range(4):
        prompt = prompts["input_ids"][row, prompts["attention_mask"][row] == 1][None]
        text = ids[row, mask[row] == 1][None]
        options |= {"max_new_tokens": text.shape[1] - prompt.shape[1] - 3, "suppress_tokens": [0]}
        cache = model.generate(prompt, return_dict_in_generate=True, **options)[CACHE]
        alone = model.generate(text, **{CACHE: cache}, num_recurrences=2, **second)
        torch.testing.assert_close(found.logits[0][row], alone.logits[0][0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("order", [*itertools.permutations(["plain", "exact", "self-speculative"], 2)])
def test_policies_that_keep_every_recurrence_hand_their_caches_to_each_other(order):
    model, prompts = tiny_model(), padded_prompts(3)
    before, after = (POLICIES.get(name, {}) for name in order)
    common = {"max_new_tokens": 5, "return_dict_in_generate": True}
    cache = RecurrentCache.every_recurrence(model.config, 3, 4, DEPTH, torch.float32, "cpu")
    first = model.generate(**prompts, **{CACHE: cache}, **common, **before)
    ids = torch.cat([first.sequences, padded_prompts(3, seed=8)["input_ids"]], dim=1)
    ids[-1, 12:18] = 7
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 12, dtype=torch.long)], dim=1)
    second = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **common, **after)
    assert second.sequences.tolist() == model.generate(ids, attention_mask=mask, max_new_tokens=5).tolist()
    assert second.num_prefill_positions == 3 * 8


@pytest.mark.parametrize("policy", ["adaptive", "diffusion-forcing"])
def test_a_cache_of_latest_recurrences_is_gone_on_from(policy):
    model, prompts = settling_model(21), {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]])}
    prompts["attention_mask"] = torch.tensor([[1, 1, 1], [0, 1, 1]])
    # States at rest are the same however they were reached, so that what is gone on from does not show in the text.
    options = {"policy": policy, "num_recurrences": 32, "exit_threshold": 1e-5, "return_dict_in_generate": True}
    first = model.generate(**prompts, max_new_tokens=6, **options)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12], [13, 14]])], dim=1)
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
    second = model.generate(ids, attention_mask=mask, **{CACHE: first[CACHE]}, max_new_tokens=6, **options)
    afresh = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    assert second.sequences.tolist() == afresh.sequences.tolist()
    assert (second.num_prefill_positions, afresh.num_prefill_positions) == (6, 21)


@pytest.mark.parametrize(
    "options", [{"policy": policy} for policy in ("autoregressive", "exact", "diffusion-forcing")] + [{"num_beams": 2}]
)
def test_a_prompt_of_no_tokens_is_refused(options):
    ids = torch.empty(2, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`input_ids` must have at least one token per row .* has shape \(2, 0\)"):
        random_model().generate(ids, max_new_tokens=2, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_ids_of_32_bits_are_read_as_others_are(policy):
    model, ids = tiny_model(), padded_prompts(1)["input_ids"]
    expected = model.generate(ids.int(), max_new_tokens=6)
    assert model.generate(ids.int(), max_new_tokens=6, **POLICIES[policy]).tolist() == expected.tolist()


def test_a_mask_with_holes_hides_them():
    model, ids = tiny_model(), padded_prompts(2)["input_ids"]
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    for options in POLICIES.values():
        assert model.generate(ids, attention_mask=mask, max_new_tokens=8, **options).tolist() == expected.tolist()
    without = model.generate(ids[:1][mask[:1] == 1][None], max_new_tokens=8, policy="exact")
    assert without[0, 5:].tolist() == expected[0, 7:].tolist()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        ("latest", {"policy": "exact"}, "of 3 recurrences"),
        ("every", {"policy": "diffusion-forcing"}, "of 1 recurrences"),
        ("every", {"policy": "exact", "batch": 2}, "of 2 rows"),
        ("every", {"policy": "exact", "length": 5}, "of fewer than 5 tokens"),
        ("every", {"length": 5}, "of fewer than 5 tokens"),
        ("shallow", {"policy": "exact"}, "with 3 recurrences"),
        ("shallow", {}, "with 3 recurrences"),
    ],
)
def test_a_cache_that_cannot_be_gone_on_from_is_refused(make, options, words):
    model = tiny_model()
    stored, depth = {"latest": (1, 3), "every": (3, 3), "shallow": (3, 2)}[make]
    cache = RecurrentCache(model.config, 1, 8, stored, torch.float32, "cpu")
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8, 9]]), **{CACHE: cache}, num_recurrences=depth)
    options = dict(options)
    ids = torch.ones(options.pop("batch", 1), options.pop("length", 8), dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        model.generate(ids, **{CACHE: cache}, max_new_tokens=2, **options)


class DraftRecorder(TextStreamer):
    def __init__(self):
        super().__init__(LetterTokenizer(), skip_prompt=True)
        self.pieces, self.drafts = [], []

    def put(self, value):
        self.pieces.append(value)

    def put_draft(self, value):
        self.drafts.append((sum(len(piece) for piece in self.pieces[1:]), value))


@pytest.mark.parametrize("policy", ["exact", "self-speculative", "diffusion-forcing"])
def test_streamers_get_the_text_and_draft_aware_ones_the_wavefront(policy):
    model, prompts = settling_model(21), padded_prompts(1)
    prompts["input_ids"] %= 37
    options = {"max_new_tokens": 12, "policy": policy, "num_recurrences": 8}
    expected = model.generate(**prompts, **options)[0, 7:]
    recorder = DraftRecorder()
    model.generate(**prompts, **options, streamer=recorder)
    prompt, *pieces = recorder.pieces
    assert prompt.tolist() == prompts["input_ids"].tolist()
    assert all(piece.dim() == 1 for piece in pieces)
    assert torch.cat(pieces).tolist() == expected.tolist()
    assert all(draft.shape[0] == 1 and draft.shape[1] > 0 for _, draft in recorder.drafts)
    later = [(num, draft[0].tolist()) for num, draft in recorder.drafts if num < 12]
    assert any(draft[0] == expected[num] for num, draft in later), "a draft stands after the text streamed before it"
    assert max(len(draft) for _, draft in later) > 1

    iterator = TextIteratorStreamer(LetterTokenizer(), skip_prompt=True)
    model.generate(**prompts, **options, streamer=iterator)
    assert "".join(iterator) == LetterTokenizer().decode(expected)


@pytest.mark.parametrize("policy", ["autoregressive", "adaptive", "exact", "self-speculative", "diffusion-forcing"])
def test_a_batch_streams_row_by_row(policy):
    model, prompts, texts = tiny_model(), padded_prompts(3), ["", "", ""]

    def on_text(row, text, is_end):
        texts[row] += text

    streamer = RowStreamer(LetterTokenizer(), on_text)
    found = model.generate(**prompts, max_new_tokens=8, policy=policy, streamer=streamer)
    assert texts == [LetterTokenizer().decode(row[7:]) for row in found]


def test_options_survive_saving_and_a_keyword_wins(tmp_path):
    model, prompts = tiny_model(), padded_prompts(1)
    stored = {"policy": "exact", "draft_recurrences": (1, 2), "max_wavefront": 5, "seed": 3, "max_new_tokens": 6}
    for name, value in stored.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = RecurrentDepthForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.generation_config.policy == "exact" and loaded.generation_config.draft_recurrences == [1, 2]
    common = {"return_dict_in_generate": True}
    by_config = loaded.generate(**prompts, **common)
    by_keyword = tiny_model().generate(**prompts, **stored, **common)
    assert by_config.sequences.tolist() == by_keyword.sequences.tolist()
    assert by_config.num_positions == by_keyword.num_positions
    assert loaded.generate(**prompts, **common, max_wavefront=1).num_positions != by_config.num_positions
    # Another policy sets the stored one's own options aside; what both take stays.
    other = loaded.generate(**prompts, **common, policy="diffusion-forcing", record_wavefront=True)
    assert max(len(step.fed_ids) for step in other.wavefront) <= 5
    preset = GenerationConfig(preset="diffusion-forcing-r2", max_new_tokens=6)
    assert loaded.generate(**prompts, generation_config=preset, **common).num_core_passes % 2 == 0
    loaded.generation_config.policy = "fastest"
    with pytest.raises(ValueError, match="`policy` must be one of"):
        loaded.generate(**prompts)


def test_a_sampled_rows_drafts_see_their_own_prefix_whatever_other_rows_decide():
    """The other row decides tokens while this one's drafts wait: they must stay where the n-gram processor looks."""
    model = random_model(0, vocab_size=VOCAB_SIZE, mean_recurrence=3, n_layers_in_recurrent_block=1).double()
    options = {"max_new_tokens": 10, "do_sample": True, "no_repeat_ngram_size": 2, "top_k": 5}
    options |= {"policy": "exact", "draft_recurrences": (1, 2)}
    prompts = torch.tensor([[9, 18, 42, 33, 42], [0, 0, 38, 3, 15]])
    batch = model.generate(prompts, attention_mask=(prompts > 0).long(), **options, seed=[223492, 169009])
    assert batch[0].tolist() == model.generate(prompts[:1], **options, seed=[223492])[0].tolist()
