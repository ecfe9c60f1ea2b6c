"""Every private name of torch, transformers and PEFT is used in one file, and listed in `docs/internals.md`.

The last tests check facts that no other test covers: a name still exists and still has the same meaning.
"""

import ast
import functools
import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CompileConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    Trainer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file

from helpers_tidar import tiny_tidar
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM
from wavedraft.modeling_recurrent.generation_recurrent import RecurrentGenerationMixin
from wavedraft.modeling_tidar.generation_tidar import TiDARGenerationMixin
from wavedraft.modeling_tidar.modeling_tidar import tidar_class
from wavedraft.training.trainer_tidar import TiDARTrainer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "internals.md"
FOLDERS = ("generation", "hub", "modeling_*", "conversion", "training", "wavedraft")
PRIVATE = re.compile(r"_[a-z]\w{2,}|_C")
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}  # public, as Python's documentation says
PRIVATE_THOUGH_SPELT_PUBLICLY = {"lora_variant", "ALoraLinearVariant", "queue_callback"}
# Classes that classes of ours derive from: a private name of theirs that ours define is an override.
BASES = (PreTrainedModel, GenerationMixin, Trainer, PreTrainedConfig, Cache, nn.Module)
OVERRIDABLE = {name for base in BASES for name in dir(base) if PRIVATE.fullmatch(name)}
# transformers sets these on a class when it is first asked; ours set them beforehand.
OVERRIDABLE |= {f"_can_set_{what}_implementation_cached_value" for what in ("attn", "experts")}


class Row(NamedTuple):
    files: tuple[str, ...]
    tests: tuple[str, ...]


def sources() -> list[Path]:
    return [
        path for pattern in FOLDERS for folder in sorted(ROOT.glob(pattern)) for path in sorted(folder.rglob("*.py"))
    ]


def names_of_ours(trees: list[ast.Module]) -> set[str]:
    """Private names that our classes define, and that no class above them has."""
    defined = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            defined |= {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            defined |= {name.id for member in node.body for name in ast.walk(member) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            defined.add(node.attr)
    return defined - OVERRIDABLE


def private_names_in(tree: ast.Module, ours: set[str]) -> set[str]:
    """Foreign private names that a source reads, writes, imports, passes as a keyword, spells out, or overrides."""
    found: set[str] = set()
    in_f_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {part for part in (node.module or "").split(".") if not node.level}
            found |= {alias.name for alias in node.names if not node.level}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.keyword):
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_f_strings:
            found.add(node.value)
        elif isinstance(node, ast.ClassDef):
            members = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            stored = [name for member in node.body for name in ast.walk(member) if isinstance(name, ast.Name)]
            found |= OVERRIDABLE & (members | {name.id for name in stored if isinstance(name.ctx, ast.Store)})
    is_foreign = {name for name in found - ours - OF_NAMED_TUPLES if PRIVATE.fullmatch(name)}
    return is_foreign | (found & PRIVATE_THOUGH_SPELT_PUBLICLY)


@functools.cache
def used() -> dict[str, set[str]]:
    """The files that use each private name."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    ours = names_of_ours(list(trees.values()))
    files = defaultdict(set)
    for path, tree in trees.items():
        for name in private_names_in(tree, ours):
            files[name].add(str(path.relative_to(ROOT)))
    return files


@functools.cache
def listed() -> dict[str, Row]:
    """The rows of the page's tables: the name first, then the files, and the tests in the last column."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert cells[0].strip("`") not in rows, f"{cells[0]} has two rows"
            rows[cells[0].strip("`")] = Row(*(tuple(re.findall(r"`([^`]+)`", cells[i])) for i in (2, -1)))
    assert rows, "the page has no table"
    return rows


def test_the_page_lists_every_private_name_and_no_other():
    assert {name: sorted(files) for name, files in used().items() if name not in listed()} == {}
    assert listed().keys() - used().keys() == set(), "rows of names that no source uses any more"


def test_a_private_name_is_used_where_the_page_says_and_nowhere_else():
    broken = [
        f"`{name}` is used in {file}, but {PAGE.name} says {', '.join(row.files)}"
        for name, row in sorted(listed().items())
        for file in sorted(used().get(name, set()) - set(row.files))
    ]
    assert not broken, "\n".join(broken)
    stale = [f"`{name}`: {f}" for name, row in listed().items() for f in row.files if f not in used().get(name, set())]
    assert not stale, "\n".join(stale)


def test_only_what_a_class_declares_or_overrides_may_stand_in_several_files():
    several = {name for name, row in listed().items() if len(row.files) > 1}
    assert several <= OVERRIDABLE


def test_the_tests_that_the_page_names_are_there():
    for name, row in listed().items():
        assert row.tests, f"`{name}` names no test"
        for test in row.tests:
            file, _, function = test.partition("::")
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", source, re.M), f"{test}, of `{name}`, is not there"


# -- torch


def test_a_module_keeps_its_parts_tensors_and_hooks_where_they_are_read():
    linear = nn.Linear(2, 2)
    linear.register_buffer("steps", torch.zeros(1))
    assert nn.Sequential(linear)._modules == {"0": linear}
    assert linear._parameters == dict(linear.named_parameters())
    assert linear._buffers == dict(linear.named_buffers())

    calls = []
    linear.register_forward_pre_hook(lambda *args: calls.append("before"))
    linear.register_forward_pre_hook(lambda *args: calls.append("before, with keywords"), with_kwargs=True)
    linear.register_forward_hook(lambda *args: calls.append("after"))
    linear.register_forward_hook(lambda *args: calls.append("after, always"), with_kwargs=True, always_call=True)
    assert len(linear._forward_pre_hooks) == len(linear._forward_hooks) == 2
    other = nn.Identity()
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
        setattr(other, name, getattr(linear, name))
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(other, name, getattr(linear, name))
    other(torch.ones(2))
    assert calls == ["before", "before, with keywords", "after", "after, always"]


def test_a_tensor_counts_how_often_it_was_written_to():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before
    with torch.inference_mode(), pytest.raises(RuntimeError, match="version counter"):
        _ = torch.zeros(2)._version


def test_torchs_compiler_has_options_by_mode_and_takes_a_fixed_address():
    assert torch._inductor.list_mode_options("default") == {}
    assert "triton.cudagraphs" in torch._inductor.list_options()
    assert torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    torch._dynamo.mark_static_address(torch.zeros(2))


def test_torchs_compiler_keeps_its_checks_of_the_processor():
    from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list

    pick_vec_isa()
    assert valid_vec_isa_list.cache_info().currsize == 1


# -- transformers and PEFT


def test_a_models_config_names_how_it_attends_and_a_new_name_is_followed():
    model = tiny_tidar("qwen3")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    calls = []

    def attend(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("of_this_test", attend)
    AttentionMaskInterface.register("of_this_test", sdpa_mask)
    model.config._attn_implementation = "of_this_test"
    model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == model.config.num_hidden_layers
    assert type(model)._supports_attention_backend


def test_classes_made_at_run_time_say_what_can_be_chosen_of_them():
    """transformers reads a class's source for this, which ours do not have, or keep elsewhere."""
    qwen, mixture = tidar_class(Qwen3ForCausalLM), tidar_class(Qwen3MoeForCausalLM)
    for model_class in (qwen, mixture, RecurrentDepthForCausalLM):
        assert model_class._can_set_attn_implementation()
    assert mixture._can_set_experts_implementation() and not qwen._can_set_experts_implementation()


def test_a_model_says_that_an_adapter_was_added_to_it():
    model = tiny_tidar("qwen3")
    assert not model._hf_peft_config_loaded
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert model._hf_peft_config_loaded


def test_a_file_that_is_not_there_or_cannot_be_reached_is_none(tmp_path):
    assert cached_file(tmp_path, "none.json", _raise_exceptions_for_missing_entries=False) is None
    hub = {"cache_dir": tmp_path, "local_files_only": True, "revision": "0" * 40}
    assert cached_file("no/body", "none.json", _raise_exceptions_for_connection_errors=False, **hub) is None


def test_a_stock_model_can_be_compiled_on_a_cpu():
    """Else `wavedraft bench` would time "AR compiled" without any compiling."""
    config = CompileConfig()
    assert config._compile_all_devices is None and "_compile_all_devices" not in config.to_dict()
    model = tiny_tidar("qwen3")
    cache = type("Compilable", (), {"is_compileable": True})()
    generation_config = model.generation_config
    generation_config.compile_config = config
    for compiles in (None, True):
        config._compile_all_devices = compiles
        given = {"past_key_values": cache, "cache": cache}
        assert GenerationMixin._valid_auto_compile_criteria(model, given, generation_config) == bool(compiles)


@pytest.mark.parametrize(
    "ours", [TiDARGenerationMixin, RecurrentGenerationMixin, TiDARTrainer, RecurrentDepthForCausalLM]
)
def test_an_override_takes_what_its_owner_is_called_with(ours):
    overrides = [name for name in OVERRIDABLE & vars(ours).keys() if inspect.isfunction(vars(ours)[name])]
    assert overrides
    for name in overrides:
        base = next(base for base in BASES if hasattr(base, name))
        theirs = [p for p in inspect.signature(getattr(base, name)).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = inspect.signature(vars(ours)[name]).parameters
        by_place = [p.name for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in own.values())
        assert takes_all or {p.name for p in theirs} <= own.keys(), f"`{name}` of {base.__name__} has new parameters"
        assert by_place == [p.name for p in theirs][: len(by_place)], f"`{name}` of {base.__name__} has another order"
