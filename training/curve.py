"""The plot of a training run: its loss and its tokens per forward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_curve(log_history: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draws a Trainer's log. Returns None if matplotlib is not installed (`pip install wavedraft[plot]`)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    losses = figure.subplots()
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    names = ("diffusion_loss", "ar_loss") if any("diffusion_loss" in row for row in log_history) else ("loss",)
    for name in names:
        if points := [(row["step"], row[name]) for row in log_history if name in row]:
            losses.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    if points := [(row["step"], row["eval_tokens_per_forward"]) for row in log_history if _is_evaluation(row)]:
        worth = losses.twinx()
        worth.set_ylabel("tokens per forward")
        worth.plot(*zip(*points, strict=True), "o-", color="black", label="tokens per forward")
        worth.legend(loc="upper left")
    losses.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    return path


def _is_evaluation(row: dict[str, Any]) -> bool:
    return "eval_tokens_per_forward" in row
