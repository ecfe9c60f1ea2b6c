"""What travels with a checkpoint: the files of this package that it needs to decode where wavedraft is not installed.

The files are the package's own, flattened into one folder as the Hub wants them; there is no second copy.
"""

import ast
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.+([\w.]*\b(\w+)|\w+)(\s+import\b)", re.MULTILINE)
CUSTOM_GENERATE = Path("custom_generate", "generate.py")
OLDEST_TRANSFORMERS = "5.22"


def write_travelling_code(
    model_class: type, folder: Path, *, architecture: str | None = None, config_class: type | None = None
) -> None:
    """Writes the source files of `model_class` into a saved checkpoint and points its config at them.

    Args:
        folder: a checkpoint folder with a config.json.
        architecture: the class of transformers to leave in `architectures`, where tools look one up by name.
        config_class: of a model whose config is not transformers' own.

    Raises:
        ValueError: two files of the same name would overwrite each other.
    """
    source = source_file(model_class)
    for name, text in flat_sources(source).items():
        (folder / name).write_text(text, encoding="utf-8")
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if architecture is not None:
        config["architectures"] = [architecture]
    config["auto_map"] = {"AutoModelForCausalLM": f"{source.stem}.{model_class.__name__}"}
    if config_class is not None:
        config["auto_map"]["AutoConfig"] = f"{source_file(config_class).stem}.{config_class.__name__}"
    partial = config_path.with_suffix(".json.partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(config_path)


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


def source_file(defined: Any) -> Path:
    """The file in which a class or function was defined."""
    return Path(inspect.getsourcefile(sys.modules[defined.__module__]) or "").resolve()


def flat_sources(source: Path) -> dict[str, str]:
    """A module and all it imports relatively, by file name, with every relative import turned into `from .name`."""
    texts: dict[str, str] = {}
    for path in imported_first(source):
        if path.name in texts:
            raise ValueError(
                f"{path} and another file of the package have the same file name, and a Hub repository keeps them in "
                "one folder. Rename one of them."
            )
        text = path.read_text(encoding="utf-8")
        texts[path.name] = RELATIVE_IMPORT.sub(lambda m: f"{m[1]}.{m[2].rsplit('.', 1)[-1]}{m[4]}", text)
    return texts


def one_file(source: Path) -> str:
    """A module and all it imports relatively as the text of one module, each part behind those it imports.

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


def imported_first(source: Path) -> list[Path]:
    """A module and all it imports relatively, each behind those it imports."""
    found: list[Path] = []
    begun: set[Path] = set()

    def add(path: Path) -> None:
        if path not in begun:
            begun.add(path)
            for imported in relative_imports(path, path.read_text(encoding="utf-8")):
                add(imported)
            found.append(path)

    add(source.resolve())
    return found


def relative_imports(path: Path, text: str) -> list[Path]:
    """The files a source file imports with leading dots."""
    imported = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module, f"{path}: `from . import x` does not travel; name the module"
            imported.append(path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py").resolve())
    return imported


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
