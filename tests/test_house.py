"""House rules, checked on the sources: the maximum length of a file, a function, a class and a line."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel, Trainer

ROOT = Path(__file__).parents[1]
FOLDERS = ("generation", "hub", "modeling_*", "conversion", "training", "wavedraft", "serving_vllm")
MOST_LINES, MOST_LINES_OF_A_MODEL = 400, 600  # of a file
MOST_LINES_OF_A_FUNCTION = 60  # signature and docstring included
MOST_METHODS, MOST_PARAMETERS, MOST_COLUMNS = 15, 12, 120
# Methods by which torch and transformers call a class of ours: not the class's own.
INTERFACE = {
    name for owner in (nn.Module, PreTrainedModel, GenerationMixin, Cache, Trainer) for name in dir(owner)
} - set(dir(object))
# Constructors that an interface makes long, each with the reason.
MAY_HAVE_MANY_PARAMETERS = {
    "FinetuneArguments": "a dataclass over transformers' TrainingArguments: a field is an option of the command line",
    "TiDAROptions": "a dataclass of all keywords of `generate` that drafts read",
}


def sources() -> list[Path]:
    return [
        path for pattern in FOLDERS for folder in sorted(ROOT.glob(pattern)) for path in sorted(folder.rglob("*.py"))
    ]


def nodes(*kinds: type) -> Iterator[tuple[str, ast.AST]]:
    """All nodes of some kinds, each with its place."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_parameters_of(node: ast.ClassDef) -> int:
    """Parameters of a class's own constructor, `self` not counted: of a dataclass or named tuple, its fields."""
    for method in methods_of(node):
        if method.name == "__init__":
            given = method.args
            return len(given.posonlyargs + given.args + given.kwonlyargs) - 1
    written = [*map(ast.unparse, node.decorator_list), *map(ast.unparse, node.bases)]
    if not any(word.split("(")[0] in ("dataclass", "NamedTuple") for word in written):
        return 0
    return sum(isinstance(member, ast.AnnAssign) and "init=False" not in ast.unparse(member) for member in node.body)


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a page that can be wrapped: no table, no code, nothing that is long because of a URL."""
    text = re.sub(
        r"<!-- (bench|beside llama.cpp|half precision|more) -->.*?<!-- end of \1 -->",
        lambda tables: "\n" * tables[0].count("\n"),
        text,
        flags=re.S,
    )
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not line.lstrip().startswith("|"):
            yield number, re.sub(r"\]\([^)]*\)|https?://\S+", "", line)


def pages() -> list[Path]:
    """The pages that git keeps: not those of installed packages and downloaded models."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository: the pages of the project are not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_is_long():
    broken = []
    for path in sources():
        most = MOST_LINES_OF_A_MODEL if path.name.startswith("modeling_") else MOST_LINES
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > most:
            broken.append(f"{path.relative_to(ROOT)} has {num_lines} lines, more than {most}")
    assert not broken, "\n".join(broken)


def test_no_function_is_long():
    broken = [
        f"{place} `{node.name}` has {num_lines} lines, more than {MOST_LINES_OF_A_FUNCTION}"
        for place, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if (num_lines := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]
    assert not broken, "\n".join(broken)


def test_no_class_has_many_methods_of_its_own():
    broken = [
        f"{place} `{node.name}` has {len(own)} methods of its own, more than {MOST_METHODS}"
        for place, node in nodes(ast.ClassDef)
        if len(own := [method.name for method in methods_of(node) if method.name not in INTERFACE]) > MOST_METHODS
    ]
    assert not broken, "\n".join(broken)


def test_no_constructor_takes_much():
    broken = [
        f"{place} `{node.name}` is made of {num_parameters_of(node)} parameters, more than {MOST_PARAMETERS}"
        for place, node in nodes(ast.ClassDef)
        if num_parameters_of(node) > MOST_PARAMETERS and node.name not in MAY_HAVE_MANY_PARAMETERS
    ]
    assert not broken, "\n".join(broken)


def test_each_exception_is_needed():
    needed = {node.name for _, node in nodes(ast.ClassDef) if num_parameters_of(node) > MOST_PARAMETERS}
    assert MAY_HAVE_MANY_PARAMETERS.keys() <= needed


def test_no_line_is_wide():
    """Of code, ruff's E501 says the same: it counts no comment that is meant for a tool."""
    broken = [
        f"{path.relative_to(ROOT)}:{number} has {len(line)} characters, more than {MOST_COLUMNS}"
        for path in pages()
        for number, line in prose_lines(path.read_text(encoding="utf-8"))
        if len(line) > MOST_COLUMNS
    ]
    assert not broken, "\n".join(broken)
