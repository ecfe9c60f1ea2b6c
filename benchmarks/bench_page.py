"""Puts the tables of `wavedraft bench` into a page of docs, between the two marks of a section.

    python benchmarks/bench_page.py docs/bench.md bench build/bench/1/bench.json

    python benchmarks/bench_page.py README.md figures build/bench/1/bench.json

Several files become one section, in their order. Figures stand in docs alone, but for the three rows of README.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from wavedraft.bench.contenders import DEFAULT
from wavedraft.bench.tables import line, markdown

DOCS = Path(__file__).parents[1] / "docs"
README, FIGURES = Path(__file__).parents[1] / "README.md", "figures"
TAUGHT = "where", "tokens_per_forward", "speed_up", "equal_texts"


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


def readme_table(results: dict[str, Any]) -> str:
    """README's three rows: what `generate` without keywords brought here at batch 1, a GPU, and what `teach` brought
    (`taught.json`, by hand from its last lines)."""
    about, cell = results["about"], next(cell for cell in results["cells"] if cell["batch_size"] == 1)
    default = next(one for one in cell["contenders"] if one["name"] == DEFAULT)
    _, _, _, speed, per_forward, _, equal, *_ = line(default)
    size = f"{about['num_parameters'] / 1e6:.0f}M"
    taught = json.loads(Path(__file__).with_name("taught.json").read_text(encoding="utf-8"))
    rows = [
        ("where", "tokens per forward", "times the stock model's speed", "equal texts", "command"),
        ("---",) * 5,
        (f"{about['device']}, {size}, {about['dtype']}, batch 1", per_forward, speed, equal, "`make bench`"),
        ("a GPU", "", "not measured", "", "`wavedraft bench MODEL --adapter ADAPTER --dtype bfloat16 --compile`"),
        (*(taught[name] for name in TAUGHT), f"`{taught['command']}`"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("section", help="the name in the marks")
    parser.add_argument("benches", type=Path, nargs="+", help="what `wavedraft bench --output` wrote")
    arguments = parser.parse_args()
    is_readme = (arguments.page.resolve(), arguments.section) == (README, FIGURES)
    if arguments.page.resolve().parent != DOCS and not is_readme:
        parser.error(f"page must be in {DOCS}, where all figures stand, but is {arguments.page}.")
    write = readme_table if is_readme else markdown
    tables = [write(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.benches]
    put_between_marks(arguments.page, arguments.section, tables)


if __name__ == "__main__":
    main()
