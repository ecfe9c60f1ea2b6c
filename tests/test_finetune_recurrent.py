"""Recurrent-depth models in `wavedraft train`: random depth, exact resumption, measurement by decoding."""

import json
import sys

import pytest
import torch
from peft import PeftModel

from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM
from wavedraft.training import finetune
from wavedraft.training.dialogue import PaddingCollator
from wavedraft.training.trainer_recurrent import held_out_perplexity, measure_recurrent


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = RecurrentDepthConfig(
        vocab_size=14, n_embd=32, n_heads=2, intermediate_size=48, n_layers_in_prelude=1, n_layers_in_recurrent_block=1,
        n_layers_in_coda=1, mean_recurrence=4, mean_backprop_depth=2, block_size=128, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    RecurrentDepthForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "the " * n + "cat sat on a mat and slept all day on the mat"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model", tmp_path / "data.jsonl"


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_learns_a_text_and_says_what_its_wavefront_is_worth(checkpoint, tmp_path, mode):
    folder, data = checkpoint
    report = finetune(
        folder, data, tmp_path / "run", mode=mode, rank=16, max_steps=60, batch_size=8, learning_rate=1e-2,
        eval_prompts_path=data, num_eval_prompts=1, eval_steps=30,
    )  # fmt: skip
    assert report["after"]["perplexity"] < 0.7 * report["before"]["perplexity"]
    assert report["after"]["tokens_per_forward"] > 0 and 0 <= report["after"]["identical"] <= 1
    model = RecurrentDepthForCausalLM.from_pretrained(folder if mode == "lora" else tmp_path / "run").eval()
    if mode == "lora":
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        taught = PeftModel.from_pretrained(model, tmp_path / "run")
        adapted = {name.rsplit(".lora_A", 1)[0] for name in taught.state_dict() if ".lora_A" in name}
        assert adapted and all(".adapter" in name or ".core_block." in name for name in adapted)
        model = taught.merge_and_unload()
        outside = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
        assert {"lm_head.weight", "transformer.wte.weight"} & outside
    ids = torch.tensor([[4, 4, 4, 5]])
    again = measure_recurrent(model, [ids[0]], [], compare_with_plain=True)
    assert again.num_tokens * 4 / again.num_core_passes == pytest.approx(again.tokens_per_forward)


def test_perplexity_is_that_of_a_plain_sum(checkpoint):
    model = RecurrentDepthForCausalLM.from_pretrained(checkpoint[0]).eval()
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    losses = []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]]), init_scale=0.0).logits[0].log_softmax(-1)
        losses += [-logits[i - 1, row["labels"][i]] for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    assert held_out_perplexity(model, rows) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert PaddingCollator(0)(rows)["labels"].shape == (2, 4)


def losses_of(run):
    history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def test_a_resumed_run_draws_the_same_depths_and_states(checkpoint, tmp_path):
    folder, data = checkpoint
    common = {"rank": 4, "batch_size": 2, "save_steps": 2, "max_steps": 6}
    finetune(folder, data, tmp_path / "run", **common)
    expected = losses_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "complete").unlink()
    finetune(folder, data, tmp_path / "run", resume=True, **common)
    assert losses_of(tmp_path / "run") == expected and len(set(expected)) == 6


def test_what_only_drafts_have_is_refused(checkpoint, tmp_path):
    for options, message in [
        ({"mode": "gated"}, "'lora' or 'full'"),
        ({"draft_loss": "kl"}, "`draft_loss` is for TiDAR"),
        ({"pack": True}, "`pack` is for TiDAR"),
        ({"mode": "lora", "rank": 0}, "`rank` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            finetune(*checkpoint, tmp_path / "run", max_steps=1, **options)
    assert not (tmp_path / "run").exists()


def test_the_command_trains_it(checkpoint, tmp_path, monkeypatch, capsys):
    from wavedraft import cli

    folder, data = checkpoint
    arguments = ["train", str(folder), str(data), str(tmp_path / "run"), "--max-steps", "1", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["wavedraft", *arguments, "--eval-prompts", str(data), "--num-eval-prompts", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "adapter, and what was measured" in printed and "tokens per forward" in printed
