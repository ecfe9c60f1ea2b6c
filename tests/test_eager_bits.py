"""Packed weights of bfloat16 on a CPU with AVX2: drafts and compiled steps leave every logit as plain decoding does."""

import pytest
import torch
import transformers
from torch import nn
from transformers import CompileConfig, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiny_stock import FAMILIES
from tiny_tidar import SHAPE, random_prompts
from wavedraft.generation import draft_forward, packed_weights
from wavedraft.generation.bfloat16_kernel import bfloat16_kernel
from wavedraft.generation.cache_name import CACHE
from wavedraft.generation.cpp_operators import options_of_compiler
from wavedraft.generation.eager_bits import mean_of_channels, options_of_eager_bits
from wavedraft.modeling_tidar import TiDARForCausalLM

pytestmark = [
    pytest.mark.skipif(isinstance(bfloat16_kernel(), str), reason=str(bfloat16_kernel())),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() != "AVX2", reason="PyTorch sums up in another order on this CPU"
    ),
]
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", dynamic=False)}


@pytest.mark.parametrize("num_channels", [8, 31, 32, 33, 100, 576, 577, 1024, 2304, 4096, 5000, 16384])
def test_means_are_pytorchs_to_the_bit(num_channels):
    torch.manual_seed(0)
    for _ in range(50):
        x = torch.randn(2, 3, num_channels) ** 2
        alone = torch.stack([row.mean(-1, keepdim=True) for row in x.view(6, 1, -1)]).view(2, 3, 1)
        assert torch.equal(mean_of_channels()(x), alone)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_compiled_norm_has_the_bits_of_the_norm_only_with_these_means(is_transposed):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(576).bfloat16()
    nn.init.normal_(norm.weight)

    def normed(x):
        return norm(x.transpose(0, 1)) * 2 if is_transposed else norm(x) * 2

    def num_differing(options):
        compiled = torch.compile(normed, dynamic=False, options=options)
        return sum(int((compiled(x) != normed(x)).sum()) for x in inputs)

    with torch.no_grad():
        inputs = list((3 * torch.randn(500, 2, 4, 576)).bfloat16())
        assert num_differing(options_of_compiler(mean_of_channels()) | options_of_eager_bits()) == 0
        assert num_differing({"emulate_precision_casts": True}) > 0
        assert num_differing(None) > 0


def half(family, **changes):
    """A model whose every token has a twin that its head can hardly tell from it."""
    config_class, extra = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 1536, "head_dim": 16}
    config = getattr(transformers, config_class)(**{**SHAPE, **extra, **sizes, **changes})
    config.tidar_config = {"draft_length": 4, "mask_token_id": config.vocab_size, "mask_embedding_id": 3}
    torch.manual_seed(0)
    model = TiDARForCausalLM.from_config(config).eval()
    with torch.no_grad():
        weight = model.lm_head.weight
        twins = weight[: len(weight) // 2 * 2].view(-1, 2, weight.shape[1])
        twins[:, 1] = twins[:, 0] * (1 + 0.01 * torch.randn_like(twins[:, 0]))
    return model.to(torch.bfloat16)


def decoded(model, seed, batch_size=1, **keywords):
    about = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(random_prompts(batch_size, 11 + seed, seed), **about, **keywords)


@pytest.mark.parametrize(
    "family, ways",
    [
        *((family, {}) for family in ("llama", "qwen2", "qwen3", "gemma3", "glm4", "cohere", "olmo2")),
        *((family, COMPILED) for family in ("llama", "qwen3", "gemma3", "glm4")),
    ],
)
def test_drafts_leave_every_logit_as_plain_decoding_has_it(family, ways, monkeypatch):
    monkeypatch.setattr(packed_weights, "has_onednn_products", lambda dtype: dtype == torch.float32)
    model = half(family, **({"sliding_window": 64} if family == "gemma3" else {}))
    num_equal_by_sdpa, num_forwards, num_tokens = 0, 0, 0
    for seed in range(3):
        plain = decoded(model, seed, draft_length=0)
        for branches in (1, "auto"):
            output = decoded(model, seed, num_branches=branches, packed_weights=True, **ways)
            assert output.sequences.tolist() == plain.sequences.tolist()
            assert all(map(torch.equal, output.logits, plain.logits))
            num_forwards, num_tokens = num_forwards + output.num_forwards, num_tokens + len(output.logits)
        by_sdpa = decoded(model, seed, num_branches=1)
        num_equal_by_sdpa += all(map(torch.equal, by_sdpa.logits, plain.logits))
    assert num_equal_by_sdpa < 3, "wide forwards round as narrow ones by themselves, so nothing was tested"
    assert num_forwards < num_tokens, "nothing drafted was accepted"


@pytest.mark.parametrize("ways", [{}, COMPILED], ids=["uncompiled", "compiled"])
def test_so_it_is_in_a_batch_of_prompts_of_one_length(ways, monkeypatch):
    monkeypatch.setattr(packed_weights, "has_onednn_products", lambda dtype: dtype == torch.float32)
    model = half("llama")
    for seed in range(3):
        plain = decoded(model, seed, 3, draft_length=0)
        output = decoded(model, seed, 3, num_branches=1, packed_weights=True, **ways)
        assert all(map(torch.equal, output.logits, plain.logits))


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_so_it_is_in_a_step_with_and_without_masks(num_blocks, monkeypatch):
    monkeypatch.setattr(packed_weights, "has_onednn_products", lambda dtype: dtype == torch.float32)
    model, cache = half("llama"), DynamicCache()
    attend, num_calls = draft_forward.attend_in_bfloat16, []
    monkeypatch.setattr(draft_forward, "attend_in_bfloat16", lambda *a, **k: num_calls.append(1) or attend(*a, **k))
    prompt_ids, draft_ids = random_prompts(1, 21), random_prompts(1, 4, seed=5)
    with torch.no_grad():
        model(prompt_ids, **{CACHE: cache})
        alone = [model(draft_ids[:, i : i + 1], **{CACHE: cache}).logits[0, 0] for i in range(4)]
        with packed_weights.reading_packed(model, True) as packed:
            forward = draft_forward.DraftForward(model, 4, mask_embedding_id=3, batch_size=1, packed_weights=packed)
            forward.prefill(prompt_ids, None, has_draft=False)
            branch_lengths = torch.ones(1, num_blocks, dtype=torch.long)
            assert torch.equal(forward.verify_and_draft(draft_ids, branch_lengths)[0], torch.stack(alone))
    assert len(num_calls) == model.config.num_hidden_layers  # so small a model may have the same bits by sdpa


def test_so_it_is_where_torch_calls_operators_through_python(monkeypatch):
    monkeypatch.setattr(packed_weights, "has_onednn_products", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(draft_forward, "options_of_compiler", lambda *operators: {})
    model = half("llama")
    plain = decoded(model, 0, draft_length=0)
    output = decoded(model, 0, num_branches=1, packed_weights=True, **COMPILED)
    assert all(map(torch.equal, output.logits, plain.logits))
