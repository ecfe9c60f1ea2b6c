"""The other models of the family, compared with plain loops written from their definitions."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers_family import (
    CONFIGS,
    FORMS,
    random_weights,
    raven_shapes,
    tiny_model,
    write_folder,
)
from helpers_plain_recurrent import ouro_logits, raven_logits
from helpers_sampling import ERROR_RATE, chance_of_worse
from wavedraft.modeling_recurrent import OuroConfig, OuroForCausalLM, RecurrentDepthConfig, RecurrentDepthForCausalLM

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def plain_logits(kind: str, ids: torch.Tensor, num_recurrences: int, seed: int = 0) -> torch.Tensor:
    """[T, V], from the definition."""
    if kind == "ouro":
        return ouro_logits(random_weights(kind, seed), CONFIGS[kind], ids, num_recurrences)
    return raven_logits(random_weights(kind, seed), CONFIGS[kind], FORMS[kind], ids, num_recurrences)


def plain_text(kind: str, prompt: list[int], num_new: int, num_recurrences: int, seed: int = 0) -> list[int]:
    """Greedy text at full depth, the whole prefix computed anew for each token."""
    ids = list(prompt)
    for _ in range(num_new):
        ids.append(int(plain_logits(kind, torch.tensor(ids), num_recurrences, seed)[-1].argmax()))
    return ids[len(prompt) :]


def continuation(model, prompt: list[int], num_new: int, **options) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=num_new, init_scale=0.0, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_recurrences", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_definition(kind, num_recurrences):
    ids = torch.arange(3, 33)
    with torch.no_grad():
        logits = tiny_model(kind)(ids[None], num_recurrences=num_recurrences, init_scale=0.0).logits[0]

    torch.testing.assert_close(logits, plain_logits(kind, ids, num_recurrences), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", ["llama", "olmo", "ouro"])
@torch.compiler.set_stance("force_eager")  # transformers compiles flex_attention, and the kernel is torch's own
def test_a_left_padded_row_has_the_logits_of_the_row_alone(kind, attention):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    padded = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 11, 12, 13]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])

    with torch.no_grad():
        logits = model(padded, attention_mask=mask, init_scale=0.0, num_recurrences=2).logits

    torch.testing.assert_close(logits[0], plain_logits(kind, padded[0], 2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 3:], plain_logits(kind, padded[1, 3:], 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loader", [RecurrentDepthForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_as_released_loads_unmodified_and_comes_back_the_same(tmp_path, kind, loader):
    (tmp_path / "saved").mkdir()
    folder = write_folder(tmp_path, kind)

    model, report = loader.from_pretrained(folder, output_loading_info=True)
    model.save_pretrained(tmp_path / "saved")
    again = loader.from_pretrained(tmp_path / "saved")

    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert isinstance(model, OuroForCausalLM if kind == "ouro" else RecurrentDepthForCausalLM)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in random_weights(kind).items()
    }
    expected = plain_logits(kind, torch.tensor(PROMPT), 4)
    for loaded in (model, again):
        logits = loaded(torch.tensor([PROMPT]), num_recurrences=4, init_scale=0.0).logits[0]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


LLAMA_1B = {
    **CONFIGS["llama"],
    "head_dim": 64,
    "intermediate_size": 8192,
    "n_embd": 2048,
    "n_heads": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "n_layers": 14,
    "n_layers_in_prelude": 4,
    "n_layers_in_recurrent_block": 6,
    "n_layers_in_coda": 4,
    "vocab_size": 128256,
    "padded_vocab_size": 128256,
    "block_form": "pre-norm",
}


def test_the_full_size_models_have_the_released_numbers_of_parameters():
    with torch.device("meta"):
        llama = RecurrentDepthForCausalLM(RecurrentDepthConfig(**LLAMA_1B))
        ouro = OuroForCausalLM(OuroConfig())

    assert sum(math.prod(p.shape) for p in llama.parameters()) == 1_385_228_288  # Recurrent-Llama-3.2-...-32
    assert sum(math.prod(p.shape) for p in ouro.parameters()) == 1_434_652_673  # Ouro-1.4B
    assert {name: tuple(p.shape) for name, p in llama.named_parameters()} == raven_shapes(LLAMA_1B, False)


def test_a_head_of_its_own_stays_untied_whatever_the_config_inherited(tmp_path):
    folder = write_folder(tmp_path, "llama")
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"tie_word_embeddings": True}))

    model = RecurrentDepthForCausalLM.from_pretrained(folder)

    assert torch.equal(model.lm_head.weight, random_weights("llama")["lm_head.weight"])
    assert torch.equal(model.transformer["wte"].weight, random_weights("llama")["transformer.wte.weight"])


def test_rotary_angles_stay_precise_in_bf16():
    model = tiny_model("llama")
    precise = model.rotary_emb.inverse_frequencies.clone()
    assert torch.equal(model.to(torch.bfloat16).rotary_emb.inverse_frequencies, precise)


@pytest.mark.parametrize("draft_recurrences", [(1,), (3,), (1, 2)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_exact_wavefront_writes_the_text_of_full_depth_decoding(kind, draft_recurrences):
    for seed in range(2):
        model, depth = tiny_model(kind, seed), 4
        expected = plain_text(kind, PROMPT, 16, depth, seed)
        options = {"policy": "exact", "num_recurrences": depth, "draft_recurrences": draft_recurrences}
        assert continuation(model, PROMPT, 16, num_recurrences=depth) == expected
        assert continuation(model, PROMPT, 16, **options) == expected


def true_probabilities(kind: str, num_new: int) -> dict[tuple, float]:
    """Probability of each text drawn from the three likeliest tokens at temperature 1.3, by plain loops."""
    probabilities = {(): 1.0}
    for _ in range(num_new):
        longer = {}
        for text, prob in probabilities.items():
            scores = plain_logits(kind, torch.tensor([*PROMPT, *text]), 4)[-1].double() / 1.3
            likeliest = scores.topk(3)
            for token, share in zip(likeliest.indices.tolist(), likeliest.values.softmax(-1).tolist(), strict=True):
                longer[(*text, token)] = prob * share
        probabilities = longer
    return probabilities


@pytest.mark.parametrize("kind", ["llama", "ouro"])
def test_the_exact_wavefront_samples_texts_with_their_true_probabilities(kind):
    model, generator, counts = tiny_model(kind), torch.Generator().manual_seed(1), Counter()
    options = {"policy": "exact", "num_recurrences": 4, "draft_recurrences": (1, 2), "generator": generator}
    rows = torch.tensor([PROMPT]).expand(1000, -1)
    for _ in range(4):
        texts = model.generate(
            rows, max_new_tokens=3, do_sample=True, temperature=1.3, top_k=3, top_p=1.0, init_scale=0.0, **options
        )
        counts.update(tuple(text) for text in texts[:, len(PROMPT) :].tolist())

    assert chance_of_worse(counts, true_probabilities(kind, 3)) > ERROR_RATE


@pytest.mark.parametrize("policy", ["adaptive", "self-speculative"])
@pytest.mark.parametrize("kind", ["llama", "ouro"])
def test_the_other_policies_serve_them_too(kind, policy):
    model = tiny_model(kind)
    options = {"exit_threshold": 0.0} if policy == "adaptive" else {"draft_recurrences": 1}
    text = continuation(model, PROMPT, 12, policy=policy, num_recurrences=4, **options)
    assert len(text) == 12
    if policy == "self-speculative":
        assert text == plain_text(kind, PROMPT, 12, 4)


@pytest.mark.parametrize("kind", FORMS)
def test_diffusion_forcing_one_position_at_a_time_is_plain_decoding(kind):
    options = {"policy": "diffusion-forcing", "inner_recurrence": 4, "num_recurrences": 4, "freeze_criterion": "fixed"}
    text = continuation(tiny_model(kind), PROMPT, 12, max_wavefront=1, kv_cache="every-recurrence", **options)
    assert text == plain_text(kind, PROMPT, 12, 4)


@pytest.mark.parametrize("kind", FORMS)
def test_diffusion_forcing_agrees_with_plain_decoding_where_states_settle(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        model.transformer["adapter"].weight[:, :24] *= 0.05  # the core forgets its state, so that every start settles
    expected = continuation(model, PROMPT, 24, num_recurrences=16)

    ids = torch.tensor([PROMPT])
    options = {"policy": "diffusion-forcing", "inner_recurrence": 2, "exit_threshold": 1e-4, "num_recurrences": 16}
    output = model.generate(ids, max_new_tokens=24, init_scale=0.0, return_dict_in_generate=True, **options)

    assert output.sequences[0, len(PROMPT) :].tolist() == expected
    assert output.num_core_passes < 16 * 23  # what plain decoding needs after its prefill


def test_diffusion_forcing_is_refused_where_no_input_is_injected():
    with pytest.raises(ValueError, match="reinjects_input"):
        continuation(tiny_model("ouro"), PROMPT, 4, policy="diffusion-forcing")


@pytest.mark.parametrize("kind", ["llama", "ouro"])
def test_a_row_of_a_ragged_batch_is_the_row_alone(kind):
    model = tiny_model(kind)
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 12, 13]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])

    output = model.generate(ids, attention_mask=mask, max_new_tokens=10, init_scale=0.0, policy="exact")

    depth = model.config.mean_recurrence
    assert output[0, 5:].tolist() == plain_text(kind, [5, 6, 7, 8, 9], 10, depth)
    assert output[1, 5:].tolist() == plain_text(kind, [12, 13], 10, depth)


def test_a_model_that_cannot_be_served_is_refused_by_name_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hrm_text"}))
    with pytest.raises(ValueError, match="'hrm_text': it alternates two stacks on a fixed schedule"):
        RecurrentDepthForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        RecurrentDepthForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RecurrentDepthForCausalLM(RecurrentDepthConfig(**CONFIGS["llama"])), "block_form"),
        (lambda: RecurrentDepthConfig(**CONFIGS["llama"], block_form="parallel"), "block_form"),
        (
            lambda: RecurrentDepthForCausalLM(
                RecurrentDepthConfig(**CONFIGS["llama"] | {"qk_bias": True}, block_form="pre-norm")
            ),
            "qk_bias",
        ),
        (lambda: OuroConfig(**CONFIGS["ouro"] | {"layer_types": ["sliding_attention"] * 3}), "sliding_attention"),
        (lambda: OuroConfig(**CONFIGS["ouro"] | {"hidden_act": "gelu"}), "hidden_act"),
    ],
)
def test_what_the_released_models_are_not_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
