"""Which layers a gated adapter may adapt: none that would act on text, and none that PEFT cannot gate."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from helpers_tidar import SHAPE, random_prompts, tiny_tidar
from wavedraft import TiDARForCausalLM
from wavedraft.training import finetune, gated_adapter_config

SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = {
    "qwen3_moe": (Qwen3MoeConfig, SMALL | {"head_dim": 8}),
    "qwen3_moe with dense layers": (Qwen3MoeConfig, SMALL | {"head_dim": 8, "mlp_only_layers": [0]}),
    "qwen2_moe": (Qwen2MoeConfig, SMALL | {"shared_expert_intermediate_size": 24}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
}


def mixture(kind, vocab_size=61):
    torch.manual_seed(0)
    config_class, more = EXPERTS[kind]
    config = config_class(**SHAPE | {"vocab_size": vocab_size} | more)
    config.tidar_config = {"draft_length": 4, "mask_token_id": vocab_size, "mask_embedding_id": 3}
    return TiDARForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mixture_of_experts_gets_a_gated_adapter_that_leaves_its_text_alone(kind):
    model, prompts = mixture(kind), random_prompts(2, 7)
    text, logits = model.generate(prompts, max_new_tokens=16, draft_length=0).tolist(), model(prompts).logits
    config = gated_adapter_config(model, 4)
    peft_model = get_peft_model(model, config).eval()
    assert not config.target_parameters
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert torch.equal(peft_model(input_ids=prompts).logits, logits)
    assert peft_model.generate(input_ids=prompts, max_new_tokens=16).tolist() == text


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_mixture_of_experts_is_taught_in_the_default_mode(kind, checkpoint, tmp_path):
    folder, data = checkpoint
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    (folder / "model.safetensors").unlink()
    mixture(kind, vocab_size).save_pretrained(folder)
    finetune(folder, data, tmp_path / "run", rank=4, max_steps=2, batch_size=2)
    model, prompts = TiDARForCausalLM.from_pretrained(folder), random_prompts(2, 5) % vocab_size
    text = model.generate(prompts, max_new_tokens=12, draft_length=0).tolist()
    model.load_adapter(str(tmp_path / "run"))
    assert model.generate(prompts, max_new_tokens=12).tolist() == text


@pytest.mark.parametrize("target", ["gate_proj", "mlp.experts.down_proj", "w1", "gate"])
def test_experts_are_refused_by_name_before_anything_is_adapted(target):
    model = mixture("mixtral")
    with pytest.raises(ValueError, match=f"`target_modules` must not name {target} of TiDARMixtral"):
        gated_adapter_config(model, target_modules=["q_proj", target])
    assert gated_adapter_config(model, target_modules=r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"


@pytest.mark.parametrize(
    "part",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["mlp.experts.down_proj"]},
    ],
)
def test_parts_that_would_act_on_text_are_refused_by_name(part):
    (name,) = part
    with pytest.raises(ValueError, match=f"`{name}` must be left out of a gated adapter"):
        gated_adapter_config(tiny_tidar(), **part)
    assert gated_adapter_config(tiny_tidar(), bias="none", modules_to_save=None)
