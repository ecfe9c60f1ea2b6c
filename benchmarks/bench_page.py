"""Puts the tables of `wavedraft bench` into a page of docs, between the two marks of a section.

    python benchmarks/bench_page.py docs/bench.md bench build/bench/1/bench.json

Several files become one section, in their order. Figures stand in docs alone: other pages link to them.
"""

import argparse
import json
from pathlib import Path

from wavedraft.bench.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"


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
    parser.add_argument("section", help="the name in the marks")
    parser.add_argument("benches", type=Path, nargs="+", help="what `wavedraft bench --output` wrote")
    arguments = parser.parse_args()
    if arguments.page.resolve().parent != DOCS:
        parser.error(f"page must be in {DOCS}, where all figures stand, but is {arguments.page}.")
    tables = [markdown(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.benches]
    put_between_marks(arguments.page, arguments.section, tables)


if __name__ == "__main__":
    main()
