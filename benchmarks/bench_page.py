"""Puts the tables of `wavedraft bench` into a page, between its two marks.

    python benchmarks/bench_page.py README.md build/bench/1/bench.json

Several files become one section, in their order.
"""

import argparse
import json
from pathlib import Path

from wavedraft.bench.tables import markdown


def filled(page: str, name: str, tables: list[str]) -> str:
    """The page with other tables between the marks of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, mark, rest = page.partition(begin)
    _, end_mark, after = rest.partition(end)
    if not mark or not end_mark:
        raise ValueError(f"The page must hold {begin} and, after it, {end}: the tables stand between them.")
    return f"{before}{begin}\n" + "\n".join(table.strip() + "\n" for table in tables) + f"{end}{after}"


def put_between_marks(path: Path, name: str, tables: list[str]) -> None:
    """The same, of a file."""
    path.write_text(filled(path.read_text(encoding="utf-8"), name, tables), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("benches", type=Path, nargs="+", help="what `wavedraft bench --output` wrote")
    arguments = parser.parse_args()
    tables = [markdown(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.benches]
    put_between_marks(arguments.page, "bench", tables)


if __name__ == "__main__":
    main()
