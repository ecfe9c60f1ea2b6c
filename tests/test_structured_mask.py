"""The structured masks equal masks written as plain loops, for every attention implementation."""

import pytest
import torch

from helpers_tidar import tiny_tidar
from helpers_whole_masks import decode_mask, training_mask
from wavedraft.generation.drafting.draftable import refuse_undraftable
from wavedraft.generation.drafting.structured_mask import (
    draft_mask_function,
    draft_positions,
    real_slot_function,
    structured_attention_mask,
)
from wavedraft.modeling_tidar.masking_tidar import (
    blocks_with_labels,
    mask_positions,
    training_attention_mask,
    training_branch_lengths,
)


def looped_training_mask(num_clean, draft_length):
    """Row q may see column k, straight from the definition."""
    size = 2 * num_clean
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            if q < num_clean:
                mask[q, k] = k < num_clean and k <= q
            elif k < num_clean:
                mask[q, k] = k < (q - num_clean) // draft_length * draft_length
            else:
                mask[q, k] = (k - num_clean) // draft_length == (q - num_clean) // draft_length
    return mask


def looped_decode_mask(draft_length, branch_lengths):
    """d_i sees d_1..d_i; block j sees the d's of its branch and its own masks."""
    queries = [("draft", i) for i in range(1, draft_length + 1)]
    queries += [("mask", j) for j in branch_lengths for _ in range(draft_length)]
    mask = torch.zeros(len(queries), len(queries), dtype=torch.bool)
    for row, (row_kind, row_number) in enumerate(queries):
        for column, (kind, number) in enumerate(queries):
            if kind == "draft":
                mask[row, column] = number <= row_number
            else:
                mask[row, column] = row_kind == "mask" and number == row_number
    return mask


@pytest.mark.parametrize("num_clean", [1, 5, 6, 12])
@pytest.mark.parametrize("draft_length", [1, 2, 3, 4, 7])
def test_training_mask_is_the_papers(num_clean, draft_length):
    assert torch.equal(training_mask(num_clean, draft_length), looped_training_mask(num_clean, draft_length))


def test_training_mask_as_drawn_in_the_specification():
    drawn = """
        #.....|......
        ##....|......
        ###...|......
        ####..|......
        #####.|......
        ######|......
        ......|###...
        ......|###...
        ......|###...
        ###...|...###
        ###...|...###
        ###...|...###
    """
    rows = [line.strip().replace("|", "") for line in drawn.strip().splitlines()]
    assert ["".join(".#"[see] for see in row) for row in training_mask(6, 3).int().tolist()] == rows


@pytest.mark.parametrize("draft_length", [1, 2, 3, 8])
def test_decode_mask_is_the_papers(draft_length):
    expected = looped_decode_mask(draft_length, range(1, draft_length + 1))
    assert torch.equal(decode_mask(draft_length), expected)


@pytest.mark.parametrize("branch_lengths", [[4], [1, 3], [2, 4, 1]])
def test_decode_mask_with_some_branches_only(branch_lengths):
    assert torch.equal(decode_mask(4, branch_lengths), looped_decode_mask(4, branch_lengths))


@pytest.mark.parametrize("window", [None, 4])
def test_rows_may_draft_after_different_tokens(window):
    draft_length, branch_lengths, cached_lengths = 4, torch.tensor([[1, 3], [2, 4], [1, 1]]), torch.tensor([5, 2, 7])
    num_queries, num_slots = draft_length * 3, 7 + draft_length * 3
    structure = draft_mask_function(draft_length, draft_length, branch_lengths, cached_lengths, sliding_window=window)
    b, q, k = torch.meshgrid(torch.arange(3), torch.arange(num_queries), torch.arange(num_slots), indexing="ij")
    found = structure(b, 0, q, k)
    positions = draft_positions(draft_length, draft_length, branch_lengths)
    for row, cached in enumerate(cached_lengths.tolist()):
        lengths = branch_lengths[row].tolist()
        queries = [("clean", i, i) for i in range(draft_length)]
        queries += [(f"block {n}", m, length + m) for n, length in enumerate(lengths) for m in range(draft_length)]
        assert positions[row].tolist() == [position for _, _, position in queries]
        for query, (kind, place, position) in enumerate(queries):
            for slot in range(num_slots):
                if slot < cached:
                    visible, key_position = True, slot - cached
                elif slot - cached < num_queries:
                    key_kind, key_place, key_position = queries[slot - cached]
                    num_seen = place + 1 if kind == "clean" else lengths[int(kind[-1])]
                    visible = key_place < num_seen if key_kind == "clean" else key_kind == kind
                else:
                    visible, key_position = False, 0
                near = window is None or position - key_position < window
                assert found[row, query, slot] == (visible and near)


def test_positions_start_after_what_a_branch_sees():
    assert draft_positions(3, 3, torch.tensor([1, 2, 3])).tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5]
    assert mask_positions(3, training_branch_lengths(7, 3)).tolist() == [*range(7), 7, 8]
    assert mask_positions(3, torch.tensor([[1, 4], [3, 6]])).tolist() == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_only_blocks_with_something_to_learn_are_drafted(first):
    has_label = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1], [0] * 5 + [1] * 6, [0] * 10 + [1], [0] * 11]).bool()
    expected = [[start for start in range(first, 11, 3) if any(row[start : start + 3])] for row in has_label.tolist()]
    most = max(len(row) for row in expected)
    assert blocks_with_labels(has_label, 3, first).tolist() == [row + [11] * (most - len(row)) for row in expected]


def looped_cached_mask(draft_length, cached_lengths, is_real_slot, window):
    """The decode step's mask with each row's own cache in front, padding hidden, and a sliding window."""
    corner = looped_decode_mask(draft_length, range(1, draft_length + 1))
    positions = draft_positions(draft_length, draft_length, torch.arange(1, draft_length + 1)).tolist()
    num_queries, num_slots = len(corner), is_real_slot.shape[1]
    mask = torch.zeros(len(cached_lengths), 1, num_queries, num_slots, dtype=torch.bool)
    for row, cached in enumerate(cached_lengths):
        for q in range(num_queries):
            for slot in range(num_slots):
                inside = slot - cached
                if inside < 0:
                    near = window is None or positions[q] - inside < window
                    mask[row, 0, q, slot] = is_real_slot[row, slot] and near
                elif inside < num_queries:
                    near = window is None or positions[q] - positions[inside] < window
                    mask[row, 0, q, slot] = corner[q, inside] and near
    return mask


@pytest.mark.parametrize("window", [None, 3, 6])
def test_ragged_rows_see_their_own_cache_and_no_padding(window):
    draft_length, cached_lengths = 3, torch.tensor([7, 4, 5])
    num_slots = int(cached_lengths.max()) + draft_length * (draft_length + 1)
    is_real_slot = torch.ones(3, num_slots, dtype=torch.bool)
    is_real_slot[1, :2] = is_real_slot[2, 0] = False

    structure = draft_mask_function(
        draft_length, draft_length, torch.arange(1, draft_length + 1), cached_lengths, sliding_window=window
    )
    real = real_slot_function(is_real_slot, cached_lengths)
    b, q, k = torch.meshgrid(torch.arange(3), torch.arange(12), torch.arange(num_slots), indexing="ij")
    mask = (structure(b, 0, q, k) & real(b, 0, q, k))[:, None]

    assert torch.equal(mask, looped_cached_mask(draft_length, cached_lengths.tolist(), is_real_slot, window))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_implementation_gets_the_form_it_reads(implementation):
    model = tiny_tidar()
    model.set_attn_implementation(implementation)
    mask = structured_attention_mask(
        model.config,
        lambda window: draft_mask_function(4, 2, torch.tensor([2, 4]), sliding_window=window),
        batch_size=2,
        query_length=8,
        key_length=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    visible = mask if implementation == "sdpa" else mask == 0
    branches = looped_decode_mask(4, [2, 4])  # blocks of 4, of which this layout's blocks of 2 are the first half
    keep = [0, 1, 2, 3, 4, 5, 8, 9]
    assert visible.shape == (2, 1, 8, 8)
    assert torch.equal(visible[1, 0], branches[keep][:, keep])
    if implementation == "eager":
        assert (mask[~visible] < -1e30).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_eager_sdpa_and_flex_attention_agree_on_the_doubled_sequence(family):
    losses = {}
    ids = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    document_ids = torch.tensor([[0] * 5 + [1] * 6, [0] * 9 + [-1] * 2])
    for implementation in ("eager", "sdpa", "flex_attention"):
        model = tiny_tidar(family, draft_length=3)
        if family == "gemma2" and implementation == "sdpa":
            continue  # its soft-capped attention has no sdpa form
        model.set_attn_implementation(implementation)
        blocks = training_branch_lengths(11, 3)
        mask = training_attention_mask(model.config, 3, blocks, document_ids, dtype=torch.float32)
        with torch.no_grad():
            positions = torch.cat([torch.arange(11), torch.arange(12)]).expand(2, -1)
            doubled_ids = torch.cat([ids, ids, ids[:, :1]], dim=1)
            # A fused kernel reads our mask function once; the other families read it uncompiled.
            with torch.compiler.set_stance("default" if family == "llama" else "force_eager"):
                states = model.model(doubled_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        losses[implementation] = states[:, :9]
    reference = losses.pop("eager")
    for states in losses.values():
        torch.testing.assert_close(states, reference, atol=1e-4, rtol=1e-4)


def test_layers_of_an_unknown_kind_are_refused_by_name():
    model = tiny_tidar("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        refuse_undraftable(type(model), model.config)


def test_flash_attention_is_refused():
    model = tiny_tidar()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        training_attention_mask(
            model.config, 2, torch.tensor([0]), torch.zeros(1, 2, dtype=torch.long), dtype=torch.float32
        )
