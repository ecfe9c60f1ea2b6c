"""Folders, files and link targets named in the documentation exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = {"build", "models", "runs"}  # by commands; no part of the repository
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} - MADE
PAGES = sorted(
    page for pattern in ("*.md", "docs/*.md", "adapters/*/*.md", "checkpoints/*/*.md") for page in ROOT.glob(pattern)
)
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
PATH = re.compile(r"(?<![\w./:=-])[\w-]+(?:/[\w.-]*\w)+")
SCRIPT = re.compile(r"(?<![\w./-])\w+\.py\b")
LINK = re.compile(r"\]\(([^):#]+)\)")


def repository_paths(text: str) -> set[str]:
    """Paths in code that begin in a folder of the repository, or name a source file or a page in any folder."""
    found = {path for code in CODE.findall(text) for path in PATH.findall(code)}
    return {path for path in found if path.split("/")[0] in FOLDERS or path.endswith((".py", ".md"))}


def scripts() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert not sorted(path for path in repository_paths(text) if not (ROOT / path).exists())
    assert not sorted({name for code in CODE.findall(text) for name in SCRIPT.findall(code)} - scripts())
    assert not sorted(link for link in LINK.findall(text) if not (page.parent / link).exists())


def test_a_path_that_is_not_there_is_seen():
    text = "`python benchmarks/gone.py`, `generation/nowhere`, ```\ntests/x.py\n```, not `ORG/NAME`, not `runs/a`"
    assert repository_paths(text) == {"benchmarks/gone.py", "generation/nowhere", "tests/x.py"}
