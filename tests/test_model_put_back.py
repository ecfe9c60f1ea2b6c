"""A decode changes the model once, and always restores the model afterwards, even after an error."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from transformers import CompileConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from helpers_tidar import plain_greedy_loop, random_prompts, tiny_tidar, with_random_head
from wavedraft.training import gated_adapter_config

STATIC = {"cache_implementation": "static"}
FORMS = {
    "grows": {},
    "one branch": {"num_branches": 1},
    "auto": {"num_branches": "auto"},
    "trust": {"trust": 0.5},
    "tie-safe": {"exact": "tie-safe"},
    "packed": {"packed_weights": True},
    "static": STATIC,
    "compiled": STATIC | {"compile_config": CompileConfig(backend="eager", dynamic=False)},
    "compiled, packed": STATIC
    | {"compile_config": CompileConfig(backend="eager", dynamic=False), "packed_weights": True},
    "plain": {"draft_length": 0},
    "plain, packed": {"draft_length": 0, "packed_weights": True},
}
ADAPTERS = ("bare", "gated", "gated, through PEFT", "head")


def model_with(adapter: str, is_eager: bool = False):
    """A drafting model, and the object whose `generate` is called."""
    model = tiny_tidar(draft_length=4)
    if is_eager:
        model.set_attn_implementation("eager")
    if adapter == "head":
        return with_random_head(model), model
    if adapter == "bare":
        return model, model
    torch.manual_seed(0)
    peft_model = get_peft_model(model, gated_adapter_config(model, rank=4)).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model, peft_model if "PEFT" in adapter else model


# What transformers and PEFT note on a model themselves. PEFT leaves its own hooks where a decode is broken off.
OF_OTHERS = {"_cache", "_previous_max_cache_length", "prepare_inputs_for_generation"}


def fingerprint(model):
    """All that must be as it was: modules and their attributes, tensors, hooks, variants, config and mode."""
    seen = [repr(model.config.to_dict()), model.config._attn_implementation, model.training]
    for name, module in model.named_modules():
        seen.append((name, id(module), type(module), module.training, sorted(vars(module).keys() - OF_OTHERS)))
        seen += [(key, id(child)) for key, child in module._modules.items()]
        seen += [(key, id(value), value._version) for key, value in module.named_parameters(recurse=False)]
        seen += [(key, id(value)) for key, value in module.named_buffers(recurse=False)]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        seen += [hook for hook in hooks if "_alora_offsets" not in repr(hook)]
        seen += [(key, id(value)) for key, value in (getattr(module, "lora_variant", None) or {}).items()]
        seen.append(repr(module.__dict__.get("scaling")))
    return seen


class Interrupted(Exception):
    """What is raised in the middle of a text."""


class BreakingStreamer(BaseStreamer):
    def __init__(self):
        self.num_calls = 0

    def put(self, value):
        self.num_calls += 1
        if self.num_calls > 3:  # the prompt, and a step or two
            raise Interrupted

    def end(self):
        """Not reached."""


class BreakingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 9:
            raise Interrupted
        return scores


class BreakingCriterion(StoppingCriteria):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 9:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


BREAKS = {
    "streamer": (Interrupted, lambda: {"streamer": BreakingStreamer()}),
    "processor": (Interrupted, lambda: {"logits_processor": [BreakingProcessor()]}),
    "criterion": (Interrupted, lambda: {"stopping_criteria": StoppingCriteriaList([BreakingCriterion(Interrupted)])}),
    "ctrl-c": (
        KeyboardInterrupt,
        lambda: {"stopping_criteria": StoppingCriteriaList([BreakingCriterion(KeyboardInterrupt)])},
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_decode_that_is_broken_off_leaves_the_model_as_it_was(form, adapter):
    model, called = model_with(adapter)
    prompt = random_prompts(1, 6)
    expected = plain_greedy_loop(model, prompt[0], num_new=14).tolist()
    logits = model(prompt).logits
    keywords = {"input_ids": prompt, "max_new_tokens": 14, "do_sample": False, **FORMS[form]}
    before = fingerprint(called)
    for error, more in BREAKS.values():
        with pytest.raises(error):
            called.generate(**keywords, **more())
        assert fingerprint(called) == before
        assert torch.equal(model(prompt).logits, logits)
    assert called.generate(**keywords)[0].tolist() == expected or form == "trust"  # which has a text of its own
    assert fingerprint(called) == before
    assert called.generate(input_ids=prompt, max_new_tokens=14, do_sample=False)[0].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_that_has_decoded_is_copied_and_pickled_like_one_that_has_not(form, adapter):
    model, called = model_with(adapter)
    prompt = random_prompts(1, 6)
    keywords = {"input_ids": prompt, "max_new_tokens": 8, "do_sample": False}
    text = called.generate(**keywords, **FORMS[form]).tolist()
    copied = copy.deepcopy(called)
    assert copied.generate(**keywords, **FORMS[form]).tolist() == text
    weights = pickle.loads(pickle.dumps(model.state_dict()))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["grows", "packed", "static", "plain"])
def test_a_model_in_training_mode_stays_in_it(form):
    _, called = model_with("gated")
    called.train()
    before = fingerprint(called)
    called.generate(input_ids=random_prompts(1, 6), max_new_tokens=8, do_sample=False, **FORMS[form])
    assert fingerprint(called) == before and called.training


def test_a_model_that_attends_eagerly_is_put_back_too():
    model, called = model_with("gated", is_eager=True)
    prompt, before = random_prompts(1, 6), fingerprint(model)
    with pytest.raises(Interrupted):
        called.generate(input_ids=prompt, max_new_tokens=14, do_sample=False, streamer=BreakingStreamer())
    assert fingerprint(model) == before


def test_hooks_of_an_adapted_layer_are_called_in_a_decode():
    model, called = model_with("gated")
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    called.generate(input_ids=random_prompts(1, 6), max_new_tokens=8, do_sample=False)
    assert seen[0] == 6 + 4 and set(seen[1:]) == {4 * 5}
