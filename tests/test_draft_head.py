"""The draft head changes drafts but never the text. It is trained, saved and loaded next to the weights."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers_sampling import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from helpers_tidar import FAMILIES, VOCAB_SIZE, plain_greedy_loop, random_prompts, tiny_tidar, with_random_head
from helpers_without_wavedraft import run_alone
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.drafting import draft_head
from wavedraft.generation.drafting.draft_head import HEAD_FILE, DraftChain, draft_head_of
from wavedraft.generation.stock_model import lm_head_logits
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.modeling_tidar.objective_tidar import cross_entropy
from wavedraft.training import finetune


def losses_of(run):
    history = json.loads((run / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_scores_candidates_as_the_whole_lm_head_does(family, monkeypatch):
    """Its slow twin mends the state and runs the whole lm_head; tokens that are no candidates keep their logits."""
    monkeypatch.setattr(draft_head, "NUM_CANDIDATES", 7)
    model = with_random_head(tiny_tidar(family))
    states = torch.randn(2, 3, 32)
    logits = lm_head_logits(model, states)
    chain = DraftChain(model, model.draft_head, logits, states)
    previous_ids = torch.tensor([[5], [9]])
    previous = model.get_input_embeddings()(previous_ids[:, 0])
    for slot in range(3):
        whole = lm_head_logits(model, model.draft_head(states[:, slot], previous))
        mended = chain.logits_after(slot, previous_ids)[:, 0]
        for row in range(2):
            candidates = set(logits[row, slot].topk(7).indices.tolist())
            for token in range(VOCAB_SIZE):
                expected = (whole if token in candidates else logits[:, slot])[row, token]
                assert mended[row, token].item() == pytest.approx(expected.item(), abs=1e-4)
        assert (mended.argmax(-1) != logits[:, slot].argmax(-1)).any() or slot


def test_an_lm_head_that_cannot_be_read_by_rows_is_run_whole():
    model = with_random_head(tiny_tidar())
    states, previous_ids = torch.randn(2, 3, 32), torch.tensor([[5], [9]])
    logits = lm_head_logits(model, states)
    by_rows = DraftChain(model, model.draft_head, logits, states).logits_after(1, previous_ids)

    class Adapted(torch.nn.Linear):
        pass

    adapted = Adapted(32, VOCAB_SIZE, bias=False)
    adapted.weight = model.lm_head.weight
    model.lm_head = adapted
    chain = DraftChain(model, model.draft_head, logits, states)
    whole = chain.logits_after(1, previous_ids)
    assert torch.allclose(whole, by_rows, atol=1e-4)  # 61 tokens: all are candidates


@pytest.mark.parametrize(
    ("draft_length", "num_branches"), [(1, None), (2, 1), (2, None), (4, 1), (4, 2), (4, "auto"), (4, None), (8, None)]
)
def test_greedy_text_is_the_plain_loops_with_a_head_too(draft_length, num_branches):
    model = with_random_head(tiny_tidar("qwen3", draft_length))
    prompt_ids = random_prompts(1, 7)
    expected = plain_greedy_loop(model, prompt_ids[0], num_new=30)
    for given in ({}, {"exact": "tie-safe"}, {"cache_implementation": "static"}, {"repetition_penalty": 1.0001}):
        output = model.generate(prompt_ids, max_new_tokens=30, do_sample=False, num_branches=num_branches, **given)
        assert output[0].tolist() == expected.tolist()


def test_rows_of_a_padded_batch_write_and_draft_what_they_do_alone():
    model = with_random_head(tiny_tidar("mistral"))
    lengths = [3, 9, 1, 6]
    rows = [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]
    ids = torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    for sampling in ({"do_sample": False}, {"do_sample": True, "seed": [4, 5, 6, 7]}):
        common = {"max_new_tokens": 20, "return_dict_in_generate": True, **sampling}
        batch = model.generate(ids, attention_mask=mask, **common)
        for row, prompt_ids in enumerate(rows):
            own = {"seed": sampling["seed"][row]} if "seed" in sampling else {}
            alone = model.generate(prompt_ids[None], **common | own)
            assert batch.sequences[row, 9 - len(prompt_ids) :].tolist() == alone.sequences[0].tolist()
            assert batch.accepted_lengths[row].tolist() == alone.accepted_lengths[0].tolist()


@pytest.mark.parametrize("sampling", [{"top_k": 0}, {"top_k": 4, "temperature": 0.8, "repetition_penalty": 1.2}])
def test_sampling_with_a_head_draws_from_plain_samplings_distribution(sampling, monkeypatch):
    monkeypatch.setattr(draft_head, "NUM_CANDIDATES", 3)
    model = tiny_tidar(draft_length=3, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)
    with_random_head(model, size=0.3)
    prompt_ids = random_prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    expected = exact_joint(model, prompt_ids, 3, **sampling) * NUM_DRAWS

    counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=1, **sampling)

    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]]).clamp(min=1e-9)
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_bound(len(expected) - 1)


def test_the_head_can_be_left_out_of_a_call():
    model = tiny_tidar("qwen3")
    prompt_ids, common = random_prompts(1, 6), {"max_new_tokens": 40, "return_dict_in_generate": True}
    without = model.generate(prompt_ids, **common).accepted_lengths
    with_random_head(model)
    assert torch.equal(model.generate(prompt_ids, draft_head=False, **common).accepted_lengths, without)
    assert not torch.equal(model.generate(prompt_ids, **common).accepted_lengths, without)


def test_the_loss_mends_every_slot_but_the_first_for_the_token_before():
    model = with_random_head(tiny_tidar(draft_length=3))
    ids = random_prompts(2, 8)
    loss = model(ids, labels=ids, objective=DraftObjective(mode="head", slot_decay=0.5)).loss

    total = weight_sum = 0.0
    for row in ids:
        for start in range(0, 8, 3):  # each block alone: it sees the tokens before it, then its own masks
            masks = torch.full((min(3, 8 - start),), 3)
            block = torch.cat([row[:start], masks])[None]
            mask = torch.ones(len(block[0]), len(block[0])).tril()
            mask[start:, start:] = 1
            bias = torch.zeros_like(mask).masked_fill(mask == 0, torch.finfo(torch.float32).min)[None, None]
            with torch.no_grad():
                states = model.base_model(block, attention_mask=bias)[0][0, start:]
            for slot in range(1, len(masks)):
                previous = model.get_input_embeddings()(row[start + slot - 1])
                logits = lm_head_logits(model, model.draft_head(states[slot], previous))
                total += 0.5**slot * cross_entropy(logits[None], row[start + slot][None])[0]
                weight_sum += 0.5**slot
    assert loss.item() == pytest.approx((total / weight_sum).item(), rel=1e-4)


def test_a_packed_document_hears_nothing_of_another_through_the_head():
    model = with_random_head(tiny_tidar(draft_length=4))
    ids = random_prompts(1, 14)
    documents = torch.tensor([[0] * 6 + [1] * 8])
    labels = ids.masked_fill(documents == 0, -100)  # only the second document teaches
    objective = DraftObjective(mode="head")
    losses = []
    for first in (ids, torch.cat([random_prompts(1, 6, seed=9), ids[:, 6:]], dim=1)):
        losses.append(model(first, labels=labels, document_ids=documents, objective=objective).loss.item())
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_head_is_taught_resumed_and_found_by_every_way_in(checkpoint, tokenizer, tmp_path, caplog, monkeypatch):
    folder, data = checkpoint
    written = TiDARForCausalLM.from_pretrained(folder).generate(
        torch.arange(2, 10)[:, None], max_new_tokens=50, do_sample=True, temperature=0.5, seed=0, eos_token_id=None
    )
    data.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in written))
    finetune(folder, data, tmp_path / "adapter", rank=4, max_steps=60, batch_size=4)
    common = {"mode": "head", "from_adapter": tmp_path / "adapter", "rank": 16, "max_steps": 60, "save_steps": 30}
    common |= {"batch_size": 4, "learning_rate": 2e-2, "eval_prompts_path": data, "num_eval_prompts": 4}
    report = finetune(folder, data, tmp_path / "head", **common)
    losses = losses_of(tmp_path / "head")
    assert losses[-1] < 0.85 * losses[0]
    assert report["after"]["tokens_per_forward"] > report["before"]["tokens_per_forward"]
    assert report["after"]["identical"] == 1.0
    adapter = "adapter_model.safetensors"
    before, after = load_file(tmp_path / "adapter" / adapter), load_file(tmp_path / "head" / adapter)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    taught = load_file(tmp_path / "head" / HEAD_FILE)

    (tmp_path / "head" / "checkpoint-60" / "complete").unlink()  # as a kill leaves it
    (tmp_path / "head" / HEAD_FILE).unlink()
    finetune(folder, data, tmp_path / "head", resume=True, **common)
    assert losses_of(tmp_path / "head") == losses
    resumed = load_file(tmp_path / "head" / HEAD_FILE)
    assert all(torch.equal(taught[name], resumed[name]) for name in taught)

    prompt_ids, counted = random_prompts(1, 5) % 14, {"max_new_tokens": 40, "return_dict_in_generate": True}
    counted["draft_copies"] = False  # the masks' drafts are compared
    model = TiDARForCausalLM.from_pretrained(folder)
    model.load_adapter(str(tmp_path / "head"))
    expected = model.generate(prompt_ids, **counted)
    ways = {"custom_generate": str(tmp_path / "head"), "trust_remote_code": True}
    for way in (ways, {"custom_generate": tidar}):
        stock = AutoModelForCausalLM.from_pretrained(folder)
        stock.load_adapter(str(tmp_path / "head"))
        found = stock.generate(prompt_ids, draft_head=str(tmp_path / "head"), **way, **counted)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert torch.equal(found.accepted_lengths, expected.accepted_lengths)
        assert not any("draft_head" in name for name in stock.get_adapter_state_dict())

    finetune(folder, data, tmp_path / "further", from_adapter=tmp_path / "head", max_steps=1)
    assert "draft head of" in caplog.text and not (tmp_path / "further" / HEAD_FILE).exists()
    assert "Train the masks first" not in caplog.text

    monkeypatch.setattr(sys.modules["wavedraft.training.report"], "LEAST_FOR_A_HEAD", 9.0)
    finetune(folder, data, tmp_path / "untaught", **{**common, "from_adapter": None, "max_steps": 1})
    assert "Train the masks first" in caplog.text
    assert "is of an earlier save" not in caplog.text
    TiDARForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "head")
    assert "is of an earlier save" in caplog.text and (tmp_path / "head" / HEAD_FILE).is_file()


WITHOUT_WAVEDRAFT = """
    ids = torch.tensor([arguments["ids"]])
    model = AutoModelForCausalLM.from_pretrained("tidar", trust_remote_code=True)
    model.save_pretrained("again")
    again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    outputs = [one.generate(ids, max_new_tokens=30, return_dict_in_generate=True) for one in (model, again)]
    stock = AutoModelForCausalLM.from_pretrained("tidar")
    assert not any("draft_head" in name for name in stock.state_dict())
    answer = [[output.sequences[0].tolist(), output.accepted_lengths[0].tolist()] for output in outputs]
"""


def test_a_saved_head_travels_beside_weights_of_stock_names(tmp_path):
    model = with_random_head(tiny_tidar("qwen3"))
    model.save_pretrained(tmp_path / "tidar")
    assert not any("draft_head" in name for name in load_file(tmp_path / "tidar" / "model.safetensors"))
    ids = random_prompts(1, 6)
    output = model.generate(ids, max_new_tokens=30, return_dict_in_generate=True)
    expected = [output.sequences[0].tolist(), output.accepted_lengths[0].tolist()]
    assert run_alone(WITHOUT_WAVEDRAFT, {"ids": ids[0].tolist()}, tmp_path) == [expected, expected]
    half, info = TiDARForCausalLM.from_pretrained(tmp_path / "tidar", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["unexpected_keys"] and draft_head_of(half).input_weight.dtype == torch.bfloat16


def test_what_is_no_head_for_this_model_is_refused_by_name(checkpoint, tmp_path):
    folder, data = checkpoint
    model, ids = tiny_tidar(), random_prompts(1, 4)
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"`draft_head` is .*, but there is no draft_head\.safetensors"):
            model.generate(ids, max_new_tokens=2, draft_head=name)
    with pytest.raises(ValueError, match="`draft_head` must be a folder"):
        model.generate(ids, max_new_tokens=2, draft_head=True)
    (tmp_path / HEAD_FILE).write_text("{}")
    with pytest.raises(ValueError, match="holds no draft head"):
        model.generate(ids, max_new_tokens=2, draft_head=str(tmp_path))
    shapes = {"input_weight": (4, 32), "input_bias": (4,), "output_weight": (16, 4)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / HEAD_FILE)
    with pytest.raises(ValueError, match="16 channels, but TiDARLlamaForCausalLM has 32"):
        model.generate(ids, max_new_tokens=2, draft_head=str(tmp_path))
    for given, named in (
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"torch_compile": True}, "`torch_compile`"),
        ({"mode": "heads"}, "'gated', 'joint', 'full' or 'head'"),
        ({"from_adapter": "nowhere"}, "There is no folder nowhere"),
    ):
        with pytest.raises(ValueError, match=named):
            finetune(folder, data, tmp_path / "run", **{"mode": "head", "max_steps": 1, **given})
    with pytest.raises(ValueError, match="needs a draft head, but the model has none"):
        model(ids, labels=ids, objective=DraftObjective(mode="head"))
    assert json.loads((folder / "config.json").read_text())["tidar_config"]["draft_length"] == 4
