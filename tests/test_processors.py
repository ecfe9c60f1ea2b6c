"""A caller's own processors are shown what plain decoding shows them: each prefix once, in order, the whole batch.

A processor may keep state a call, or know only prefixes of its text. The text is plain decoding's.
"""

import itertools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from helpers_generate import ForbidsTheLastTokenAgain, StopsAfterTheSum
from helpers_grammars import END, GRAMMARS, assert_allowed
from helpers_marks import slow_but
from helpers_policies import POLICIES, padded_prompts, tiny_model
from helpers_recurrent import random_model, settling_model
from helpers_sampling import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw
from helpers_tidar import VOCAB_SIZE, random_prompts, tiny_tidar
from wavedraft.generation import tidar
from wavedraft.modeling_tidar import generation_tidar

ADAPTIVE = {"policy": "adaptive", "exit_threshold": 0.0}
WIDE = {"policy": "diffusion-forcing", "headway": 2, "max_wavefront": 6, "exit_threshold": 0.2}
RECURRENT = {**POLICIES, "adaptive": ADAPTIVE, "wide": WIDE}


class CountsCalls(LogitsProcessor):
    """Allows a third of the ids, another at each call, and records what it is shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        ids = torch.arange(scores.shape[1])
        scores = scores.masked_fill(ids % 3 != len(self.shown) % 3, -torch.inf)
        self.shown.append(input_ids.tolist())
        return scores


class OwnPenalty(RepetitionPenaltyLogitsProcessor):
    """A processor of transformers' own, made one with state."""

    def __init__(self):
        super().__init__(1.5)
        self.shown = []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids.tolist())
        self.penalty = 1.0 + 0.2 * len(self.shown)
        return super().__call__(input_ids, scores)


class WritesOutOfPlace(CountsCalls):
    """Changes its argument, as outlines' processors do."""

    def __call__(self, input_ids, scores):
        return scores.copy_(super().__call__(input_ids, scores))


PROCESSORS = {one.__name__: one for one in (CountsCalls, OwnPenalty, WritesOutOfPlace)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A drafting model and the stock model of the same weights."""
    model = tiny_tidar("qwen3", draft_length=4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


def padded(batch_size, length=7, seed=0):
    prompts = padded_prompts(batch_size, length, seed)
    return {**prompts, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}


CALLS = {
    "usual": {},
    "ends": {"eos_token_id": [25, 36, 44, 51, 9, 10, 11]},
    "auto": {"num_branches": "auto"},
    "one branch": {"num_branches": 1},
    "static": {"cache_implementation": "static", "num_branches": 2, "eos_token_id": [25, 36, 44]},
    "with others": {"repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": list(range(20, 50))},
    "short": {"max_new_tokens": 2},
}


@pytest.mark.parametrize("batch_size", slow_but({3}, (1, 3)))
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("call", CALLS)
def test_a_processor_with_state_is_shown_what_plain_decoding_shows(models, call, processor, batch_size):
    model, stock = models
    ours = {name: CALLS[call][name] for name in ("num_branches", "cache_implementation") if name in CALLS[call]}
    common = {name: value for name, value in CALLS[call].items() if name not in ours}
    for seed in range(3):
        mine, theirs = PROCESSORS[processor](), PROCESSORS[processor]()
        keywords = padded(batch_size, seed=seed) | common
        keywords |= {"return_dict_in_generate": True, "output_scores": True}
        found = model.generate(**keywords, **ours, logits_processor=[mine])
        expected = stock.generate(**keywords, logits_processor=[theirs])
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert mine.shown == theirs.shown
        assert len(found.scores) == len(expected.scores)


def test_processors_that_follow_the_text_let_drafts_stand(models):
    """The processor forbids nothing: as many tokens a forward as without it."""

    class Watches(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    model, _ = models
    keywords = {**padded(1), "max_new_tokens": 120, "return_dict_in_generate": True}
    alone, watched = model.generate(**keywords), model.generate(**keywords, logits_processor=[Watches()])
    assert watched.num_forwards == alone.num_forwards < 119


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stopping_criteria_end_what_processors_are_shown(models, batch_size):
    model, stock = models
    mine, theirs = CountsCalls(), CountsCalls()
    keywords = padded(batch_size) | {"eos_token_id": 58}
    found = model.generate(**keywords, logits_processor=[mine], stopping_criteria=[StopsAfterTheSum(500)])
    expected = stock.generate(**keywords, logits_processor=[theirs], stopping_criteria=[StopsAfterTheSum(500)])
    assert found.tolist() == expected.tolist()
    assert mine.shown == theirs.shown
    assert len(mine.shown) < 30, "nothing was stopped"


def test_a_prefix_function_may_know_only_prefixes_of_its_text(models):
    model, stock = models
    prompt = torch.tensor([[1, 2, 3]])
    known = {(): [7], (7,): [60]}
    keywords = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "eos_token_id": 60, "do_sample": False}
    keywords |= {"prefix_allowed_tokens_fn": lambda row, ids: known.get(tuple(ids[3:].tolist()), [])}
    assert model.generate(prompt, **keywords).tolist() == stock.generate(prompt, **keywords).tolist()
    assert stock.generate(prompt, **keywords).tolist() == [[1, 2, 3, 7, 60]]
    assert stock.generate(prompt, **keywords, custom_generate=tidar, draft_length=4).tolist() == [[1, 2, 3, 7, 60]]


@pytest.mark.parametrize("num_new", [3, 12])
def test_a_prefix_function_is_asked_in_each_row_about_its_own_text(models, num_new):
    model, stock = models
    keywords = padded(2) | {"max_new_tokens": num_new}

    def allowed(row, ids):
        text = ids[7:].tolist()
        assert all(token % 5 == (row + place) % 5 for place, token in enumerate(text)), text
        assert len(text) < num_new
        return [token for token in range(1, VOCAB_SIZE) if token % 5 == (row + len(text)) % 5]

    expected = stock.generate(**keywords, prefix_allowed_tokens_fn=allowed)
    assert model.generate(**keywords, prefix_allowed_tokens_fn=allowed).tolist() == expected.tolist()
    recurrent = tiny_model()
    expected = recurrent.generate(**keywords, prefix_allowed_tokens_fn=allowed).tolist()
    for options in POLICIES.values():
        assert recurrent.generate(**keywords, prefix_allowed_tokens_fn=allowed, **options).tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_processor_that_writes_into_the_text_is_refused_by_name(models, batch_size):
    class Writes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            input_ids[:, 0] = 5
            return scores

    for model, options in ((models[0], {}), *((tiny_model(), one) for one in RECURRENT.values())):
        with pytest.raises(ValueError, match=r"Writes.* writes into them"):
            model.generate(**padded(batch_size), logits_processor=[Writes()], **options)


SYNTH_ID = {"keys": [654, 400, 836, 123], "ngram_len": 3, "context_history_size": 16}
SYNTH_ID |= {"sampling_table_size": 2**10, "sampling_table_seed": 0}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("is_instance", [True, False])
def test_synth_id_marks_the_text_of_plain_decoding(models, is_instance, batch_size):
    model, stock = models

    def marking():
        if is_instance:
            return {"logits_processor": [SynthIDTextWatermarkLogitsProcessor(**SYNTH_ID, device="cpu")]}
        return {"watermarking_config": SynthIDTextWatermarkingConfig(**SYNTH_ID)}

    keywords = padded(batch_size) | {"eos_token_id": [25, 36, 44]}
    assert model.generate(**keywords, **marking()).tolist() == stock.generate(**keywords, **marking()).tolist()
    recurrent = tiny_model()
    expected = recurrent.generate(**keywords, **marking()).tolist()
    for options in POLICIES.values():
        assert recurrent.generate(**keywords, **marking(), **options).tolist() == expected


@pytest.mark.parametrize("is_instance", [True, False])
def test_guidance_decodes_plainly_and_says_so(models, is_instance, monkeypatch):
    model, stock = models
    said = []
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)

    def guidance(of):
        if is_instance:
            return {"logits_processor": [UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, of)]}
        return {"guidance_scale": 1.5}

    keywords = padded(1)
    assert (
        model.generate(**keywords, **guidance(model)).tolist() == stock.generate(**keywords, **guidance(stock)).tolist()
    )
    assert "guidance" in said.pop()
    with pytest.raises(ValueError, match="guidance"):
        stock.generate(**keywords, **guidance(stock), custom_generate=tidar, draft_length=4, mask_embedding_id=3)
    recurrent = tiny_model()
    for options in RECURRENT.values():
        with pytest.raises(ValueError, match="uidance"):
            recurrent.generate(**keywords, **guidance(recurrent), **options)


def test_tie_safe_decoding_asks_no_processor_with_state_twice(models, monkeypatch):
    model, stock = models
    said = []
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)
    mine, theirs = CountsCalls(), CountsCalls()
    found = model.generate(**padded(3), logits_processor=[mine], exact="tie-safe")
    assert found.tolist() == stock.generate(**padded(3), logits_processor=[theirs]).tolist()
    assert mine.shown == theirs.shown
    assert "CountsCalls" in said.pop()


# -- sampling


def test_a_seeded_row_depends_on_neither_its_batch_nor_its_drafts(models):
    model, _ = models
    keywords = padded(3) | {"do_sample": True, "eos_token_id": [25, 36], "temperature": 1.5}
    seeds = [11, 2**40, 0]
    together = model.generate(**keywords, seed=seeds, logits_processor=[CountsCalls()])
    assert len(set(map(tuple, together[:, 7:].tolist()))) == 3
    again = model.generate(**keywords, seed=seeds, num_branches=2, draft_length=2, logits_processor=[CountsCalls()])
    assert again.tolist() == together.tolist()
    for row, seed in enumerate(seeds):
        own = {name: keywords[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        alone = model.generate(**keywords | own, seed=[seed], logits_processor=[CountsCalls()])[0].tolist()
        assert alone == together[row, : len(alone)].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("forbids", ["a processor", "stock processors", "the third token"])
def test_a_row_without_a_token_to_sample_is_refused_by_name(models, forbids, batch_size):
    class AllowsTwo(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] < 7 + 2 else torch.full_like(scores, -torch.inf)

    given = {
        "a processor": {"logits_processor": [AllowsTwo()]},
        "stock processors": {"suppress_tokens": list(range(VOCAB_SIZE))},
        "the third token": {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(2, VOCAB_SIZE))},
    }[forbids]
    keywords = padded(batch_size) | given | {"do_sample": True}
    model, stock = models
    with pytest.raises(RuntimeError):  # torch's own words
        stock.generate(**keywords)
    for num_branches in ("all", 1):
        with pytest.raises(ValueError, match="must leave each row a token to sample"):
            model.generate(**keywords, num_branches=num_branches)
    if forbids == "a processor":
        for options in RECURRENT.values():
            with pytest.raises(ValueError, match=r"AllowsTwo.* leave a row none"):
                tiny_model().generate(**keywords, **options)


def test_the_distribution_is_plain_samplings():
    model = tiny_tidar(draft_length=3, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)
    prompt_ids = random_prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    joint = torch.ones(1)
    for step in range(3):
        prefixes = torch.tensor(list(itertools.product(range(SMALL_VOCABULARY), repeat=step)), dtype=torch.long)
        ids = torch.cat([prompt_ids.expand(len(prefixes), -1), prefixes.view(len(prefixes), step)], dim=1)
        with torch.no_grad():
            probs = unlikely(0, ids, model(ids).logits[:, -1].float() / 0.8).softmax(-1)
        joint = (joint.flatten()[:, None] * probs).flatten()
    assert joint.max() < 0.5

    class Unlikely(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return unlikely(0, input_ids, scores)

    sampling = {"top_k": 0, "temperature": 0.8, "logits_processor": LogitsProcessorList([Unlikely()])}
    counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=3, **sampling).flatten()
    expected = joint * NUM_DRAWS
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_bound(len(expected) - 1)


def unlikely(_, input_ids, scores):
    """Scores without the last token, the token after it made likelier: unchanged by a temperature."""
    rows = torch.arange(len(scores))
    scores = scores.clone()
    scores[rows, input_ids[:, -1]] = -torch.inf
    return scores


# -- recurrent depth


@pytest.mark.parametrize("batch_size", slow_but({3}, (1, 3)))
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_recurrent_policy_shows_what_plain_decoding_shows(policy, processor, batch_size):
    model = tiny_model()
    for seed, eos_token_id in itertools.product(range(2), (None, [25, 36, 44, 51, 9, 10, 11])):
        mine, theirs = PROCESSORS[processor](), PROCESSORS[processor]()
        keywords = padded(batch_size, seed=seed) | {"max_new_tokens": 16, "eos_token_id": eos_token_id}
        found = model.generate(**keywords, logits_processor=[mine], **RECURRENT[policy])
        assert found.tolist() == model.generate(**keywords, logits_processor=[theirs]).tolist()
        assert mine.shown == theirs.shown


@pytest.mark.parametrize("processor", slow_but({"CountsCalls"}, PROCESSORS))
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("policy", RECURRENT)
def test_a_recurrent_row_is_the_row_alone_and_each_prefix_is_shown_once(policy, do_sample, processor):
    model = settling_model(21) if policy == "wide" else random_model(7)
    seeds = [3, 8, 21]
    ids = torch.tensor([[9, 8, 2, 3, 7], [0, 0, 8, 3, 5], [0, 6, 1, 3, 4]])
    keywords = {"max_new_tokens": 14, "eos_token_id": [12, 13], "pad_token_id": 0, "do_sample": do_sample}
    keywords |= RECURRENT[policy] | {"attention_mask": (ids > 0).long()}
    mine = PROCESSORS[processor]()
    batch = model.generate(ids, **keywords, seed=seeds, logits_processor=[mine]).tolist()
    assert mine.shown == [[row[:end] for row in batch] for end in range(5, len(batch[0]))]
    for row, seed in enumerate(seeds):
        own = ids[row : row + 1]
        alone = keywords | {"attention_mask": (own > 0).long(), "seed": [seed]}
        text = model.generate(own, **alone, logits_processor=[PROCESSORS[processor]()])[0].tolist()
        assert text == batch[row][: len(text)]


def test_the_published_decode_refuses_processors_of_a_callers_own():
    options = {"policy": "diffusion-forcing", "reference_compat": True, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="ForbidsTheLastTokenAgain"):
        tiny_model().generate(torch.tensor([[5, 6, 7]]), **options, logits_processor=[ForbidsTheLastTokenAgain()])


# -- grammars


@pytest.mark.filterwarnings("ignore:Error in LLMatcher")  # also in plain decoding, of rows that have ended
@pytest.mark.parametrize("batch_size", slow_but({3}, (1, 3)))
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_grammar_writes_the_text_of_plain_decoding(models, grammar, batch_size):
    model, stock = models
    make = GRAMMARS[grammar]
    keywords = padded(batch_size) | {"max_new_tokens": 32, "eos_token_id": END}
    expected = stock.generate(**keywords, **make()).tolist()
    for num_branches in ("all", 1):
        found = model.generate(**keywords, **make(), num_branches=num_branches, return_dict_in_generate=True)
        assert found.sequences.tolist() == expected
        assert found.accepted_lengths.sum() > (found.accepted_lengths > 0).sum(), "no draft stood under a grammar"
    recurrent = tiny_model()
    expected = recurrent.generate(**keywords, **make()).tolist()
    for options in POLICIES.values():
        assert recurrent.generate(**keywords, **make(), **options).tolist() == expected


@pytest.mark.filterwarnings("ignore:Error in LLMatcher")
@pytest.mark.parametrize("grammar", slow_but({"xgrammar"}, GRAMMARS))
def test_samples_keep_to_a_grammar(models, grammar):
    make, keywords = GRAMMARS[grammar], padded(3) | {"max_new_tokens": 20, "eos_token_id": END, "do_sample": True}
    for model, options in ((models[0], {}), *((tiny_model(), one) for one in RECURRENT.values())):
        together = model.generate(**keywords, **make(), **options, seed=[4, 5, 6])
        for row in range(3):
            assert_allowed(make, keywords["input_ids"][row], together[row, 7:].tolist())
            own = {name: keywords[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            alone = model.generate(**keywords | own, **make(), **options, seed=[4 + row])[0].tolist()
            assert alone == together[row, : len(alone)].tolist()
