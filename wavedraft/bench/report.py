"""What a bench measured, as numbers for a program, a table for a terminal or a README, and a picture.

One cell is a batch size, a prompt length and a temperature.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from ..generation.stock_model import attention_of
from .contenders import AR
from .measure import Bench, Run
from .settings import OWN_LENGTH, Settings

FREE = 1.25  # a forward of "free" query tokens takes at most this much of the time of a forward of one
COLUMNS = ("", "first\ntoken s", "ms a\ntoken", "speed-up\n(of rounds)", "tokens/\nforward", "queries/\nforward",
           "MiB", "identical", "worst kind")  # fmt: skip


def report(results: Bench, model: PreTrainedModel, settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, and with what, ready for JSON.

    Args:
        options: what else the caller chose; it is written down as it is.
    """
    device, max_new_tokens = model.device, settings.max_new_tokens
    about = {
        "command": " ".join(["wavedraft", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "num_threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_of(model.config),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **options,
        **asdict(settings),
    }
    cells = list(dict.fromkeys((run.batch_size, run.prompt_length, run.temperature) for run in results.runs))
    return {
        "about": about,
        "cells": [
            {
                "batch_size": cell[0],
                "prompt_length": cell[1],
                "temperature": cell[2],
                "contenders": [_figures(results, cell, name, max_new_tokens) for name in results.contenders],
            }
            for cell in cells
        ],
        "forwards": [
            {**row, "seconds": _spread(row["seconds"])} | {"cost": _cost(results.forward_seconds, row)}
            for row in results.forward_seconds
        ],
        "runs": [vars(run) for run in results.runs],
    }


def _processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _figures(results: Bench, cell: tuple[int, int | str, float], name: str, max_new_tokens: int) -> dict[str, Any]:
    """One line of the table, and the same for each kind of prompt."""
    if (reason := results.refusals.get((*cell, name))) is not None:
        return {"name": name, "refused": reason}
    in_cell = [run for run in results.runs if (run.batch_size, run.prompt_length, run.temperature) == cell]
    plain, runs = ([run for run in in_cell if run.contender == which] for which in (AR, name))
    kinds = {}
    for kind in dict.fromkeys(run.kind for run in runs):
        plain_of, runs_of = ([run for run in of if run.kind == kind] for of in (plain, runs))
        kinds[kind] = _summary(plain_of, runs_of, max_new_tokens)
    worst = min(kinds, key=lambda kind: kinds[kind]["speed_up"]["median"])
    return {
        "name": name,
        "refused": None,
        **_summary(plain, runs, max_new_tokens),
        "peak_bytes": results.peak_bytes[(*cell, name)],
        "compile_seconds": results.compile_seconds.get((*cell, name)),
        "worst_kind": worst,
        "kinds": kinds,
    }


def _summary(plain: list[Run], runs: list[Run], max_new_tokens: int) -> dict[str, Any]:
    """The figures of one contender's runs, beside those of plain decoding on the same prompts."""
    num_decoded = len(runs) * (max_new_tokens - 1)
    num_decode_forwards = sum(run.num_forwards - 1 for run in runs)
    speed_up = _spread(_ratios(plain, runs, lambda run: run.decode_seconds))
    compared = [run.num_identical for run in runs if run.num_identical is not None]
    return {
        "first_token_seconds": _spread([run.first_token_seconds for run in runs]),
        "decode_seconds_per_token": _spread([run.decode_seconds / (max_new_tokens - 1) for run in runs]),
        "speed_up": speed_up,
        "speed_up_with_prefill": _spread(_ratios(plain, runs, lambda run: run.seconds)),
        "tokens_per_forward": num_decoded / num_decode_forwards if num_decode_forwards else None,
        "queries_per_forward": sum(run.num_query_tokens for run in runs) / max(num_decode_forwards, 1),
        "num_forwards": sum(run.num_forwards for run in runs),
        "num_assistant_forwards": sum(run.num_assistant_forwards for run in runs),
        "num_identical": sum(compared) if compared else None,
        "num_rows": sum(run.batch_size for run in runs),
    }


def _ratios(plain: list[Run], runs: list[Run], seconds: Callable[[Run], float]) -> list[float]:
    """Of each round: plain decoding's seconds divided by this contender's, over all kinds of prompt."""
    repeats = sorted({run.repeat for run in runs})
    total = [[sum(seconds(run) for run in of if run.repeat == repeat) for repeat in repeats] for of in (plain, runs)]
    return [base / own for base, own in zip(*total, strict=True)]


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": median(values), "least": min(values), "greatest": max(values)}


def _cost(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """What a forward costs, in forwards of one query token of the same batch after the same prompts."""
    (one,) = (r for r in rows if r["num_query_tokens"] == 1 and _place(r) == _place(row))
    return median(row["seconds"]) / median(one["seconds"])


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return row["batch_size"], row["num_cached"]


def free_query_tokens(forwards: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """The most query tokens a row, of those tried, whose forward takes at most `FREE` times as long as one token's.

    Returns:
        numbers by (batch size, cached tokens).
    """
    free = {}
    for place in dict.fromkeys(map(_place, forwards)):  # widths rise; the first that costs more ends what is free
        rows = (row for row in forwards if _place(row) == place)
        free[place] = [row["num_query_tokens"] for row in takewhile(lambda row: row["cost"] <= FREE, rows)][-1]
    return free


def tables(results: dict[str, Any]) -> list[Table]:
    """A table of each cell, 80 columns wide."""
    made = []
    for cell in results["cells"]:
        table = Table(title=cell_title(cell), box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
        for place, name in enumerate(COLUMNS[:-1]):  # the worst kinds are notes here
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for figures in cell["contenders"]:
            table.add_row(*line(figures)[: len(COLUMNS) - 1])
        made.append(table)
    return made


def cell_title(cell: dict[str, Any]) -> str:
    length = "prompts of their own lengths"
    if cell["prompt_length"] != OWN_LENGTH:
        length = f"prompts of {cell['prompt_length']} tokens"
    return f"batch {cell['batch_size']}, {length}, temperature {cell['temperature']:g}"


def line(figures: dict[str, Any]) -> list[str]:
    """The cells of one contender's line."""
    if figures["refused"] is not None:
        return [figures["name"], "", "", "batch 1 only" if "batch_size" in figures["refused"] else "refused"]
    speed = figures["speed_up"]
    return [
        figures["name"],
        f"{figures['first_token_seconds']['median']:.3f}",
        f"{1e3 * figures['decode_seconds_per_token']['median']:.1f}",
        f"{speed['median']:.2f} ({speed['least']:.2f}-{speed['greatest']:.2f})",
        "" if figures["tokens_per_forward"] is None else f"{figures['tokens_per_forward']:.2f}",
        f"{figures['queries_per_forward']:.1f}",
        f"{figures['peak_bytes'] / 2**20:.0f}",
        "sampled" if figures["num_identical"] is None else f"{figures['num_identical']}/{figures['num_rows']}",
        f"{figures['worst_kind']} {_worst(figures):.2f}",
    ]


def _worst(figures: dict[str, Any]) -> float:
    return figures["kinds"][figures["worst_kind"]]["speed_up"]["median"]


def notes(results: dict[str, Any]) -> list[str]:
    """What the tables leave unsaid, a line each."""
    lines = []
    for cell in results["cells"]:
        worst = [
            f"{figures['name']} {figures['worst_kind']} {_worst(figures):.2f}"
            for figures in cell["contenders"]
            if figures["refused"] is None and figures["name"] != AR
        ]
        if worst:
            lines.append(f"{cell_title(cell)}: speed-up on the worst kind of prompt: {', '.join(worst)}.")
        for figures in cell["contenders"]:
            if (seconds := figures.get("compile_seconds")) is not None:
                lines.append(
                    f"{cell_title(cell)}: {figures['name']} took {seconds:.0f} s to compile, not counted above."
                )
    packed = ", of packed weights" if results["about"]["has_packed_weights"] else ""
    for (batch_size, num_cached), free in free_query_tokens(results["forwards"]).items():
        rows = [r for r in results["forwards"] if _place(r) == (batch_size, num_cached)]
        costs = ", ".join(f"{row['num_query_tokens']}: {row['cost']:.2f}" for row in rows)
        lines.append(
            f"batch {batch_size}, {num_cached} cached tokens: {free} query tokens a row are free here (at most "
            f"{FREE} forwards of one); cost of a forward by query tokens{packed}: {costs}."
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The same tables for a README, after the command that made them."""
    about = results["about"]
    lines = [f"`{about['command']}`, {about['dtype']}, {about['device']}, {about['num_threads']} threads, torch "]
    lines[0] += f"{about['versions']['torch']}, {about['date']}, {about['repeats']} rounds, texts of "
    lines[0] += f"{about['max_new_tokens']} tokens:"
    for cell in results["cells"]:
        names = [" ".join(name.split()) for name in COLUMNS]
        lines += ["", "| " + " | ".join([cell_title(cell), *names[1:]]) + " |", "|---" * len(COLUMNS) + "|"]
        for figures in cell["contenders"]:
            cells = line(figures)
            lines.append("| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |")
    costs = [note for note in notes(results) if "worst kind" not in note]
    return "\n".join([*lines, "", *costs]) + "\n"


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes bench.json, bench.md and, where matplotlib is installed, bench.png.

    Returns:
        what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "bench.json", folder / "bench.md"]
    written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written[1].write_text(markdown(results), encoding="utf-8")
    if (picture := draw(results, folder / "bench.png")) is not None:
        written.append(picture)
    return written


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Speed-up against batch size, and the time of a forward against its query tokens; None where matplotlib is not
    installed (`pip install wavedraft[plot]`)."""
    if not has_matplotlib():
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speeds, forwards = figure.subplots(1, 2)
    first = results["cells"][0]
    alike = [cell for cell in results["cells"] if all(cell[n] == first[n] for n in ("prompt_length", "temperature"))]
    for name in (figures["name"] for figures in first["contenders"]):
        points = [
            (cell["batch_size"], figures["speed_up"])
            for cell in alike
            for figures in cell["contenders"]
            if figures["name"] == name and figures["refused"] is None
        ]
        sizes, spreads = [size for size, _ in points], [spread for _, spread in points]
        middle = [spread["median"] for spread in spreads]
        bars = [
            [spread["median"] - spread["least"] for spread in spreads],
            [spread["greatest"] - spread["median"] for spread in spreads],
        ]
        speeds.errorbar(sizes, middle, yerr=bars, marker="o", capsize=3, label=name)
    sizes = sorted({cell["batch_size"] for cell in alike})
    speeds.set_xscale("log", base=2)
    speeds.set_xticks(sizes, [str(size) for size in sizes])
    speeds.set(xlabel="batch size", ylabel="speed-up over plain decoding", title=cell_title(first).split(", ", 1)[1])
    speeds.axhline(1, color="black", linewidth=0.8)
    speeds.legend(fontsize="small")
    for batch_size, num_cached in dict.fromkeys(map(_place, results["forwards"])):
        rows = [row for row in results["forwards"] if _place(row) == (batch_size, num_cached)]
        widths = [row["num_query_tokens"] for row in rows]
        label = f"batch {batch_size}, {num_cached} cached"
        forwards.plot(widths, [1e3 * row["seconds"]["median"] for row in rows], "o-", label=label)
    forwards.set_xscale("log", base=2)
    forwards.set_yscale("log")
    forwards.set(xlabel="query tokens a row", ylabel="ms a forward", title="free slots of this machine")
    forwards.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path
