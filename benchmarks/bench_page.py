"""Puts the tables of `wavedraft bench` into a page, between its two marks.

python benchmarks/bench_page.py README.md build/bench/1/bench.json

Several files become one section, in their order.
"""

import json
import sys
from pathlib import Path

from wavedraft.bench.report import markdown

BEGIN, END = "<!-- bench -->", "<!-- end of bench -->"


def filled(page: str, tables: list[str]) -> str:
    """The page with other tables between its marks."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"The page must hold {BEGIN} and, behind it, {END}, for the tables to stand between.")
    return f"{before}{BEGIN}\n" + "\n".join(table.strip() + "\n" for table in tables) + f"{END}{after}"


def main() -> None:
    page, *benches = map(Path, sys.argv[1:])
    tables = [markdown(json.loads(path.read_text(encoding="utf-8"))) for path in benches]
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
