"""custom_generate/generate.py: the one file with which an unmodified stock model drafts, written from our own files."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import compress
from operator import not_
from pathlib import Path

from .travelling_code import imported_first

OLDEST_TRANSFORMERS = "5.22"


def one_file(source: Path) -> str:
    """A module and all it imports relatively as the text of one module, each part after those it imports.

    The imports of others stand at the top, once. What nothing in the module uses is left out.

    Raises:
        ValueError: two parts define the same name differently.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in imported_first(source)}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    check_definitions(trees)
    unused = unused_definitions(trees, source.resolve())
    used = set().union(*(names_in(node) for tree in trees.values() for node in tree.body if node not in unused))
    parts = [f"# {path.name}\n\n{own_text(text, trees[path], unused)}\n" for path, text in texts.items()]
    head = f'"""Written by wavedraft from its own files: {source.name} and what it imports, as one module."""\n'
    return "\n\n".join([f"{head}\n{import_lines(trees.values(), used)}", *parts])


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


def unused_definitions(trees: dict[Path, ast.Module], source: Path) -> list[ast.stmt]:
    """The functions and classes that nothing names, outside `source`: training uses them, or the command line."""
    statements = {node: names_in(node) for tree in trees.values() for node in tree.body}
    candidates = [
        node
        for path, tree in trees.items()
        for node in tree.body
        if path != source and isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list
    ]
    unused: list[ast.stmt] = []
    while found := [
        node for node in candidates if not any(node.name in statements[s] for s in statements if s != node)
    ]:
        unused += found
        candidates = [node for node in candidates if node not in found]
        for node in found:
            del statements[node]
    return unused


def names_in(node: ast.AST) -> set[str]:
    """Every name that a statement may look up, also by a string."""
    return {
        str(getattr(part, field))
        for part in ast.walk(node)
        for kind, field in ((ast.Name, "id"), (ast.Attribute, "attr"), (ast.Constant, "value"))
        if isinstance(part, kind)
    }


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


def own_text(text: str, tree: ast.Module, unused: list[ast.stmt]) -> str:
    """A module's text without its imports, and without what is unused. Inside a function, others' imports stay."""
    lines, top, dropped = text.splitlines(), set(tree.body), set(unused)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not any(alias.asname for alias in node.names), "one module has one name for a thing"
        elif node not in dropped and not (node in top and isinstance(node, ast.Import | ast.ImportFrom)):
            continue
        left = "" if node.col_offset == 0 else " " * node.col_offset + "pass"
        lines[node.lineno - 1 : node.end_lineno] = [left] + [""] * (node.end_lineno - node.lineno)
        above = node.lineno - 2
        while node in dropped and above >= 0 and lines[above].startswith("#"):
            lines[above], above = "", above - 1
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip()


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
