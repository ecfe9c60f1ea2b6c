"""One prompt's decode, timed and counted from outside, and the table of several."""

import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table


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
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
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


def is_identical(drafted_runs: list[Run], plain_runs: list[Run]) -> bool:
    return [run.new_ids for run in drafted_runs] == [run.new_ids for run in plain_runs]


def runs_table(prompts: list[str], drafted_runs: list[Run], plain_runs: list[Run]) -> Table:
    """A row for each prompt and one for all, the plain decode beside the drafting one where there is one."""
    table = Table(box=None)
    table.add_column("\nprompt", no_wrap=True)
    calls = "\nforwards" if drafted_runs[0].num_core_passes is None else "core\npasses"
    plain_columns = [f"plain {calls}".replace(" \n", "\n"), "plain\nseconds"] if plain_runs else []
    for name in ["\ntokens", calls, "tokens per\nforward", "\nseconds", *plain_columns]:
        table.add_column(name, justify="right")

    def total(runs: list[Run]) -> Run:
        decided = [token for run in runs for token in run.new_ids[1:]]
        passes = None if runs[0].num_core_passes is None else sum(run.num_core_passes or 0 for run in runs)
        return Run([0, *decided], sum(run.num_forwards for run in runs), sum(run.seconds for run in runs), passes)

    def num_calls(run: Run) -> str:
        return f"{run.num_forwards if run.num_core_passes is None else run.num_core_passes}"

    def add(name: str, num_tokens: int, run: Run, plain: list[Run]) -> None:
        cells = [str(num_tokens), num_calls(run), f"{run.tokens_per_forward:.2f}", f"{run.seconds:.1f}"]
        table.add_row(name, *cells, *(cell for p in plain for cell in (num_calls(p), f"{p.seconds:.1f}")))

    for place, (prompt, run) in enumerate(zip(prompts, drafted_runs, strict=True)):
        add(shortened(prompt), len(run.new_ids), run, plain_runs[place : place + 1])
    if len(prompts) > 1:
        num_tokens = sum(len(run.new_ids) for run in drafted_runs)
        add("all", num_tokens, total(drafted_runs), [total(plain_runs)] if plain_runs else [])
    return table


def shortened(prompt: str, length: int = 20) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else line[: length - 1] + "…"
