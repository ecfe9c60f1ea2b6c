"""What a bench measured, as a picture: speed-ups, and the time of a forward against its query tokens."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .contenders import AR
from .forward_costs import place_of
from .tables import cell_title

AXES = {"batch_size": "batch size", "prompt_length": "tokens of a prompt"}


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Speed-ups of one cell as bars, or of several against what they differ in; and the times of forwards.

    Returns:
        the path; None where matplotlib is not installed (`pip install wavedraft[plot]`).
    """
    if not has_matplotlib():
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speeds, forwards = figure.subplots(1, 2)
    axis, alike = swept(results["cells"])
    if axis is None:
        draw_bars(speeds, alike[0])
    else:
        draw_lines(speeds, axis, alike)
    for place in dict.fromkeys(map(place_of, results["forwards"])):
        rows = [row for row in results["forwards"] if place_of(row) == place]
        widths = [row["num_query_tokens"] for row in rows]
        is_noise = rows[0]["cost"] is None
        label = "batch {}, {} cached".format(*place) + ", too noisy" * is_noise
        style = "o:" if is_noise else "o-"
        forwards.plot(widths, [1e3 * row["least_seconds"] for row in rows], style, label=label)
    forwards.set_xscale("log", base=2)
    forwards.set_yscale("log")
    forwards.set(xlabel="query tokens a row", ylabel="ms a forward, at least", title="free slots of this machine")
    forwards.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def swept(cells: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """What is drawn along the axis, and the cells that differ from the first in nothing else; None for one cell."""
    for axis in AXES:
        others = [name for name in (*AXES, "temperature") if name != axis]
        alike = [cell for cell in cells if all(cell[name] == cells[0][name] for name in others)]
        if len(alike) > 1:
            return axis, alike
    return None, cells[:1]


def draw_bars(axes: Any, cell: dict[str, Any]) -> None:
    """A bar for each contender, the first on top."""
    measured = [one for one in cell["contenders"] if one["refused"] is None and one["name"] != AR]
    names, speeds = [one["name"] for one in measured], [one["speed_up"] for one in measured]
    axes.barh(names, [speed["mean"] for speed in speeds], xerr=_bars(speeds), capsize=3, color="tab:blue", alpha=0.7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="speed-up over plain decoding (95% interval)", title=cell_title(cell))


def draw_lines(axes: Any, axis: str, cells: list[dict[str, Any]]) -> None:
    """A line for each contender, over the values of one axis, evenly spaced."""
    values = [str(cell[axis]) for cell in cells]
    for name in (one["name"] for one in cells[0]["contenders"]):
        points = [
            (value, one["speed_up"])
            for value, cell in zip(values, cells, strict=True)
            for one in cell["contenders"]
            if one["name"] == name and one["refused"] is None
        ]
        speeds = [speed for _, speed in points]
        means = [speed["mean"] for speed in speeds]
        axes.errorbar([values.index(value) for value, _ in points], means, yerr=_bars(speeds), marker="o", capsize=3,
                      label=name)  # fmt: skip
    axes.set_xticks(range(len(values)), values)
    axes.axhline(1, color="black", linewidth=0.8)
    shared = ", ".join(part for part in cell_title(cells[0]).split(", ") if not part.startswith(_word(axis)))
    axes.set(xlabel=AXES[axis], ylabel="speed-up over plain decoding (95% interval)", title=shared)
    axes.legend(fontsize="small")


def _word(axis: str) -> str:
    return "batch" if axis == "batch_size" else "prompts"


def _bars(speeds: list[dict[str, Any]]) -> list[list[float]]:
    """How far the interval reaches below and above each mean; not at all where there is none."""
    lows = [speed["mean"] - (speed["low"] or speed["mean"]) for speed in speeds]
    return [lows, [(speed["high"] or speed["mean"]) - speed["mean"] for speed in speeds]]
