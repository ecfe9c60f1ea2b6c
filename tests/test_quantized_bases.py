"""Quantized bases: drafting writes the text of the stock model with the same quantized weights, or is refused by name.

A kind whose package is not installed is skipped by its name. What is tried is the table `BASES`.
"""

from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import model as lora_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig, TorchAoConfig

from helpers_quantized import write_quantized
from helpers_tidar import random_prompts, tiny_tidar
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation import tidar
from wavedraft.modeling_tidar import DraftObjective, generation_tidar
from wavedraft.training import gated_adapter_config

GREEDY = {"max_new_tokens": 24, "do_sample": False}
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WAYS = ({"num_branches": "all"}, {"num_branches": "auto"}, {"cache_implementation": "static"}, {"draft_length": 0})


def torchao(name, **options):
    """transformers' config of one of torchao's."""
    return TorchAoConfig(getattr(import_module("torchao.quantization"), name)(**options))


def four_bit(kind):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)


# Each kind: its package, and its config.
BASES = {
    "bitsandbytes 8 bit, no threshold": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    ),
    "bitsandbytes nf4": ("bitsandbytes", partial(four_bit, "nf4")),
    "bitsandbytes fp4": ("bitsandbytes", partial(four_bit, "fp4")),
    "torchao int8 weights": ("torchao", partial(torchao, "Int8WeightOnlyConfig")),
    "torchao int8": ("torchao", partial(torchao, "Int8DynamicActivationInt8WeightConfig")),
    "torchao fp8 weights": ("torchao", partial(torchao, "Float8WeightOnlyConfig")),
    "torchao int4 weights": ("torchao", partial(torchao, "IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    "torchao int4, int8": ("torchao", partial(torchao, "Int8DynamicActivationIntxWeightConfig")),
    "HQQ 4 bit": ("hqq", partial(HqqConfig, nbits=4, group_size=64)),
    "HQQ 8 bit": ("hqq", partial(HqqConfig, nbits=8, group_size=64)),
    # Folders of quantized weights. On a CPU transformers makes plain weights of FP8.
    "GPTQ 4 bit": ("gptqmodel", "gptq"),
    "AWQ 4 bit": ("gptqmodel", "awq"),
    "FP8 on a CPU": ("transformers", "fp8"),
}
FOLDERS = {kind: config for kind, (_, config) in BASES.items() if isinstance(config, str)}
NO_GATE = ["HQQ 4 bit", "HQQ 8 bit", "GPTQ 4 bit", "AWQ 4 bit"]


@pytest.fixture
def folder(tmp_path):
    model = tiny_tidar(**SHAPE)
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def with_adapter(folder):
    """The folder of a gated adapter of ours with random weights."""
    peft_model = get_peft_model(tiny_tidar(**SHAPE), gated_adapter_config(tiny_tidar(**SHAPE), 4))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def quantized(cls, folder, kind):
    package, config = BASES[kind]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if kind in FOLDERS:
        if not (folder / config).exists():
            write_quantized(folder / "model", folder / config, config)
        return cls.from_pretrained(folder / config, dtype=torch.float32).eval()
    if package == "hqq":  # transformers 5.23 loads no model with it, so layers are replaced as HQQ's own loader does
        return with_hqq_layers(cls.from_pretrained(folder / "model").eval(), config())
    return cls.from_pretrained(folder / "model", quantization_config=config(), dtype=torch.float32).eval()


def with_hqq_layers(model, config):
    layer_class = import_module("hqq.core.quantize").HQQLinear
    linears = [(name, one) for name, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)]
    for name, linear in linears:
        parent, _, place = name.rpartition(".")
        options = {"compute_dtype": torch.float32, "device": "cpu"}
        layer = layer_class(linear, config.quant_config, **options)
        setattr(model.model.get_submodule(parent), place, layer)
    return model


@pytest.mark.parametrize("kind", [kind for kind in BASES if "AWQ" not in kind])
def test_a_quantized_base_drafts_its_own_text_with_and_without_a_gated_adapter(folder, kind):
    stock, prompts = quantized(AutoModelForCausalLM, folder, kind), random_prompts(2, 7)
    expected, logits = stock.generate(prompts, **GREEDY).tolist(), stock(prompts).logits
    model = quantized(TiDARForCausalLM, folder, kind)
    for way in WAYS:
        assert model.generate(prompts, **GREEDY, **way).tolist() == expected
    adapter = with_adapter(folder)
    model.load_adapter(adapter)
    stock.load_adapter(adapter)
    assert torch.equal(model(prompts).logits, logits)
    for way in WAYS:
        assert model.generate(prompts, **GREEDY, **way).tolist() == expected
        if "draft_length" not in way:
            assert stock.generate(prompts, **GREEDY, **way, custom_generate=tidar).tolist() == expected
    peft_model = PeftModel.from_pretrained(quantized(TiDARForCausalLM, folder, kind), adapter)
    if kind in NO_GATE:  # PEFT hands these layers what they do not take; `load_adapter` above does not
        with pytest.raises(TypeError, match="alora_offsets"):
            peft_model(input_ids=prompts)
    else:
        assert peft_model.generate(input_ids=prompts, **GREEDY).tolist() == expected
    drafted = model.generate(prompts, **GREEDY, num_branches="all", return_dict_in_generate=True).accepted_lengths
    model.disable_adapters()
    bare = model.generate(prompts, **GREEDY, num_branches="all", return_dict_in_generate=True).accepted_lengths
    assert drafted.sum() > 0 and bare.sum() > 0


def test_an_awq_base_drafts_its_own_text_and_refuses_a_gated_adapter(folder):
    stock, prompts = quantized(AutoModelForCausalLM, folder, "AWQ 4 bit"), random_prompts(2, 7)
    expected = stock.generate(prompts, **GREEDY).tolist()
    model = quantized(TiDARForCausalLM, folder, "AWQ 4 bit")
    with pytest.raises(ValueError, match="cannot be gated in this TiDARLlamaForCausalLM: PEFT has no gate"):
        model.load_adapter(with_adapter(folder))
    for way in WAYS:
        assert model.generate(prompts, **GREEDY, **way).tolist() == expected
        if "draft_length" not in way:
            by_keywords = {"custom_generate": tidar, "draft_length": 4, "mask_embedding_id": 3}
            assert stock.generate(prompts, **GREEDY, **way, **by_keywords).tolist() == expected
    drafted = model.generate(prompts, **GREEDY, num_branches="all", return_dict_in_generate=True)
    assert drafted.accepted_lengths.sum() > 0


@pytest.mark.parametrize("kind", NO_GATE)
def test_a_gated_adapter_is_not_taught_where_peft_has_no_gate(folder, kind):
    model = quantized(TiDARForCausalLM, folder, kind)
    with pytest.raises(ValueError, match=r"cannot be taught on this TiDARLlamaForCausalLM.*Linear layers"):
        gated_adapter_config(model, 4)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_quantized_folder_is_not_converted(folder, kind):
    write_quantized(folder / "model", folder / FOLDERS[kind], FOLDERS[kind])
    with pytest.raises(ValueError, match="This checkpoint is quantized"):
        convert(folder / FOLDERS[kind], folder / "tidar")
    assert not (folder / "tidar").exists()


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind not in NO_GATE])
def test_a_gated_adapter_learns_on_a_quantized_base(folder, kind):
    model, ids = quantized(TiDARForCausalLM, folder, kind), random_prompts(2, 12)
    peft_model = get_peft_model(model, gated_adapter_config(model, 4)).train()
    peft_model(input_ids=ids, labels=ids, objective=DraftObjective(mode="gated")).loss.backward()
    trained = [p for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert trained
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-1.0)
    logits = peft_model.eval()(input_ids=ids).logits
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(input_ids=ids).logits, logits)


def test_eight_bit_layers_with_a_threshold_decode_plainly_and_say_so(folder, monkeypatch):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    said, prompts = [], random_prompts(2, 7)
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.float32}
    stock = AutoModelForCausalLM.from_pretrained(folder / "model", **options).eval()
    model = TiDARForCausalLM.from_pretrained(folder / "model", **options).eval()
    assert model.generate(prompts, **GREEDY).tolist() == stock.generate(prompts, **GREEDY).tolist()
    assert "`llm_int8_threshold=0.0`" in said[0]
    with pytest.raises(ValueError, match="llm_int8_threshold"):
        stock.generate(prompts, **GREEDY, custom_generate=tidar)


@pytest.mark.parametrize("is_told", [True, False])
def test_activations_quantized_over_all_tokens_decode_plainly_and_say_so(folder, is_told, monkeypatch):
    """torchao's granularity by the tensor; `is_told` where the config says that the model is quantized."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    said, prompts = [], random_prompts(2, 7)
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)
    config = quantization.Int8DynamicActivationInt8WeightConfig(granularity=quantization.PerTensor())

    def loaded(cls):
        if is_told:
            return cls.from_pretrained(folder / "model", quantization_config=TorchAoConfig(config)).eval()
        model = cls.from_pretrained(folder / "model").eval()
        quantization.quantize_(model.model, config)
        return model

    stock, model = loaded(AutoModelForCausalLM), loaded(TiDARForCausalLM)
    assert model.generate(prompts, **GREEDY).tolist() == stock.generate(prompts, **GREEDY).tolist()
    assert "tokens beside it" in said[0]
    with pytest.raises(ValueError, match="Quantize activations by the token"):
        stock.generate(prompts, **GREEDY, custom_generate=tidar)


class Mixing(torch.nn.Linear):
    """A layer of int8 weights whose activations share one scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = scale

    def forward(self, x):
        size = x.abs().max() / 127
        return torch.nn.functional.linear((x / size).round() * size, self.weight * self.scale)


def test_layers_of_any_package_are_asked_about_a_token_beside_others(folder, monkeypatch):
    said = []
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)
    model = TiDARForCausalLM.from_pretrained(folder / "model").eval()
    model.generate(random_prompts(1, 7), **GREEDY)
    assert not said
    model.model.layers[1].mlp.up_proj = Mixing(model.model.layers[1].mlp.up_proj)
    prompts = random_prompts(1, 7)
    expected = model.generate(prompts, **GREEDY, draft_length=0).tolist()
    assert model.generate(prompts, **GREEDY, num_branches="all").tolist() == expected
    assert "`model.layers.1.mlp.up_proj` (Mixing)" in said[0]


@pytest.mark.parametrize("kind", ["awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear"])
def test_layers_of_peft_that_take_no_gate_are_refused_by_name(folder, kind, monkeypatch):
    module, name = kind.split(".")
    layers = import_module(f"peft.tuners.lora.{module}")
    if not hasattr(layers, name):
        pytest.skip(f"PEFT defines {name} only where its package is installed")
    prompts, adapter = random_prompts(1, 7), with_adapter(folder)

    def dispatch(target, adapter_name, config, r, lora_alpha, **kwargs):
        return getattr(layers, name)(target, adapter_name, config=config, r=r, lora_alpha=lora_alpha)

    monkeypatch.setattr(lora_model, "dispatch_default", dispatch)
    model = TiDARForCausalLM.from_pretrained(folder / "model").eval()
    expected = model.generate(prompts, **GREEDY).tolist()
    with pytest.raises(ValueError, match="cannot be gated in this TiDARLlamaForCausalLM: PEFT has no gate"):
        model.load_adapter(adapter)
    assert model.generate(prompts, **GREEDY).tolist() == expected
    stock = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for refused in (
        lambda: stock.load_adapter(adapter),
        lambda: PeftModel.from_pretrained(TiDARForCausalLM.from_pretrained(folder / "model"), adapter),
        lambda: get_peft_model(stock, gated_adapter_config(stock, 4)),
    ):
        with pytest.raises(ValueError, match="variant"):  # by PEFT itself
            refused()


@pytest.mark.parametrize("kind", [kind for kind in BASES if "FP8" not in kind])
def test_packed_weights_of_a_quantized_base_are_refused_by_name(folder, kind):
    model, prompts = quantized(TiDARForCausalLM, folder, kind), random_prompts(1, 5)
    for way in ({}, {"draft_length": 0}):
        with pytest.raises(ValueError, match="`packed_weights` must be False"):
            model.generate(prompts, **GREEDY, **way, packed_weights=True)


@pytest.mark.parametrize("kind", ["GPTQ 4 bit", "AWQ 4 bit"])
def test_a_folder_whose_package_is_absent_is_refused_by_transformers(folder, kind):
    if find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    write_quantized(folder / "model", folder / FOLDERS[kind], FOLDERS[kind])
    with pytest.raises(ImportError, match=r"optimum|gptqmodel"):
        TiDARForCausalLM.from_pretrained(folder / FOLDERS[kind])
