"""A second turn goes on from any cache of transformers and of ours, with whole texts or with what is new alone."""

import copy
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from helpers_marks import slow_but
from helpers_stock import tiny_config
from helpers_tidar import VOCAB_SIZE, random_prompts
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.stock_model import CACHE

TURN = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
OPTIONS = {
    "every branch": {},
    "planned": {"num_branches": "auto"},
    "tie-safe": {"exact": "tie-safe", "num_branches": 1},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
}
FIRST_TURNS = {
    "stock": ("stock", {}),
    "stock, static": ("stock", {"cache_implementation": "static", "max_cache_len": 60}),  # with room for more turns
    "drafted": ("ours", {}),
    "drafted, static": ("ours", {"cache_implementation": "static", "max_cache_len": 60}),
    "plain": ("ours", {"draft_length": 0}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each family and window, a drafting model and the stock model of the same weights."""
    made = {}

    def pair(family, window=9):
        if (family, window) not in made:
            torch.manual_seed(0)
            config = tiny_config(family, **({"sliding_window": window} if window != 9 else {}))
            config.tidar_config = {"draft_length": 4, "mask_token_id": VOCAB_SIZE, "mask_embedding_id": 3}
            model = TiDARForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 1 + (parameter.ndim > 1)  # so that texts vary
            model.generation_config.num_branches = "all"
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family, window] = model, AutoModelForCausalLM.from_pretrained(folder).eval()
        return made[family, window]

    return pair


def second_turn(model, first, mask, more, is_new_alone, **options):
    """The new ids and the output of a turn that goes on from a copy of the first turn's cache."""
    ids, cache = torch.cat([first.sequences, more], dim=1), copy.deepcopy(first[CACHE])
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    ids = ids[:, int(cache.get_seq_length()) :] if is_new_alone else ids
    output = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **TURN, **options)
    return output.sequences[:, ids.shape[1] :].tolist(), output


FAMILIES = [
    *product(["mistral", "gemma3", "gpt-oss"], [2, 5, 9, 40]),
    *product(["gemma2", "qwen2-windows", "cohere2", "llama", "gpt2"], [9]),
]


@pytest.mark.parametrize("is_ragged", slow_but({True}, (False, True)), ids=["even", "ragged"])
@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_a_turn_goes_on_from_any_cache(pairs, family, window, is_ragged):
    """The text is that of a stock turn that reads everything afresh. Layers with a window keep few tokens of a text."""
    model, stock = pairs(family, window)
    prompts, more, mask = random_prompts(2, 10), random_prompts(2, 3, seed=5), torch.ones(2, 10, dtype=torch.long)
    mask[1, : 3 * is_ragged] = 0
    for number, (of, options) in enumerate(FIRST_TURNS.values()):
        first = {"stock": stock, "ours": model}[of].generate(prompts, attention_mask=mask, **TURN, **options)
        ids = torch.cat([first.sequences, more], dim=1)
        whole_mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - 10), value=1)
        expected = stock.generate(ids, attention_mask=whole_mask, **TURN).sequences[:, ids.shape[1] :].tolist()
        for is_new_alone in (False, True):
            name = [*OPTIONS][(2 * number + is_new_alone) % len(OPTIONS)]
            found, output = second_turn(model, first, mask, more, is_new_alone, **chosen(name, family))
            assert found == expected, (of, options, is_new_alone, name)
            length = ids.shape[1] + TURN["max_new_tokens"] - 1
            assert output[CACHE].get_seq_length() == length
            is_whole = not any(first[CACHE].is_sliding) or type(first[CACHE]) is DynamicCache
            assert hasattr(output, "num_forwards") == (is_whole and not is_new_alone)
            third = torch.cat([ids, torch.tensor(found), more], dim=1)
            third_mask = torch.nn.functional.pad(mask, (0, third.shape[1] - 10), value=1)
            kept = stock.generate(third, attention_mask=third_mask, **{CACHE: output[CACHE]}, **TURN).sequences
            assert kept.tolist() == stock.generate(third, attention_mask=third_mask, **TURN).sequences.tolist()


def chosen(name, family):
    """A cache given leaves no choice of another."""
    return {} if name == "static" else OPTIONS[name]


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_users_empty_cache_is_filled_and_gone_on_from(pairs, cache):
    model, stock = pairs("mistral", 9)
    prompts, more = random_prompts(2, 10), random_prompts(2, 3, seed=5)
    own = cache(config=model.config, **({"max_cache_len": 60} if cache is StaticCache else {}))
    first = model.generate(prompts, **{CACHE: own}, **TURN)
    assert first[CACHE] is own and own.get_seq_length() == 21
    ids = torch.cat([first.sequences, more], dim=1)
    found = stock.generate(ids, **{CACHE: own}, **TURN).sequences
    assert found.tolist() == stock.generate(ids, **TURN).sequences.tolist()


def test_what_a_window_has_dropped_is_never_seen(pairs):
    """Only a mask keeps the zeros in its place out of sight: another value there must not change the text either."""
    model, stock = pairs("gemma3", 5)
    prompts, more = random_prompts(2, 10), random_prompts(2, 3, seed=5)
    first, mask = stock.generate(prompts, **TURN), torch.ones(2, 10, dtype=torch.long)
    found, _ = second_turn(model, first, mask, more, False)
    for layer in first[CACHE].layers:
        missing = first[CACHE].get_seq_length() - layer.keys.shape[2]
        for name in ("keys", "values"):
            setattr(layer, name, torch.nn.functional.pad(getattr(layer, name), (0, 0, missing, 0), value=1e4))
    assert second_turn(model, first, mask, more, False)[0] == found


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_positions_of_one_row_are_those_of_all(pairs, family):
    model, stock = pairs(family)
    prompts = random_prompts(2, 10)
    for positions in (torch.arange(10)[None], torch.arange(5, 15)[None], 2 * torch.arange(20).view(2, 10)):
        expected = stock.generate(prompts, position_ids=positions, **TURN).sequences.tolist()
        for of, more in ((model, {}), (model, {"prefill_chunk_size": 3}), (stock, {"custom_generate": tidar})):
            found = of.generate(prompts, position_ids=positions, **TURN, **more)
            assert found.sequences.tolist() == expected and found.num_forwards is not None


CASES = {
    "one row": ({}, 1, "other rows"),
    "shorter text": ({"num_columns": 10}, 2, "not whole texts, longer than the cache"),
    "same text": ({"num_columns": 21}, 2, "not whole texts, longer than the cache"),
    "new alone": ({"num_columns": 3, "mask": 24}, 2, "as long as the mask"),
    "new alone, without their mask": ({"num_columns": 3}, 2, "not whole texts, longer than the cache"),
    "mask too long": ({"mask": 40}, 2, "as long as the mask"),
    "positions of three": ({"positions": torch.arange(75).view(3, 25)}, 2, r"`position_ids` are \[3, 25\] for \[2, 4"),
    "three kinds of positions": ({"positions": torch.arange(150).view(3, 2, 25)}, 2, r"`position_ids` are \[3, 2, 25"),
    "few positions": ({"positions": torch.arange(3)[None]}, 2, r"`position_ids` are \[1, 3\]"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_left_to_plain_decoding(pairs, name):
    """It writes a text or raises, and so does ours. A custom decode refuses what does not fit, before any forward."""
    (changes, num_rows, words), (model, stock) = CASES[name], pairs("mistral")
    cache = stock.generate(random_prompts(2, 10), **TURN)[CACHE]
    ids = random_prompts(num_rows, changes.get("num_columns", 25))
    given = {"attention_mask": torch.ones(2, changes["mask"])} if "mask" in changes else {}
    given |= {"position_ids": changes["positions"]} if "positions" in changes else {}
    assert outcome(model, ids, cache, **given) == outcome(stock, ids, cache, **given)
    forwards = []
    hook = stock.register_forward_pre_hook(lambda *args: forwards.append(args))
    with pytest.raises(ValueError, match=words):
        stock.generate(ids, **{CACHE: copy.deepcopy(cache)}, **given, **TURN, custom_generate=tidar)
    hook.remove()
    assert not forwards


def outcome(model, ids, cache, **given):
    try:
        return model.generate(ids, **{CACHE: copy.deepcopy(cache)}, **given, **TURN).sequences.tolist()
    except (RuntimeError, IndexError, ValueError) as error:
        return type(error)


def test_a_cache_of_another_kind_is_decoded_from_plainly(pairs):
    model, stock = pairs("llama")
    first = stock.generate(random_prompts(2, 10), **TURN)
    ids = torch.cat([first.sequences, random_prompts(2, 3, seed=5)], dim=1)
    turn = {"attention_mask": torch.ones_like(ids), **TURN}
    expected = stock.generate(ids, **turn).sequences.tolist()

    class OwnCache(DynamicCache):
        pass

    own = OwnCache()
    own.layers = copy.deepcopy(first[CACHE]).layers
    found = model.generate(ids, **{CACHE: copy.deepcopy(own)}, **turn)
    assert found.sequences.tolist() == expected and not hasattr(found, "num_forwards")
    with pytest.raises(ValueError, match=r"the cache handed in is of another kind \(OwnCache\)"):
        stock.generate(ids, **{CACHE: own}, **turn, custom_generate=tidar)
