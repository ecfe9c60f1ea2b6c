"""Puts the tables of `wavedraft bench` into the README, between its two marks.

python benchmarks/readme_bench.py build/bench/bench.json

Several files become one section, in their order.
"""

import json
import sys
from pathlib import Path

from wavedraft.bench_report import markdown

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench -->", "<!-- end of bench -->"


def filled(readme: str, tables: list[str]) -> str:
    """The README with other tables between its marks."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"The README must hold {BEGIN} and, behind it, {END}, for the tables to stand between.")
    return f"{before}{BEGIN}\n" + "\n".join(table.strip() + "\n" for table in tables) + f"{END}{after}"


def main() -> None:
    tables = [markdown(json.loads(Path(path).read_text(encoding="utf-8"))) for path in sys.argv[1:]]
    README.write_text(filled(README.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
