"""Prompts of eleven kinds, made from a seed: what a draft is trained on, and judged by on others like them.

    apt-get download wordnet-base r-cran-janeaustenr && for deb in *.deb; do dpkg-deb -x $deb sources; done
    pip install reasoning-gym==0.1.25
    python benchmarks/prompts.py --sources sources --output benchmarks

Sources: WordNet 3.0 (its own permissive licence), Jane Austen (public domain), reasoning-gym (Apache-2.0), functions of
Python's standard library (PSF), and the templates below. The held-out split shares no noun, name, place, number seed,
novel, or library function with the train split, and asks part of its questions in forms the train split never uses.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import struct
import sysconfig
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
from prompt_kinds import (
    DIALOGUES,
    LISTS,
    PUZZLES,
    REWRITING,
    SQL,
    TRANSLATION,
    dialogue,
    list_prompt,
    puzzle_prompt,
    rewriting_prompt,
    sql_prompt,
    translation_prompt,
)
from prompt_words import (
    CHAT,
    CLOSED_CLASSES,
    CODE,
    CODE_TASKS,
    FACTS,
    JSON_FORMS,
    LIBRARY_MODULES,
    MATHS_TASKS,
    REPORTS,
    SUMMARY,
    WORDS,
)

KINDS = ("chat", "code", "maths", "summary", "json")
MORE_KINDS = ("translation", "rewriting", "list", "sql", "dialogue", "puzzle")
HELD_OUT_NOVELS = {"Persuasion"}
# WordNet's files of nouns that make natural topics, by number
NOUN_FILES = {
    "act": 4,
    "animal": 5,
    "artifact": 6,
    "food": 13,
    "feeling": 12,
    "phenomenon": 19,
    "plant": 20,
    "person": 18,
}


@dataclass
class Words:
    """What templates are filled with, of one split: names in braces to lists of words, and the passages."""

    fillings: dict[str, list[str]]
    glosses: dict[str, dict[str, str]]
    novels: list[str]
    functions: list[str]
    is_heldout: bool

    def forms(self, templates: Sequence[str]) -> list[str]:
        """The templates this split may use: the held-out split uses all, the train split not every sixth."""
        return [form for place, form in enumerate(templates) if self.is_heldout or place % 6 != 5]


def of_split(items: Sequence[Any], is_heldout: bool) -> list[Any]:
    """Every fifth item is kept for the held-out split; the train split has the others."""
    return [item for place, item in enumerate(items) if (place % 5 == 4) == is_heldout]


def wordnet_glosses(folder: Path) -> dict[str, dict[str, str]]:
    """Common nouns and what WordNet says of their first sense, by the file (animal, food, ...) they stand in."""
    frequent: dict[str, int] = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        sense_key, sense_number, count = line.split()
        lemma, rest = sense_key.split("%")
        word_class, file_number = rest.split(":")[:2]
        if word_class == "1" and sense_number == "1" and int(count) >= 2 and re.fullmatch(r"[a-z]{3,12}", lemma):
            frequent[lemma] = int(file_number)
    offsets = {}
    for line in (folder / "index.noun").read_text().splitlines():
        if not line.startswith(" "):
            fields = line.split()
            offsets[fields[0]] = int(fields[6 + int(fields[3])])
    data = (folder / "data.noun").read_bytes()
    glosses: dict[str, dict[str, str]] = {name: {} for name in NOUN_FILES}
    for lemma, file_number in sorted(frequent.items()):
        if lemma not in offsets:
            continue
        for name, number in NOUN_FILES.items():
            if number == file_number:
                entry = data[offsets[lemma] : data.index(b"\n", offsets[lemma])].decode()
                glosses[name][lemma] = entry.split(" | ")[1].split('; "')[0].strip()
    return glosses


def austen_paragraphs(folder: Path, min_words: int, max_words: int) -> dict[str, list[str]]:
    """Paragraphs of Jane Austen's novels of a length, by novel, out of the R package's serialised character vectors."""
    data = (folder / "Rdata.rdb").read_bytes()
    novels: dict[str, list[str]] = {}
    titles = [
        "Emma",
        "Mansfield Park",
        "Northanger Abbey",
        "Persuasion",
        "Pride and Prejudice",
        "Sense and Sensibility",
    ]
    position = 0
    for title in titles:  # the order of the package's objects: a length, then a zlib stream, for each
        stream = zlib.decompressobj()
        content = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        start = content.index(b"\x00\x00\x00\x10") + 4
        (num_lines,) = struct.unpack(">I", content[start : start + 4])
        start += 4
        lines = []
        for _ in range(num_lines):
            (length,) = struct.unpack(">i", content[start + 4 : start + 8])
            lines.append(content[start + 8 : start + 8 + length].decode())
            start += 8 + length
        paragraphs = [" ".join(paragraph.split()) for paragraph in "\n".join(lines).split("\n\n")]
        novels[title] = [text for text in paragraphs if min_words <= len(text.split()) <= max_words]
    return novels


def library_functions(max_lines: int = 14) -> list[str]:
    """Short functions of Python's standard library, as source text without docstrings and comments."""
    functions = []
    for module in LIBRARY_MODULES:
        source_path = Path(sysconfig.get_path("stdlib"), *module.split(".")).with_suffix(".py")
        if not source_path.exists():
            source_path = source_path.with_suffix("") / "__init__.py"
        for node in ast.walk(ast.parse(source_path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                node.body = node.body[1:]
            source = ast.unparse(node)
            if 4 <= len(source.splitlines()) <= max_lines and len(source) <= 420:
                functions.append(source)
    return list(dict.fromkeys(functions))


def read_words(sources: Path, is_heldout: bool) -> Words:
    """All that one split may speak of."""
    glosses = {
        name: dict(of_split(list(entries.items()), is_heldout))
        for name, entries in wordnet_glosses(sources / "usr/share/wordnet").items()
    }
    fillings = {name: of_split(words, is_heldout) for name, words in WORDS.items()} | CLOSED_CLASSES
    fillings |= {name: list(entries) for name, entries in glosses.items()}
    fillings["task"] = of_split(CODE_TASKS, is_heldout)
    novels = austen_paragraphs(sources / "usr/lib/R/site-library/janeaustenr/data", 40, 90)
    return Words(
        fillings=fillings,
        glosses=glosses,
        novels=[text for title, texts in novels.items() if (title in HELD_OUT_NOVELS) == is_heldout for text in texts],
        functions=of_split(library_functions(), is_heldout),
        is_heldout=is_heldout,
    )


def fill(template: str, words: Words, rng: random.Random) -> str:
    """`template` with every {name} replaced by a word of that list, {n:2-9} by a number, and no word used twice."""
    used: set[str] = set()

    def choose(match: re.Match[str]) -> str:
        name, _, bounds = match.group(1).partition(":")
        if name == "n":
            low, high = bounds.split("-")
            return str(rng.randint(int(low), int(high)))
        word = rng.choice([word for word in words.fillings[name] if word not in used])
        used.add(word)
        return word

    text = re.sub(r"{([a-z]+(?::[0-9]+-[0-9]+)?)}", choose, template)
    return re.sub(r"\b([Aa]) (?=[aeio])(?!one)", r"\1n ", text)


def chat_prompt(words: Words, rng: random.Random) -> str:
    return fill(rng.choice(words.forms(CHAT)), words, rng)


def code_prompt(words: Words, rng: random.Random) -> str:
    if rng.random() < 0.2:
        ask = rng.choice(
            [
                "Explain what this Python function does.",
                "Add a docstring and comments to this function.",
                "Explain this code line by line.",
                "Rewrite this function with type hints.",
                "Write two unit tests for this function.",
            ]
        )
        return f"{ask}\n\n```python\n{rng.choice(words.functions)}\n```"
    return fill(rng.choice(words.forms(CODE)), words, rng)


def maths_prompt(words: Words, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return fill(rng.choice(words.forms(FACTS)), words, rng)
    task = rng.choice(words.forms(MATHS_TASKS))
    seed = 2 * rng.randrange(10**6) + words.is_heldout
    question = reasoning_gym.create_dataset(task, size=1, seed=seed)[0]["question"].strip()
    question = re.sub(
        r"\s*(Give only|Reply with (just|only)|Give the result|Return only)[^.]*\.\s*", " ", question
    ).strip()
    return question + rng.choice(["", "", " Explain your steps.", " Show your work.", " Let's think step by step."])


def summary_prompt(words: Words, rng: random.Random) -> str:
    share = rng.random()
    if share < 0.4:
        passage = rng.choice(words.novels)
    elif share < 0.8:
        passage = fill(
            " ".join(rng.sample(REPORTS["start"], 1) + rng.sample(REPORTS["middle"], rng.choice([2, 3]))), words, rng
        )
        passage += " " + fill(rng.choice(REPORTS["end"]), words, rng)
    else:
        entries = words.glosses[rng.choice(["animal", "food", "artifact", "plant", "phenomenon"])]
        chosen = rng.sample(sorted(entries), 5)
        passage = " ".join(f"{name.capitalize()}: {entries[name]}." for name in chosen)
    ask = rng.choice(words.forms(SUMMARY))
    return f"{ask}\n\n{passage}" if rng.random() < 0.8 else f"{passage}\n\n{ask.rstrip(':')}."


def json_prompt(words: Words, rng: random.Random) -> str:
    return fill(rng.choice(words.forms(JSON_FORMS)), words, rng)


def further_prompt(kind: str, words: Words, rng: random.Random) -> str | list[dict[str, str]]:
    """A prompt of `MORE_KINDS`; messages of a dialogue."""

    def fill_in(template: str) -> str:
        return fill(template, words, rng)

    if kind == "puzzle":
        return puzzle_prompt(rng, words.forms(PUZZLES), words.is_heldout)
    if kind == "dialogue":
        return dialogue(fill_in, rng, words.forms(DIALOGUES))
    maker, forms = {
        "translation": (translation_prompt, TRANSLATION),
        "rewriting": (rewriting_prompt, REWRITING),
        "list": (list_prompt, LISTS),
        "sql": (sql_prompt, SQL),
    }[kind]
    return maker(fill_in, rng, words.forms(forms)).strip()


MAKERS: dict[str, Callable[[Words, random.Random], str]] = {
    "chat": chat_prompt,
    "code": code_prompt,
    "maths": maths_prompt,
    "summary": summary_prompt,
    "json": json_prompt,
}


def make_prompts(
    words: Words, num_each: int, seed: int, taken: Collection[str] = (), max_words: int = 190
) -> list[dict[str, str]]:
    """`num_each` different prompts of each of `KINDS`, none of them `taken`, shuffled together."""
    rng = random.Random(seed)
    rows = []
    for kind in KINDS:
        seen: set[str] = set()
        while len(seen) < num_each:
            prompt = MAKERS[kind](words, rng).strip()
            longest = max_words if kind == "summary" else max_words // 2
            if prompt not in seen and prompt not in taken and len(prompt.split()) <= longest:
                seen.add(prompt)
                rows.append({"kind": kind, "prompt": prompt})
    rng.shuffle(rows)
    return rows


def more_prompts(words: Words, num_each: int, seed: int, taken: Collection[str] = ()) -> list[dict[str, Any]]:
    """The same of `MORE_KINDS`, with `messages` in place of `prompt` where there are several turns."""
    rng, rows = random.Random(seed), []
    for kind in MORE_KINDS:
        seen: set[str] = set()
        while len(seen) < num_each:
            made = further_prompt(kind, words, rng)
            text = json.dumps(made)
            if text not in seen and text not in taken and len(text.split()) <= 95:
                seen.add(text)
                rows.append({"kind": kind, "prompt" if isinstance(made, str) else "messages": made})
    rng.shuffle(rows)
    return rows


HOME = {"train": Path(__file__).parents[1] / "training", "heldout": Path(__file__).parent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sources", type=Path, required=True, help="folder into which the Debian packages were unpacked"
    )
    parser.add_argument("--output", type=Path, help="folder of both files; by default each goes where it is kept")
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-heldout", type=int, default=100)
    parser.add_argument("--num-more", type=int, default=1800, help="train prompts of the further kinds; held out: 120")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    taken: set[str] = set()
    counts = {"train": (arguments.num_train, arguments.num_more), "heldout": (arguments.num_heldout, 120)}
    for split, (count, count_more) in counts.items():
        is_heldout = split == "heldout"
        words, seed = read_words(arguments.sources, is_heldout), 2 * arguments.seed + is_heldout
        rows = make_prompts(words, count // len(KINDS), seed, taken)
        more = more_prompts(words, count_more // len(MORE_KINDS), seed, taken)
        taken |= {row["prompt"] for row in rows} | {json.dumps(row.get("prompt", row.get("messages"))) for row in more}
        folder = arguments.output or HOME[split]
        files = {f"prompts_{split}.jsonl": rows, f"prompts_{split}_more.jsonl": more}
        if not is_heldout:  # `wavedraft teach` takes the first: of all kinds
            random.Random(seed).shuffle(rows := rows + more)
            files = {f"prompts_{split}.jsonl": rows}
        for name, some in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (folder / name).write_text(text, encoding="utf-8")
            print(f"{folder / name}: {len(some)} prompts")


if __name__ == "__main__":
    main()
