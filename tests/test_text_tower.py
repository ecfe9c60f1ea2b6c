"""`convert --text-only`: the text tower of a model of text and images, alone and the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from helpers_composites import EVERY_COMPOSITE, TEXT_ONLY, tiny_composite, tiny_stock_composite
from helpers_tidar import SHAPE
from wavedraft import TiDARForCausalLM, convert, to_ar
from wavedraft.conversion import text_tower

CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "llava": "LlamaForCausalLM",
    "internvl": "Qwen2ForCausalLM",
}
IDS = torch.randint(1, 57, (2, 9), generator=torch.Generator().manual_seed(1))
PLAIN = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("family", [one for one in EVERY_COMPOSITE if one.values[0] in CLASSES])
def test_the_tower_writes_the_whole_models_text(family, tmp_path):
    stock, _ = tiny_composite(family)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    result = convert(tmp_path / "stock", tmp_path / "text", draft_length=4, text_only=True)
    assert result.architecture == CLASSES[family] and result.proof.max_abs_difference == 0.0
    assert result.num_parameters < sum(one.numel() for one in stock.parameters())
    model = TiDARForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(model).__name__ == f"TiDAR{CLASSES[family]}"
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    expected = stock.generate(IDS, **PLAIN)
    assert model.generate(IDS, num_branches="all", **PLAIN).tolist() == expected.tolist()
    to_ar(tmp_path / "text", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(plain).__name__ == CLASSES[family]
    assert plain.generate(IDS, **PLAIN).tolist() == expected.tolist()


def test_a_text_without_a_class_of_its_own_is_refused_by_name(tmp_path):
    stock, _ = tiny_composite("qwen3_vl_moe")
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="no causal language model for Qwen3VLMoeTextConfig"):
        convert(tmp_path / "stock", tmp_path / "text", draft_length=4, text_only=True)
    assert not (tmp_path / "text").exists()


def released_names(name):
    """As the files of Gemma 3 and Mistral 3 on the Hub have them."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_released_tensor_names_and_a_large_model(family, tmp_path, monkeypatch):
    """Of a large model the first layers are compared, in its own dtype."""
    stock, _ = tiny_composite(family)
    stock.to(torch.bfloat16).save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    save_file({released_names(name): one for name, one in load_file(file).items()}, file, metadata={"format": "pt"})
    monkeypatch.setattr(text_tower, "LARGEST_WHOLE", 0)
    convert(tmp_path / "stock", tmp_path / "text", text_only=True)
    model = TiDARForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert model.dtype == torch.bfloat16
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype="auto").eval()
    assert torch.equal(model(IDS).logits, stock(IDS).logits)


def test_a_head_of_its_own_goes_along(tmp_path):
    stock, _ = tiny_composite("qwen2_5_vl")
    assert not stock.config.tie_word_embeddings
    with torch.no_grad():
        stock.lm_head.weight.mul_(2)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "text", text_only=True)
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], stock.lm_head.weight)
    assert not [name for name in tensors if not name.startswith(("model.layers.", "model.norm.", "model.embed", "lm_"))]


def test_a_tower_that_reads_text_in_another_way_is_refused(tmp_path, monkeypatch):
    stock, _ = tiny_composite("qwen2_5_vl")
    stock.save_pretrained(tmp_path / "stock")
    config_of = text_tower.tower_config

    def other(config, text_class):
        found = config_of(config, text_class)
        found.rms_norm_eps = 0.1
        return found

    monkeypatch.setattr(text_tower, "tower_config", other)
    with pytest.raises(ValueError, match="logits of the text tower differ"):
        convert(tmp_path / "stock", tmp_path / "text", text_only=True)
    assert not (tmp_path / "text").exists()


def saved_config(folder, model_type, **values):
    folder.mkdir()
    values = AutoConfig.for_model(model_type, **values).to_dict() | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return folder


def test_what_has_no_tower_is_refused_by_name(tmp_path):
    of_text = saved_config(tmp_path / "llama", "llama", **SHAPE)
    without = saved_config(tmp_path / "glm4v", "glm4v")
    prefix = saved_config(tmp_path / "paligemma", "paligemma")
    for folder, reason in (
        (of_text, "it is of text alone already"),
        (without, "no causal language model for Glm4vTextConfig"),
        (prefix, "reads its prompt from both sides"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(folder, tmp_path / "text", text_only=True)
    assert not (tmp_path / "text").exists()


def test_options_that_do_not_fit_are_refused(tmp_path):
    stock, _ = tiny_composite("gemma3")
    stock.save_pretrained(tmp_path / "stock")
    for options, name in (({"link": True}, "link"), ({"recurrent": (1, 1, 1)}, "recurrent")):
        with pytest.raises(ValueError, match=f"`{name}` must be left out with `text_only`"):
            convert(tmp_path / "stock", tmp_path / "text", text_only=True, **options)
    with pytest.raises(ValueError, match="must not contain each other"):
        convert(tmp_path / "stock", tmp_path / "stock", text_only=True, overwrite=True)
    convert(tmp_path / "stock", tmp_path / "both")
    with pytest.raises(ValueError, match="--to-ar first"):
        convert(tmp_path / "both", tmp_path / "text", text_only=True)


def test_a_composite_that_cannot_draft_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"'idefics3' model cannot draft.*--text-only"):
        TiDARForCausalLM.from_config(AutoConfig.for_model("idefics3"))
    for model_type in ("paligemma", "glm4v"):
        with pytest.raises(ValueError, match="cannot draft") as raised:
            TiDARForCausalLM.from_config(AutoConfig.for_model(model_type))
        assert "--text-only" not in str(raised.value)


@pytest.mark.parametrize("family", TEXT_ONLY)
def test_the_way_out_works(family, tmp_path):
    """The whole model cannot draft; its text can."""
    stock = tiny_stock_composite(family)
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="--text-only"):
        convert(tmp_path / "stock", tmp_path / "whole")
    convert(tmp_path / "stock", tmp_path / "text", text_only=True)
    model = TiDARForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
