"""Checkpoints that other code trained to draft: tiny random ones with original tensor names and config fields."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Ministral3Config, Qwen2Config

from helpers_stock import digests, edit_json
from helpers_tidar import SHAPE, VOCAB_SIZE, random_prompts
from wavedraft import TiDARForCausalLM, convert, to_ar

MASK = 44
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# The fields of the released config.json that Ministral 3 has not.
NEMOTRON_FIELDS = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "auto_map": {"AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel"},
    "ar_loss_weight": 1.0,
    "attention_bias": False,
    "attn_implementation": "sdpa",
    "block_size": 6,
    "dlm_loss_weight": 0.3,
    "dlm_paradigm": "bidirectional",
    "dp_varying_mask_ratio": False,
    "mask_token_id": MASK,
    "mlp_bias": False,
    "model_type": "nemotron_labs_diffusion",
}
THEIR_NAMES = (("model.", "encoder."), ("lm_head.", "diffusion_head."))


def save_random(config, folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder, **options)
    return model


def their_name(name):
    return next((theirs + name.removeprefix(ours) for ours, theirs in THEIR_NAMES if name.startswith(ours)), name)


@pytest.fixture(params=["1GB", "20KB"])
def nemotron(request, tmp_path):
    """A folder with Nemotron-Labs-Diffusion's names and fields, in one file or many, and the stock model of it."""
    folder = tmp_path / "nemotron"
    config = Ministral3Config(**{**SHAPE, "head_dim": 8, "rope_parameters": YARN})
    stock = save_random(config, folder, max_shard_size=request.param)
    for path in folder.glob("*.safetensors"):
        tensors = {their_name(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        edit_json(index, weight_map={their_name(name): file for name, file in content["weight_map"].items()})
    edit_json(folder / "config.json", **NEMOTRON_FIELDS)
    (folder / "modeling_nemotron_labs_diffusion.py").write_text("raise SystemExit('their code was run')\n")
    return folder, stock


def check_drafts(folder, stock, mask_token_id):
    """AR logits are the stock model's, and the text is its greedy text without the mask token."""
    model = TiDARForCausalLM.from_pretrained(folder)
    prompts = random_prompts(3, 9)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :4] = 0
    with torch.no_grad():
        assert torch.equal(model(prompts).logits, stock(prompts).logits)
    options = {"attention_mask": attention_mask, "max_new_tokens": 20, "do_sample": False}
    expected = stock.generate(prompts, suppress_tokens=[mask_token_id], **options)
    output = model.generate(prompts, return_dict_in_generate=True, **options)
    assert output.sequences.tolist() == expected.tolist() and output.num_forwards <= 19
    assert mask_token_id not in output.sequences[:, 9:]
    assert stock.generate(prompts, **options)[:, 9:].eq(mask_token_id).any(), "the mask token was never likely"


def likely_token(stock):
    return int(stock.generate(random_prompts(3, 9), max_new_tokens=2, do_sample=False)[0, -1])


def test_nemotron_labs_diffusion_drafts_as_tidar(nemotron, tmp_path):
    folder, stock = nemotron
    mask_token_id = likely_token(stock)
    edit_json(folder / "config.json", mask_token_id=mask_token_id)
    before = digests(folder)
    result = convert(folder, tmp_path / "tidar", draft_length=4)
    assert digests(folder) == before
    assert result.proof.max_abs_difference == 0 and result.mask_reason == "the mask token it was trained with"
    assert (result.tidar_config.mask_token_id, result.tidar_config.mask_embedding_id) == (mask_token_id,) * 2
    check_drafts(tmp_path / "tidar", stock, mask_token_id)

    values = json.loads((tmp_path / "tidar" / "config.json").read_text())
    assert not set(values) & (set(NEMOTRON_FIELDS) - {"architectures", "auto_map", "model_type"})
    assert values["model_type"] == "ministral3" and values["architectures"] == ["Ministral3ForCausalLM"]
    assert not (tmp_path / "tidar" / "modeling_nemotron_labs_diffusion.py").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar")
    to_ar(tmp_path / "tidar", tmp_path / "back")
    for model in (plain, AutoModelForCausalLM.from_pretrained(tmp_path / "back")):
        with torch.no_grad():
            assert torch.equal(model(random_prompts(1, 9)).logits, stock(random_prompts(1, 9)).logits)


def test_a_tidar_checkpoint_over_qwen2_keeps_its_mask_token(tmp_path):
    stock = save_random(Qwen2Config(**SHAPE), tmp_path / "source")
    mask_token_id = likely_token(stock)
    theirs = {"block_size": 8, "use_tidar": True, "clean_ratio": 0.5}
    edit_json(tmp_path / "source" / "config.json", model_type="tidar_qwen2", tidar_config=theirs, **theirs)
    with pytest.raises(ValueError, match="--mask-token-id"):
        convert(tmp_path / "source", tmp_path / "tidar")
    result = convert(tmp_path / "source", tmp_path / "tidar", mask_token_id=mask_token_id, link=True)
    assert (tmp_path / "tidar" / "model.safetensors").is_symlink() and result.architecture == "Qwen2ForCausalLM"
    check_drafts(tmp_path / "tidar", stock, mask_token_id)

    entry = {"content": "<mask>"}
    settings = {"mask_token": "<mask>", "added_tokens_decoder": {str(mask_token_id): entry}}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, **entry}]}))
    result = convert(tmp_path / "source", tmp_path / "by-tokenizer", verify=False)
    assert result.tidar_config.mask_token_id == mask_token_id


def test_a_stock_config_that_names_a_mask_token_keeps_it(tmp_path):
    stock = save_random(Qwen2Config(**SHAPE), tmp_path / "source")
    mask_token_id = likely_token(stock)
    edit_json(tmp_path / "source" / "config.json", mask_token_id=mask_token_id, block_size=8)
    assert convert(tmp_path / "source", tmp_path / "tidar").tidar_config.draft_length == 8
    check_drafts(tmp_path / "tidar", stock, mask_token_id)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, {"draft_length": 7}, "between 1 and 6, the block this checkpoint was trained"),
        ({}, {"mask_token_id": 5}, f"must be {MASK}, the mask token"),
        ({}, {"link": True}, "`link` must be left out"),
        ({"mask_token_id": VOCAB_SIZE}, {}, "must be in the vocabulary"),
        ({"mask_token_id": -1}, {}, "must be in the vocabulary"),
        ({"attention_bias": True}, {}, "`attention_bias` must be False"),
        ({"model_type": "nemotron_labs_diffusion_vlm"}, {}, "does not support"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(nemotron, tmp_path, values, options, message):
    edit_json(nemotron[0] / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        convert(nemotron[0], tmp_path / "tidar", **{"draft_length": 4, **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nemotron"]


def test_a_cut_shard_is_refused(nemotron, tmp_path):
    shard = sorted(nemotron[0].glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short"):
        convert(nemotron[0], tmp_path / "tidar", draft_length=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nemotron"]
