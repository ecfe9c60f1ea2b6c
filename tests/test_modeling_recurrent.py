"""The recurrent model: values of the golden fixture, padding, attention implementations, released checkpoints."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers_recurrent import HUGINN_CONFIG, checkpoint, golden_model, prompt_ids, random_model, records, tensors
from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM


def huginn_shapes() -> dict[str, tuple]:
    """The 77 names of the released checkpoint with their shapes, written out from its description."""
    width, hidden, vocab, heads, head_dim = 5280, 17920, 65536, 55, 96
    shapes = {
        "transformer.wte.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "freqs_cis": (1, 4096, 1, 48, 2),
        "transformer.adapter.weight": (width, 2 * width),
        "transformer.ln_f.weight": (width,),
    }
    for part, count in (("prelude", 2), ("core_block", 4), ("coda", 2)):
        for i in range(count):
            block = f"transformer.{part}.{i}."
            shapes[block + "attn.Wqkv.weight"] = (3 * width, width)
            shapes[block + "attn.qk_bias"] = (2, 1, heads, head_dim)
            shapes[block + "attn.proj.weight"] = (width, width)
            shapes[block + "mlp.fc.weight"] = (2 * hidden, width)
            shapes[block + "mlp.proj.weight"] = (width, hidden)
            shapes |= {f"{block}norm_{n}.weight": (width,) for n in (1, 2, 3, 4)}
    return shapes


def write_folder(folder, config: dict, weights: dict):
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("variant", ["base", "slow"])
@pytest.mark.parametrize("num_recurrences", [1, 4, 32])
def test_every_stage_has_the_references_numbers(variant, num_recurrences):
    model, golden = golden_model(variant), tensors()

    with torch.no_grad():
        output = model(prompt_ids("p16"), num_recurrences=num_recurrences, init_scale=0.0, output_hidden_states=True)
    embeds, *trajectory = output.hidden_states

    torch.testing.assert_close(embeds, golden[f"embeds/{variant}/p16"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, golden[f"logits/{variant}/p16/n{num_recurrences}"], atol=1e-5, rtol=0)
    for step in (1, 2, 4, 8, 32):
        if step <= num_recurrences:
            latents = model.transformer["ln_f"](trajectory[step])
            torch.testing.assert_close(latents, golden[f"latents/{variant}/p16/n{step}"], atol=1e-5, rtol=0)


def test_the_full_size_model_has_the_released_names_and_shapes():
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**HUGINN_CONFIG))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert shapes == huginn_shapes()
    assert len(shapes) == 77
    assert sum(math.prod(p.shape) for p in model.parameters()) == 3_564_976_800  # tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", [RecurrentDepthForCausalLM, AutoModelForCausalLM])
def test_a_folder_as_released_loads_unmodified(tmp_path, loader, dtype):
    weights = checkpoint("base")
    config = {**HUGINN_CONFIG, **records()["meta"]["config"], "init_values": None}
    config = {k: v for k, v in config.items() if k not in ("head_dim", "num_attention_heads", "num_key_value_heads")}
    config |= {"padded_vocab_size": config["vocab_size"]}
    folder = write_folder(tmp_path, config, {**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()})

    model, report = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)

    assert isinstance(model, RecurrentDepthForCausalLM)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.lm_head.weight.data_ptr() == model.transformer["wte"].weight.data_ptr()
    assert model.freqs_cis.dtype == torch.float32 and model.to(torch.bfloat16).freqs_cis.dtype == torch.float32
    if dtype == torch.float32:
        model = model.to(dtype)
        logits = loader.from_pretrained(folder, dtype=dtype)(
            prompt_ids("p16"), num_recurrences=4, init_scale=0.0
        ).logits
        torch.testing.assert_close(logits, tensors()["logits/base/p16/n4"], atol=1e-5, rtol=0)


def test_a_tied_pair_stored_with_different_values_is_not_tied(tmp_path):
    weights, config = checkpoint("base"), records()["meta"]["config"]
    other_head = weights["transformer.wte.weight"] + 1
    folder = write_folder(tmp_path, config | {"model_type": "huginn_raven"}, {**weights, "lm_head.weight": other_head})

    model = RecurrentDepthForCausalLM.from_pretrained(folder)

    assert torch.equal(model.lm_head.weight, other_head)
    assert torch.equal(model.transformer["wte"].weight, weights["transformer.wte.weight"])


def test_a_saved_model_comes_back_the_same(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])

    assert torch.equal(model(ids, init_scale=0.0).logits, again(ids, init_scale=0.0).logits)
    config = {**again.config.to_dict(), "_name_or_path": ""}
    assert config.pop("auto_map")["AutoConfig"] == "configuration_recurrent.RecurrentDepthConfig"
    assert config.pop("architectures") == ["AutoModelForCausalLM"]  # a name that `transformers serve` finds
    own = model.config.to_dict()
    own.pop("architectures")
    assert config == own


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.compiler.set_stance("force_eager")  # transformers compiles flex_attention, and the kernel is torch's own
def test_a_left_padded_row_has_the_logits_of_the_row_alone(attention):
    model = random_model()
    model.set_attn_implementation(attention)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    padded = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])

    with torch.no_grad():
        logits = model(padded, attention_mask=mask, init_scale=0.0).logits
        model.set_attn_implementation("eager")
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]), init_scale=0.0).logits[0]
            torch.testing.assert_close(logits[i, -len(row) :], alone, atol=1e-4, rtol=1e-4)


def test_position_ids_are_honoured():
    model, ids = random_model(), torch.tensor([[5, 6, 7, 8]])
    shifted = torch.arange(4)[None] + 40
    with torch.no_grad():
        plain = model(ids, init_scale=0.0).logits
        far = model(ids, position_ids=shifted, init_scale=0.0).logits  # relative positions are all that matter
        spread = model(ids, attention_mask=torch.ones_like(ids), position_ids=shifted * 2, init_scale=0.0).logits
    torch.testing.assert_close(plain, far, atol=1e-4, rtol=1e-4)
    assert (plain - spread).abs().max() > 1e-2


def test_initial_states_follow_their_scale_and_generator():
    model = random_model(n_embd=96)
    embeds = torch.zeros(1, 500, 96)
    draw = lambda scale: model.initial_states(embeds, scale, torch.Generator().manual_seed(3))  # noqa: E731
    unit = math.sqrt(2 / 5)  # std * sqrt(n_embd), whatever the width

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(draw(1.0), draw(1.0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(draw(2.0), 2 * draw(1.0))
    assert draw(1.0).abs().max() <= 3 * unit + 1e-6
    assert abs(draw(1.0).std() / (unit * 0.9866) - 1) < 0.01  # 0.9866: what cutting at 3 leaves of a deviation
    assert not draw(0.0).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"injection_type": "add"}, "injection_type"),
        ({"test_time_noise": 0.1}, "`test_time_noise` must be 0"),
        ({"head_dim": 5}, "head_dim"),
        ({"mean_recurrence": 0}, "mean_recurrence"),
    ],
)
def test_a_config_this_package_cannot_run_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        random_model(**change)


def test_the_limits_of_a_forward_are_told():
    model = random_model(block_size=8)
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="num_recurrences"):
        model(torch.zeros(1, 2, dtype=torch.long), num_recurrences=0)


def test_outputs_come_as_the_config_and_the_caller_ask():
    model = random_model(0)
    ids = torch.tensor([[5, 6, 7, 8]])
    output = model(ids)
    assert output.hidden_states is None
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 2 + model.config.mean_recurrence
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_weights_that_do_not_tell_the_block_are_missing_ones(tmp_path):
    model = random_model(0)
    model.save_pretrained(tmp_path)
    save_file({"foo": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert again.is_sandwiched and set(report["unexpected_keys"]) == {"foo"} and report["missing_keys"]


def test_attentions_are_those_of_each_layers_last_recurrence():
    model, ids = random_model(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
        plain = model(ids)
    assert len(output.attentions) == 1 + 3 + 1 and len(output.hidden_states) == 2 + 6
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 4))
        assert not weights.triu(1).any()
    assert plain.attentions is None and plain.hidden_states is None
    torch.testing.assert_close(plain.logits, output.logits, atol=1e-3, rtol=1e-3)
    generated = model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert [layers[0].shape[-2:] for layers in generated.attentions] == [(4, 4), (1, 5), (1, 6)]
