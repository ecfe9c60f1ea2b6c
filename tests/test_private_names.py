"""Every private name of torch, transformers and PEFT that the sources use stands in `docs/internals.md`, in one file.

The tests at the end hold what no other test would notice: that a name still exists, and still means what it meant.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import (
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "internals.md"
FOLDERS = ("generation", "hub", "modeling_*", "conversion", "training", "wavedraft")
PRIVATE = re.compile(r"_[a-z]\w{2,}|_C")
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}  # public, as Python's documentation says
PRIVATE_THOUGH_SPELT_PUBLICLY = {"lora_variant", "ALoraLinearVariant", "queue_callback"}
# Classes that classes of ours derive from: a private name of theirs that ours define is an override.
BASES = (PreTrainedModel, GenerationMixin, Trainer, PreTrainedConfig, Cache, nn.Module)
OVERRIDABLE = {name for base in BASES for name in dir(base) if PRIVATE.fullmatch(name)}


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


def used() -> dict[str, set[str]]:
    """The files that use each private name."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    ours = names_of_ours(list(trees.values()))
    files = defaultdict(set)
    for path, tree in trees.items():
        for name in private_names_in(tree, ours):
            files[name].add(str(path.relative_to(ROOT)))
    return files


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
