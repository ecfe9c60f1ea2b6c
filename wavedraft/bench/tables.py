"""What a bench measured, as tables for a terminal of 80 columns and for a README, and what these leave unsaid.

All read the figures of `report`, or of a bench.json.
"""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .contenders import AR
from .forward_costs import cost_note, free_query_tokens, place_of
from .paired import BUSY, FEWEST_PAIRS, WIDEST
from .settings import OWN_LENGTH

COLUMNS = ("", "first\ntoken s", "next\ntoken ms", "speed-up\n(95% interval)", "tokens a\nforward",
           "queries a\nforward", "equal\ntexts", "peak\nMiB", "worst kind")  # fmt: skip
NUM_SHOWN = 7  # of them in a terminal, which has no room for more
NUM_CELLS = 6  # of a sweep beside each other


def tables(results: dict[str, Any]) -> list[Group]:
    """A table of each cell, then their speed-ups by kind of prompt, and beside each other; 80 columns wide."""
    made = []
    for cell in results["cells"]:
        rows = [line(figures)[:NUM_SHOWN] for figures in cell["contenders"]]
        made.append(_table(cell_title(cell), COLUMNS[:NUM_SHOWN], rows))
        if (by_kind := kinds_of(cell)) is not None:
            made.append(_table("speed-up by kind of prompt", *by_kind))
    return made + [_table("speed-ups beside each other", *sweep) for sweep in sweeps(results)]


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Group:
    table = Table(box=None, padding=(0, 1, 0, 0))  # a title of its own would be wrapped at its width
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return Group(Text(f"\n{title}", style="bold"), table)


def cell_title(cell: dict[str, Any]) -> str:
    length = "prompts of their own lengths"
    if cell["prompt_length"] != OWN_LENGTH:
        length = f"prompts of {cell['prompt_length']} tokens"
    return f"batch {cell['batch_size']}, {length}, temperature {cell['temperature']:g}"


def line(figures: dict[str, Any]) -> list[str]:
    """The cells of one contender's line."""
    if figures["refused"] is not None:
        return [figures["name"], "", "", _refused(figures), "", "", "", "", ""]
    return [
        figures["name"],
        f"{figures['first_token_seconds']['median']:.3f}",
        f"{1e3 * figures['decode_seconds_per_token']['median']:.1f}",
        _speed(figures),
        "" if figures["tokens_per_forward"] is None else f"{figures['tokens_per_forward']:.2f}",
        f"{figures['queries_per_forward']:.1f}",
        "sampled" if figures["num_identical"] is None else f"{figures['num_identical']}/{figures['num_rows']}",
        f"{figures['peak_bytes'] / 2**20:.0f}",
        f"{figures['worst_kind']} {figures['kinds'][figures['worst_kind']]['speed_up']['mean']:.2f}",
    ]


def _refused(figures: dict[str, Any]) -> str:
    return "batch 1 only" if "batch_size" in figures["refused"] else "refused"


def _speed(figures: dict[str, Any]) -> str:
    """The mean and the interval; a question mark where the interval says little."""
    speed = figures["speed_up"]
    if figures["name"] == AR or speed["low"] is None:
        return f"{speed['mean']:.2f}"
    return f"{speed['mean']:.2f}{'?' * figures['is_noisy']} ({speed['low']:.2f}-{speed['high']:.2f})"


def kinds_of(cell: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """Columns and rows of the speed-ups by kind of prompt; None where there is one kind, or more than a terminal
    has room for."""
    measured = [one for one in cell["contenders"] if one["refused"] is None]
    kinds = list(measured[0]["kinds"])
    if len(kinds) < 2 or sum(max(len(kind), 5) + 1 for kind in kinds) > 60:
        return None
    rows = [
        [one["name"], *(f"{one['kinds'][kind]['speed_up']['mean']:.2f}" for kind in kinds)]
        for one in measured
        if one["name"] != AR
    ]
    return ("", *kinds), rows


def sweeps(results: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """Columns and rows of the speed-ups of all cells; none where there is one cell."""
    cells, found = results["cells"], []
    if len(cells) < 2:
        return []
    for start in range(0, len(cells), NUM_CELLS):
        some = cells[start : start + NUM_CELLS]
        rows = []
        for of_cells in zip(*(cell["contenders"] for cell in some), strict=True):
            speeds = ["" if one["refused"] is not None else _mean(one) for one in of_cells]
            rows.append([of_cells[0]["name"], *speeds])
        found.append((("", *(_short_title(cell, cells) for cell in some)), rows))
    return found


def _mean(figures: dict[str, Any]) -> str:
    return f"{figures['speed_up']['mean']:.2f}{'?' * figures['is_noisy']}"


def _short_title(cell: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """A cell by what not all cells share."""
    length = cell["prompt_length"]
    names = {
        "batch_size": f"batch {cell['batch_size']}",
        "prompt_length": "own" if length == OWN_LENGTH else f"{length} tok.",
        "temperature": f"temp. {cell['temperature']:g}",
    }
    return "\n".join(text for name, text in names.items() if len({one[name] for one in cells}) > 1)


def notes(results: dict[str, Any]) -> list[str]:
    """What the tables leave unsaid, a line each: first what makes figures doubtful."""
    lines = []
    for cell in results["cells"]:
        lines += doubts(cell)
        for figures in cell["contenders"]:
            if (seconds := figures.get("compile_seconds") or 0.0) >= 0.5:
                lines.append(
                    f"{cell_title(cell)}: {figures['name']} took {seconds:.0f} s to compile, not counted above."
                )
    if (trust := results["about"].get("trust")) is not None:
        lines.append(f"With trust={trust:g} texts are not meant to be plain decoding's: one that differs is no fault.")
    for place, free in free_query_tokens(results["forwards"]).items():
        rows = [row for row in results["forwards"] if place_of(row) == place]
        lines.append(cost_note(rows, free, results["about"]["has_packed_weights"]))
    return lines


def doubts(cell: dict[str, Any]) -> list[str]:
    """Why figures of a cell may say nothing: other programs ran, intervals are wide, or there are none."""
    lines, title = [], cell_title(cell)
    if (share := cell["waited_share"]) is not None and share > BUSY:
        lines.append(
            f"{title}: TOO BUSY. Other programs had the cores for {share:.0%} of the time in which this one could run. "
            "No time above can be trusted. Run this again on an idle machine."
        )
    others = [one for one in cell["contenders"] if one["refused"] is None and one["name"] != AR]
    if noisy := [one["name"] for one in others if one["is_noisy"]]:
        lines.append(
            f"{title}: too noisy to say how fast these are: {', '.join(noisy)}. The ends of their intervals are more "
            f"than {WIDEST} times apart. Raise --num-batches or --repeats."
        )
    if others and (num := others[0]["speed_up"]["num_pairs"]) < FEWEST_PAIRS:
        lines.append(
            f"{title}: {num} batches of prompts are too few for an interval, which takes {FEWEST_PAIRS}. Raise "
            "--num-batches, or give more prompts."
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The same tables for a README, after the command that made them."""
    about = results["about"]
    lines = [f"`{about['command']}`, {about['dtype']}, {about['device']}, {about['num_threads']} threads, torch "]
    lines[0] += f"{about['versions']['torch']}, {about['date']}, {about['repeats']} rounds of at most "
    lines[0] += f"{about['num_batches']} batches of each kind, texts of {about['max_new_tokens']} tokens:"
    for cell in results["cells"]:
        names = (cell_title(cell), *COLUMNS[1:])
        lines += ["", *_markdown_table(names, [line(figures) for figures in cell["contenders"]])]
    for columns, rows in sweeps(results):
        lines += ["", *_markdown_table(("speed-ups", *columns[1:]), rows)]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes(results))]).rstrip() + "\n"


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = [" ".join(name.split()) for name in columns]
    return [_row(head), "|---" * len(columns) + "|", *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
