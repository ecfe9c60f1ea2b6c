"""A checkpoint has little code. The code starts no program, and a recurrent-depth model's has no TiDAR drafting."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

from wavedraft.generation.drafting.draft_head import HEAD_FILE
from wavedraft.hub.custom_generate import one_file
from wavedraft.hub.hub_repository import WEIGHT_FILES
from wavedraft.hub.travelling_code import flat_sources, imported_first

ROOT = Path(__file__).parents[1]
TIDAR, GENERATE = "modeling_tidar/modeling_tidar.py", "modeling_tidar/generation_tidar.py"
MODELS = ("modeling_recurrent/modeling_recurrent.py", "modeling_recurrent/ouro_recurrent.py")


def imported_modules(path: Path) -> set[str]:
    """Every module of others that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def test_a_tidar_checkpoint_carries_little_code():
    sources = flat_sources(ROOT / TIDAR)
    assert len(sources) <= 30
    assert sum(len(text.encode()) for text in sources.values()) <= 250 * 1024


def test_custom_generate_is_short_enough_to_be_read_before_it_is_trusted():
    assert len(one_file(ROOT / GENERATE).encode()) <= 190_000


def test_training_does_not_travel():
    assert not {"objective_tidar.py", "masking_tidar.py"} & flat_sources(ROOT / TIDAR).keys()


@pytest.mark.parametrize("model", [*MODELS, TIDAR])
def test_of_hub_one_file_travels(model):
    names = [path.name for path in imported_first(ROOT / model) if path.parent == ROOT / "hub"]
    assert names == ["hub_repository.py"]


@pytest.mark.parametrize("model", MODELS)
def test_a_recurrent_checkpoint_carries_little_code(model):
    sources = flat_sources(ROOT / model)
    assert len(sources) <= 30
    assert sum(len(text.encode()) for text in sources.values()) <= 260_000


@pytest.mark.parametrize("model", MODELS)
def test_a_recurrent_checkpoint_carries_nothing_that_drafts_for_stock_models(model):
    names = [str(path.relative_to(ROOT)) for path in imported_first(ROOT / model)]
    foreign = ("generation/drafting/*", "generation/execution/*", "modeling_tidar/*", "*_tidar.py", "hub/custom_*")
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in foreign)]


@pytest.mark.parametrize("model", [*MODELS, TIDAR, GENERATE])
def test_travelling_code_starts_no_program_and_loads_no_library_of_its_own(model):
    barred = {"subprocess", "ctypes", "cffi", "distutils", "setuptools", "multiprocessing", "torch.utils.cpp_extension"}
    for path in imported_first(ROOT / model):
        found = {one for one in imported_modules(path) if one in barred or one.split(".")[0] in barred}
        assert not found, path
        assert "os.system" not in path.read_text(encoding="utf-8"), path


def test_a_draft_head_is_published_though_hub_repository_does_not_import_its_code():
    assert any(fnmatch(HEAD_FILE, pattern) for pattern in WEIGHT_FILES)


@pytest.mark.parametrize("model", [*MODELS, TIDAR])
def test_what_a_flat_file_imports_of_another_travels(model):
    trees = {name.removesuffix(".py"): ast.parse(text) for name, text in flat_sources(ROOT / model).items()}
    for tree in trees.values():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level):
            parts = [*ast.walk(trees[node.module])]
            bound = {n.name for n in parts if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.alias)}
            bound |= {n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            assert {alias.name for alias in node.names} <= bound, node.module
