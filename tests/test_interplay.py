"""Our models in other libraries: pipelines, offloading, training loops, and a process that only imports wavedraft."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, pipeline
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from helpers_recurrent import random_model
from helpers_tidar import VOCAB_SIZE, random_prompts, tiny_tidar
from helpers_tokenizers import LETTERS, letter_tokenizer
from wavedraft import RecurrentDepthForCausalLM, TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.execution.model_form import ModelForm
from wavedraft.generation.execution.packed_linear import has_packed_products
from wavedraft.generation.stock_model import CACHE, devices_of
from wavedraft.modeling_recurrent import RecurrentCache, generation_recurrent
from wavedraft.modeling_tidar import generation_tidar

GREEDY = {"max_new_tokens": 12, "do_sample": False}
TEXTS = ["abc", "hijklm", "ba"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TiDAR checkpoint with a tokenizer, whose every letter is a token."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tidar("qwen3").save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def recurrent():
    return random_model(0)


def completions(model, texts, **options):
    """What the text-generation pipeline writes after each text."""
    generator = pipeline("text-generation", model, tokenizer=letter_tokenizer())
    return [one["generated_text"] for [one] in generator(texts, return_full_text=False, **{**GREEDY, **options})]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_writes_the_stock_pipelines_text(folder, stock, batch_size):
    expected = completions(stock, TEXTS, batch_size=batch_size)
    model = TiDARForCausalLM.from_pretrained(folder)
    assert completions(model, TEXTS, batch_size=batch_size) == expected
    assert completions(model, TEXTS, batch_size=batch_size, draft_length=2) == expected
    assert completions(stock, TEXTS, batch_size=batch_size, custom_generate=tidar) == expected


@pytest.mark.parametrize("way", ["ours", "custom_generate", "with and without drafts"])
def test_threads_that_share_a_model_get_their_texts(folder, way):
    model = TiDARForCausalLM.from_pretrained(folder).eval()
    options = [{}, {"draft_length": 2}]
    if way == "custom_generate":
        model, options = AutoModelForCausalLM.from_pretrained(folder).eval(), [{"custom_generate": tidar}] * 2
    elif way == "with and without drafts":
        options = [{}, {"draft_length": 0}]
    prompts = [random_prompts(1, 5, seed=1), random_prompts(3, 4, seed=2)]
    calls = [partial(model.generate, ids, **GREEDY, **own) for ids, own in zip(prompts, options, strict=True)]
    expected = [call().tolist() for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(call) for call in calls * 3]
            assert [one.result().tolist() for one in found] == expected * 3
    finally:
        sys.setswitchinterval(interval)


def test_threads_do_not_change_the_weights_that_another_reads(folder, monkeypatch):
    if not has_packed_products(torch.float32):
        pytest.skip("no oneDNN products of torch.float32")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    applied, opened, most_opened = ModelForm.applied, [], []

    @contextmanager
    def watched(form):
        opened.append(True)
        most_opened.append(len(opened))
        with applied(form):
            yield
        opened.pop()

    monkeypatch.setattr(ModelForm, "applied", watched)
    keywords = {"custom_generate": tidar, "packed_weights": True, **GREEDY}
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(model.generate, random_prompts(1, 5, seed=seed), **keywords) for seed in range(4)]
        assert all(call.result().shape[1] > 5 for call in calls)
    assert most_opened == [1] * 4
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_pipeline_loads_the_code_that_came_with_the_checkpoint(folder, stock):
    generator = pipeline("text-generation", str(folder), trust_remote_code=True)
    assert type(generator.model).__module__.startswith("transformers_modules")
    texts = [one["generated_text"] for [one] in generator(TEXTS, return_full_text=False, **GREEDY)]
    assert texts == completions(stock, TEXTS)


def test_a_pipeline_stops_at_a_stop_sequence(folder, stock):
    whole = completions(stock, TEXTS[:1])[0]
    stop = whole[4:6]
    assert completions(TiDARForCausalLM.from_pretrained(folder), TEXTS[:1], stop_sequence=stop) == [
        whole[: whole.index(stop) + 2]
    ]


@pytest.mark.parametrize("policy", ["exact", "self-speculative"])
def test_a_pipeline_runs_a_recurrent_model(recurrent, policy):
    assert recurrent.config.vocab_size <= len(LETTERS)
    expected = completions(recurrent, TEXTS, init_scale=0.0)
    assert completions(recurrent, TEXTS, init_scale=0.0, policy=policy, batch_size=3) == expected


def test_weights_that_visit_the_device_layer_by_layer_draft_the_same(folder, stock):
    prompts = random_prompts(2, 6)
    expected = stock.generate(prompts, **GREEDY).tolist()
    for model, options in (
        (TiDARForCausalLM.from_pretrained(folder), {}),
        (AutoModelForCausalLM.from_pretrained(folder), {"custom_generate": tidar}),
    ):
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.device.type == "meta"
        assert model.generate(prompts, **GREEDY, **options).tolist() == expected


@pytest.mark.parametrize("policy", ["autoregressive", "exact", "diffusion-forcing"])
def test_a_recurrent_model_whose_weights_visit_the_device_decodes_the_same(recurrent, policy, tmp_path):
    prompts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    expected = recurrent.generate(prompts, policy=policy, **GREEDY).tolist()
    recurrent.save_pretrained(tmp_path)
    model = RecurrentDepthForCausalLM.from_pretrained(tmp_path).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert model.generate(prompts, policy=policy, **GREEDY).tolist() == expected


@pytest.fixture(scope="module")
def spread(recurrent, tmp_path_factory):
    """A recurrent model whose layers are on the CPU and on disk, in turn."""
    folder = tmp_path_factory.mktemp("spread")
    recurrent.save_pretrained(folder / "model")
    places = {"transformer.wte": "cpu", "transformer.adapter": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {"freqs_cis": "cpu"}
    for part in ("prelude", "core_block", "coda"):
        for layer in range(len(recurrent.transformer[part])):
            places[f"transformer.{part}.{layer}"] = "cpu" if layer % 2 else "disk"
    return RecurrentDepthForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload"
    ).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "exact"},
        {"policy": "self-speculative"},
        {"preset": "diffusion-forcing-r4"},
        {"cache_implementation": "static", "compile_config": CompileConfig()},
    ],
    ids=["plain", "exact", "self-speculative", "diffusion forcing", "static"],
)
def test_a_recurrent_model_spread_by_a_device_map_decodes_the_same(recurrent, spread, options, monkeypatch):
    said, prompts = [], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    monkeypatch.setattr(generation_recurrent.logger, "warning_once", said.append)
    text = spread.generate(prompts, **GREEDY, **options).tolist()
    assert len(said) == ("compile_config" in options)  # left aside
    options.pop("compile_config", None)
    assert text == recurrent.generate(prompts, **GREEDY, **options).tolist()


def test_a_static_cache_is_left_aside_over_several_devices(spread, monkeypatch):
    said, prompts = [], torch.tensor([[5, 6, 7, 8]])
    monkeypatch.setattr(generation_recurrent.logger, "warning_once", said.append)
    hook = spread.transformer["coda"][0]._hf_hook
    monkeypatch.setattr(generation_recurrent, "devices_of", lambda model: {torch.device("cpu"), torch.device("meta")})
    output = spread.generate(prompts, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    assert type(output[CACHE]) is RecurrentCache and "several devices" in said[0]
    monkeypatch.undo()
    assert devices_of(spread) == {torch.device("cpu")}
    monkeypatch.setattr(hook, "execution_device", "meta")
    assert devices_of(spread) == {torch.device("cpu"), torch.device("meta")}


def test_what_is_generated_in_inference_mode_leaves_a_model_that_can_train(folder):
    model = TiDARForCausalLM.from_pretrained(folder).train()
    model.lm_head.weight.requires_grad_(False)
    wants_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prompts = random_prompts(2, 6)
    texts = []
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            texts.append(model.generate(prompts, **GREEDY))
            assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert texts[0].tolist() == texts[1].tolist() == texts[2].tolist()
    assert model.training and all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wants_grad
    assert all(parameter.grad is None for parameter in model.parameters())

    model(prompts, labels=prompts).loss.backward()
    assert all((parameter.grad is not None) == wants_grad[name] for name, parameter in model.named_parameters())
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.generate(prompts, **GREEDY)
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(mine, before) for mine, before in zip(after, gradients, strict=True))


def test_random_numbers_are_drawn_only_where_the_global_generator_samples(folder):
    model = TiDARForCausalLM.from_pretrained(folder)
    prompts = random_prompts(2, 6)
    for options, is_drawn in (
        ({"do_sample": False}, False),
        ({"do_sample": True, "seed": 3}, False),
        ({"do_sample": True}, True),
    ):
        before = torch.get_rng_state()
        model.generate(prompts, max_new_tokens=8, **options)
        assert torch.equal(torch.get_rng_state(), before) != is_drawn


IMPORT = """
    import logging, os, warnings
    import accelerate, peft, torch, transformers, typer, rich.console, rich.table
    import transformers.generation, transformers.modeling_utils, transformers.models.llama.modeling_llama
    from transformers import AutoConfig, AutoModelForCausalLM, pipelines
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def state():
        names = [None, "transformers", "torch", "huggingface_hub", "accelerate", "peft"]
        return {
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "random": torch.get_rng_state().tolist(),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
            "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
            "precision": torch.get_float32_matmul_precision(),
            "attention": [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "math", "cudnn")],
            "warnings": list(map(str, warnings.filters)),
            "levels": [logging.getLogger(name).level for name in names],
            "handlers": [len(logging.getLogger(name).handlers) for name in names],
            "environment": dict(os.environ),
            "attention functions": sorted(transformers.AttentionInterface().valid_keys()),
            "masks": sorted(transformers.AttentionMaskInterface().valid_keys()),
            "pipelines": sorted(pipelines.PIPELINE_REGISTRY.get_supported_tasks()),
            "forward": transformers.LlamaForCausalLM.forward,
            "configs": set(CONFIG_MAPPING),
            "models": {config.__name__ for config in AutoModelForCausalLM._model_mapping._extra_content},
        }

    before = state()
    import wavedraft, wavedraft.cli
    after = state()
    assert after.pop("configs") - before.pop("configs") == {"huginn_raven", "ouro"}
    assert after.pop("models") - before.pop("models") == {"RecurrentDepthConfig", "OuroConfig"}
    assert after == before, [name for name in before if before[name] != after[name]]
"""


def test_importing_us_changes_nothing_but_the_two_registered_configs(tmp_path):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(IMPORT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stdout


def test_what_transformers_serve_loads_of_a_recurrent_folder_decodes_as_we_do(tmp_path):
    """It looks `architectures[0]` up in transformers."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager").ModelManager(
        device="cpu", trust_remote_code=True, model_timeout=-1
    )
    model = random_model(0, vocab_size=VOCAB_SIZE)
    model.generation_config.policy = "exact"
    model.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    served, tokenizer = manager.load_model_and_processor(manager.process_model_name(str(tmp_path)))
    assert manager.get_model_modality(served, tokenizer).value == "LLM"
    prompts = random_prompts(1, 5)
    found = served.generate(prompts, generation_config=served.generation_config, **GREEDY, return_dict_in_generate=True)
    assert found.sequences.tolist() == model.generate(prompts, **GREEDY, policy="autoregressive").tolist()
    assert found.num_core_passes < 11 * model.config.mean_recurrence, "the stored policy was not read"
    manager.shutdown()


def test_continuous_batching_is_plain_decoding_or_refused(monkeypatch):
    said, model, prompts = [], tiny_tidar(), random_prompts(2, 5)
    monkeypatch.setattr(generation_tidar.logger, "warning_once", said.append)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=VOCAB_SIZE, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # else they are as many as memory holds
    keywords = {"generation_config": config, "continuous_batching_config": pages, "warmup": False}
    found = model.generate_batch(prompts.tolist(), **keywords)
    expected = model.generate(prompts, max_new_tokens=6, do_sample=False)[:, 5:].tolist()
    assert [request.generated_tokens for request in found.values()] == expected
    assert "Decoding without drafts: continuous batching" in said[0]
    with pytest.raises(ValueError, match="must be left out for recurrent-depth models"):
        random_model().generate_batch([[5, 6, 7]], **keywords)
