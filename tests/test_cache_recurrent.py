"""The recurrent cache: its contents, layout and size, and rolling back."""

import pytest
import torch

from helpers_recurrent import HUGINN_CONFIG, random_model
from wavedraft.generation.stock_model import CACHE, CACHE_NAMES
from wavedraft.modeling_recurrent import RecurrentCache, RecurrentDepthConfig


def huginn_bytes(make, *extra) -> int:
    config = RecurrentDepthConfig(**HUGINN_CONFIG)
    return make(config, 1, 1, *extra, torch.bfloat16, "meta").bytes_per_token


def test_the_bytes_a_token_takes_are_those_the_docstring_names():
    assert huginn_bytes(RecurrentCache.every_recurrence, 32) == 2 * 2 * 5280 * (4 + 4 * 32)  # 2.79 MB
    assert huginn_bytes(RecurrentCache.latest_only) == 2 * 2 * 5280 * 8  # 169 kB


def test_a_layer_is_one_tensor_whatever_the_depth_of_the_core():
    config = random_model(n_layers_in_recurrent_block=6).config
    cache = RecurrentCache.every_recurrence(config, 2, 16, 5, torch.float32, "cpu")
    assert [tuple(keys.shape) for keys in cache.keys] == [(1, 2, 3, 16, 8)] + [(5, 2, 3, 16, 8)] * 6 + [
        (1, 2, 3, 16, 8)
    ]


def forward(model, ids, cache):
    with torch.no_grad():
        return model(ids, **{CACHE: cache}, init_scale=0.0).logits


def test_rolling_back_is_never_having_been_there():
    model = random_model()
    cache = RecurrentCache.every_recurrence(model.config, 1, 16, 6, torch.float32, "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    forward(model, ids, cache)
    forward(model, torch.tensor([[30, 31]]), cache)  # a draft that falls
    pointers = [keys.data_ptr() for keys in cache.keys]

    cache.roll_back(0, 4)
    after = forward(model, torch.tensor([[9, 10]]), cache)

    assert torch.allclose(after, forward(model, torch.tensor([[5, 6, 7, 8, 9, 10]]), None)[:, 4:], atol=1e-5)
    assert [keys.data_ptr() for keys in cache.keys] == pointers and cache.lengths == [6]


def test_writing_is_in_place_and_growing_doubles():
    model = random_model()
    cache = RecurrentCache.latest_only(model.config, 1, 4, torch.float32, "cpu")
    pointers, moved = None, 0
    for token in range(30):
        forward(model, torch.tensor([[token]]), cache)
        now = [keys.data_ptr() for keys in cache.keys]
        moved += pointers is not None and now != pointers
        pointers = now
    assert cache.capacity == 32 and moved == 3


@pytest.mark.parametrize("stored", [1, 2, 6])
def test_the_latest_recurrences_are_kept_cyclically(stored):
    model = random_model()
    cache = RecurrentCache(model.config, 1, 8, stored, torch.float32, "cpu")
    every = RecurrentCache.every_recurrence(model.config, 1, 8, 6, torch.float32, "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    forward(model, ids, cache), forward(model, ids, every)
    for recurrence in range(6 - stored + 1, 7):
        torch.testing.assert_close(cache.keys[1][(recurrence - 1) % stored], every.keys[1][recurrence - 1])


def test_rows_that_stay_keep_their_place_and_their_contents():
    model = random_model()
    cache = RecurrentCache.latest_only(model.config, 4, 8, torch.float32, "cpu")
    forward(model, torch.arange(12).view(4, 3), cache)
    cache.lengths = [3, 2, 1, 3]
    before = [keys.clone() for keys in cache.keys]
    cache.keep_rows([0, 2, 3])
    assert cache.lengths == [3, 1, 3]
    assert all(torch.equal(now, old[:, [0, 2, 3]]) for now, old in zip(cache.keys, before, strict=True))


def test_what_transformers_asks_of_a_cache():
    model = random_model()
    cache = RecurrentCache.every_recurrence(model.config, 2, 8, 6, torch.float32, "cpu")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    together = forward(model, ids, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    again = forward(model, ids[[1, 0], -1:], cache)
    torch.testing.assert_close(again, together[[1, 0], -1:])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4 and cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stored_recurrences"):
        RecurrentCache(model.config, 1, 8, 0, torch.float32, "cpu")


def test_a_returned_cache_goes_on_where_it_stopped():
    model, ids = random_model(), torch.tensor([[5, 6, 7]])
    first = model.generate(ids, max_new_tokens=6, init_scale=0.0, return_dict_in_generate=True)
    more = model.generate(first.sequences, max_new_tokens=6, init_scale=0.0, **{CACHE: first[CACHE]})
    assert more.tolist() == model.generate(ids, max_new_tokens=12, init_scale=0.0).tolist()


def test_a_forward_takes_its_cache_by_either_name_but_not_by_both():
    model, ids = random_model(), torch.tensor([[5, 6, 7]])
    caches = [RecurrentCache.every_recurrence(model.config, 1, 8, 6, torch.float32, "cpu") for _ in range(2)]
    by_name = [model(ids, **{name: cache}) for name, cache in zip(CACHE_NAMES, caches, strict=True)]
    assert by_name[0].logits.equal(by_name[1].logits)
    assert [cache.get_seq_length() for cache in caches] == [3, 3]
    assert by_name[0][CACHE] is caches[0] and by_name[1][CACHE] is caches[1]
    with pytest.raises(ValueError, match="`past_key_values` must be left out with `cache`"):
        model(ids, cache=caches[0], past_key_values=caches[1])


def test_beams_reorder_the_cache():
    model, ids = random_model(), torch.tensor([[5, 6, 7]])
    with_cache = model.generate(ids, max_new_tokens=8, num_beams=3, init_scale=0.0)
    without = model.generate(ids, max_new_tokens=8, num_beams=3, init_scale=0.0, use_cache=False)
    assert with_cache.tolist() == without.tolist()


@pytest.mark.parametrize("kind", ["one column", "columns of their own", "packed"])
@pytest.mark.parametrize("layer", [1, 2])  # of the core, whose planes are several, and of the coda
def test_a_layer_on_another_device_gets_the_window_there_and_keeps_its_keys_there(kind, layer):
    """The CPU's only other device is meta, which computes shapes and refuses tensors of the CPU."""
    model = random_model(0, n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1)
    blocks = [*model.transformer["prelude"], *model.transformer["core_block"], *model.transformer["coda"]]
    cache = RecurrentCache.every_recurrence(model.config, 2, 16, 3, torch.float32, "cpu")
    if kind == "packed":
        window = model.packed_window([0, 0, 0, 1, 1], [4, 5, 6, 5, 6], cache)
        window = window.at([3, 1, 2, 2, 1]) if layer == 1 else window
        shape = (5, 1)
    else:
        window = model.window_at([3, 3] if kind == "one column" else [5, 3], 2, cache)
        shape = (2, 2)
    states = torch.zeros(*shape, model.config.n_embd)
    with pytest.raises((RuntimeError, NotImplementedError)):
        blocks[layer](states.to("meta"), window, 1)  # its weights are on the CPU
    found = blocks[layer].to("meta")(states.to("meta"), window, 1)
    assert found.device.type == cache.keys[layer].device.type == cache.values[layer].device.type == "meta"
    assert found.shape == states.shape
    assert blocks[0](states, window).device.type == cache.keys[0].device.type == cache.device.type == "cpu"
    assert window.device.type == "cpu" and window.on(torch.device("meta")) is window.on(torch.device("meta"))


def test_a_packed_windows_recurrences_are_those_of_its_copies():
    model = random_model(0)
    cache = RecurrentCache.every_recurrence(model.config, 1, 16, 3, torch.float32, "cpu")
    window = model.packed_window([0, 0, 0], [4, 5, 6], cache)
    first, second = (window.at(depths) for depths in ([1, 2, 3], [3, 1, 2]))
    for one, planes in ((first, [0, 1, 2]), (second, [2, 0, 1])):
        assert one.packing.planes.tolist() == planes
        assert one.on(torch.device("meta")).packing is not one.packing
        assert one.on(torch.device("cpu")) is one
