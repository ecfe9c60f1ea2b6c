"""What a bench measured, as numbers for a program: what `bench.json` holds.

One cell is a batch size, a prompt length and a temperature.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..generation.stock_model import attention_of
from .contenders import AR, Contender, reads_packed
from .forward_costs import forwards_with_costs
from .measure import Bench, Run
from .paired import is_noisy, paired_ratio
from .picture import draw
from .settings import Settings
from .tables import markdown


def report(
    results: Bench, model: PreTrainedModel, contenders: list[Contender], settings: Settings, options: dict[str, Any]
) -> dict[str, Any]:
    """All that was measured, and with what, ready for JSON.

    Args:
        options: what else the caller chose; it is written down as it is.
    """
    device, max_new_tokens = model.device, settings.max_new_tokens
    about = {
        "command": " ".join(["wavedraft", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "num_threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_of(model.config),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **options,
        **asdict(settings),
        "has_packed_weights": reads_packed(contenders),
    }
    cells = list(dict.fromkeys((run.batch_size, run.prompt_length, run.temperature) for run in results.runs))
    return {
        "about": about,
        "cells": [
            {
                "batch_size": cell[0],
                "prompt_length": cell[1],
                "temperature": cell[2],
                "waited_share": waited_share([run for run in results.runs if _cell(run) == cell]),
                "contenders": [_figures(results, cell, name, max_new_tokens) for name in results.contenders],
            }
            for cell in cells
        ],
        "forwards": [
            {**row, "seconds": _spread(row["seconds"])} for row in forwards_with_costs(results.forward_seconds)
        ],
        "runs": [vars(run) for run in results.runs],
    }


def processor() -> str:
    """The name of the CPU, and whether it multiplies bfloat16, where torch tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has it
    if "avx2" not in found:
        return name
    has_products = found.get("avx512_bf16") or found.get("amx_bf16")
    return f"{name} ({'with' if has_products else 'no'} products of bfloat16)"


def _cell(run: Run) -> tuple[int, int | str, float]:
    return run.batch_size, run.prompt_length, run.temperature


def waited_share(runs: list[Run]) -> float | None:
    """The share of the time in which threads that could run waited for a core, at most 1; None where the system does
    not tell."""
    waited = [run.waited_seconds for run in runs if run.waited_seconds is not None]
    return min(1.0, sum(waited) / torch.get_num_threads() / sum(run.seconds for run in runs)) if waited else None


def _figures(results: Bench, cell: tuple[int, int | str, float], name: str, max_new_tokens: int) -> dict[str, Any]:
    """One line of the table, and the same for each kind of prompt."""
    if (reason := results.refusals.get((*cell, name))) is not None:
        return {"name": name, "refused": reason}
    in_cell = [run for run in results.runs if _cell(run) == cell]
    plain, runs = ([run for run in in_cell if run.contender == which] for which in (AR, name))
    kinds = {}
    for kind in dict.fromkeys(run.kind for run in runs):
        plain_of, runs_of = ([run for run in of if run.kind == kind] for of in (plain, runs))
        kinds[kind] = _summary(plain_of, runs_of, max_new_tokens)
    worst = min(kinds, key=lambda kind: kinds[kind]["speed_up"]["mean"])
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
    speed_up = _ratio(plain, runs, lambda run: run.decode_seconds)
    compared = [run.num_identical for run in runs if run.num_identical is not None]
    return {
        "first_token_seconds": _spread([run.first_token_seconds for run in runs]),
        "decode_seconds_per_token": _spread([run.decode_seconds / (max_new_tokens - 1) for run in runs]),
        "speed_up": speed_up,
        "is_noisy": is_noisy(speed_up),
        "speed_up_with_prefill": _ratio(plain, runs, lambda run: run.seconds),
        "speed_up_in_cpu_seconds": _ratio(plain, runs, lambda run: run.cpu_seconds),
        "tokens_per_forward": num_decoded / num_decode_forwards if num_decode_forwards else None,
        "queries_per_forward": sum(run.num_query_tokens for run in runs) / max(num_decode_forwards, 1),
        "num_forwards": sum(run.num_forwards for run in runs),
        "num_assistant_forwards": sum(run.num_assistant_forwards for run in runs),
        "num_identical": sum(compared) if compared else None,
        "num_rows": sum(run.batch_size for run in runs),
    }


def _ratio(plain: list[Run], runs: list[Run], seconds: Callable[[Run], float]) -> dict[str, Any]:
    """Plain decoding's seconds divided by this contender's, batch by batch and round by round."""
    plain_seconds = {(run.kind, run.batch, run.repeat): seconds(run) for run in plain}
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run in runs:
        pair = plain_seconds[run.kind, run.batch, run.repeat], seconds(run)
        pairs.setdefault((run.kind, run.batch), []).append(pair)
    return paired_ratio(pairs)


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": median(values), "least": min(values), "greatest": max(values)}


def save(results: dict[str, Any], output: Path) -> list[Path]:
    """Writes the figures into `output` where it ends in .json; else bench.json, bench.md and, where matplotlib is
    installed, bench.png into the folder `output`.

    Returns:
        what was written.
    """
    is_file = output.suffix == ".json"
    folder = output.parent if is_file else output
    folder.mkdir(parents=True, exist_ok=True)
    written = [output if is_file else folder / "bench.json"]
    written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not is_file:
        written.append(folder / "bench.md")
        written[1].write_text(markdown(results), encoding="utf-8")
        if (picture := draw(results, folder / "bench.png")) is not None:
            written.append(picture)
    return written
