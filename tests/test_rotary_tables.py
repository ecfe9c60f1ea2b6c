"""Rotary positions whose table depends on the longest position of a forward: masks must not choose it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from helpers_tidar import SHAPE, random_prompts
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation import tidar

END = 32  # the longest text of the first table
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 8.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": END, **FACTORS}
CASES = {
    "llama, dynamic": (LlamaForCausalLM, LlamaConfig, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}, END),
    "llama, longrope": (LlamaForCausalLM, LlamaConfig, LONGROPE, 256),
    "phi3, longrope": (Phi3ForCausalLM, Phi3Config, LONGROPE, 256),
}
GREEDY = {"do_sample": False, "return_dict_in_generate": True}
EVERY_BRANCH = GREEDY | {"num_branches": "all"}


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    model_class, config_class, rope, longest = CASES[request.param]
    torch.manual_seed(0)
    values = SHAPE | {"max_position_embeddings": longest, "rope_parameters": rope}
    if config_class is Phi3Config:
        values |= {"original_max_position_embeddings": END}
    model_class(config_class(**values)).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=8)
    return model_class, tmp_path


def test_up_to_the_end_of_the_table_drafts_are_exact(folder):
    model_class, path = folder
    stock, model = model_class.from_pretrained(path / "stock"), TiDARForCausalLM.from_pretrained(path / "tidar")
    prompts, padding = random_prompts(2, 10), torch.ones(2, 10, dtype=torch.long)
    padding[0, :4], prompts[0, :4] = 0, 0
    for rows in (slice(0, 2), slice(1, 2)):
        given = {"attention_mask": padding[rows], "max_new_tokens": END - 10}
        expected = stock.generate(prompts[rows], **given, **GREEDY)
        found = model.generate(prompts[rows], **given, **EVERY_BRANCH)
        by_keyword = stock.generate(prompts[rows], custom_generate=tidar, mask_embedding_id=3, draft_length=8, **given,
                                    **EVERY_BRANCH)  # fmt: skip
        assert found.num_forwards and found.sequences.tolist() == expected.sequences.tolist()
        assert by_keyword.sequences.tolist() == expected.sequences.tolist()


def test_a_text_that_may_go_on_is_decoded_plainly_by_ours_and_refused_by_name_elsewhere(folder, caplog):
    model_class, path = folder
    stock, model = model_class.from_pretrained(path / "stock"), TiDARForCausalLM.from_pretrained(path / "tidar")
    for length in (20, END + 2):
        prompt, given = random_prompts(1, length), {"max_new_tokens": 24}
        expected = stock.generate(prompt, **given, **GREEDY).sequences
        assert model.generate(prompt, **given, **EVERY_BRANCH).sequences.tolist() == expected.tolist()
        with pytest.raises(ValueError, match=f"rotary positions change where a text passes {END} tokens"):
            stock.generate(prompt, custom_generate=tidar, mask_embedding_id=3, draft_length=8, **given, **EVERY_BRANCH)


def test_8_bit_layers_with_a_threshold_are_decoded_plainly(folder):
    """Without bitsandbytes: its config is all that is read."""
    model_class, path = folder
    stock = model_class.from_pretrained(path / "stock")
    call = {"custom_generate": tidar, "mask_embedding_id": 3, "draft_length": 4, "max_new_tokens": 4, **EVERY_BRANCH}
    for threshold in (6.0, 0.0):
        config = type("Config", (), {"load_in_8bit": True, "llm_int8_threshold": threshold})()
        stock.config.quantization_config = config
        if threshold:
            with pytest.raises(ValueError, match=r"llm_int8_threshold=0\.0"):
                stock.generate(random_prompts(1, 5), **call)
        else:
            assert stock.generate(random_prompts(1, 5), **call).num_forwards
