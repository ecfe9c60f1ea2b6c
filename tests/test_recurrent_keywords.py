"""What a recurrent-depth model's `generate` and `forward` are given is honoured or refused, and Ouro's early exit."""

import inspect

import pytest
import torch
from transformers import GenerationConfig

from helpers_family import tiny_model
from helpers_keywords import FIELDS, NOT_OF_A_CALL
from helpers_recurrent import left_padded, random_model
from helpers_tokenizers import LETTERS, letter_tokenizer
from wavedraft.generation.stock_model import CACHE

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
POLICIES = {
    "exact": {"policy": "exact", "draft_recurrences": (1, 2)},
    "self-speculative": {"policy": "self-speculative", "draft_recurrences": 1, "draft_length": 3},
    "adaptive": {"policy": "adaptive", "exit_threshold": 0.0},
    "diffusion-forcing": {"policy": "diffusion-forcing"},
}
# Fields that the policies leave to plain decoding.
REFUSED = {
    *("early_stopping", "num_beams", "length_penalty", "use_cache", "use_mtp", "token_healing", "guidance_scale"),
    *("output_attentions", "output_hidden_states", "is_assistant", "prompt_lookup_num_tokens", "assistant_early_exit"),
    *("max_matching_ngram_size", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups"),
    *("constraints", "force_words_ids", "prefill_chunk_size"),
}
# A wavefront has no one shape, so that `exact` takes no static cache: another policy does.
STATIC = {"cache_implementation", "max_cache_len"}


def tiny(**changes):
    return random_model(0, vocab_size=61, mean_recurrence=3, n_layers_in_recurrent_block=1, block_size=600, **changes)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_generation_config_is_honoured_or_refused(name):
    model = tiny()
    keywords = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "init_scale": 0.0, **FIELDS[name][0]}
    if name == "stop_strings":
        keywords |= {"stop_strings": [LETTERS[n] for n in range(20)], "tokenizer": letter_tokenizer()}
    policy = POLICIES["self-speculative" if name in STATIC else "exact"]
    if name in REFUSED:
        with pytest.raises((ValueError, TypeError, ImportError, OSError)):
            model.generate(PROMPT, **keywords, **policy)
    else:
        expected = model.generate(PROMPT, **keywords)
        found = model.generate(PROMPT, **keywords, **policy)
        assert getattr(found, "sequences", found).tolist() == getattr(expected, "sequences", expected).tolist()


def test_every_field_of_a_generation_config_is_in_the_table():
    assert vars(GenerationConfig()).keys() - NOT_OF_A_CALL == FIELDS.keys() >= REFUSED | STATIC


@pytest.mark.parametrize("policy", POLICIES)
def test_a_keyword_of_forward_that_a_policy_does_not_read_is_refused(policy):
    """Those it reads are options of `generate`, and the ids, the mask and the cache."""
    model, read = tiny(), {"input_ids", "attention_mask", "cache", "past_key_values", "use_cache", "logits_to_keep"}
    names = set(inspect.signature(model.forward).parameters) - {"kwargs", "num_recurrences", "init_scale", "generator"}
    for name in names - read:
        value = 0.5 if name == "exit_threshold" else torch.ones(1, 5)
        value = True if name.startswith("output_") else value
        if name == "exit_threshold" and policy in ("adaptive", "diffusion-forcing"):
            continue  # the policy's own option
        with pytest.raises(ValueError, match=f"`{name}`"):
            model.generate(PROMPT, max_new_tokens=3, **POLICIES[policy], **{name: value})


@pytest.mark.parametrize("name", ["num_steps", "cache_position", "token_type_ids"])
def test_a_forward_refuses_what_it_does_not_read(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be left out.* `num_recurrences`"):
        tiny()(PROMPT, **{name: PROMPT})
    assert tiny()(PROMPT, labels=PROMPT, num_items_in_batch=4, **{name: None}).loss is not None


@pytest.mark.parametrize("options", [{"max_cache_len": 512}, {}])
def test_a_static_cache_has_the_room_asked_for(options):
    common = {"max_new_tokens": 4, "cache_implementation": "static", "return_dict_in_generate": True}
    for policy in ({}, POLICIES["self-speculative"]):
        found = tiny().generate(PROMPT, **common, **policy, **options)
        assert found[CACHE].capacity == (640 if options else 128)


@pytest.mark.parametrize("is_padded", [False, True])
def test_new_tokens_alone_go_on_from_a_cache_in_plain_decoding_and_are_refused_elsewhere(is_padded):
    model = tiny()
    rows = left_padded([[5, 6, 7, 8], [9, 10] if is_padded else [9, 10, 11, 12]])
    common = {"max_new_tokens": 5, "return_dict_in_generate": True, "pad_token_id": 0}
    for length in (3, 6):  # more and fewer than the tokens in the cache
        more = torch.arange(20, 20 + 2 * length).view(2, length)
        first = model.generate(**rows, max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0)
        ids = torch.cat([first.sequences[:, :4], more], dim=1)
        mask = torch.nn.functional.pad(rows["attention_mask"], (0, length), value=1)
        expected = model.generate(ids, attention_mask=mask, **common).sequences[:, 4 + length :]
        for policy in POLICIES.values():
            with pytest.raises(ValueError, match=r"whole rows.*including cached tokens|whole rows with `policy"):
                model.generate(more, attention_mask=mask, **{CACHE: first[CACHE]}, **common, **policy)
        found = model.generate(more, attention_mask=mask, **{CACHE: first[CACHE]}, **common)
        assert found.sequences[:, length:].tolist() == expected.tolist()


def test_positions_of_one_row_are_those_of_all():
    model, ids = tiny(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    expected = model.generate(ids, max_new_tokens=6)
    assert model.generate(ids, position_ids=torch.arange(3)[None], max_new_tokens=6).tolist() == expected.tolist()


@pytest.mark.parametrize("policy", ["plain", *POLICIES])
def test_training_mode_does_not_change_a_text(policy):
    model, options = tiny(), POLICIES.get(policy, {})
    expected = model.generate(PROMPT, max_new_tokens=9, **options)
    assert model.train().generate(PROMPT, max_new_tokens=9, **options).tolist() == expected.tolist()


# An early exit.


def released_logits(model, ids, threshold):
    """Logits [T, V] of one row as the authors' code computes them, token by token and step by step."""
    states = model(ids[None], output_hidden_states=True).hidden_states[2:]  # after each of the core steps
    gate, logits = model.model["early_exit_gate"], []
    for place in range(len(ids)):
        remaining, cumulative = 1.0, 0.0
        for step, of_step in enumerate(states):
            leaves = float(torch.sigmoid(gate(of_step[0, place])))
            chance = remaining if step == len(states) - 1 else leaves * remaining
            remaining *= 1 - leaves
            cumulative += chance
            if cumulative >= threshold or step == len(states) - 1:
                logits.append(model.lm_head(of_step[0, place]).float())
                break
    return torch.stack(logits)


@pytest.fixture
def ouro():
    model = tiny_model("ouro")
    with torch.no_grad():
        model.model["early_exit_gate"].weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_token_exits_where_the_gates_cumulative_probability_reaches_the_threshold(ouro, threshold):
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    ouro.config.early_exit_threshold = 1.0
    expected = [released_logits(ouro, torch.tensor(row), threshold) for row in rows]
    batch = left_padded(rows)
    ouro.config.early_exit_threshold = threshold
    for found in (ouro(**batch).logits, ouro(**batch, exit_threshold=threshold).logits):
        for row, logits in enumerate(expected):
            torch.testing.assert_close(found[row, -len(logits) :], logits, atol=1e-4, rtol=1e-4)
    ends = [plain_loop(ouro, row, 6) for row in rows]
    text = ouro.generate(**batch, max_new_tokens=6, pad_token_id=0)
    assert [row.tolist()[-6:] for row in text] == ends
    static = ouro.generate(**batch, max_new_tokens=6, pad_token_id=0, cache_implementation="static")
    assert static.tolist() == text.tolist()


def plain_loop(model, row, num_new):
    """The new ids of greedy decoding of one row, without a cache."""
    ids = torch.tensor([row])
    for _ in range(num_new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(row) :].tolist()


@torch.no_grad()
def test_thresholds_choose_different_steps(ouro):
    """Otherwise the tests above would prove little."""
    texts = set()
    for threshold in (0.0, 0.6, 1.0):
        texts.add(str(ouro(torch.arange(5, 25)[None], exit_threshold=threshold).logits.argmax(-1).tolist()))
    assert len(texts) == 3


@torch.no_grad()
def test_tokens_exit_at_the_step_asked_for(ouro):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    states = ouro(ids, output_hidden_states=True).hidden_states[2:]
    for step in range(4):
        expected = ouro.lm_head(states[step]).float()
        torch.testing.assert_close(ouro(ids, exit_at_step=step).logits, expected)
        ouro.config.early_exit_step = step
        torch.testing.assert_close(ouro(ids, logits_to_keep=1).logits, expected[:, -1:])
        text = ouro.generate(ids, max_new_tokens=5)
        ouro.config.early_exit_step = None
        assert ouro.generate(ids, max_new_tokens=5, exit_at_step=step).tolist() == text.tolist()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "diffusion-forcing"])
@pytest.mark.parametrize("field", [{"early_exit_threshold": 0.5}, {"early_exit_step": 1}])
def test_an_early_exit_of_the_config_is_for_plain_decoding(ouro, policy, field):
    for name, value in field.items():
        setattr(ouro.config, name, value)
    with pytest.raises(ValueError, match=r"`policy` must be 'autoregressive' where the config has an early exit"):
        ouro.generate(PROMPT, max_new_tokens=3, **POLICIES[policy])


def test_exits_that_cannot_be_are_refused(ouro):
    for step in (-1, 4):
        with pytest.raises(ValueError, match="`exit_at_step` must be from 0 to 3"):
            ouro(PROMPT, exit_at_step=step)
    with pytest.raises(ValueError, match="Leave one of the two out"):
        ouro(PROMPT, exit_at_step=1, exit_threshold=0.5)
    with pytest.raises(ValueError, match="has no exit gate"):
        tiny()(PROMPT, exit_at_step=1)
    with pytest.raises(ValueError, match="must be left out in training"):
        ouro.train()(PROMPT, exit_at_step=1)
    ouro.config.early_exit_threshold = 0.1
    assert ouro(PROMPT, labels=PROMPT).loss.requires_grad  # training takes all steps
