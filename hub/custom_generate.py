"""custom_generate/generate.py: the one file with which an unmodified stock model drafts, written from our own files."""

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import compress
from operator import not_
from pathlib import Path

from .travelling_code import imported_first, shorten_docstrings, without_gaps

OLDEST_TRANSFORMERS = "5.22"
REMARK = re.compile(r"  # (type: ignore(\[[\w-]+\])?|fmt: skip)")  # to our own type checker and formatter


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
    parts = [f"{heading(path, trees[path])}\n\n{own_text(text, trees[path], unused)}\n" for path, text in texts.items()]
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


def unused_definitions(trees: dict[Path, ast.Module], source: Path) -> set[ast.AST]:
    """The functions, classes and methods that nothing names, outside `source`: training uses them, or the command line.

    A method counts where its class has no bases, through which others' code may call it.
    """
    candidates = [
        node
        for path, tree in trees.items()
        for node in (*tree.body, *methods_in(tree))
        if path != source and isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list
    ]
    unused: set[ast.AST] = set()
    while True:
        named = Counter(name for tree in trees.values() for name in names_in(tree, unused))
        found = {
            node
            for node in candidates
            if node not in unused and named[node.name] == [*names_in(node, unused)].count(node.name)
        }
        if not found:
            return unused
        unused |= found


def repeated_assignments(trees: dict[Path, ast.Module]) -> set[ast.AST]:
    """What an earlier part has made already, such as `logger`."""
    assigned: list[ast.AST] = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.Assign)]
    first = {ast.dump(node): node for node in reversed(assigned)}
    return {*assigned} - {*first.values()}


def methods_in(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The methods, but those that Python calls itself, of a module's classes without bases."""
    for kind in tree.body:
        if isinstance(kind, ast.ClassDef) and not kind.bases:
            yield from (m for m in kind.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("__"))


def names_in(node: ast.AST, left_out: Collection[ast.AST] = ()) -> Iterator[str]:
    """Every name that a statement may look up, also by a string, outside the parts `left_out`."""
    if node in left_out:
        return
    for kind, field in ((ast.Name, "id"), (ast.Attribute, "attr"), (ast.Constant, "value")):
        if isinstance(node, kind):
            yield str(getattr(node, field))
    for part in ast.iter_child_nodes(node):
        yield from names_in(part, left_out)


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


def own_text(text: str, tree: ast.Module, unused: set[ast.AST]) -> str:
    """A module's text without its docstring, its imports, and what is unused. Inside a function, others' imports
    stay. Of functions and classes the first sentence of the docstring stays: the package has them whole."""
    lines, top = text.splitlines(), set(tree.body)
    has_docstring = ast.get_docstring(tree) is not None
    left_out = {*unused, *tree.body[:has_docstring], *(n for n in top if isinstance(n, ast.Import | ast.ImportFrom))}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not any(alias.asname for alias in node.names), "one module has one name for a thing"
        elif node not in left_out:
            continue
        left = "" if node in left_out else " " * node.col_offset + "pass"
        lines[node.lineno - 1 : node.end_lineno] = [left] + [""] * (node.end_lineno - node.lineno)
        above = node.lineno - 2
        while node in unused and above >= 0 and lines[above].lstrip().startswith("#"):
            lines[above], above = "", above - 1
    drop_inner_docstrings(lines, tree)
    shorten_docstrings(lines, tree)
    return without_gaps(REMARK.sub("", "\n".join(lines))).strip()


def drop_inner_docstrings(lines: list[str], tree: ast.Module) -> None:
    """Takes out docstrings of methods and private functions, and those of classes that begin with their sections."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)]
    functions += [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
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
