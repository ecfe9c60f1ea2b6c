"""Training a recurrent-depth model: random depth, truncated back-propagation, checkpointing, Trainer, LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers_family import CONFIGS, FORMS, tiny_model
from helpers_plain_recurrent import ouro_logits, raven_logits
from helpers_recurrent import random_model
from wavedraft.modeling_recurrent import (
    LORA_CORE_AND_ADAPTER,
    DepthSampler,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    sample_depth,
)
from wavedraft.modeling_recurrent.looped_recurrent import RecurrentRMSNorm

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6]])


def plain_gradients(kind: str, model, num_recurrences: int, num_detached: int) -> dict[str, torch.Tensor]:
    """The loss's gradient by weight name, through a loop written from the definition."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights = leaves | {"lm_head.weight": leaves.get("lm_head.weight", leaves.get("transformer.wte.weight"))}
    if kind == "ouro":
        logits = ouro_logits(weights, CONFIGS["ouro"], IDS[0], num_recurrences)
    else:
        config = model.config.to_dict() | {"init_values": {"embed_scale": model.config.embed_scale}}
        config |= {"head_dim": model.config.head_dim} | (CONFIGS.get(kind, {}))
        form = FORMS.get(kind, "sandwich")
        logits = raven_logits(weights, config, form, IDS[0], num_recurrences, num_detached=num_detached)
    cross_entropy(logits[:-1], IDS[0, 1:]).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_depths_are_one_more_than_a_poisson_of_a_log_normal_rate():
    generator = torch.Generator().manual_seed(0)
    depths = torch.tensor([sample_depth(32, generator) for _ in range(20_000)]).double()

    rate_variance = 32**2 * (torch.tensor(0.25).exp() - 1)
    assert depths.min() >= 1
    assert abs(depths.mean() - 33) < 0.5
    assert abs(depths.var() / (32 + rate_variance) - 1) < 0.1
    assert abs((depths < 33).double().mean() - 0.58) < 0.03  # mostly less, at times far more


def test_every_rank_draws_the_same_depths_and_no_global_state_is_touched():
    draws = []
    for rank in range(3):
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        sampler = DepthSampler(8, seed=5)
        draws.append([sampler.draw() for _ in range(50)])
        assert torch.equal(torch.get_rng_state(), before)

    assert draws[0] == draws[1] == draws[2]
    other = DepthSampler(8, seed=6)
    assert [other.draw() for _ in range(50)] != draws[0]


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["huginn", "llama", "olmo", "ouro"])
def test_gradients_are_those_of_a_plain_loop_of_the_same_depth(kind, is_checkpointed):
    model = random_model() if kind == "huginn" else tiny_model(kind)
    num_recurrences, num_backprop = (4, 4) if kind == "ouro" else (5, 2)
    expected = plain_gradients(kind, model, num_recurrences, num_recurrences - num_backprop)
    model.train()
    if is_checkpointed:
        model.activation_checkpointing_enable()

    model(IDS, labels=IDS, num_recurrences=num_recurrences, num_backprop=num_backprop, init_scale=0.0).loss.backward()

    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["huginn", "llama", "olmo", "ouro"])
def test_checkpointing_runs_each_layer_once_more_and_changes_no_bit_of_a_gradient(kind, use_reentrant):
    gradients, num_runs = [], []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = (random_model() if kind == "huginn" else tiny_model(kind)).train()
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert {type(layer).__name__ for layer in layers} <= set(model._no_split_modules)
        if is_checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        calls: list[None] = []
        for layer in layers:
            norm = next(m for m in layer.modules() if isinstance(m, RecurrentRMSNorm))
            norm.register_forward_hook(lambda *_, calls=calls: calls.append(None))

        model(IDS, labels=IDS, num_recurrences=4, num_backprop=4, init_scale=0.0).loss.backward()

        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        num_runs.append(len(calls))
    assert num_runs[1] == 2 * num_runs[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_mixed_precision_keeps_the_cores_gradient(is_checkpointed):
    """Autocast keeps the weights it has cast; those of the recurrences without a gradient must not serve the others."""
    model = random_model().train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    options = {"num_recurrences": 5, "num_backprop": 2, "init_scale": 0.0}
    model(IDS, labels=IDS, **options).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS, **options).loss
    loss.backward()

    for name, parameter in model.named_parameters():
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.9, name


def test_a_training_forward_goes_as_deep_as_drawn_and_differentiates_the_last_recurrences():
    model = random_model(mean_recurrence=12, mean_backprop_depth=3).train()
    twin = DepthSampler(12)
    depths = []
    for _ in range(8):
        embeds, start, *states = model(IDS, labels=IDS, output_hidden_states=True).hidden_states
        depths.append(len(states))
        has_graph = [state.grad_fn is not None for state in states]
        assert embeds.grad_fn is not None and start.grad_fn is None
        assert has_graph == [False] * max(0, len(states) - 3) + [True] * min(3, len(states))

    assert depths == [twin.draw() for _ in range(8)]
    assert len(model.eval()(IDS, labels=IDS, output_hidden_states=True).hidden_states) == 2 + 12
    with torch.no_grad():
        assert len(model.train()(IDS, output_hidden_states=True).hidden_states) == 2 + 12


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_depth_and_shrinks_with_checkpointing():
    model = random_model(mean_backprop_depth=3).train()

    def kept(num_recurrences: int, num_backprop: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(IDS, labels=IDS, num_recurrences=num_recurrences, num_backprop=num_backprop)
        return sum(sizes)

    assert kept(30, 3) == kept(3, 3)
    one_more = kept(4, 4) - kept(3, 3)
    model.activation_checkpointing_enable()
    assert kept(4, 4) - kept(3, 3) < one_more / 10


def small_model() -> RecurrentDepthForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_heads": 4, "intermediate_size": 64, "vocab_size": 40, "block_size": 64}
    layers = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    return RecurrentDepthForCausalLM(RecurrentDepthConfig(**sizes, **layers, mean_recurrence=4, mean_backprop_depth=2))


def train(model, folder, num_steps: int, **arguments) -> list[float]:
    """Losses of a Trainer run on one sentence."""
    settings = {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": []}
    settings |= {"per_device_train_batch_size": 2, "max_steps": num_steps, "save_strategy": "no", "use_cpu": True}
    sentence = [3, 17, 5, 29, 11, 2, 38, 7, 23, 13, 31, 19]
    rows = [{"input_ids": sentence, "labels": sentence}] * 2
    trainer = Trainer(
        model, TrainingArguments(str(folder), disable_tqdm=True, **settings | arguments), train_dataset=rows
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_small_model_learns_a_sentence_in_the_trainer(tmp_path, is_checkpointed):
    model = small_model()
    losses = train(model, tmp_path, 60, gradient_checkpointing=is_checkpointed)

    assert losses[0] > 3 and losses[-1] < 0.1
    model.eval()
    for num_recurrences in (2, 4, 8):  # it was trained at any depth
        text = model.generate(
            torch.tensor([[3, 17]]), max_new_tokens=10, init_scale=0.0, num_recurrences=num_recurrences
        )
        assert text[0].tolist() == [3, 17, 5, 29, 11, 2, 38, 7, 23, 13, 31, 19]
    exact = model.generate(torch.tensor([[3, 17]]), max_new_tokens=10, init_scale=0.0, policy="exact")
    assert exact.tolist() == text.tolist()


def test_lora_on_core_and_adapter_trains_merges_and_comes_back(tmp_path):
    base = small_model()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LORA_CORE_AND_ADAPTER, init_lora_weights=True))
    targets = {name.split(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A" in name}
    names = {target.removeprefix("base_model.model.transformer.") for target in targets}
    assert names == {"adapter"} | {f"core_block.0.{part}" for part in ("attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj")}

    losses = train(model, tmp_path, 30, learning_rate=2e-2, gradient_checkpointing=True)
    model.save_pretrained(tmp_path / "adapter")

    assert losses[-1] < losses[0] - 0.5
    model.eval()
    with torch.no_grad():
        trained = model(IDS, init_scale=0.0).logits
        again = PeftModel.from_pretrained(small_model(), tmp_path / "adapter").eval()
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS, init_scale=0.0).logits, trained, atol=1e-4, rtol=1e-4)
    text = model.generate(input_ids=IDS, max_new_tokens=6, init_scale=0.0)
    assert text.tolist() == model.generate(input_ids=IDS, max_new_tokens=6, init_scale=0.0, policy="exact").tolist()


@pytest.mark.parametrize("targets", [LORA_CORE_AND_ADAPTER, "all-linear"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_finds_the_core_of_every_form_and_decodes(kind, targets):
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=targets))
    if targets == LORA_CORE_AND_ADAPTER:
        num_targets = 3 * 7 if kind == "ouro" else 2 * 4 + 1
        assert sum(".lora_A" in name for name, _ in model.named_parameters()) == num_targets
    model(IDS % 37, labels=IDS % 37).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".core_block" in name and "lora_B" in name)
    ids = model.eval().generate(input_ids=torch.tensor([[3, 7, 11]]), max_new_tokens=4, init_scale=0.0)
    assert ids.shape == (1, 7)


@pytest.mark.parametrize("name", ["num_recurrences", "num_backprop"])
def test_depths_below_one_are_refused(name):
    with pytest.raises(ValueError, match=name):
        random_model()(IDS, **{name: 0})
