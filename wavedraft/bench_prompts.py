"""The prompts of `wavedraft bench`, by kind: those of a file, or five kinds of our own."""

from pathlib import Path

PROMPTS: dict[str, list[str]] = {
    "code": [
        "Write a Python function that returns the longest common prefix of a list of strings.",
        "Write a SQL query that lists the ten customers with the most orders this year.",
        "Explain with a short example how a queue differs from a stack.",
        "Write a shell command that counts the lines of every text file in a folder.",
    ],
    "maths": [
        "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
        "A box holds 24 apples. A farmer fills 17 boxes and has 9 apples left. How many apples are there?",
        "Solve 3x + 7 = 40 and show each step.",
        "A coat costs 80 dollars and is reduced by 15 percent. What does it cost now?",
    ],
    "chat": [
        "Why do leaves change colour in autumn?",
        "I have a free Saturday and it will rain. What could I do at home?",
        "Write a short letter that thanks a neighbour for watering the plants.",
        "What should somebody know before adopting a cat?",
    ],
    "translation": [
        "Translate into French: The library is closed on Monday, but the museum is open until six.",
        "Translate into Spanish: My sister works in a hospital near the river.",
        "Translate into German: We would like a table for four people, please.",
        "Translate into Italian: The train was late, so we missed the beginning of the film.",
    ],
    "json": [
        "Give a JSON object that describes a bicycle: brand, colour, price and a list of three accessories.",
        "Turn this into JSON: Ana, 34, nurse, lives in Porto, speaks Portuguese and English.",
        "Write a JSON array of four planets, each with name, number of moons and whether it has rings.",
        "Write a JSON configuration for a web server: host, port, timeouts and two allowed origins.",
    ],
}


def read_kinds(path: str | Path) -> dict[str, list[str]]:
    """The prompts of a file by kind: JSONL rows with `prompt` and, where there are several kinds, `kind`; or one
    prompt a line, all of one kind.

    Raises:
        ValueError: there is no such file, or none in it, or a row has no prompt.
    """
    from .audit import read_prompts

    prompts = read_prompts(path)
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Give JSONL rows with `prompt` and `kind`, or one prompt a line.")
    kinds = ["all"] * len(prompts)
    if Path(path).suffix == ".jsonl":
        from .training.dialogue import read_jsonl

        kinds = [str(row.get("kind", "all")) for row in read_jsonl(path)]
    return {kind: [p for p, k in zip(prompts, kinds, strict=True) if k == kind] for kind in dict.fromkeys(kinds)}
