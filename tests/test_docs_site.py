"""The site builds without a warning: every link, anchor and name of the API reference exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path):
    """A broken link, an unknown name of the API reference, or a page that is not in the menu fails."""
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install wavedraft[docs]")
    pytest.importorskip("mkdocstrings", reason="no mkdocstrings: pip install wavedraft[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "num_branches" in page and "max_wavefront" in page


def test_the_compatibility_table_is_what_is_tested_and_accepted():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    project, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.+) \|$", page, re.M))
    for package, least in re.findall(r'"(torch|peft|accelerate|huggingface-hub)>=([\d.]+)"', project):
        name = {"torch": "PyTorch", "peft": "PEFT"}.get(package, package)
        assert f"{least} and newer" in rows[name], name
    (wanted,) = re.findall(r'"transformers(>=\S+)"', project)
    assert wanted in rows["transformers"]
    (others,) = re.findall(r"^OTHERS := (.+)$", makefile, re.M)
    assert all(version.rpartition(".")[0] in rows["transformers"] for version in others.split())
    (torch_version,) = set(re.findall(r"torch==([\d.]+)", (ROOT / ".ci" / "install").read_text()))
    assert torch_version.rpartition(".")[0] in rows["PyTorch"]


def test_the_animation_is_of_a_real_run_and_small():
    path = ROOT / "docs" / "pictures" / "drafts.svg"
    picture = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 150_000
    counts = [int(number) for number in re.findall(r"the prompt's: (\d+) tokens", picture.replace("&#x27;", "'"))]
    assert len(counts) == picture.count("<animate ") > 10 and counts == sorted(set(counts))
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", ""), "it must not load anything"


def test_figures_are_written_into_docs_alone_between_the_marks_of_a_section(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from bench_page import filled

    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    for section, other in (("bench", "more"), ("more", "bench")):
        parts = [text.partition(f"<!-- {other} -->") for text in (page, filled(page, section, ["| a |"]))]
        assert parts[0][0 if section == "more" else 2] == parts[1][0 if section == "more" else 2], "the other stays"
        assert f"<!-- {section} -->\n| a |\n<!-- end of {section} -->" in filled(page, section, ["| a |"])
    with pytest.raises(ValueError, match="nothing"):
        filled(page, "nothing", [])
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_page.py"), str(ROOT / "README.md"), "bench", "x.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "must be in" in done.stderr
