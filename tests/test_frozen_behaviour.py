"""The behaviour on tiny models equals the frozen behaviour (`tests/frozen/freeze.py`).

A fast part runs here; `python tests/frozen/freeze.py --check` runs everything.
"""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "frozen"))

import freeze


@pytest.mark.parametrize("section", freeze.SECTIONS)
def test_behaviour_is_as_it_was_frozen(section, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frozen = {name: told for name, told in freeze.read_frozen()[section].items() if freeze.is_fast(section, name)}
    found = freeze.run_section(section, freeze.is_fast)
    assert len(found) > 3
    assert freeze.compare(section, frozen, found) == []
