"""`tidar_config.block_attention`: blocks whose masks see only the masks before them."""

import json

import pytest
import torch

from helpers_stock import save_tiny_stock
from helpers_tidar import FAMILIES, gated, plain_greedy_loop, ragged, random_prompts, tiny_tidar
from helpers_whole_masks import decode_mask, training_mask
from wavedraft import DraftObjective, TiDARForCausalLM, convert
from wavedraft.generation.drafting.draft_network import new_network
from wavedraft.generation.drafting.draft_step import with_masks
from wavedraft.generation.execution.gated_linear import mask_gate_of


def causal_tidar(family="llama", draft_length=4, **changes):
    model = tiny_tidar(family, draft_length, **changes)
    model.config.tidar_config = model.config.tidar_config | {"block_attention": "causal"}
    return model


def looped_causal_mask(num_clean, draft_length, branch_lengths):
    """A token sees tokens up to itself; mask m of block j sees the tokens of its branch, and masks 1..m of block j."""
    queries = [("token", i, 0) for i in range(1, num_clean + 1)]
    queries += [(f"block {n}", j, m) for n, j in enumerate(branch_lengths) for m in range(1, draft_length + 1)]
    mask = torch.zeros(len(queries), len(queries), dtype=torch.bool)
    for row, (row_kind, row_number, row_place) in enumerate(queries):
        for column, (kind, number, place) in enumerate(queries):
            if kind == "token":
                mask[row, column] = number <= row_number
            else:
                mask[row, column] = row_kind == kind and place <= row_place
    return mask


@pytest.mark.parametrize("branch_lengths", [[4], [1, 3], [2, 4, 1], [1, 2, 3, 4]])
def test_decode_mask_of_causal_blocks(branch_lengths):
    assert torch.equal(decode_mask(4, branch_lengths, is_causal=True), looped_causal_mask(4, 4, branch_lengths))


@pytest.mark.parametrize(("num_clean", "draft_length"), [(6, 3), (12, 4), (4, 1)])
def test_training_mask_of_causal_blocks(num_clean, draft_length):
    expected = looped_causal_mask(num_clean, draft_length, range(0, num_clean, draft_length))
    assert torch.equal(training_mask(num_clean, draft_length, is_causal=True), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branch_lengths", [[4], [2], [1, 3]])
def test_a_causal_block_reads_what_a_plain_forward_of_its_text_reads(family, branch_lengths):
    """The slow twin needs no mask: the text, a block's tokens and the masks, in order."""
    model = causal_tidar(family)
    ids = random_prompts(1, 11)[0]
    network = new_network(model, 1, 3)
    assert network.masks.is_causal
    with network.form.applied():
        _, prompt_predictions, positions = network.prefill(ids[None, :7], None, 4)
        positions = positions + torch.arange(4)
        branches = torch.tensor([branch_lengths])
        _, predictions = network(with_masks(ids[None, 7:], positions, branches, torch.tensor([7]), 4, 4, network.masks))
    masks = torch.full((4,), 3)
    for states, num_read in [(prompt_predictions.states[0], 7)] + [
        (predictions.states[0, 4 * block : 4 * block + 4], 7 + j) for block, j in enumerate(branch_lengths)
    ]:
        expected = model.model(torch.cat([ids[:num_read], masks])[None]).last_hidden_state[0, -4:]
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("num_branches", [1, 2, "all", "auto"])
def test_text_is_plain_decodings_for_every_number_of_branches(family, num_branches):
    model = gated(causal_tidar(family)).get_base_model()
    prompts = random_prompts(1, 9)
    output = model.generate(
        prompts, max_new_tokens=24, do_sample=False, num_branches=num_branches, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == plain_greedy_loop(model, prompts[0], 24).tolist()


@pytest.mark.parametrize("num_branches", [1, "all"])
@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}])
def test_a_padded_batch_is_each_row_alone(num_branches, static):
    model = causal_tidar()
    given = ragged()
    how = {"max_new_tokens": 16, "do_sample": False, "num_branches": num_branches, **static}
    found = model.generate(**given, **how)
    for row, mask in enumerate(given["attention_mask"]):
        alone = given["input_ids"][row : row + 1, mask.bool()]
        assert found[row, 7:].tolist() == model.generate(alone, **how)[0, alone.shape[1] :].tolist()


@pytest.mark.parametrize("mode", ["joint", "gated"])
def test_losses_are_those_of_a_loop_over_prefixes(mode):
    """Each block alone: a plain forward of its prefix and its masks."""
    peft_model = gated(causal_tidar(draft_length=3)) if mode == "gated" else None
    model = peft_model.get_base_model() if peft_model else causal_tidar(draft_length=3)
    ids = random_prompts(2, 10)
    loss = model(ids, objective=DraftObjective(mode=mode)).diffusion_loss
    gate, losses = mask_gate_of(model), []
    for row in ids:
        for start in range(0, 10, 3):
            labels = row[start : start + 3]
            doubled = torch.cat([row[:start], torch.full((3,), 3)])[None]
            if gate:
                gate.num_masks = 3
            logits = model(doubled).logits[0, start : start + len(labels)]
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_conversion_keeps_the_kind_of_blocks_and_the_card_says_it(tmp_path):
    save_tiny_stock(tmp_path / "stock", "llama")
    result = convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4, block_attention="causal")
    assert result.tidar_config.block_attention == "causal"
    assert json.loads((tmp_path / "tidar/config.json").read_text())["tidar_config"]["block_attention"] == "causal"
    assert "block_attention: causal" in (tmp_path / "tidar/README.md").read_text()
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").tidar_config.block_attention == "causal"
    convert(tmp_path / "stock", tmp_path / "usual", draft_length=4)
    assert "block_attention" not in (tmp_path / "usual/config.json").read_text()
    assert "block_attention" not in (tmp_path / "usual/README.md").read_text()
    with pytest.raises(ValueError, match="`block_attention` must be one of"):
        convert(tmp_path / "stock", tmp_path / "wrong", block_attention="sideways")


def test_an_unknown_kind_of_block_is_refused():
    model = tiny_tidar()
    model.config.tidar_config = model.config.tidar_config | {"block_attention": "sideways"}
    with pytest.raises(ValueError, match=r"block_attention` must be one of \['bidirectional', 'causal'\]"):
        _ = model.tidar_config
