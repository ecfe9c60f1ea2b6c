"""A draft head and the record of how often drafts stand belong to the adapter that they were taught with."""

import copy
import functools
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers_tidar import random_prompts, tiny_tidar, with_random_head
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.drafting.draft_head import HEAD_FILE, attach_draft_head, draft_head_of, new_draft_head
from wavedraft.modeling_tidar import DraftObjective, modeling_tidar
from wavedraft.modeling_tidar.modeling_tidar import acceptance_of
from wavedraft.training import gated_adapter_config

KEYWORDS = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
CHANCES = {"a": [0.9, 0.8, 0.7], "b": [0.3, 0.2, 0.1]}


def record(name):
    return {"chances": CHANCES[name], "num_prompts": 4} if name in CHANCES else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read by every test, written by none.

    A model, and gated adapters: a and b with a head and a record, c with neither, and a user's own LoRA.
    """
    tmp_path = tmp_path_factory.mktemp("adapters")
    tiny_tidar("qwen3").save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("a", "b", "c", "user")):
        model = TiDARForCausalLM.from_pretrained(tmp_path / "model")
        gated = gated_adapter_config(model, 4)
        user = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear")
        peft_model = get_peft_model(model, user if name == "user" else gated)
        torch.manual_seed(seed)
        for key, parameter in peft_model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        peft_model.save_pretrained(tmp_path / name)
        if name in CHANCES:
            again = TiDARForCausalLM.from_pretrained(tmp_path / "model")
            again.load_adapter(str(tmp_path / name))
            with torch.no_grad():
                new_draft_head(again, 8).output_weight.normal_()
            again.save_pretrained(tmp_path / name)
            options = json.loads((tmp_path / name / "generation_config.json").read_text())
            (tmp_path / name / "generation_config.json").write_text(
                json.dumps(options | {"draft_acceptance": record(name)})
            )
    return tmp_path


@functools.cache
def drafted_alone(folder, name):
    """What a model drafts with one adapter that nothing was done to: the texts, and how many drafts stood."""
    alone = TiDARForCausalLM.from_pretrained(folder / "model")
    alone.load_adapter(str(folder / name))
    found = alone.generate(random_prompts(1, 6), num_branches="all", **KEYWORDS)
    return found.sequences, found.accepted_lengths


def is_of(model, folder, name, tmp_path=None):
    """Whether a model drafts, and saves into `tmp_path`, with one adapter's head and record."""
    head, beside = draft_head_of(model), folder / name / HEAD_FILE
    assert (head is None) != beside.is_file()
    assert acceptance_of(model) == record(name)
    if head is not None:
        stored = load_file(beside)
        assert all(torch.equal(stored[key], value) for key, value in head.state_dict().items())
    mine = model.generate(random_prompts(1, 6), num_branches="all", **KEYWORDS)
    texts, accepted_lengths = drafted_alone(folder, name)
    assert torch.equal(mine.sequences, texts) and torch.equal(mine.accepted_lengths, accepted_lengths)
    if tmp_path and len(model.active_adapters()) == 1:
        model.save_pretrained(tmp_path)
        assert (tmp_path / HEAD_FILE).is_file() == beside.is_file()
        if head is not None:
            assert torch.equal(load_file(tmp_path / HEAD_FILE)["output_weight"], stored["output_weight"])
        options = json.loads((tmp_path / "generation_config.json").read_text())
        assert options.get("draft_acceptance") == record(name)


@pytest.mark.parametrize("first", ["a", "c"])
@pytest.mark.parametrize("second", ["b", "c", "user"])
@pytest.mark.parametrize("way", ["hot swap", "switch", "switch and back", "delete", "delete and load", "through PEFT"])
def test_a_head_and_a_record_are_used_and_saved_with_their_adapter(folder, first, second, way, tmp_path):
    if first == second or (second == "user" and way == "hot swap"):
        pytest.skip("the same adapter, or other arithmetic")
    paths = {name: str(folder / name) for name in (first, second)}
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(paths[first], adapter_name="one")
    is_of(model, folder, first, tmp_path / "saved first")
    in_use = second
    if way == "hot swap":
        model.load_adapter(paths[second], adapter_name="one", hotswap=True)
    elif way == "delete and load":
        model.delete_adapter("one")
        assert draft_head_of(model) is None and acceptance_of(model) is None
        model.load_adapter(paths[second], adapter_name="one")
    else:
        model.load_adapter(paths[second], adapter_name="two")
        model.set_adapter("two")
    if way == "switch and back":
        model.set_adapter("one")
        in_use = first
    elif way == "delete":
        model.delete_adapter("two")
        model.set_adapter("one")
        in_use = first
    elif way == "through PEFT":
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter("two")
    is_of(model, folder, in_use, tmp_path / "saved last")
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        is_of(one, folder, in_use)


@pytest.mark.parametrize("state", ["as loaded", "in another dtype", "swapped by PEFT"])
def test_an_adapter_is_known_again_by_its_weights(folder, state, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(modeling_tidar.logger, "warning", said.append)
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(str(folder / "a"), adapter_name="one")
    if state == "in another dtype":
        model.to(torch.bfloat16)
    elif state == "swapped by PEFT":
        weights = _insert_adapter_name_into_state_dict(
            load_peft_weights(str(folder / "b"), device="cpu"), adapter_name="one", parameter_prefix="lora_"
        )
        weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
        hotswap_adapter_from_state_dict(
            model, weights, "one", config=PeftConfig.from_pretrained(folder / "b"), parameter_prefix="lora_"
        )
    for _ in range(2):
        model.generate(random_prompts(1, 6), **KEYWORDS)
    is_kept = state != "swapped by PEFT"
    assert (draft_head_of(model) is not None) == (acceptance_of(model) is not None) == is_kept
    assert len(said) == (not is_kept) and all("hotswap=True" in line for line in said)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / HEAD_FILE).is_file() == is_kept


def test_an_adapter_swapped_by_peft_is_not_saved_with_anothers_head(folder, tmp_path):
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(str(folder / "a"))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / HEAD_FILE).is_file()
    options = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "draft_acceptance" not in options


def test_with_a_users_own_adapter_beside_it_the_gated_adapters_head_is_used(folder):
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    for name in ("user", "a"):
        model.load_adapter(str(folder / name), adapter_name=name)
    for names in (["user", "a"], ["a", "user"]):
        model.set_adapter(names)
        assert torch.equal(draft_head_of(model).input_weight, load_file(folder / "a" / HEAD_FILE)["input_weight"])
        assert acceptance_of(model) == record("a")
    model.disable_adapters()
    assert draft_head_of(model) is None and acceptance_of(model) is None


def test_a_models_own_head_is_used_where_no_active_adapter_has_one_and_saved_with_the_model_alone(folder, tmp_path):
    model = with_random_head(TiDARForCausalLM.from_pretrained(folder / "model"))
    model.save_pretrained(tmp_path / "with head")
    model = TiDARForCausalLM.from_pretrained(tmp_path / "with head")
    own = draft_head_of(model)
    for name in ("user", "a"):
        model.load_adapter(str(folder / name), adapter_name=name)
    model.set_adapter("user")
    assert draft_head_of(model) is own
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / HEAD_FILE).exists()
    model.set_adapter("a")
    assert draft_head_of(model) is not own
    model.delete_adapter(["a", "user"])
    assert draft_head_of(model) is own
    model.save_pretrained(tmp_path / "again")
    assert not any(
        "head." in name.replace("lm_head.", "") for name in load_file(tmp_path / "again" / "model.safetensors")
    )
    assert (tmp_path / "again" / HEAD_FILE).is_file()


def test_training_makes_the_active_adapters_record_unknown_and_no_other(folder):
    model, ids = TiDARForCausalLM.from_pretrained(folder / "model"), random_prompts(2, 8)
    for name in ("a", "b"):
        model.load_adapter(str(folder / name), adapter_name=name)
    model.set_adapter("b")
    model.train()
    model(ids, labels=ids, objective=DraftObjective(mode="gated"))
    assert acceptance_of(model) is None
    model.set_adapter("a")
    assert acceptance_of(model) == record("a")


def test_a_head_that_a_call_names_is_of_that_call_alone(folder):
    ids = random_prompts(1, 6)
    for cls, way in ((TiDARForCausalLM, {"num_branches": "all"}), (AutoModelForCausalLM, {"custom_generate": tidar})):
        model = cls.from_pretrained(folder / "model")
        model.load_adapter(str(folder / "c"))
        way = way | {"num_branches": "all"}
        without = model.generate(ids, **KEYWORDS, **way).accepted_lengths
        counts = {}
        for name in ("a", "b", "a"):
            counts.setdefault(name, []).append(
                model.generate(ids, draft_head=str(folder / name), **KEYWORDS, **way).accepted_lengths
            )
        assert torch.equal(*counts["a"]) and not torch.equal(counts["a"][0], counts["b"][0])
        assert torch.equal(model.generate(ids, **KEYWORDS, **way).accepted_lengths, without)
        assert draft_head_of(model) is None


def test_an_adapter_that_peft_loaded_is_said_to_lack_its_head_once(folder, monkeypatch):
    said, ids = [], random_prompts(1, 6)
    monkeypatch.setattr(modeling_tidar.logger, "warning_once", said.append)
    model = PeftModel.from_pretrained(TiDARForCausalLM.from_pretrained(folder / "model"), str(folder / "a"))
    model.generate(input_ids=ids, **KEYWORDS)
    assert len(said) == 1 and "`model.load_adapter(folder)`" in said[0]
    said.clear()
    for name in ("a", "c", "user"):
        model = TiDARForCausalLM.from_pretrained(folder / "model")
        model.load_adapter(str(folder / name))
        model.generate(ids, **KEYWORDS)
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, gated_adapter_config(model, 4)).generate(input_ids=ids, **KEYWORDS)
    assert not said


def test_a_head_of_another_size_is_refused(folder, tmp_path):
    model = TiDARForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(str(folder / "c"))
    other = tiny_tidar(hidden_size=48)
    attach_draft_head(other, new_draft_head(other, 4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="48 channels"):
        model.generate(random_prompts(1, 4), max_new_tokens=2, draft_head=str(tmp_path / "other"))


def test_the_folder_of_an_adapter_loads_with_its_base(folder):
    model = TiDARForCausalLM.from_pretrained(folder / "a")
    assert model.active_adapters() == ["default"] and acceptance_of(model) == record("a")
    assert torch.equal(draft_head_of(model).input_weight, load_file(folder / "a" / HEAD_FILE)["input_weight"])
    other = TiDARForCausalLM.from_pretrained(folder / "model")
    other.load_adapter(str(folder / "a"))
    ids = random_prompts(1, 6)
    assert torch.equal(model.generate(ids, **KEYWORDS).sequences, other.generate(ids, **KEYWORDS).sequences)


def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(folder):
    model, ids = tiny_tidar("qwen3", hidden_size=48), random_prompts(1, 6)
    logits, before = model(ids).logits, [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="must be an adapter of this TiDARQwen3ForCausalLM"):
        model.load_adapter(str(folder / "a"))
    assert torch.equal(model(ids).logits, logits) and draft_head_of(model) is None
    assert not any("lora_A.default" in name for name, _ in model.named_modules()) and before


def test_generate_is_documented_before_a_model_is_loaded():
    assert "draft_length" in TiDARForCausalLM.generate.__doc__ and "num_branches" in TiDARForCausalLM.generate.__doc__
    with pytest.raises(TypeError, match="Load a model first"):
        TiDARForCausalLM.generate(None)
