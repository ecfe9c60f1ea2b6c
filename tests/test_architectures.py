"""Every family: a converted model equals the stock model exactly, and drafts without changing a token."""

import importlib

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers_every_family import tiny_config_of, tiny_model_of
from helpers_stock import FAMILIES, save_tiny_stock
from helpers_tidar import plain_greedy_loop
from wavedraft import TiDARForCausalLM, convert
from wavedraft.conversion.proof import Proof


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_converted_bit_for_bit_and_drafts_the_same_text(family, tmp_path):
    config = save_tiny_stock(tmp_path / "stock", family)
    result = convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    assert result.proof.max_abs_difference == 0.0
    assert result.proof.num_layers == config.num_hidden_layers

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    also_stock = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar").eval()
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").eval()
    assert type(also_stock) is type(stock) and isinstance(model, type(stock))

    prompt_ids, expected_ids = a_prompt_with_a_varied_answer(stock, config.vocab_size)
    with torch.no_grad():
        logits = stock(prompt_ids[None]).logits
        assert torch.equal(also_stock(prompt_ids[None]).logits, logits)
        assert torch.equal(model(prompt_ids[None]).logits, logits)
    output = model.generate(prompt_ids[None], max_new_tokens=16, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == expected_ids.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-moe", "gpt2"])
def test_a_large_model_is_proved_on_its_first_layers_in_its_own_dtype(family, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("wavedraft.conversion.convert"), "LARGEST_WHOLE_PROOF", 0)
    layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    num_proved = 2
    if family == "gemma2":
        layers["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        num_proved = 3  # every kind of layer
    save_tiny_stock(tmp_path / "stock", family, dtype="bfloat16", **layers)
    assert convert(tmp_path / "stock", tmp_path / "tidar").proof == Proof(0.0, num_proved)


def a_prompt_with_a_varied_answer(stock, vocab_size):
    """Random models like to repeat one word, which proves little."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        prompt_ids = torch.randint(1, vocab_size, (11,), generator=generator)
        answer_ids = plain_greedy_loop(stock, prompt_ids, num_new=16)
        if len(set(answer_ids[11:].tolist())) >= 3:
            return prompt_ids, answer_ids
    raise AssertionError("no varied answer among 100")


REFUSED = {
    "t5": ("encoder-decoder", {}),
    "mamba": ("cannot", {}),
    "mamba2": ("cannot", {}),
    "bloom": ("position_ids", {}),
    "gpt_neo": ("cache slots", {}),
    "gemma3_text": ("backwards", {"use_bidirectional_attention": True}),
    "falcon": ("ALiBi", {"alibi": True}),
    "llama4_text": ("chunked_attention", {}),
    "llama4": ("several models", {}),
    "paligemma": ("prefix model", {}),
    "rwkv": ("do not keep their state in transformers' cache", {}),
    "xlstm": ("do not keep their state in transformers' cache", {}),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_draft_is_refused_by_name_with_the_reason(model_type, tmp_path):
    reason, values = REFUSED[model_type]
    config = transformers.CONFIG_MAPPING[model_type](**values)
    (tmp_path / "stock").mkdir()
    config.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=model_type) as caught:
        convert(tmp_path / "stock", tmp_path / "tidar")
    assert reason in str(caught.value) and "Supported: " in str(caught.value)
    assert "Decode others with transformers." in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@pytest.mark.parametrize("model_type", ["jamba", "minimax", "recurrent_gemma"])
def test_layers_with_states_that_cannot_be_read_twice_are_refused(model_type, tmp_path):
    tiny_model_of(tiny_config_of(model_type)).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=f"'{model_type}' model cannot draft: its .*layers") as caught:
        convert(tmp_path / "stock", tmp_path / "tidar")
    assert "Supported: " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_a_model_whose_states_do_not_go_straight_to_the_lm_head_is_refused(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=61, initializer_range=0.2, **shape)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="'bert' model cannot draft: its forward is more than a decoder"):
        convert(tmp_path / "stock", tmp_path / "tidar")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]
