"""All that `generate` may be given: drafting honours it, leaves it to plain decoding and says so, or refuses it.

Every field of transformers' generation config and every keyword of a stock forward stands in a table here. One that a
newer transformers adds fails a test until somebody has decided what drafting does with it.
"""

import inspect
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers_keywords import DRAFTED, FIELDS, NOT_OF_A_CALL, PLAIN_TEXT, REFUSED, SILENT
from helpers_stock import tiny_config
from helpers_tidar import VOCAB_SIZE, random_prompts, tiny_tidar
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.drafting.draft_step import PLAIN
from wavedraft.modeling_tidar import generation_tidar

# Fields that do not show in the ids of a text.
NOT_IN_THE_TEXT = {
    *("max_time", "use_cache", "cache_implementation", "max_cache_len", "renormalize_logits", "remove_invalid_values"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "forced_bos_token_id", "encoder_no_repeat_ngram_size"),  # of other prompts
    *("is_assistant", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
    *("compile_config", "disable_compile", "prefill_chunk_size", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping", "length_penalty", "num_beams"),
}

PROMPT = random_prompts(1, 10)
# Keyword of a stock forward: a value, and what drafting does with it.
KEYWORDS = {
    "input_ids": (None, SILENT),
    "attention_mask": (torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]), DRAFTED),
    "position_ids": (torch.arange(5, 15)[None] * 2, DRAFTED),
    "past_key_values": (None, DRAFTED),  # test_generate_caches.py
    "cache": (None, DRAFTED),
    "cache_params": (None, SILENT),
    "use_cache": (False, PLAIN_TEXT),
    "logits_to_keep": (3, DRAFTED),
    "inputs_embeds": (torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0)), PLAIN_TEXT),
    "labels": (PROMPT, PLAIN_TEXT),
    "token_type_ids": (PROMPT % 5, PLAIN_TEXT),
    "output_attentions": (True, PLAIN_TEXT),
    "output_hidden_states": (True, PLAIN_TEXT),
    "output_router_logits": (True, PLAIN_TEXT),
    "encoder_hidden_states": (torch.ones(1, 10, 32), REFUSED),
    "encoder_attention_mask": (torch.ones(1, 10), PLAIN_TEXT),
    "document_ids": (PROMPT, REFUSED),
    "objective": (None, SILENT),
    "return_dict": (None, SILENT),
}


def pair(family, tmp_path_factory):
    torch.manual_seed(0)
    config = tiny_config(family, **({} if family == "gpt2" else {"max_position_embeddings": 512}))
    config.tidar_config = {"draft_length": 4, "mask_token_id": VOCAB_SIZE, "mask_embedding_id": 3}
    model = TiDARForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "c_" in name:  # so that texts vary
                parameter *= 3
    model.generation_config.num_branches = "all"
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A drafting model and the stock model of the same weights."""
    return pair("qwen3", tmp_path_factory)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return pair("gpt2", tmp_path_factory)


@pytest.fixture
def said(monkeypatch):
    words = []
    monkeypatch.setattr(generation_tidar.logger, "warning_once", words.append)
    return words


def outcome(model, **keywords):
    """The ids, and whether they were drafted."""
    output = model.generate(PROMPT, **{**keywords, "return_dict_in_generate": True})
    return output.sequences.tolist(), getattr(output, "num_forwards", None) is not None


def check(models, said, keywords, expected, name):
    model, stock = models
    keywords = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **keywords}
    if expected == REFUSED:
        for of in (model, stock):
            with pytest.raises((ValueError, TypeError, ImportError, OSError)):
                of.generate(PROMPT, **keywords, **({} if of is model else {"custom_generate": tidar}))
        return None
    text, _ = outcome(stock, **keywords)
    found, is_drafted = outcome(model, **keywords)
    assert found == text
    assert is_drafted == (expected != PLAIN_TEXT)
    assert bool(said) == (expected == PLAIN_TEXT), said
    if expected == PLAIN_TEXT:
        with pytest.raises(ValueError, match=r"`custom_generate(=tidar)?`"):
            stock.generate(PROMPT, **keywords, custom_generate=tidar)
    elif name != "stop_strings":  # a custom decode gets no tokenizer
        assert outcome(stock, **keywords, custom_generate=tidar) == (text, True)
    return text


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_generation_config_is_drafted_by_decoded_plainly_or_refused(name, models, said):
    keywords, expected = FIELDS[name]
    text = check(models, said, keywords, expected, name)
    if expected == DRAFTED and name not in NOT_IN_THE_TEXT:
        without, _ = outcome(models[1], max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert text != without, "the value changes nothing, and would prove nothing"


def test_every_field_of_a_generation_config_is_in_the_table():
    assert vars(GenerationConfig()).keys() - NOT_OF_A_CALL == FIELDS.keys()


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_of_a_forward_is_drafted_with_decoded_plainly_or_refused(name, models, gpt2, said):
    value, expected = KEYWORDS[name]
    if value is None:
        pytest.skip("tried elsewhere, or nothing to try")
    of = gpt2 if name in inspect.signature(type(gpt2[1]).forward).parameters else models
    check(of, said, {name: value}, expected, name)


def test_every_keyword_of_a_forward_is_in_the_table(models, gpt2):
    for model in (*models, *gpt2):
        parameters = inspect.signature(model.forward).parameters.values()
        assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= KEYWORDS.keys()


def test_a_prompt_is_read_in_chunks_of_the_size_asked_for(models):
    model, stock = models
    prompts, mask = random_prompts(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, :37] = 0
    for size in (1, 16, 99, 100, 200):
        for more in ({}, {"cache_implementation": "static"}, {"num_branches": 1, "exact": "tie-safe"}):
            widths = []
            hook = model.register_forward_hook(
                lambda module, args, kwargs, output: widths.append(kwargs["input_ids"].shape[1]),  # noqa: B023
                with_kwargs=True,
            )
            keywords = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
            found = model.generate(prompts, prefill_chunk_size=size, return_dict_in_generate=True, **keywords, **more)
            hook.remove()
            assert found.sequences.tolist() == stock.generate(prompts, **keywords).tolist()
            num_prefill = -(-100 // size)
            assert found.num_prefill_forwards == num_prefill
            assert set(widths[: num_prefill - 1]) <= {size}
            assert widths[num_prefill - 1] <= min(size, 100) + 4
    for size in (-1, 1.5, "16"):
        with pytest.raises(ValueError, match="`prefill_chunk_size` must be"):
            model.generate(prompts, prefill_chunk_size=size, max_new_tokens=3)


@pytest.mark.parametrize("longest", [None, 512, 700])
def test_a_static_cache_has_the_room_asked_for(models, longest):
    model, _ = models
    widths = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: widths.append(kwargs["attention_mask"].shape[-1]), with_kwargs=True
    )
    model.generate(PROMPT, max_new_tokens=9, do_sample=False, cache_implementation="static", max_cache_len=longest)
    hook.remove()
    assert set(widths[1:]) == {{None: 256, 512: 1024, 700: 1024}[longest]}


def test_an_image_is_not_dropped(models):
    """A multimodal stock model takes `pixel_values`; a decode of text refuses them by name."""
    _, stock = models

    class Seeing(type(stock)):
        def forward(self, *args, pixel_values=None, **kwargs):
            return super().forward(*args, **kwargs)

        def prepare_inputs_for_generation(self, *args, pixel_values=None, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    seeing = object.__new__(Seeing)
    object.__setattr__(seeing, "__dict__", stock.__dict__)
    with pytest.raises(ValueError, match=r"`pixel_values` is for forwards of one token|cannot draft"):
        seeing.generate(PROMPT, max_new_tokens=4, pixel_values=torch.ones(1, 3, 8, 8), custom_generate=tidar)


@pytest.mark.parametrize("keywords", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_a_seed_is_refused_wherever_transformers_samples(models, keywords):
    with pytest.raises(ValueError, match="`seed` must be left out where plain decoding samples"):
        models[0].generate(PROMPT, max_new_tokens=4, do_sample=True, seed=3, **keywords)


@pytest.mark.parametrize("keywords", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"draft_length": 0}, {}])
def test_no_loop_writes_a_mask_token_of_the_vocabulary(keywords):
    model = tiny_tidar("qwen3", draft_length=4)
    plain = model.generate(PROMPT, max_new_tokens=8, do_sample=False, draft_length=0)
    model.config.tidar_config = {"draft_length": 4, "mask_token_id": int(plain[0, 10])}
    found = model.generate(PROMPT, max_new_tokens=8, do_sample=False, **keywords)
    assert int(plain[0, 10]) not in found[0, 10:].tolist()


def test_a_draft_of_one_token_is_plain_decoding_by_the_planner_too(models):
    found = models[0].generate(
        PROMPT, max_new_tokens=9, do_sample=False, draft_length=1, num_branches="auto", return_dict_in_generate=True
    )
    assert found.sequences.tolist() == models[1].generate(PROMPT, max_new_tokens=9, do_sample=False).tolist()
    assert found.plans == {PLAIN: 8}


@pytest.mark.parametrize("options", [{}, {"num_branches": "auto"}, {"draft_length": 0}, {"num_beams": 2}], ids=str)
def test_training_mode_does_not_change_a_text(models, options):
    model, _ = models
    common = {"max_new_tokens": 9, "do_sample": False, **options}
    expected = model.generate(PROMPT, **common)
    try:
        assert model.train().generate(PROMPT, **common).tolist() == expected.tolist()
    finally:
        model.eval()


logging.getLogger("transformers").setLevel(logging.ERROR)
