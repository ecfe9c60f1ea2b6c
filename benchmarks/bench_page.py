"""Puts the tables of `wavedraft bench` into a page, between its two marks.

    python benchmarks/bench_page.py README.md build/bench/1/bench.json

Several files become one section, in their order.
"""

import argparse
import json
from pathlib import Path

from wavedraft.bench.report import markdown

BEGIN, END = "<!-- bench -->", "<!-- end of bench -->"


def filled(page: str, tables: list[str]) -> str:
    """The page with other tables between its marks."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"The page must hold {BEGIN} and, after it, {END}: the tables stand between them.")
    return f"{before}{BEGIN}\n" + "\n".join(table.strip() + "\n" for table in tables) + f"{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("benches", type=Path, nargs="+", help="what `wavedraft bench --output` wrote")
    arguments = parser.parse_args()
    tables = [markdown(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.benches]
    arguments.page.write_text(filled(arguments.page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
