"""custom_generate/generate.py: the one file with which an unmodified stock model drafts, written from our own files."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import compress
from operator import not_
from pathlib import Path

from .travelling_code import (
    drop,
    imported_first,
    names_in,
    shorten_docstrings,
    unused_definitions,
    without_gaps,
)

OLDEST_TRANSFORMERS = "5.22"
# Remarks to our own type checker and formatter, and types that say nothing.
NOTHING_SAID = re.compile(r"  # (type: ignore(\[[\w-]+\])?|fmt: skip)|: Any(?=[,)])| -> (Any|None)(?=:)")


def one_file(source: Path) -> str:
    """A module and all it imports relatively as the text of one module, each part after those it imports.

    The imports of others stand at the top, once. What nothing in the module uses is left out. Of a part's own docstring
    stays the last of several paragraphs, as a comment: what the letters of its shapes stand for.

    Raises:
        ValueError: two parts define the same name differently.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in imported_first(source)}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    check_definitions(trees)
    unused = unused_definitions(trees, source.resolve()) | repeated_assignments(trees)
    used = {name for tree in trees.values() for name in names_in(tree, unused)}
    parts = []
    for path, text in texts.items():
        own = own_text(text, trees[path], unused, path == source.resolve())
        parts.append(f"{heading(path, trees[path])}\n\n{own}\n")
    head = f'"""Written by wavedraft from its own files: {source.name} and what it imports, as one module."""\n'
    return "\n\n".join([f"{head}\n{import_lines(trees.values(), used)}", *parts])


def heading(path: Path, tree: ast.Module) -> str:
    """The comment over a part."""
    _, *paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    return "\n".join(f"# {line}" for text in [path.name, *paragraphs[-1:]] for line in text.split("\n"))


def check_definitions(trees: dict[Path, ast.Module]) -> None:
    """Raises where two files give one name two meanings."""
    definitions: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for name, found in top_level_definitions(tree).items():
            if definitions.setdefault(name, found) != found:
                raise ValueError(
                    f"{path} and another file of the package define `{name}` differently, and custom_generate/ keeps "
                    "them in one module. Rename one of them."
                )


def repeated_assignments(trees: dict[Path, ast.Module]) -> set[ast.AST]:
    """What an earlier part has made already, such as `logger`."""
    assigned: list[ast.AST] = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.Assign)]
    first = {ast.dump(node): node for node in reversed(assigned)}
    return {*assigned} - {*first.values()}


def import_lines(trees: Iterable[ast.Module], used: set[str]) -> str:
    """The modules' imports of others as one sorted block, the standard library first, without names not `used`."""
    modules: set[str] = set()
    members: dict[str, set[str]] = defaultdict(set)
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            modules |= {ast.unparse(alias) for alias in node.names if bound_name(alias) in used}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            members[str(node.module)] |= {ast.unparse(alias) for alias in node.names if bound_name(alias) in used}
    lines = [f"import {module}" for module in sorted(modules)]
    for module, names in sorted(members.items()):
        line = f"from {module} import {', '.join(sorted(names))}"
        one_a_line = "".join(f"    {name},\n" for name in sorted(names))
        lines += [line if len(line) <= 120 else f"from {module} import (\n{one_a_line})"] if names else []
    is_standard = [line.split()[1].split(".")[0] in sys.stdlib_module_names for line in lines]
    blocks = (compress(lines, is_standard), compress(lines, map(not_, is_standard)))
    return "\n\n".join(filter(None, ("\n".join(block) for block in blocks))) + "\n"


def bound_name(alias: ast.alias) -> str:
    """The name that an import binds."""
    return alias.asname or alias.name.split(".")[0]


def own_text(text: str, tree: ast.Module, unused: set[ast.AST], is_source: bool) -> str:
    """A module's text without its docstring, its imports, and what is unused. Inside a function, others' imports
    stay. Of functions and classes the first sentence of the docstring stays: the package has them whole."""
    lines = text.splitlines()
    docstring = tree.body[: ast.get_docstring(tree) is not None]
    for node in ast.walk(tree):
        if node in unused or node in docstring or isinstance(node, ast.Assert):  # asserts are for our type checker
            drop(node, lines)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)):
        is_ours = isinstance(node, ast.ImportFrom) and node.level
        assert not (is_ours and any(alias.asname for alias in node.names)), "one module has one name for a thing"
        if is_ours or node in tree.body:
            drop(node, lines)
            lines[node.lineno - 1] = "" if node in tree.body else " " * node.col_offset + "pass"
    drop_inner_docstrings(lines, tree)
    shorten_docstrings(lines, tree, is_source)
    return without_gaps(NOTHING_SAID.sub("", "\n".join(lines))).strip()


def drop_inner_docstrings(lines: list[str], tree: ast.Module) -> None:
    """Takes out docstrings of methods, and those of classes that begin with their sections."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)]
    listed = [kind for kind in kinds if ast.get_docstring(kind) and not lines[kind.body[0].lineno - 1].strip(' "')]
    found: list[ast.FunctionDef | ast.ClassDef] = [*functions, *listed]
    for node in found:
        if ast.get_docstring(node) is not None and len(node.body) > 1:
            first, last = node.body[0].lineno - 1, int(node.body[0].end_lineno or 0)
            lines[first:last] = [""] * (last - first)


def top_level_definitions(tree: ast.Module) -> dict[str, set[str]]:
    """What a module binds each of its names to, as text; what it imports relatively is its origin's."""
    bound: dict[str, set[str]] = defaultdict(set)

    def visit(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound[node.name].add(ast.dump(node))
            elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
                for alias in node.names:
                    origin = getattr(node, "module", "")
                    bound[alias.asname or alias.name].add(f"{origin} {alias.name}")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            bound[name.id].add(ast.dump(node))
            for body in ("body", "orelse", "handlers", "finalbody"):
                if isinstance(node, ast.If | ast.Try | ast.With):
                    visit(getattr(node, body, []))

    visit(tree.body)
    return bound
