"""The table of `wavedraft generate` and of /stats in chat: whole at any width."""

import io

import pytest
from rich.console import Console

from wavedraft.commands.timed_runs import Run, print_runs

RUNS = [Run(list(range(120)), 44, 12.3), Run(list(range(12)), 4, 2.3)]


@pytest.mark.parametrize("plain", [[], RUNS])
@pytest.mark.parametrize("width", [80, 40, 20])
def test_every_number_is_told_at_every_width(width, plain):
    out = io.StringIO()
    print_runs(["Why [b]is it", "no"], RUNS, plain, Console(file=out, width=width))
    words = " ".join(out.getvalue().split())
    assert all(len(line) <= width for line in out.getvalue().splitlines())
    assert "Why [b]is it" in words, "a prompt is no markup"
    for number in ("120", "44", "2.70", "12.3", "132", "48", "2.71", "14.6"):
        assert number in words
    assert ("plain" in words) == bool(plain)
    assert words.count("14.6") == 1 + bool(plain)
    assert "…" not in words and "\033" not in words


def test_a_table_stands_where_it_fits():
    out = io.StringIO()
    print_runs(["no"], RUNS[1:], [], Console(file=out, width=80))
    assert " ".join(out.getvalue().split()) == "tokens per prompt tokens forwards forward seconds no 12 4 2.75 2.3"
