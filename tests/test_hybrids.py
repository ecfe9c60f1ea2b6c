"""Families whose layers keep states: text, batches, caches and distribution are the stock model's.

In float64, whose states are float32 in transformers: sums of several tokens round at 1e-6, and no choice is so near.
"""

import random

import pytest
import torch
from safetensors import safe_open

from helpers_drafts import draft_now_and_then
from helpers_hybrids import EVERY_HYBRID, HYBRIDS, tiny_hybrid
from helpers_marks import slow_but
from helpers_sampling import SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from helpers_tidar import CountedForwards, gated
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation.stock_model import CACHE, can_choose_experts

PLAIN = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompts(batch_size=2, length=9, seed=1):
    return torch.randint(1, 61, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch_size=3):
    ids = prompts(batch_size)
    for row in range(1, batch_size):
        ids[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def assert_same(found, expected):
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3, check_dtype=False)


@pytest.mark.parametrize("family", EVERY_HYBRID)
def test_every_family_writes_the_stock_models_text_alone_and_in_a_ragged_batch(family, monkeypatch):
    stock, model = tiny_hybrid(family, dtype=torch.float64)
    for given in ({"input_ids": prompts(1)}, left_padded()):
        expected = stock.generate(**given, **PLAIN)
        draft_now_and_then(monkeypatch, expected.sequences)
        for num_branches in (1, "all"):
            found = model.generate(**given, num_branches=num_branches, **PLAIN)
            assert_same(found, expected)
            assert found.accepted_lengths[:, 1:].any()  # drafts did stand


# Falcon-H1's config.json has an infinite float and its model a buffer of its own; Bailing's weights change their names.
@pytest.mark.parametrize("family", ["falcon_h1", "bailing_hybrid"])
def test_a_converted_folder_writes_the_stock_models_text(family, tmp_path, monkeypatch):
    stock, _ = tiny_hybrid(family)
    stock.save_pretrained(tmp_path / "stock")
    if family == "falcon_h1":
        assert '"__float__": "Infinity"' in (tmp_path / "stock" / "config.json").read_text()
    else:
        assert read_tensors(tmp_path / "stock") != {*stock.state_dict()}
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    assert read_tensors(tmp_path / "tidar") == read_tensors(tmp_path / "stock")
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar", dtype=torch.float64).eval()
    for name, tensor in stock.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), tensor, check_dtype=False)
    for one in (stock := stock.double(), model):
        one.generation_config.pad_token_id, one.generation_config.eos_token_id = 0, None
        if can_choose_experts(one):
            one.set_experts_implementation("eager")
    expected = stock.generate(**left_padded(), **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    found = model.generate(**left_padded(), num_branches="all", **PLAIN)
    assert_same(found, expected)
    assert found.accepted_lengths[:, 1:].any()


def read_tensors(folder):
    """The names in a folder's weights."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {*file.keys()}


@pytest.mark.slow
@pytest.mark.parametrize("draft_length", [2, 4, 8])
@pytest.mark.parametrize("num_branches", [1, 2, "all", "auto"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_every_shape_of_step_writes_the_same(family, draft_length, num_branches, monkeypatch):
    stock, model = tiny_hybrid(family, draft_length, torch.float64)
    given = left_padded()
    expected = stock.generate(**given, **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences, seed=draft_length)
    assert_same(model.generate(**given, num_branches=num_branches, **PLAIN), expected)


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid", "nemotron_h"])
def test_float32_writes_the_same_up_to_a_tie(family, monkeypatch):
    stock, model = tiny_hybrid(family)
    given = left_padded()
    expected = stock.generate(**given, **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    found = model.generate(**given, num_branches="all", **PLAIN)
    for row in range(3):
        for step, logits in enumerate(expected.logits):
            if found.sequences[row, 9 + step] != expected.sequences[row, 9 + step]:
                best = logits[row].topk(2).values
                assert best[0] - best[1] < 1e-3, (row, step)
                break
            torch.testing.assert_close(found.logits[step][row], logits[row], atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("family", EVERY_HYBRID)
def test_each_forward_of_a_step_is_one_call_of_the_model(family, monkeypatch):
    stock, model = tiny_hybrid(family, dtype=torch.float64)
    expected = stock.generate(prompts(1), **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    counted = CountedForwards(model)
    found = model.generate(prompts(1), num_branches=1, **PLAIN)
    assert len(counted.num_queries) == found.num_forwards + found.num_prefill_forwards < 14
    assert max(counted.num_queries[1:]) == 8  # as many query tokens as without states: K + K


@pytest.mark.parametrize("family", EVERY_HYBRID)
def test_a_row_ends_inside_a_run_of_accepted_tokens(family, monkeypatch):
    stock, model = tiny_hybrid(family, dtype=torch.float64)
    given = left_padded()
    texts = stock.generate(**given, **PLAIN).sequences
    ends = {"eos_token_id": [int(texts[0, 13]), int(texts[1, 16])], "pad_token_id": 0}
    expected = stock.generate(**given, **PLAIN, **ends)
    assert (expected.sequences[:, 9:] == 0).any() or expected.sequences.shape[1] < texts.shape[1]
    draft_now_and_then(monkeypatch, texts)
    found = model.generate(**given, num_branches="all", **PLAIN, **ends)
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("family", EVERY_HYBRID)
def test_a_second_turn_goes_on_from_the_first_turns_cache(family, monkeypatch):
    stock, model = tiny_hybrid(family, dtype=torch.float64)
    first = stock.generate(prompts(1), **PLAIN)
    draft_now_and_then(monkeypatch, first.sequences)
    mine = model.generate(prompts(1), num_branches=2, **PLAIN)
    for one, other in zip(getattr(mine, CACHE).layers, getattr(first, CACHE).layers, strict=True):
        assert type(one).__name__ == type(other).__name__
        for kind in ("conv_states", "recurrent_states"):
            for state, expected in zip(getattr(one, kind, {}).values(), getattr(other, kind, {}).values(), strict=True):
                if expected is not None:
                    torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    longer = torch.cat([first.sequences, prompts(1, 4, seed=3)], dim=1)
    given = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    second = stock.generate(**given, **PLAIN, **{CACHE: getattr(first, CACHE)})
    draft_now_and_then(monkeypatch, second.sequences)
    found = model.generate(**given, num_branches="all", **PLAIN, **{CACHE: getattr(mine, CACHE)})
    assert_same(found, second)


def test_a_second_turn_of_rows_that_ended_apart_is_each_rows_own(monkeypatch):
    """Plain decoding reads padding into the states of ended rows; here a row's state stays behind its own text."""
    stock, model = tiny_hybrid("qwen3_5_text", dtype=torch.float64)
    given = left_padded()
    texts = stock.generate(**given, **PLAIN).sequences
    draft_now_and_then(monkeypatch, texts)
    first = model.generate(**given, num_branches=2, **PLAIN, eos_token_id=int(texts[0, 13]))
    longer = torch.cat([first.sequences, prompts(3, 4, seed=3)], dim=1)
    mask = longer.ne(0).long()
    found = model.generate(longer, attention_mask=mask, **PLAIN, **{CACHE: getattr(first, CACHE)})
    for row in range(3):
        alone = stock.generate(longer[row : row + 1, mask[row].bool()], **PLAIN).sequences
        assert found.sequences[row, longer.shape[1] :].tolist() == alone[0, -14:].tolist()


@pytest.fixture(scope="module")
def pairs():
    return {}


@pytest.mark.parametrize("case", slow_but(range(10), range(30)))
def test_random_prompts_cut_at_random_places(case, pairs, monkeypatch):
    """Random rows, padding, drafts and branches; then a second turn from the cache of a text that was cut anywhere."""
    chance = random.Random(case)
    family, length = chance.choice(["lfm2", "qwen3_next"]), chance.choice([2, 3, 5])
    if (family, length) not in pairs:
        pairs[family, length] = tiny_hybrid(family, length, torch.float64)
    stock, model = pairs[family, length]
    num_rows, width = chance.choice([1, 1, 2, 3]), chance.randint(2, 12)
    ids = prompts(num_rows, width, seed=case)
    for row in range(1, num_rows):
        ids[row, : chance.randrange(width)] = 0
    asked = PLAIN | {"max_new_tokens": chance.randint(2, 11)}
    given = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    first = stock.generate(**given, **asked)
    draft_now_and_then(monkeypatch, first.sequences, seed=case)
    mine = model.generate(**given, num_branches=chance.choice([1, 2, "all"]), **asked)
    assert_same(mine, first)
    longer = torch.cat([first.sequences, prompts(num_rows, chance.randint(1, 7), seed=100 + case)], dim=1)
    more = torch.ones(num_rows, longer.shape[1] - width, dtype=torch.long)
    given = {"input_ids": longer, "attention_mask": torch.cat([given["attention_mask"], more], dim=1)}
    second = stock.generate(**given, **asked)  # all of it read again, without the cache
    draft_now_and_then(monkeypatch, second.sequences, seed=case)
    branches = chance.choice([1, 2, "all"])
    assert_same(model.generate(**given, num_branches=branches, **asked, **{CACHE: getattr(mine, CACHE)}), second)


def test_a_prompt_read_in_chunks_is_the_prompt():
    stock, model = tiny_hybrid("qwen3_5_text", dtype=torch.float64)
    expected = stock.generate(**left_padded(), **PLAIN)
    assert_same(model.generate(**left_padded(), prefill_chunk_size=4, **PLAIN), expected)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "lfm2")) for name in HYBRIDS]
)
def test_sampled_texts_have_the_stock_models_distribution(family):
    _, model = tiny_hybrid(family, 3, vocab_size=SMALL_VOCABULARY, pad_token_id=None)
    model.config.tidar_config["mask_token_id"] = SMALL_VOCABULARY
    prompt_ids = prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    joint = exact_joint(model, prompt_ids, 3, top_k=0, temperature=2.0)
    num_draws = 8000
    counts = draw(model, prompt_ids, 3, num_draws, seed=1, top_k=0, temperature=2.0, num_branches="all")
    expected = joint * num_draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).clamp(min=1e-9)
    assert ((observed - wanted) ** 2 / wanted).sum().item() < chi_square_bound(len(wanted) - 1)


def test_a_gated_adapter_leaves_the_text_and_the_states_alone(monkeypatch):
    stock, model = tiny_hybrid("qwen3_5_text", dtype=torch.float64)
    model = gated(model).get_base_model()
    expected = stock.generate(**left_padded(), **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    for num_branches in (1, "all"):
        assert_same(model.generate(**left_padded(), num_branches=num_branches, **PLAIN), expected)


def test_what_states_cannot_do_is_decoded_plainly_or_refused(caplog):
    from wavedraft.generation import tidar

    stock, model = tiny_hybrid("qwen3_5_text")
    expected = stock.generate(prompts(1), max_new_tokens=6, do_sample=False)
    for asked in ({"exact": "tie-safe"}, {"cache_implementation": "static"}):
        found = model.generate(prompts(1), max_new_tokens=6, do_sample=False, **asked)
        assert found.tolist() == expected.tolist()
        with pytest.raises(ValueError, match="keep a state"):
            stock.generate(
                prompts(1), max_new_tokens=6, custom_generate=tidar, draft_length=4, mask_embedding_id=3, **asked
            )
