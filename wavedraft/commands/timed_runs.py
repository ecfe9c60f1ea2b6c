"""One prompt's decode, timed and counted from outside, and the table of several."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config


@dataclass(frozen=True)
class Run:
    """One prompt's decode.

    Attributes:
        num_forwards: calls of the network without the prefill; of a recurrent-depth model, its core passes divided by
            those of one token at full depth.
        num_core_passes: of a recurrent-depth model.
        wavefront: with `record_wavefront`, a recurrent-depth model's `WavefrontStep` of each decode step.
    """

    new_ids: list[int]
    num_forwards: float
    seconds: float
    num_core_passes: int | None = None
    wavefront: list[Any] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """The token the prefill decides is not counted; NaN for a text of that token alone."""
        return (len(self.new_ids) - 1) / self.num_forwards if self.num_forwards else float("nan")


def timed_generate(model: Any, inputs: Any, **options: Any) -> Run:
    """One decode of a TiDAR checkpoint, its forwards counted by a hook."""
    num_calls = 0

    def count(module: Any, args: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    handle = model.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    return Run(ids, num_calls - 1, seconds)


def timed_recurrent(model: Any, inputs: Any, **options: Any) -> Run:
    """One decode of a recurrent-depth model, its core passes as the decode itself counts them."""
    start = time.perf_counter()
    output = model.generate(**inputs, return_dict_in_generate=True, **options)
    seconds = time.perf_counter() - start
    new_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    num_forwards = output.num_core_passes / output.num_prefill_core_passes
    return Run(new_ids, num_forwards, seconds, output.num_core_passes, getattr(output, "wavefront", None))


def num_calls(run: Run) -> int:
    """Forwards, or core passes of a recurrent-depth model, after the prompt was read."""
    return int(run.num_forwards) if run.num_core_passes is None else run.num_core_passes


def told_of(run: Run) -> str:
    """What a decode took, as one line."""
    calls = f"{num_calls(run)} {'forwards' if run.num_core_passes is None else 'core passes'}"
    return f"{len(run.new_ids)} tokens, {calls}, {run.tokens_per_forward:.2f} tokens per forward"


def why_different(model: Any, trust: float = 1.0) -> str:
    """Why a text may be another than plain decoding's, in a sentence or two."""
    if is_recurrent_config(model.config):
        return "Only the policy exact promises the text of full depth."
    if trust < 1:
        return f"With trust={trust:g} a text need not be plain decoding's."
    if (dtype := str(model.dtype).removeprefix("torch.")) == "float32":
        return "In float32 they must be the same. Please report it, with the prompt and the settings."
    return (
        f"In {dtype} two tokens can be nearly equal, and forwards of several tokens round differently from those of "
        "one. The mode tie-safe (exact), which is not compiled, writes plain decoding's text."
    )


def is_identical(drafted: Run, plain: Run) -> bool:
    return drafted.new_ids == plain.new_ids


def rows_of(prompts: list[str], drafted_runs: list[Run], plain_runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each prompt and one for all, with the plain decode beside where there is one.

    The first column names the prompt and has no title.
    """
    calls = "forwards" if drafted_runs[0].num_core_passes is None else "core passes"
    titles = ["", "tokens", calls, "tokens per forward", "seconds"]

    def total(runs: list[Run]) -> Run:
        decided = [token for run in runs for token in run.new_ids[1:]]
        passes = None if runs[0].num_core_passes is None else sum(run.num_core_passes or 0 for run in runs)
        return Run([0, *decided], sum(run.num_forwards for run in runs), sum(run.seconds for run in runs), passes)

    def num_calls(run: Run) -> str:
        return f"{run.num_forwards if run.num_core_passes is None else run.num_core_passes}"

    def row(name: str, num_tokens: int, run: Run, plain: list[Run]) -> list[str]:
        cells = [str(num_tokens), num_calls(run), f"{run.tokens_per_forward:.2f}", f"{run.seconds:.1f}"]
        return [name, *cells, *(cell for p in plain for cell in (num_calls(p), f"{p.seconds:.1f}"))]

    rows = [
        row(shortened(prompt), len(run.new_ids), run, plain_runs[place : place + 1])
        for place, (prompt, run) in enumerate(zip(prompts, drafted_runs, strict=True))
    ]
    if len(prompts) > 1:
        num_tokens = sum(len(run.new_ids) for run in drafted_runs)
        rows.append(row("all", num_tokens, total(drafted_runs), [total(plain_runs)] if plain_runs else []))
    return titles + ([f"plain {calls}", "plain seconds"] if plain_runs else []), rows


def print_runs(prompts: list[str], drafted_runs: list[Run], plain_runs: list[Run], console: Console) -> None:
    """Prints the table of these runs; where it is too wide, each row as a line of words."""
    titles, rows = rows_of(prompts, drafted_runs, plain_runs)
    table = Table(box=None)
    table.add_column("prompt", no_wrap=True, vertical="bottom")
    for title in titles[1:]:
        first, _, last = title.rpartition(" ")
        table.add_column(f"{first}\n{last}", justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(escape, cells))
    if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        told = ", ".join(f"{title} {cell}" for title, cell in zip(titles[1:], cells, strict=True))
        console.print(f"{name}: {told}", markup=False, highlight=False)


def shortened(prompt: str, length: int = 20) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else line[: length - 1] + "…"
