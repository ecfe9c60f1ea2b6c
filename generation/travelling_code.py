"""What travels with a checkpoint: the files of this package that it needs to decode where wavedraft is not installed.

The files are the package's own, flattened into one folder as the Hub wants them; there is no second copy.
"""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.+([\w.]*\b(\w+)|\w+)(\s+import\b)", re.MULTILINE)


def write_travelling_code(model_class: type, architecture: str, folder: Path) -> None:
    """Writes the source files of `model_class` into a saved checkpoint and points its config at them.

    Args:
        architecture: the stock class name to leave in `architectures`, so that the folder loads as stock too.
        folder: a checkpoint folder with a config.json.

    Raises:
        ValueError: two files of the same name would overwrite each other.
    """
    source = Path(inspect.getsourcefile(sys.modules[model_class.__module__]) or "")
    for name, text in flat_sources(source).items():
        (folder / name).write_text(text, encoding="utf-8")
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["architectures"] = [architecture]
    config["auto_map"] = {"AutoModelForCausalLM": f"{source.stem}.{model_class.__name__}"}
    partial = config_path.with_suffix(".json.partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(config_path)


def flat_sources(source: Path) -> dict[str, str]:
    """A module and all it imports relatively, by file name, with every relative import turned into `from .name`."""
    texts: dict[str, str] = {}
    origins: dict[str, Path] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if origins.setdefault(path.name, path) != path:
            raise ValueError(
                f"{path} and {origins[path.name]} have the same file name, and a Hub repository keeps them in one "
                "folder. Rename one of them."
            )
        if path.name in texts:
            continue
        text = path.read_text(encoding="utf-8")
        texts[path.name] = RELATIVE_IMPORT.sub(lambda m: f"{m[1]}.{m[2].rsplit('.', 1)[-1]}{m[4]}", text)
        waiting += relative_imports(path, text)
    return texts


def relative_imports(path: Path, text: str) -> list[Path]:
    """The files a source file imports with leading dots."""
    imported = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module, f"{path}: `from . import x` does not travel; name the module"
            imported.append(path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py").resolve())
    return imported
