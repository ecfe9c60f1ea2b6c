"""Steps that are captured once and then replayed without Python, like a CUDA graph."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, GPT2Config

from helpers_restless_plans import restless_plans
from helpers_step_graph import Recording
from helpers_tidar import gated, ragged, random_prompts, tiny_tidar, with_random_head
from wavedraft import TiDARForCausalLM
from wavedraft.generation.drafting.draft_step import PLAIN
from wavedraft.generation.drafting.step_runner import StepRunner
from wavedraft.generation.execution.compiled_layers import is_captured, reason_not_to_record
from wavedraft.generation.step_graph import (
    StepGraphs,
    what_a_step_reads,
)

DECODER = sys.modules["wavedraft.generation.drafting.decode_tidar"]  # the package names its function so
COMPILED_LAYERS = sys.modules["wavedraft.generation.execution.compiled_layers"]
COMPILED = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(backend="eager", dynamic=False),  # under `Kernels` nothing is compiled
}


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(DECODER, "is_captured", lambda model, config: config is not None)
    monkeypatch.setattr(StepGraphs, "record", Recording)
    Recording.num_recorded = Recording.num_replays = 0
    torch._dynamo.reset()
    return Recording


@pytest.mark.parametrize("num_branches", ["all", 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_recorded_steps_write_the_same_text(recorded, family, num_branches):
    model = tiny_tidar(family, draft_length=4)
    keywords = ragged() | {"max_new_tokens": 24, "num_branches": num_branches, "eos_token_id": [25, 36, 44]}
    for how in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        expected = model.generate(**keywords, **how)
        for _ in range(2):
            assert model.generate(**keywords, **how, **COMPILED).tolist() == expected.tolist()
    # Greedily from draft to draft; sampled, the forward alone.
    assert recorded.num_recorded == 2 and recorded.num_replays > 12


def test_a_recorded_step_verifies_copies(recorded):
    model, prompt = tiny_tidar("llama", draft_length=4), random_prompts(1, 7)
    keywords = {"max_new_tokens": 40, "num_branches": 1, "return_dict_in_generate": True}
    for how in ({"do_sample": False}, {"do_sample": True, "seed": 3, "temperature": 0.02}):
        without, expected = (model.generate(prompt, **keywords, **how, draft_copies=on) for on in (False, True))
        assert expected.accepted_lengths.tolist() != without.accepted_lengths.tolist()
        found = model.generate(prompt, **keywords, **how, **COMPILED, draft_copies=True)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist()
    assert recorded.num_replays


@pytest.mark.parametrize("num_branches", ["all", 2, "auto"])
def test_a_recorded_step_writes_the_draft_a_head_would_write(recorded, num_branches, monkeypatch):
    calls = []
    run_step = StepRunner.__call__

    def counted(run, plan, state):
        num_tokens = state.draft_ids.shape[1]
        calls.append(num_tokens + plan.num_blocks(num_tokens) * plan.draft_length)
        return run_step(run, plan, state)

    monkeypatch.setattr(StepRunner, "__call__", counted)
    model = with_random_head(tiny_tidar("qwen3", draft_length=4), size=0.3)
    keywords = ragged() | {"max_new_tokens": 24, "eos_token_id": [25, 36, 44], "do_sample": False}
    keywords |= {"num_branches": num_branches, "return_dict_in_generate": True}
    expected = model.generate(**keywords)
    for _ in range(3):
        calls.clear()
        found = model.generate(**keywords, **COMPILED)
        assert found.sequences.tolist() == expected.sequences.tolist()
        if num_branches != "auto":  # which goes by the clock
            assert 1 <= found.num_prefill_forwards <= 2  # the prompt, and last tokens of rows that ended before others
            assert calls == [4 * (1 + (4 if num_branches == "all" else num_branches))] * found.num_forwards
            assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist()
            assert found.num_forwards == expected.num_forwards
    without = model.generate(**keywords, **COMPILED, draft_head=False)  # another step, of the same model
    assert without.sequences.tolist() == expected.sequences.tolist()
    if num_branches != "auto":
        assert without.accepted_lengths.tolist() != expected.accepted_lengths.tolist()
        assert recorded.num_recorded == 2


@pytest.mark.parametrize(
    "wish",
    [{"repetition_penalty": 1.3}, {"output_scores": True}, {"output_logits": True, "do_sample": True, "seed": 1}],
)
def test_where_more_than_the_logits_is_asked_for_the_forward_alone_is_captured(recorded, wish):
    model = tiny_tidar("qwen3", draft_length=4)
    keywords = ragged() | {"max_new_tokens": 16, "eos_token_id": [25], "return_dict_in_generate": True} | wish
    expected = model.generate(**keywords)
    for _ in range(2):
        found = model.generate(**keywords, **COMPILED)
        assert found.sequences.tolist() == expected.sequences.tolist()
        for name in ("scores", "logits"):
            for ours, theirs in zip(getattr(found, name) or (), getattr(expected, name) or (), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert recorded.num_recorded == 1


def test_a_recorded_step_stops_where_the_position_table_ends(recorded):
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    config.tidar_config = {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 3}
    torch.manual_seed(0)
    model = TiDARForCausalLM.from_config(config).eval()
    prompt, keywords = random_prompts(1, 6), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, max_new_tokens=26, **keywords)
    assert model.generate(prompt, max_new_tokens=26, **keywords, **COMPILED).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="at most 32 tokens"):
        model.generate(prompt, max_new_tokens=40, **keywords, **COMPILED)


def test_a_later_text_begins_with_the_steps_of_an_earlier_one(recorded):
    model = tiny_tidar(draft_length=4)
    for seed, length in ((1, 6), (2, 9)):
        prompt = random_prompts(1, length, seed=seed)
        expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
        output = model.generate(prompt, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, **COMPILED)
        assert output.sequences.tolist() == expected.tolist()
    assert recorded.num_recorded == 1


def test_a_cache_of_more_slots_than_a_text_needs_serves_it_too(recorded):
    model = tiny_tidar(draft_length=4, max_position_embeddings=1024)
    seen = []
    for length in (6, 400, 6, 300, 9):
        prompt = random_prompts(1, length)
        expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
        assert model.generate(prompt, max_new_tokens=20, do_sample=False, **COMPILED).tolist() == expected.tolist()
        seen.append(recorded.num_recorded)
    assert seen == [1, 2, 2, 2, 2]


def test_plans_that_change_are_recorded_once_each(recorded):
    model = tiny_tidar("qwen3", draft_length=4)
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False}
    expected, plans = model.generate(**keywords), set()
    for _ in range(3):
        output = model.generate(**keywords, num_branches="auto", return_dict_in_generate=True, **COMPILED)
        assert output.sequences.tolist() == expected.tolist()
        plans |= output.plans.keys()
    assert {PLAIN, (2, 1)} <= plans
    assert recorded.num_recorded == len(plans)


def test_plans_that_change_all_the_time_leave_the_text_alone(recorded, monkeypatch):
    """A draft that a step has written may be cut for the next, or filled up."""
    model = with_random_head(tiny_tidar("gemma2", draft_length=4), size=0.3)
    restless_plans(monkeypatch)
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [25, 36, 44]}
    expected = model.generate(**keywords)
    for _ in range(4):
        assert model.generate(**keywords, num_branches="auto", **COMPILED).tolist() == expected.tolist()
    assert recorded.num_recorded == 4


def test_steps_are_recorded_anew_where_the_model_has_changed(recorded):
    model = gated(tiny_tidar(draft_length=4)).base_model.model
    prompt = random_prompts(1, 6)

    def both():
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        found = model.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **COMPILED)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.num_forwards == expected.num_forwards
        return recorded.num_recorded

    assert [both(), both()] == [1, 1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    assert [both(), both()] == [2, 2]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    assert [both(), both()] == [3, 3]


def test_steps_are_recorded_anew_in_another_mode(recorded):
    """Memory made in inference mode may not be written outside it, and autocast chooses the type of every product."""
    model = tiny_tidar(draft_length=4)
    prompt = random_prompts(1, 6)
    keywords = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **keywords)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(model.generate(prompt, **keywords, **COMPILED), expected)
    assert recorded.num_recorded == 3
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.generate(prompt, **keywords)
        assert torch.equal(model.generate(prompt, **keywords, **COMPILED), rounded)
    assert recorded.num_recorded == 4
    model.generate(prompt, **keywords, mask_embedding_id=5)
    assert torch.equal(model.generate(prompt, **keywords, **COMPILED, mask_embedding_id=5), expected)
    assert recorded.num_recorded == 5


def test_what_a_step_reads_sees_what_a_forward_hangs_on():
    model = gated(tiny_tidar(draft_length=4)).base_model.model
    before = what_a_step_reads(model)
    assert what_a_step_reads(model) == before
    attention = model.model.layers[0].self_attn
    layer = attention.q_proj
    changes = [
        lambda: setattr(attention, "scaling", attention.scaling * 2),
        lambda: layer.scaling.update(default=7.0),
        lambda: setattr(layer, "_disable_adapters", True),
        lambda: layer.lora_A["default"].weight.data.mul_(2),
        lambda: layer.lora_A["default"].weight.detach().mul_(2),
        lambda: setattr(model.model, "norm", torch.nn.Identity()),
        lambda: setattr(model.config, "_attn_implementation", "eager"),
        lambda: model.train(),
        lambda: model.model.norm.register_forward_hook(lambda *args: None),
    ]
    seen = []
    for change in changes:
        change()
        seen.append(what_a_step_reads(model) != before)
        before = what_a_step_reads(model)
    assert seen == [True, True, True, False, True, True, True, True, True]  # `.data` hides from everyone


@pytest.mark.parametrize(
    ("family", "changes", "can_be"),
    [
        ("llama", {}, True),
        ("gemma2", {}, True),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
    ],
)
def test_what_asks_for_values_on_the_way_is_not_recorded(family, changes, can_be):
    model = tiny_tidar(family, draft_length=4, **changes)
    assert (reason_not_to_record(model) is None) is can_be
    if can_be:
        assert not is_captured(model, CompileConfig())  # on a CPU
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: None)
        assert "model.layers.1.mlp has forward hooks" in reason_not_to_record(model)


def test_what_is_not_recorded_on_a_gpu_is_told_with_the_reason(monkeypatch):
    told, on_gpu = [], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(COMPILED_LAYERS.logger, "warning_once", told.append)
    for reason in ("its experts run one by one", None):
        monkeypatch.setattr(COMPILED_LAYERS, "reason_not_to_record", lambda model, reason=reason: reason)
        assert is_captured(on_gpu, CompileConfig()) is (reason is None)
        assert not is_captured(on_gpu, CompileConfig(mode="default"))
    assert len(told) == 1 and told[0].endswith("its experts run one by one.")


def test_a_step_that_cannot_be_recorded_is_told_with_what_to_do(recorded, monkeypatch):
    def refuse(step, *args):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StepGraphs, "record", staticmethod(refuse))
    model = tiny_tidar(draft_length=4)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\). Pass `compile_config="):
        model.generate(random_prompts(1, 6), max_new_tokens=12, do_sample=False, **COMPILED)
    expected = model.generate(random_prompts(1, 6), max_new_tokens=12, do_sample=False)
    found = model.generate(
        random_prompts(1, 6), max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert found.tolist() == expected.tolist()


def test_a_step_runs_on_inputs_of_one_layout_before_it_is_recorded_and_while_it_is(recorded):
    graphs, seen = StepGraphs(None), []

    def step(given):
        seen.append(given.stride())
        return (given + 1,)

    row = torch.arange(4)
    for given in (row.expand(3, -1), row.expand(3, -1), row.repeat(3, 1), row.repeat(2, 3).t()[:3, :].repeat(1, 2)):
        assert torch.equal(graphs.run("shape", step, (given,), None)[0], given + 1)
    assert seen == [(4, 1), (4, 1)]
