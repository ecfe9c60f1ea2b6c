"""What vLLM can be asked for and drafts do not go with: refused by name, before the engine starts."""

import pytest
import torch

from helpers_engines import core_of, engine
from helpers_tiny import CHANNELS, HEAD_SIZE, INNER, KV_HEADS, RANK
from wavedraft_vllm.gated_layers import _gate_layer

REFUSED = {
    "speculative-config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "diffusion-config": {"diffusion_config": {"canvas_length": 4}},
    "scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "enable-lora": {"enable_lora": True},
    "enable-prompt-embeds": {"enable_prompt_embeds": True},
    "enable-trace-replay": {"enable_trace_replay": True},
    "enable-dbo": {"enable_dbo": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_drafts_is_refused(folders, name):
    with pytest.raises(Exception, match=f"wavedraft-vllm does not go with --{name}"):
        engine(*folders, **REFUSED[name])


def test_an_adapter_of_another_base_is_refused_by_the_engine(folders):
    overrides = {
        "architectures": ["WavedraftLlamaForCausalLM"],
        "num_hidden_layers": 1,
        "wavedraft": {"adapter": str(folders[1])},
    }
    with pytest.raises(Exception, match="taught on another model"):
        engine(folders[0], hf_overrides=overrides)


@pytest.mark.parametrize(
    ("layer", "part", "num_inputs", "num_outputs"),
    [
        ("self_attn.qkv_proj", "self_attn.k_proj", CHANNELS, 2 * KV_HEADS * HEAD_SIZE),
        ("mlp.gate_up_proj", "mlp.up_proj", CHANNELS, INNER + 32),
        ("mlp.down_proj", "mlp.down_proj", INNER + 32, CHANNELS),
    ],
)
def test_an_adapter_of_a_wider_base_is_refused_where_the_number_of_layers_agrees(
    drafting, layer, part, num_inputs, num_outputs
):
    """A part of its matrices would fit, or the first forward would fail without a reason."""
    model = core_of(drafting).model_executor.driver_worker.worker.model_runner.model
    name = "model.layers.0."
    tensors = {
        f"{name}{part}.lora_A.weight": torch.zeros(RANK, num_inputs),
        f"{name}{part}.lora_B.weight": torch.zeros(num_outputs, RANK),
    }
    with pytest.raises(ValueError, match=f"reads {num_inputs} channels and writes {num_outputs}, but the model's"):
        _gate_layer(name + layer, model.get_submodule(name + layer), tensors, 1.0, torch.zeros(1))
