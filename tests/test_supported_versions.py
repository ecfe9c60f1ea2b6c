"""The supported versions of transformers, and the message for other versions."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from wavedraft.hub.custom_generate import OLDEST_TRANSFORMERS
from wavedraft.supported_versions import OLDEST, REQUIREMENT, check_transformers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("version", [OLDEST, f"{OLDEST}.0", "5.23.0.dev0", "5.99.1"])
def test_a_supported_version_passes(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.9.0", "5.21.1", "6.0.0", "6.0.0.dev0", "10.1"])
def test_another_version_is_refused_with_the_remedy(version):
    remedy = "pip install 'transformers>=5.22,<5.24'"
    with pytest.raises(ImportError, match=rf"transformers {version} is installed.*{remedy}"):
        check_transformers(version)


def test_the_import_says_so_before_anything_else_can_fail():
    """In a process whose transformers calls itself old, and has nothing else."""
    code = """
        import sys, types
        sys.modules["transformers"] = types.ModuleType("transformers")
        sys.modules["transformers"].__version__ = "4.57.6"
        import wavedraft
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd="/")
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last_line.startswith("ImportError: wavedraft works with transformers 5.22 and newer")


def test_the_floor_is_one_number_everywhere():
    assert OLDEST == OLDEST_TRANSFORMERS
    assert f'"{REQUIREMENT}",' in (ROOT / "pyproject.toml").read_text()
    assert f"OTHERS := {OLDEST}.0 " in (ROOT / "Makefile").read_text()
