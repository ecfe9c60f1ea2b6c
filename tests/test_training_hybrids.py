"""Gated training of models whose layers keep states: losses of a slow loop, and drafts that stand."""

import copy

import pytest
import torch
from peft import get_peft_model

from helpers_hybrids import EVERY_HYBRID, tiny_hybrid
from helpers_tidar import gated
from wavedraft import DraftObjective
from wavedraft.generation.drafting.draft_network import new_network
from wavedraft.generation.stock_model import lm_head_logits
from wavedraft.training import FinetuneArguments, PaddingCollator, gated_adapter_config, measure_drafting


@torch.no_grad()
def looped_losses(model, rows, first, draft_length):
    """One prefix, and one block of masks after it, at a time: what decoding itself reads."""
    losses = []
    for row in rows:
        for start in range(first, len(row), draft_length):
            labels = row[start : start + draft_length]
            network = new_network(model, 1, 3)
            with network.form.applied():
                _, predictions, _ = network.prefill(row[None, :start], None, draft_length)
            logits = lm_head_logits(model, predictions.states[0, : len(labels)])
            losses += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("block_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", EVERY_HYBRID)
def test_the_gated_loss_is_the_slow_loops(family, block_attention):
    _, model = tiny_hybrid(family, draft_length=3)
    model.config.tidar_config = model.config.tidar_config | {"block_attention": block_attention}
    model = gated(model).get_base_model()
    rows = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(2))
    loss = model(rows, objective=DraftObjective(mode="gated", first_token=2)).loss
    assert loss.item() == pytest.approx(looped_losses(model, rows, 2, 3), rel=2e-3)
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_padding_and_labels_choose_the_blocks(family):
    """Rows alone have the same mean as rows padded to one length."""
    _, model = tiny_hybrid(family, draft_length=3)
    model = gated(model).get_base_model()
    rows = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(rows)
    mask[1, 7:] = 0
    objective = DraftObjective(mode="gated")
    together = model(rows, attention_mask=mask, objective=objective).loss
    first, second = (model(one[None], objective=objective).loss for one in (rows[0], rows[1, :7]))
    assert together.item() == pytest.approx((11 * first.item() + 7 * second.item()) / 18, rel=1e-3)


def test_what_cannot_be_taught_says_so():
    _, model = tiny_hybrid("qwen3_5_text", draft_length=3)
    rows = torch.randint(1, 61, (1, 12))
    with pytest.raises(ValueError, match="keep a state"):
        model(rows, objective=DraftObjective(mode="joint"))
    model = gated(model).get_base_model()
    documents = torch.tensor([[0] * 6 + [1] * 6])
    with pytest.raises(ValueError, match="one document"):
        model(rows, document_ids=documents, objective=DraftObjective(mode="gated"))


def test_the_options_of_a_run_refuse_what_states_cannot_do(tmp_path):
    _, model = tiny_hybrid("lfm2", draft_length=3)
    model.save_pretrained(tmp_path / "model")
    options = {"model_path": str(tmp_path / "model"), "data": "rows.jsonl", "output_dir": str(tmp_path / "out")}
    for given in ({"pack": True}, {"mode": "joint"}, {"mode": "full"}):
        with pytest.raises(ValueError, match="keep a state") as raised:
            FinetuneArguments(**options, use_cpu=True, **given)
        assert f"`{next(iter(given))}` must be" in str(raised.value)
    assert FinetuneArguments(**options, use_cpu=True).has_states


def test_rows_are_taught_apart_and_not_through_each_others_states(tmp_path):
    """A row beside another has the loss that it has alone, and the collator packs nothing by itself."""
    _, model = tiny_hybrid("lfm2", draft_length=3)
    model = gated(model).get_base_model()
    rows = [torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (11, 7)]
    batch = PaddingCollator(0)([{"input_ids": row, "labels": row} for row in rows])
    assert batch.get("document_ids") is None and batch["input_ids"].shape == (2, 11)
    objective = DraftObjective(mode="gated")
    together = model(**batch, objective=objective).loss.item()
    alone = [model(torch.tensor([row]), objective=objective).loss.item() for row in rows]
    assert together == pytest.approx((11 * alone[0] + 7 * alone[1]) / 18, rel=1e-3)


def test_an_adapter_taught_for_blocks_of_another_kind_is_refused(tmp_path):
    _, model = tiny_hybrid("lfm2", draft_length=3)
    other = copy.deepcopy(model)
    model.add_adapter(gated_adapter_config(model, 4))
    model.save_pretrained(tmp_path / "adapter")
    other.config.tidar_config = other.config.tidar_config | {"block_attention": "causal"}
    with pytest.raises(ValueError, match="taught with bidirectional blocks, not causal ones"):
        other.load_adapter(tmp_path / "adapter")
    assert not getattr(other, "_hf_peft_config_loaded", False)
    other.config.tidar_config = other.config.tidar_config | {"block_attention": None}
    other.load_adapter(tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 11])
def test_a_taught_hybrid_drafts_more_than_one_and_a_half_tokens_a_forward(seed):
    """A hybrid first learns a small language, then an adapter learns to draft it."""
    _, model = tiny_hybrid("lfm2", draft_length=4)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(2, 8, (61,), generator=generator)

    def texts(num):  # each token says how far away the next one is
        rows = [torch.randint(1, 61, (num,), generator=generator)]
        for _ in range(31):
            rows.append((rows[-1] + step[rows[-1]] - 1) % 60 + 1)
        return torch.stack(rows, dim=1)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = texts(16)
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    peft_model = get_peft_model(model, gated_adapter_config(model, 16))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=5e-3)
    for number in range(200):
        optimizer.zero_grad()
        peft_model(texts(16), objective=DraftObjective(mode="gated", first_token=number % 4)).loss.backward()
        optimizer.step()
    report = measure_drafting(model.eval(), [row[:6] for row in texts(6)], 24, compare_with_plain=True)
    assert report.tokens_per_forward > 1.5
    assert report.identical == 1.0
