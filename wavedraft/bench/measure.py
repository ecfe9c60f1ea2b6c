"""Every way to decode the same prompts with the same weights, in turn, timed and counted from outside.

B rows, P prompt tokens, F filler tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..generation.drafting.options_tidar import ACCEPTANCE
from ..generation.execution.model_form import in_plain_form
from ..generation.kept_with_model import kept_with
from .contenders import Contender, reads_packed
from .instruments import Counts, count_uncompiled, counted, peak_bytes, time_forwards, timed, waited_seconds
from .settings import OWN_LENGTH, Settings

SHIFT = 31  # of the text that fills a row up, against the row before: rows of one prompt are not one text
Batch = tuple[torch.Tensor, torch.Tensor]  # ids and attention mask, [B, P]
Cell = tuple[int, int | str, float]  # batch size, prompt length, temperature
CellOf = tuple[int, int | str, float, str]  # the same, and the name of a contender


@dataclass
class Run:
    """One call of `generate`.

    Attributes:
        seconds: by the clock.
        first_token_seconds: until the first new token was handed out.
        cpu_seconds: of all threads of this process.
        waited_seconds: in which threads could run, but had no core; None where the system does not tell.
        num_forwards: calls of the network, the one that reads the prompt among them.
        num_query_tokens: tokens of one row that all calls but the first read.
        num_assistant_forwards: calls of the assistant.
        num_identical: rows equal to plain decoding's, counted when its round is over; None where sampled.
    """

    batch_size: int
    prompt_length: int | str
    temperature: float
    kind: str
    batch: int
    repeat: int
    contender: str
    seconds: float
    first_token_seconds: float
    num_forwards: int
    num_query_tokens: int
    num_assistant_forwards: int
    cpu_seconds: float = field(default=0.0, init=False)
    waited_seconds: float | None = field(default=None, init=False)
    num_identical: int | None = field(default=None, init=False)

    @property
    def decode_seconds(self) -> float:
        """From the first new token to the last."""
        return self.seconds - self.first_token_seconds


@dataclass
class Bench:
    """What `bench` measured.

    Attributes:
        contenders: names, plain decoding first.
        runs: in the order in which they were run.
        refusals: why a contender has no runs, by (batch size, prompt length, temperature, contender).
        peak_bytes: most memory in tensors, the weights not counted, by the same.
        compile_seconds: how much longer the first call took than the next, by the same.
        forward_seconds: rows of batch_size, num_cached, num_query_tokens and the seconds of a plain forward, one a
            repeat.
    """

    contenders: list[str]
    runs: list[Run] = field(default_factory=list)
    refusals: dict[CellOf, str] = field(default_factory=dict)
    peak_bytes: dict[CellOf, int] = field(default_factory=dict)
    compile_seconds: dict[CellOf, float] = field(default_factory=dict)
    forward_seconds: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def bench(
    contenders: list[Contender],
    prompts: dict[str, list[torch.Tensor]],
    filler: torch.Tensor,
    settings: Settings,
    on_run: Callable[[], None] = lambda: None,
) -> Bench:
    """Measures all contenders: all of them decode one batch before the next batch, and another begins each time.

    Each kind of prompt has at most `settings.num_batches` batches, and fewer where they would repeat a prompt.

    Args:
        contenders: plain decoding first.
        prompts: ids [P] of the prompts of each kind; a batch takes those of one kind in turn.
        filler: ids [F] that fill prompts up, put in after a prompt's first id.
        on_run: called after each timed run.
    """
    results = Bench([contender.name for contender in contenders])
    models = {id(contender.model): contender.model for contender in contenders}
    models |= {id(a): a for contender in contenders if (a := contender.keywords.get("assistant_model")) is not None}
    with torch.random.fork_rng(), texts_of_one_length(list(models.values())):
        for length, batch_size in product(settings.prompt_lengths, settings.batch_sizes):
            batches = {
                (kind, batch): batch_of(of_kind, batch_size, length, filler, batch)
                for kind, of_kind in prompts.items()
                for batch in range(num_batches_of(of_kind, batch_size, settings))
            }
            first_ids, first_mask = next(iter(batches.values()))
            with in_plain_form(contenders[0].model, reads_packed(contenders)):
                results.forward_seconds += time_forwards(contenders[0].model, first_ids, first_mask, settings.repeats)
            for temperature in settings.temperatures:
                _bench_cell(results, contenders, batches, settings, (batch_size, length, temperature), on_run)
    return results


def num_runs(contenders: list[Contender], prompts: dict[str, Any], settings: Settings) -> int:
    """Timed runs of a bench, if nothing is refused."""
    num_batches = sum(
        num_batches_of(of_kind, batch_size, settings)
        for batch_size, of_kind in product(settings.batch_sizes, prompts.values())
    )
    num_others = len(settings.prompt_lengths) * len(settings.temperatures) * settings.repeats
    return num_batches * num_others * len(contenders)


def num_batches_of(prompts: Sequence[Any], batch_size: int, settings: Settings) -> int:
    """Batches of one kind of prompt: no prompt is in two of them."""
    return min(settings.num_batches, max(1, len(prompts) // batch_size))


def batch_of(
    prompts: list[torch.Tensor], batch_size: int, length: int | str, filler: torch.Tensor, batch: int = 0
) -> Batch:
    """The B prompts of one batch, taken in turn, each filled or cut to `length`, or padded on the left.

    Returns:
        ids and attention mask, [B, P].
    """
    rows = [prompts[(batch * batch_size + row) % len(prompts)] for row in range(batch_size)]
    if length != OWN_LENGTH:
        rows = [_of_length(ids, int(length), filler.roll(-row * SHIFT)) for row, ids in enumerate(rows)]
    longest = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


def _of_length(ids: torch.Tensor, length: int, filler: torch.Tensor) -> torch.Tensor:
    """The last `length` of the ids; or their first one, as much filler as there is room for, and then all of them."""
    if (room := length - len(ids)) <= 0:
        return ids[-length:]
    filling = filler.repeat(-(-room // len(filler)))[: room - 1]
    return torch.cat([ids[:1], filling, ids])


def _bench_cell(
    results: Bench,
    contenders: list[Contender],
    batches: dict[tuple[str, int], Batch],
    settings: Settings,
    cell: Cell,
    on_run: Callable[[], None],
) -> None:
    """All contenders on batches of one shape at one temperature."""
    options = _sampling_keywords(cell[2]) | {"max_new_tokens": settings.max_new_tokens}
    running = _warmed_up(results, contenders, batches, options, cell)
    plain_texts: dict[tuple[str, int], torch.Tensor] = {}
    # Of plain decoding, which has as many forwards in every round.
    counts_apart: dict[tuple[str, int], Counts] = {}
    for repeat, (place, (key, (ids, mask))) in product(range(settings.repeats), enumerate(batches.items())):
        turn = (place + repeat) % len(running)
        at: dict[str, Any] = {"batch_size": cell[0], "prompt_length": cell[1], "temperature": cell[2]}
        at |= {"kind": key[0], "batch": key[1], "repeat": repeat}
        runs = []
        for contender in running[turn:] + running[:turn]:
            torch.manual_seed(repeat)
            if contender.is_counted_apart and key not in counts_apart:
                counts_apart[key] = count_uncompiled(contender, ids, mask, options)
            counts = counts_apart[key] if contender.is_counted_apart else None
            run, sequences = _measured(contender, (ids, mask), options, at, counts)
            if contender is contenders[0]:
                plain_texts.setdefault(key, sequences)
            runs.append((run, sequences))
            on_run()
        for run, sequences in runs:
            if not options["do_sample"]:
                run.num_identical = int((sequences == plain_texts[key]).all(dim=1).sum())
            results.runs.append(run)


def _measured(
    contender: Contender, batch: Batch, options: dict[str, Any], at: dict[str, Any], counts_apart: Counts | None
) -> tuple[Run, torch.Tensor]:
    """One call of `generate` and its sequences. A text for which something was compiled is decoded again: the planner
    may choose a plan for the first time after many texts.

    Args:
        at: what `Run` says of the batch.
        counts_apart: of an earlier run, where this one's forwards cannot be counted.
    """
    functions = kept_with(contender.model).compiled
    while True:
        num_compiled, waited, cpu = len(functions), waited_seconds(), time.process_time()
        with counted(contender) if counts_apart is None else nullcontext(counts_apart) as counts:
            sequences, seconds, first_token_seconds = timed(contender, *batch, options)
        if len(functions) == num_compiled:
            break
    run = Run(
        **at,
        contender=contender.name,
        seconds=seconds,
        first_token_seconds=first_token_seconds,
        num_forwards=counts.num_forwards,
        num_query_tokens=counts.num_query_tokens,
        num_assistant_forwards=counts.num_assistant_forwards,
    )
    run.cpu_seconds = time.process_time() - cpu
    run.waited_seconds = None if waited is None else (waited_seconds() or 0.0) - waited
    return run, sequences


def _warmed_up(
    results: Bench,
    contenders: list[Contender],
    batches: dict[tuple[str, int], Batch],
    options: dict[str, Any],
    cell: Cell,
) -> list[Contender]:
    """The contenders that can decode these batches, each run before anything is timed. Notes why others cannot."""
    running = []
    for contender in contenders:
        try:
            results.peak_bytes[(*cell, contender.name)] = _warm_up(results, contender, batches, options, cell)
        except ValueError as error:
            if contender.model is not contenders[0].model:
                raise
            results.refusals[(*cell, contender.name)] = str(error).splitlines()[0]  # transformers': it takes no batches
            continue
        running.append(contender)
    return running


def _warm_up(
    results: Bench,
    contender: Contender,
    batches: dict[tuple[str, int], Batch],
    options: dict[str, Any],
    cell: Cell,
) -> int:
    """Runs a contender once for what only a first call pays, and once for its memory, in bytes, which is returned."""
    if contender.is_compiled:
        # Prompts of other lengths have caches of other lengths, which are compiled anew.
        first = sum(timed(contender, *batch, options)[1] for batch in batches.values())
        again = sum(timed(contender, *batch, options)[1] for batch in batches.values())
        results.compile_seconds[(*cell, contender.name)] = max(first - again, 0.0)
    (ids, mask), *_ = batches.values()
    timed(contender, ids, mask, options | {"max_new_tokens": 2})
    return peak_bytes(lambda: timed(contender, ids, mask, options), contender.model.device)


def _sampling_keywords(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


@contextmanager
def texts_of_one_length(models: list[PreTrainedModel]) -> Iterator[None]:
    """Puts transformers' own defaults in place of the models' generation configs: no end token, no penalties. What
    drafts go by is kept: the record of how often they stand, and whether they may be copied."""
    originals = [model.generation_config for model in models]
    for model, original in zip(models, originals, strict=True):
        model.generation_config = GenerationConfig()
        for name in (ACCEPTANCE, "draft_copies"):
            if (kept := getattr(original, name, None)) is not None:
                setattr(model.generation_config, name, kept)
    try:
        yield
    finally:
        for model, config in zip(models, originals, strict=True):
            model.generation_config = config
