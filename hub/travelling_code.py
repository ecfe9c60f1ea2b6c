"""What travels with a checkpoint: the files of this package that it needs to decode where wavedraft is not installed.

The files are the package's own, flattened into one folder as the Hub wants them; there is no second copy. Of docstrings
the first sentence travels: the package has them whole.
"""

import ast
import re
from pathlib import Path

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.+([\w.]*\b(\w+)|\w+)(\s+import\b)", re.MULTILINE)
SENTENCE_END = re.compile(r"\.(?=\s|$|\"\"\")")


def flat_sources(source: Path) -> dict[str, str]:
    """A module and all it imports relatively, by file name, with every relative import turned into `from .name`, and
    docstrings shortened."""
    texts: dict[str, str] = {}
    for path in imported_first(source):
        if path.name in texts:
            raise ValueError(
                f"{path} and another file of the package have the same file name, and a Hub repository keeps them in "
                "one folder. Rename one of them."
            )
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        shorten_docstrings(lines, ast.parse(text))
        short = without_gaps("\n".join(lines)) + "\n"
        texts[path.name] = RELATIVE_IMPORT.sub(lambda m: f"{m[1]}.{m[2].rsplit('.', 1)[-1]}{m[4]}", short)
    return texts


def shorten_docstrings(lines: list[str], tree: ast.Module) -> None:
    """Leaves the first sentence of each docstring in `lines`, unless the docstring begins with its sections."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        if ast.get_docstring(node) is None:
            continue
        first, last = node.body[0].lineno - 1, int(node.body[0].end_lineno or 0)
        if not lines[first].strip(' "'):
            continue
        for i in range(first, last):
            if (end := SENTENCE_END.search(lines[i])) is not None:
                lines[i] = lines[i][: end.start() + 1] + '"""'
                lines[i + 1 : last] = [""] * (last - i - 1)
                break


def without_gaps(text: str) -> str:
    """The text without empty lines that separate nothing any more."""
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
