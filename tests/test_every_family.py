"""Every model type of transformers is decoded exactly, or refused by one sentence, at every door."""

import copy
import os

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers_every_family import MODEL_TYPES, NOT_TINY, SHAPES, tiny_config_of, tiny_model_of
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation import tidar
from wavedraft.generation.drafting.draftable import COMPOSITES
from wavedraft.generation.stock_model import has_states
from wavedraft.modeling_tidar.auto_tidar import stock_class_of
from wavedraft.modeling_tidar.generation_tidar import generate

# Each family in one shape; with WAVEDRAFT_EVERY_SHAPE=1 in all of them.
TRIED = [
    (model_type, shape)
    for model_type in sorted(set(MODEL_TYPES) - NOT_TINY)
    for shape in (SHAPES if os.environ.get("WAVEDRAFT_EVERY_SHAPE") else [*SHAPES][:1])
]
PLAIN = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
DRAFTING = PLAIN | {"num_branches": "all"}


def refusal(call, *args, **kwargs) -> str | None:
    """What a door says; None where it lets the model in."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def every_door(model, config, folder) -> dict[str, str | None]:
    """What each door says to a model: None where it is let in."""
    ids = torch.ones(1, 5, dtype=torch.long)
    by_keywords = {"draft_length": 4, "mask_embedding_id": 3, "max_new_tokens": 2, "do_sample": False}
    with_masks = copy.deepcopy(config)
    with_masks.tidar_config = {"draft_length": 4, "mask_token_id": config.vocab_size, "mask_embedding_id": 3}
    model.save_pretrained(folder / "stock")
    return {
        "custom_generate=tidar": refusal(model.generate, ids, custom_generate=tidar, **by_keywords),
        "custom_generate=folder": refusal(generate, ids, model=model, **by_keywords),
        "from_config": refusal(TiDARForCausalLM.from_config, with_masks),
        "convert": refusal(convert, folder / "stock", folder / "tidar", draft_length=4),
    }


def same_as_plain(model, drafting, ids, **given) -> None:
    expected = model.generate(ids, **given, **PLAIN)
    found = drafting.generate(ids, **given, **DRAFTING)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "shape"), TRIED)
def test_a_family_is_exact_alone_and_in_a_padded_batch_or_refused_alike_everywhere(model_type, shape, tmp_path):
    config = tiny_config_of(model_type, SHAPES[shape])
    model = tiny_model_of(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    said = every_door(model, config, tmp_path)
    assert len(set(said.values())) == 1, said
    if (reason := said["from_config"]) is not None:
        assert model_type in reason and "cannot draft" in reason and "Supported: " in reason
        assert not (tmp_path / "tidar").exists()
        return
    drafting = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").eval()
    drafting.generation_config.pad_token_id, drafting.generation_config.eos_token_id = 0, None
    ids = torch.randint(1, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    same_as_plain(model, drafting, ids[1:])
    ids[0, :3] = 0
    same_as_plain(model, drafting, ids, attention_mask=ids.ne(0).long())
    turn = drafting.generate(ids[1:], **DRAFTING)  # its text may contain the padding id
    cache = {name: value for name in ("cache", "past_key_values") if (value := getattr(turn, name, None)) is not None}
    longer = torch.cat([turn.sequences, ids[1:, :3]], dim=1)
    given = {"attention_mask": torch.ones_like(longer)}
    own = {}
    if has_states(config):  # transformers reads several tokens by another rule than one: both go on from a cache
        plain = model.generate(ids[1:], **PLAIN)
        own = {name: value for name in cache if (value := getattr(plain, name, None)) is not None}
    expected = model.generate(longer, **given, **own, **PLAIN)
    assert drafting.generate(longer, **given, **cache, **DRAFTING).sequences.tolist() == expected.sequences.tolist()


# Transformers refuses the default config of gemma4_assistant.
@pytest.mark.parametrize("model_type", sorted(NOT_TINY - COMPOSITES - {"gemma4_assistant"}))
def test_a_family_of_several_models_is_refused_by_its_config_alone(model_type):
    assert "cannot draft" in str(refusal(stock_class_of, CONFIG_MAPPING[model_type]()))
