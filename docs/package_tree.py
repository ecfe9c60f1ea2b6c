"""A hook of MkDocs: copies the source folders into one tree, build/api/wavedraft, where the API reference reads them.

The folders stand beside each other in the repository and inside `wavedraft` once installed (pyproject.toml). Links
would not do: mkdocstrings follows them.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion", "training")


def on_startup(**kwargs: object) -> None:
    """Called by MkDocs first, before mkdocstrings looks for the tree."""
    tree = ROOT / "build" / "api" / "wavedraft"
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("wavedraft", *PARTS):
        target = tree if part == "wavedraft" else tree / part
        shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
