"""Users' own adapters beside ours: the text is plain decoding's of the model with the user's adapters."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, CompileConfig

from helpers_marks import slow_but
from helpers_tidar import random_prompts, tiny_tidar
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.training import gated_adapter_config

GREEDY = {"max_new_tokens": 24, "do_sample": False}
ALORA = {"alora_invocation_tokens": [7, 8]}
STATIC = {"cache_implementation": "static"}
WAYS = {
    "all": {},
    "auto": {"num_branches": "auto"},
    "one branch": {"num_branches": 1},
    "static": STATIC,
    "compiled": STATIC | {"compile_config": CompileConfig(backend="eager", dynamic=False)},
    "tie-safe": {"exact": "tie-safe"},
    "packed": {"packed_weights": True},
    "plain": {"draft_length": 0},
}


def lora(**more):
    """A config of a user's own adapter."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=targets, **more)


USERS = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "aLoRA": lora(**ALORA),
    "aLoRA of one token": lora(alora_invocation_tokens=[9]),
    "IA3": IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
    "LoHa": LoHaConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"]),
}


@torch.no_grad()
def randomized(model, seed=3):
    """Gives every adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def saved(folder, config, seed=3):
    """A folder with a user's adapter of random weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    randomized(get_peft_model(model, copy.deepcopy(config)), seed).save_pretrained(folder / "user")
    return str(folder / "user")


@pytest.fixture
def folder(tmp_path):
    """A TiDAR checkpoint, and a gated adapter of ours with random weights."""
    model = tiny_tidar("qwen3")
    model.save_pretrained(tmp_path / "model")
    randomized(get_peft_model(model, gated_adapter_config(model, 4)), seed=5).save_pretrained(tmp_path / "ours")
    return tmp_path


def prompts_with(invocation=(7, 8)):
    """Three rows: the invocation in the middle, at the end, and nowhere."""
    prompts = random_prompts(3, 9) % 40 + 10
    prompts[0, 3 : 3 + len(invocation)] = torch.tensor(invocation)
    prompts[1, -len(invocation) :] = torch.tensor(invocation)
    return prompts


def drafted_as(expected, generate, ways=("all", "auto", "static", "plain"), **more):
    """Whether each way of drafting gives these texts."""
    for name in ways:
        way = WAYS[name]
        found = generate(**more, **GREEDY, **way, return_dict_in_generate=True)
        assert found.sequences.tolist() == expected, name
        assert name == "plain" or found.num_forwards > 0, name


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("order", ["user", "user ours", "ours user", "ours then user", "user then ours"])
def test_a_users_adapter_and_ours_in_any_order_write_the_users_text(folder, user, order):
    if user in ("IA3", "LoHa") and order != "user":
        pytest.skip("transformers mixes no kinds of adapters")
    path, prompts = saved(folder, USERS[user]), prompts_with()
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    stock.load_adapter(path)
    expected = stock.generate(prompts, **GREEDY).tolist()
    if "aLoRA" not in user:
        bare = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert expected != bare.generate(prompts, **GREEDY).tolist(), "the adapter does nothing"

    model = TiDARForCausalLM.from_pretrained(folder / "model")
    paths = {"user": path, "ours": str(folder / "ours")}
    names = order.replace(" then ", " ").split()
    for name in names:
        model.load_adapter(paths[name], adapter_name=name)
    model.set_adapter(names if "then" not in order else names[::-1])
    logits = stock(prompts).logits
    assert torch.equal(model(prompts).logits, logits)
    ways = set(WAYS) - ({"compiled"} if user in ("rsLoRA", "aLoRA of one token") else set())
    drafted_as(expected, model.generate, ways if order == "user ours" else ("all", "auto"), input_ids=prompts)
    assert torch.equal(model(prompts).logits, logits)


@pytest.mark.parametrize("invocation", slow_but({(7, 8)}, ((7, 8), (9,))))
@pytest.mark.parametrize("order", slow_but(["user ours"], ("user", "user ours", "ours user")))
def test_a_users_alora_acts_from_its_invocation_on_through_peft(folder, invocation, order):
    """PEFT tells its layers where the invocation stands, row by row."""
    config, prompts = lora(alora_invocation_tokens=list(invocation)), prompts_with(invocation)
    first, *others = order.split()
    path = saved(folder, config)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), path, "user").eval()
    bare = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = stock.generate(input_ids=prompts, **GREEDY)
    plain = bare.generate(prompts, **GREEDY)
    assert [torch.equal(row, other) for row, other in zip(expected, plain, strict=True)] == [False, False, True]

    model = TiDARForCausalLM.from_pretrained(folder / "model")
    paths = {"user": path, "ours": str(folder / "ours")}
    peft_model = PeftModel.from_pretrained(model, paths[first], first)
    for name in others:
        peft_model.load_adapter(paths[name], name)
    peft_model.set_adapter("user")  # PEFT looks for the invocation of one active adapter
    drafted_as(expected.tolist(), peft_model.eval().generate, WAYS, input_ids=prompts)
    for end in expected[:, -10:].flatten().tolist()[::7]:  # rows end one after another
        ended = {"eos_token_id": end, "pad_token_id": 0}
        text = stock.generate(input_ids=prompts, **GREEDY, **ended).tolist()
        drafted_as(text, peft_model.generate, input_ids=prompts, **ended)


@pytest.mark.parametrize(
    "names",
    slow_but(
        [("a", "xa", "b"), ("ours", "__base__", "a")],
        itertools.product(["a", "ours"], ["xa", "__base__"], ["b", "a"]),
    ),
)
def test_rows_with_adapters_of_their_own_write_plain_texts(folder, names):
    """A batch of `adapter_names`: rows end one after another, and PEFT's hooks name all of the batch."""
    configs = {"a": lora(), "b": lora(init_lora_weights=False), "xa": lora(**ALORA)}
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    stock = get_peft_model(stock, configs["a"], adapter_name="a")
    model = get_peft_model(TiDARForCausalLM.from_pretrained(folder / "model"), configs["a"], adapter_name="a")
    for name in ("b", "xa"):
        stock.add_adapter(name, configs[name])
        model.add_adapter(name, configs[name])
    randomized(stock.eval())
    randomized(model.eval())
    model.load_adapter(str(folder / "ours"), "ours")
    prompts, theirs = prompts_with(), ["__base__" if name == "ours" else name for name in names]
    texts = stock.generate(input_ids=prompts, adapter_names=theirs, **GREEDY)
    for ended in ({}, {"eos_token_id": int(texts[0, 14])}, {"eos_token_id": [int(texts[1, 12]), int(texts[2, 17])]}):
        more = {"input_ids": prompts, "pad_token_id": 0, **ended}
        expected = stock.generate(adapter_names=theirs, **more, **GREEDY).tolist()
        drafted_as(expected, partial(model.generate, adapter_names=names), **more)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=prompts[:2], adapter_names=names, **GREEDY)


def test_virtual_tokens_of_a_prompt_adapter_are_read(folder):
    prompts = random_prompts(2, 6)
    for config in (
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    ):
        peft_models = []
        for cls in (AutoModelForCausalLM, TiDARForCausalLM):
            torch.manual_seed(0)
            peft_models.append(get_peft_model(cls.from_pretrained(folder / "model"), config).eval())
        stock, model = peft_models
        expected = stock.generate(input_ids=prompts, **GREEDY).tolist()
        assert model.generate(input_ids=prompts, **GREEDY).tolist() == expected
        with pytest.raises(ValueError, match="virtual tokens"):
            stock.generate(input_ids=prompts, **GREEDY, custom_generate=tidar)


@pytest.mark.parametrize("user", [name for name in USERS if "DoRA" not in name])
def test_a_stock_model_with_a_users_adapter_drafts_its_own_text(folder, user):
    path, prompts = saved(folder, USERS[user]), prompts_with()
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    stock.load_adapter(path)
    expected = stock.generate(prompts, **GREEDY).tolist()
    drafted_as(expected, stock.generate, ("all", "one branch", "static"), input_ids=prompts, custom_generate=tidar)


@pytest.mark.parametrize("state", ["disabled", "merged", "switched", "deleted"])
def test_what_is_done_to_a_users_adapter_is_followed(folder, state):
    path, prompts = saved(folder, USERS["LoRA"]), random_prompts(2, 7)
    models = []
    for cls in (AutoModelForCausalLM, TiDARForCausalLM):
        model = cls.from_pretrained(folder / "model")
        model.load_adapter(path, adapter_name="user")
        if cls is TiDARForCausalLM:
            model.load_adapter(str(folder / "ours"), adapter_name="ours")
            model.set_adapter(["user", "ours"])
        models.append(model)
    stock, model = models
    bare = stock.generate(prompts, **GREEDY).tolist()
    drafted_as(bare, model.generate, input_ids=prompts)
    if state == "disabled":
        stock.disable_adapters()
        model.disable_adapters()
    elif state == "merged":
        for one in models:
            for module in one.modules():
                if hasattr(module, "lora_A"):
                    module.merge(adapter_names=["user"])
    elif state == "switched":
        stock.disable_adapters()
        model.set_adapter("ours")
    else:
        stock.disable_adapters()
        model.delete_adapter("user")
    if state != "merged":
        assert stock.generate(prompts, **GREEDY).tolist() != bare
    drafted_as(stock.generate(prompts, **GREEDY).tolist(), model.generate, WAYS, input_ids=prompts)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("way", slow_but(("all", "packed", "plain"), ("all", "packed", "compiled", "plain")))
def test_a_copy_of_a_gated_model_writes_its_text(folder, copied, trains, way):
    prompts = random_prompts(2, 6)
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(str(folder / "ours"))
    text = model.generate(prompts, **GREEDY, **WAYS[way]).tolist()
    if trains:
        model(prompts, labels=prompts, objective=DraftObjective(mode="gated")).loss.detach()
    other = copied(model)
    assert other.generate(prompts, **GREEDY, **WAYS[way]).tolist() == text
    assert torch.equal(other(prompts).logits, model(prompts).logits)
    assert other.generate(prompts, **GREEDY).tolist() == text


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_model_that_trains_with_checkpointed_layers_writes_evals_text(family, is_gated):
    model, prompts = tiny_tidar(family), random_prompts(2, 7)
    if is_gated:
        randomized(get_peft_model(model, gated_adapter_config(model, 4)).eval())
    expected = model.generate(prompts, **GREEDY, draft_length=0).tolist()
    model.train()
    model.gradient_checkpointing_enable()
    drafted_as(expected, model.generate, WAYS, input_ids=prompts)
    assert model.training and all(layer.gradient_checkpointing for layer in model.model.layers)
