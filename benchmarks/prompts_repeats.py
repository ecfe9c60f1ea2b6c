"""Prompts whose answers repeat them: code to edit, a text to quote from, JSON over a given schema.

python benchmarks/prompts_repeats.py > benchmarks/prompts_repeats.jsonl

Code is of Python's standard library (PSF), cut by `ast`; texts and schemas are written here. No model is trained on it.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MODULES = ("bisect", "textwrap", "shutil", "calendar", "fractions", "difflib", "tempfile", "configparser", "csv", "cmd")
MODULES += ("netrc", "plistlib", "sched", "argparse", "graphlib", "getopt", "gzip", "optparse", "wave", "zipapp")
EDITS = (
    "Rename `{old}` to `{new}` in this function, and return the whole code:\n\n{code}",
    "Add a docstring to this function. Return the complete function:\n\n{code}",
    "Add a comment above each step of this code, and change nothing else:\n\n{code}",
    "Return this function with type hints added:\n\n{code}",
)
PEOPLE = ("Nadia", "Oskar", "Priya", "Tomas", "Wanjiru", "Leila", "Hugo", "Akira", "Marta", "Samuel")
PLACES = ("Leeds", "Oslo", "Pune", "Brno", "Nakuru", "Tunis", "Lyon", "Osaka", "Porto", "Accra")
THINGS = ("bridge", "library", "market", "theatre", "ferry", "orchard", "school", "museum", "garden", "station")
QUOTE = (
    '{person} has worked at the {thing} in {place} for {years} years. "We never close before the last visitor has '
    'left," {person} told us. Last spring the roof of the {thing} was damaged by a storm, and repairs took {weeks} '
    'weeks. "Without the neighbours we could not have opened again," said {person}. The city of {place} will pay '
    "half of the cost.\n\nSummarize this report, and quote word for word what {person} said."
)
SCHEMA = (
    'Fill in this schema for the order below. Return only JSON.\n\n{{"customer": {{"first_name": "string", "city": '
    '"string"}}, "items": [{{"product_name": "string", "quantity": "number", "unit_price": "number"}}], '
    '"delivery_date": "string", "is_paid": "boolean"}}\n\nOrder: {person} from {place} buys {years} tickets for the '
    "{thing} at {weeks} euros each and {weeks} posters of the {thing} at 3 euros each, to be sent on Monday. Paid."
)


def functions() -> Iterator[ast.FunctionDef]:
    """At most two functions of a module with 12 to 40 lines and an argument beside `self`, without docstrings."""
    for module in MODULES:
        tree = ast.parse(Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text(encoding="utf-8"))
        every = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in every:
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        fitting = [node for node in every if node.body and 12 <= len(ast.unparse(node).splitlines()) <= 40]
        yield from [node for node in fitting if first_name(node)][:2]


def first_name(function: ast.FunctionDef) -> str | None:
    return next((argument.arg for argument in function.args.args if argument.arg != "self"), None)


def main() -> None:
    for place, function in enumerate(islice(functions(), 20)):
        old = first_name(function)
        code = f"```python\n{ast.unparse(function)}\n```"
        prompt = EDITS[place % len(EDITS)].format(old=old, new=f"{old}_given", code=code)
        print(json.dumps({"kind": "edit", "prompt": prompt}))
    for kind, form in (("quote", QUOTE), ("schema", SCHEMA)):
        for place, (person, city, thing) in enumerate(zip(PEOPLE, PLACES, THINGS, strict=True)):
            words = {"person": person, "place": city, "thing": thing, "years": place + 4, "weeks": 3 * place + 5}
            print(json.dumps({"kind": kind, "prompt": form.format(**words)}))


if __name__ == "__main__":
    main()
