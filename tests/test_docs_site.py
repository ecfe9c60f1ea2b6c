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


def test_readmes_figures_are_those_of_a_bench_and_name_what_was_not_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from bench_page import FIGURES, filled, readme_table

    speed = {"mean": 1.51, "low": 1.42, "high": 1.6}
    default = {
        **{"name": "default", "refused": None, "speed_up": speed, "is_noisy": False, "tokens_per_forward": 2.2},
        **{"queries_per_forward": 8.0, "num_identical": 19, "num_rows": 20, "peak_bytes": 1 << 20},
        **{"first_token_seconds": {"median": 1.0}, "decode_seconds_per_token": {"median": 1.0}},
        **{"worst_kind": "chat", "kinds": {"chat": {"speed_up": speed}}},
    }
    about = {"device": "Some CPU (no products of bfloat16)", "dtype": "float32", "num_parameters": 134_500_000}
    table = readme_table({"about": about, "cells": [{"batch_size": 1, "contenders": [default]}]})
    assert "no products of bfloat16), 134M, float32, batch 1 | 2.20 | 1.51 (1.42-1.60) | 19/20 |" in table
    assert "| a GPU | | not measured |" in table.replace("|  |", "| |")
    page = filled((ROOT / "README.md").read_text(encoding="utf-8"), FIGURES, [table])
    assert "Some CPU" in page and max(map(len, page.splitlines())) <= 120
