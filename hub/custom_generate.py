"""custom_generate/generate.py: the one file with which an unmodified stock model drafts, written from our own files."""

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .travelling_code import imported_first, source_file

CUSTOM_GENERATE = Path("custom_generate", "generate.py")
OLDEST_TRANSFORMERS = "5.22"


def write_custom_generate(function: Any, folder: Path, taught: dict[str, int] | None = None) -> None:
    """Writes custom_generate/generate.py, with which an unmodified stock model drafts.

    It is one file: transformers takes a missing second one for a repository that has no custom decode at all, and
    would decode plainly without a word.

    Args:
        function: `generate` of generation_tidar.py.
        taught: the `tidar_config` of an adapter, for stock models, whose configs have none.
    """
    text = one_file(source_file(function))
    if taught is not None:
        text += f"\n\nimport functools  # noqa: E402\n\ngenerate = functools.partial(generate, taught={taught!r})\n"
    path = folder / CUSTOM_GENERATE
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.with_name("requirements.txt").write_text(f"transformers>={OLDEST_TRANSFORMERS}\n", encoding="utf-8")


def one_file(source: Path) -> str:
    """A module and all it imports relatively as the text of one module, each part after those it imports.

    Raises:
        ValueError: two parts define the same name differently.
    """
    parts = []
    definitions: dict[str, set[str]] = {}
    for path in imported_first(source):
        text = path.read_text(encoding="utf-8")
        for name, found in top_level_definitions(ast.parse(text)).items():
            if definitions.setdefault(name, found) != found:
                raise ValueError(
                    f"{path} and another file of the package define `{name}` differently, and custom_generate/ keeps "
                    "them in one module. Rename one of them."
                )
        parts.append(f"# {path.name}\n\n{without_relative_imports(text).strip()}\n")
    head = f'"""Written by wavedraft from its own files: {source.name} and what it imports, as one module."""\n'
    return "\n\n".join([head, *parts])


def without_relative_imports(text: str) -> str:
    """A module's text with its relative imports left out."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not any(alias.asname for alias in node.names), "one module has one name for a thing"
            left = "" if node.col_offset == 0 else " " * node.col_offset + "pass"
            lines[node.lineno - 1 : node.end_lineno] = [left] + [""] * (node.end_lineno - node.lineno)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines))


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
