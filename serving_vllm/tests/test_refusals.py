"""What vLLM can be asked for and drafts do not go with: refused by name, before the engine starts."""

import pytest

from helpers_engines import engine

REFUSED = {
    "speculative-config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "diffusion-config": {"diffusion_config": {"canvas_length": 4}},
    "scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "enable-lora": {"enable_lora": True},
    "enable-prompt-embeds": {"enable_prompt_embeds": True},
    "enable-trace-replay": {"enable_trace_replay": True},
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
