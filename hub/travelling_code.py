"""What travels with a checkpoint: the files of this package that it needs to decode where wavedraft is not installed.

The files are the package's own, flattened into one folder as the Hub wants them; there is no second copy. What nothing
in them uses stays behind. Of docstrings the first sentence travels: the package has them whole.
"""

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.+([\w.]*\b(\w+)|\w+)(\s+import\b)", re.MULTILINE)
SENTENCE_END = re.compile(r"\.(?=\s|$|\"\"\")")
FEW_LINES = 10  # of a function that is read as fast as its docstring


def flat_sources(source: Path) -> dict[str, str]:
    """A module and all it imports relatively, by file name, with every relative import turned into `from .name`,
    docstrings shortened, and without what is unused."""
    files = {path: path.read_text(encoding="utf-8") for path in imported_first(source)}
    trees = {path: ast.parse(text) for path, text in files.items()}
    unused = unused_definitions(trees, source.resolve())
    texts: dict[str, str] = {}
    for path, text in files.items():
        if path.name in texts:
            raise ValueError(
                f"{path} and another file of the package have the same file name, and a Hub repository keeps them in "
                "one folder. Rename one of them."
            )
        lines = text.splitlines()
        for node in unused & {*ast.walk(trees[path])}:
            drop(node, lines)
        shorten_docstrings(lines, trees[path], path == source.resolve())
        short = without_gaps("\n".join(lines)) + "\n"
        texts[path.name] = RELATIVE_IMPORT.sub(lambda m: f"{m[1]}.{m[2].rsplit('.', 1)[-1]}{m[4]}", short)
    return texts


def drop(node: Any, lines: list[str]) -> None:
    """Empties the lines of a definition, and of the comment over it."""
    lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    above = node.lineno - 2
    while above >= 0 and lines[above].lstrip().startswith("#"):
        lines[above], above = "", above - 1


def shorten_docstrings(lines: list[str], tree: ast.Module, is_source: bool) -> None:
    """Leaves the first sentence of each docstring in `lines`, unless the docstring begins with its sections.

    Private functions, functions of few lines, and methods of classes without bases stay without one, but for those of
    the `source` that is called by its users.
    """
    silent = set() if is_source else {*methods_in(tree), *(node for node in tree.body if speaks_for_itself(node))}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        if ast.get_docstring(node) is None:
            continue
        first, last = node.body[0].lineno - 1, int(node.body[0].end_lineno or 0)
        if node in silent and len(node.body) > 1:
            lines[first:last] = [""] * (last - first)
        if not lines[first].strip(' "'):
            continue
        for i in range(first, last):
            if (end := SENTENCE_END.search(lines[i])) is not None:
                lines[i] = lines[i][: end.start() + 1] + '"""'
                lines[i + 1 : last] = [""] * (last - i - 1)
                break


def speaks_for_itself(node: ast.stmt) -> bool:
    """Whether a definition is of a private function, or of one with few lines."""
    if not isinstance(node, ast.FunctionDef):
        return False
    return node.name.startswith("_") or int(node.end_lineno or 0) - int(node.body[0].end_lineno or 0) <= FEW_LINES


def without_gaps(text: str) -> str:
    """The text without empty lines that separate nothing any more."""
    text = re.sub(r"(?<=:)\n{2,}(?= )", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"\n{3,}(?= )", "\n\n", text))


def imported_first(source: Path) -> list[Path]:
    """A module and all it imports relatively, each after those it imports."""
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
