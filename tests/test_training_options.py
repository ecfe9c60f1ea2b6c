"""Options that change how a training run computes but not what it learns, each in a real tiny run."""

import dataclasses
import json
import sys
from functools import partialmethod

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import nn

from helpers_stock import tiny_config
from helpers_tidar import tiny_tidar
from wavedraft.cli import app, main
from wavedraft.commands import cli_checks
from wavedraft.modeling_tidar import TiDARForCausalLM
from wavedraft.training import FinetuneArguments, finetune


def losses_of(run):
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


COMMON = {"rank": 4, "batch_size": 4, "max_steps": 4, "save_steps": 4, "learning_rate": 1e-2}


@pytest.mark.parametrize("mode", ["gated", "full"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"activation_checkpointing": True}, 1e-5),
        ({"attn_implementation": "sdpa"}, 1e-5),
        ({"bf16": True}, 0.05),
        pytest.param({"torch_compile": True}, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_a_run_loses_the_same_however_it_is_computed(checkpoint, tmp_path, mode, options, tolerance, monkeypatch):
    # What is traced, forward and backward, is ours; what inductor makes of it is not.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    finetune(*checkpoint, tmp_path / "plain", mode=mode, **COMMON)
    finetune(*checkpoint, tmp_path / "other", mode=mode, **COMMON, **options)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "plain"), rel=tolerance)


def test_rows_longer_than_a_position_table_are_refused(tmp_path):
    config = tiny_config("gpt2")
    config.tidar_config = {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 3}
    config.save_pretrained(tmp_path / "model")
    options = {"model_path": tmp_path / "model", "data": "data.jsonl", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="`max_length` must be at most 64, the rows of this model's position table"):
        FinetuneArguments(**options)
    assert FinetuneArguments(**options, max_length=64).max_length == 64


def test_tensorboard_is_given_the_numbers_that_count(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, data = checkpoint
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    finetune(
        folder, data, tmp_path / "run", **COMMON, eval_prompts_path=data, num_eval_prompts=1, eval_steps=4,
        report_to="tensorboard",
    )  # fmt: skip
    (file,) = (tmp_path / "events").rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    names = ["tokens_per_forward", "identical", *(f"acceptance_{place}" for place in range(2, 5))]
    found = {name: [event.step for event in events.Scalars(f"eval/{name}")] for name in names}
    assert all(steps == [4] for steps in found.values())
    assert "train/diffusion_loss" in events.Tags()["scalars"]


def test_a_quantized_base_is_refused_where_it_cannot_be(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        finetune(*checkpoint, tmp_path / "run", load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="`rank` above 0"):
        finetune(*checkpoint, tmp_path / "run", mode="full", load_in_8bit=True)
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            finetune(*checkpoint, tmp_path / "run", load_in_4bit=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gated_adapter_is_taught_on_a_quantized_base(checkpoint, tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    folder, data = tmp_path / "wide", checkpoint[1]
    tiny_tidar(vocab_size=14, eos_token_id=1, hidden_size=128, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    finetune(
        folder, data, tmp_path / "run", **COMMON | {"max_steps": 20, "save_steps": 20}, bf16=True,
        **{f"load_in_{bits}bit": True},
    )  # fmt: skip
    history = json.loads((tmp_path / "run" / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    TiDARForCausalLM.from_pretrained(folder).load_adapter(str(tmp_path / "run"))


def test_the_command_offers_options_of_a_run_with_their_defaults():
    offered = {option.name: option.default for option in typer.main.get_command(app).commands["train"].params}
    for command_name, name in {
        "model": "model_path",
        "output": "output_dir",
        "eval_prompts": "eval_prompts_path",
    }.items():
        offered[name] = offered.pop(command_name)
    known = {option.name: option.default for option in dataclasses.fields(FinetuneArguments) if option.init}
    assert (offered.pop("bf16"), known["bf16"]) == (None, False), "the command asks the machine"
    required = {"model_path", "data", "output_dir"}
    assert required <= offered.keys() <= known.keys()
    assert {name: offered[name] for name in offered.keys() - required} == {
        name: known[name] for name in offered.keys() - required
    }


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_command_computes_in_bfloat16_where_that_is_faster_and_says_so(
    checkpoint, tmp_path, monkeypatch, capsys, is_faster
):
    monkeypatch.setattr("wavedraft.commands.cli_checks.multiplies_bfloat16", lambda: is_faster)
    folder, data = checkpoint
    for name, option in (("own", []), ("no", ["--no-bf16"]), ("yes", ["--bf16"])):
        line = ["train", folder, data, tmp_path / name, "--max-steps", 1, "--rank", 2, *option]
        monkeypatch.setattr(sys, "argv", ["wavedraft", *map(str, line)])
        with pytest.raises(SystemExit, match="0"):
            main()
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        is_half = {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert is_half == (name == "yes" or (name == "own" and is_faster))
        said = capsys.readouterr().err
        assert ("--no-bf16 computes in float32" in said) == (name == "own" and is_faster)
    assert isinstance(cli_checks.multiplies_bfloat16(), bool)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"weight_decay": 0.5}, "weight_decay was None and is now '0.5'"), ({"warmup_steps": 3}, "warmup_steps was None")],
)
def test_an_option_of_trainer_reaches_it_and_is_remembered(checkpoint, tmp_path, changed, named):
    finetune(*checkpoint, tmp_path / "plain", **COMMON)
    finetune(*checkpoint, tmp_path / "changed", **COMMON, **changed)
    assert losses_of(tmp_path / "changed") != losses_of(tmp_path / "plain")
    with pytest.raises(ValueError, match=named):
        finetune(*checkpoint, tmp_path / "plain", resume=True, **COMMON, **changed)


def test_what_our_options_decide_for_trainer_cannot_be_given(checkpoint, tmp_path):
    with pytest.raises(TypeError, match="per_device_train_batch_size"):
        finetune(*checkpoint, tmp_path / "run", per_device_train_batch_size=2)
