"""Conversion of released recurrent-depth folders: known config fields, unchanged weights, and our code."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from helpers_family import CONFIGS, FORMS, ouro_shapes, raven_shapes
from helpers_recurrent import random_model
from helpers_stock import edit_json
from wavedraft import RecurrentDepthForCausalLM, TiDARForCausalLM, convert

HUGINN_FIELDS = {
    "architectures": ["RavenForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
    "effective_expected_depth": 132,
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
}


def released_folder(name, folder):
    """A random tiny checkpoint with the tensor names and config fields of a released one, and code to be left alone."""
    folder.mkdir()
    if name == "huginn":
        random_model(0).save_pretrained(folder)
        for path in folder.glob("*.py"):
            path.unlink()
        edit_json(folder / "config.json", **HUGINN_FIELDS)
        edit_json(folder / "generation_config.json", _from_model_config=True)
    else:
        config = CONFIGS[name]
        shapes = ouro_shapes(config) if name == "ouro" else raven_shapes(config, has_qk_norm=name == "olmo")
        torch.manual_seed(0)
        weights = {key: torch.randn(shape) * shape[-1] ** -0.5 for key, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "raven_modeling_minimal.py").write_text("raise SystemExit('their code was run')\n")
    return folder


@pytest.mark.parametrize("name", ["huginn", "llama", "tinyllama", "olmo", "ouro"])
def test_a_released_folder_becomes_one_of_ours(name, tmp_path):
    source = released_folder(name, tmp_path / "source")
    result = convert(source, tmp_path / "ours")
    assert result.proof.max_abs_difference == 0 and result.tidar_config is None

    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["architectures"] == ["AutoModelForCausalLM"], "`transformers serve` looks for it in transformers"
    assert not set(values) & {"test_time_noise", "torch_dtypes"}
    assert values["auto_map"]["AutoModelForCausalLM"].split(".")[-1] == result.architecture
    assert values.get("block_form") == {"huginn": "sandwich", "ouro": None, **FORMS}[name]
    assert not (tmp_path / "ours" / "raven_modeling_minimal.py").exists()
    if name == "huginn":
        options = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
        assert not options["_from_model_config"], "else transformers would drop our keywords from it"
    assert (tmp_path / "ours" / "modeling_recurrent.py").exists() == (name != "ouro")

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    models = [RecurrentDepthForCausalLM.from_pretrained(tmp_path / folder).eval() for folder in ("source", "ours")]
    texts = [model.generate(ids, max_new_tokens=8, policy="exact", do_sample=False).tolist() for model in models]
    assert texts[0] == texts[1] == models[1].generate(ids, max_new_tokens=8, do_sample=False).tolist()


def test_a_linked_conversion_costs_no_weights_and_a_wrong_shape_leaves_nothing(tmp_path):
    source = released_folder("olmo", tmp_path / "source")
    convert(source, tmp_path / "linked", link=True, verify=False)
    assert (tmp_path / "linked" / "model.safetensors").is_symlink()
    assert AutoConfig.from_pretrained(tmp_path / "linked").block_form == "post-norm"
    edit_json(source / "config.json", intermediate_size=44)
    with pytest.raises(ValueError, match="does not fit RecurrentDepthForCausalLM"):
        convert(source, tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "source"]


@pytest.mark.parametrize("given", [{}, {"draft_length": 8}])
def test_a_mask_token_of_its_own_is_refused(tmp_path, given):
    random_model().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`mask_token_id` must be left out for a recurrent-depth checkpoint"):
        convert(tmp_path / "source", tmp_path / "target", mask_token_id=3, **given)
    assert not (tmp_path / "target").exists()


def test_drafts_by_masks_are_refused_and_an_older_folder_that_has_them_is_read_as_the_plain_model(tmp_path):
    source = released_folder("huginn", tmp_path / "source")
    with pytest.raises(ValueError, match=r"`draft_length` must be left out for a recurrent-depth .*policy='exact'"):
        convert(source, tmp_path / "target", draft_length=4)
    edit_json(source / "config.json", tidar_config={"draft_length": 4, "mask_token_id": 37, "mask_recurrences": 2})
    with pytest.raises(ValueError, match=r"has a recurrent depth.*policy='exact'"):
        TiDARForCausalLM.from_pretrained(source)
    assert convert(source, tmp_path / "target").tidar_config is None
    assert "tidar_config" not in json.loads((tmp_path / "target" / "config.json").read_text())
