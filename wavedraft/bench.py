"""Every way to decode the same prompts with the same weights, in turn, timed and counted from outside.

B rows, P prompt tokens, N new tokens, Q query tokens of a forward, K drafted tokens.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from .before_loading import check_folder
from .cli_keywords import compiled_keywords
from .generation.cache_name import CACHE
from .generation.drafting.draft_network import DraftNetwork
from .generation.drafting.step_runner import StepRunner
from .generation.execution.model_form import in_plain_form

AR = "AR"
OWN_LENGTH = "own"
SHIFT = 31  # of the text that fills a row up, against the row before: rows of one prompt are not one text
QUERY_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        batch_sizes: B.
        prompt_lengths: P: prompts are filled with other text, or cut, at their beginning; "own" leaves them as they
            are, padded on the left.
        temperatures: 0 decodes greedily; others sample from the whole vocabulary.
        draft_lengths: K.
        num_branches: numbers of accepted tokens that are drafted behind: an integer, "all", or "auto", which chooses K
            too.
        num_batches: of each kind of prompt.
        repeats: rounds; in each every contender decodes every batch once.
        max_new_tokens: N, of every text: no end token ends one.
        num_lookup_tokens: `prompt_lookup_num_tokens` of transformers' prompt lookup.
        has_compiled: measure plain decoding and drafts with a static cache and torch.compile too; "auto" is compiled
            with the shortest of `draft_lengths`, which it keeps to.
        has_packed_weights: our own contenders read packed weights (`packed_weights` of `generate`).
        only: names of the contenders that are measured beside plain decoding; where empty, all.
    """

    batch_sizes: tuple[int, ...] = (1, 4)
    prompt_lengths: tuple[int | str, ...] = (OWN_LENGTH,)
    temperatures: tuple[float, ...] = (0.0,)
    draft_lengths: tuple[int, ...] = (8,)
    num_branches: tuple[int | str, ...] = (1, 3, "all", "auto")
    num_batches: int = 1
    repeats: int = 3
    max_new_tokens: int = 32
    num_lookup_tokens: int = 10
    has_compiled: bool = False
    has_packed_weights: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A text of one token has no decode to time.
        for name, least in (("num_batches", 1), ("repeats", 1), ("num_lookup_tokens", 1), ("max_new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}.")
        lists = ("batch_sizes", "prompt_lengths", "temperatures", "draft_lengths", "num_branches")
        for name in lists:
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one, but is empty.")
        for name, word in (("batch_sizes", None), ("prompt_lengths", OWN_LENGTH), ("draft_lengths", None)):
            for value in getattr(self, name):
                if value != word and value < 1:
                    raise ValueError(f"`{name}` must be integers of 1 or more, but one is {value}.")
        for temperature in self.temperatures:
            if not 0 <= temperature < float("inf"):
                raise ValueError(f"`temperatures` must be numbers of 0 or more, but one is {temperature}.")
        for branches in self.num_branches:
            if branches not in ("all", "auto") and not 1 <= int(branches) <= max(self.draft_lengths):
                raise ValueError(
                    "`num_branches` must be 'all', 'auto' or integers from 1 to the longest of `draft_lengths` "
                    f"({max(self.draft_lengths)}), but one is {branches}."
                )

    def check_against(self, config: Any, prompts: dict[str, list[torch.Tensor]]) -> None:
        """Refuses what the checkpoint of this `config` cannot do with prompts of these ids [P], before it is loaded."""
        taught, longest = config.tidar_config["draft_length"], max(self.draft_lengths)
        if longest > taught:
            raise ValueError(
                f"`draft_lengths` must be at most {taught}, the length this checkpoint was taught to draft "
                f"(`config.tidar_config.draft_length`), but one is {longest}."
            )
        if "auto" in self.num_branches and taught == 1:
            raise ValueError("`num_branches` cannot be 'auto' where the checkpoint drafts 1 token. Leave it out.")
        own = max(len(ids) for of_kind in prompts.values() for ids in of_kind)
        longest_prompt = max(own if length == OWN_LENGTH else int(length) for length in self.prompt_lengths)
        limit = config.get_text_config().max_position_embeddings
        if longest_prompt + self.max_new_tokens > limit:
            raise ValueError(
                f"Prompts and new tokens must fit into {limit} positions (`config.max_position_embeddings`), but the "
                f"longest prompt has {longest_prompt} tokens and `max_new_tokens` is {self.max_new_tokens}."
            )


@dataclass(frozen=True)
class Contender:
    """A way to decode.

    Attributes:
        keywords: of `generate`.
        is_compiled: a first run compiles.
        is_counted_apart: the whole network is compiled, and a hook on it would be too: an uncompiled run is counted.
        is_counted_within: its steps are CUDA graphs, which a hook would forbid: what calls the network is counted.
    """

    name: str
    model: PreTrainedModel
    keywords: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False
    is_counted_apart: bool = False
    is_counted_within: bool = False

    def packed(self) -> "Contender":
        """The same with packed weights."""
        return replace(self, name=f"{self.name} packed", keywords=self.keywords | {"packed_weights": True})


@dataclass(frozen=True)
class Run:
    """One call of `generate`.

    Attributes:
        first_token_seconds: until the first new token was handed out.
        num_forwards: calls of the network, the one that reads the prompt among them.
        num_query_tokens: tokens of one row that its calls read, but for the first call.
        num_assistant_forwards: calls of the assistant.
        num_identical: rows equal to plain decoding's; None where sampled.
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
    num_identical: int | None

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
        peak_bytes: most memory in tensors beside the weights, by the same.
        compile_seconds: what the first call took longer than the next, by the same.
        forward_seconds: rows of batch_size, num_cached, num_query_tokens and seconds, one a repeat, of a plain forward.
    """

    contenders: list[str]
    runs: list[Run] = field(default_factory=list)
    refusals: dict[tuple[int, int | str, float, str], str] = field(default_factory=dict)
    peak_bytes: dict[tuple[int, int | str, float, str], int] = field(default_factory=dict)
    compile_seconds: dict[tuple[int, int | str, float, str], float] = field(default_factory=dict)
    forward_seconds: list[dict[str, Any]] = field(default_factory=list)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the same memory, to be made before an adapter is loaded: plain decoding as it is without us.

    Its parameters are its own, so that what an adapter does to those of `model` (it freezes them) is not done to them.
    """
    shared = {id(parameter): nn.Parameter(parameter.data) for parameter in model.parameters()}
    stock = copy.deepcopy(model, shared)
    stock.__class__ = model.stock_class
    return stock


def load_assistant(assistant: str, dtype: torch.dtype | str, tokenizer: Any) -> PreTrainedModel:
    """A smaller stock model, which must speak the same tokens."""
    check_folder(assistant)
    if AutoTokenizer.from_pretrained(assistant).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--assistant must have the model's own vocabulary, but that of {assistant} is another one.")
    return AutoModelForCausalLM.from_pretrained(assistant, dtype=dtype).eval()


def contenders_of(
    model: PreTrainedModel, stock: PreTrainedModel, settings: Settings, assistant: PreTrainedModel | None = None
) -> list[Contender]:
    """Plain decoding of the stock model first, then transformers' own ways to be faster, then ours.

    Raises:
        ValueError: `settings.only` names one that is not among them.
    """
    found = [Contender(AR, stock)]
    if settings.has_compiled:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True
        keywords = {"cache_implementation": "static", "compile_config": compile_config}
        found.append(Contender("AR compiled", stock, keywords, is_compiled=True, is_counted_apart=True))
    found.append(Contender("lookup", stock, {"prompt_lookup_num_tokens": settings.num_lookup_tokens}))
    if assistant is not None:
        found.append(Contender("assisted", stock, {"assistant_model": assistant}))
    found.append(Contender("no drafts", model, {"draft_length": 0}))
    for length, branches in product(settings.draft_lengths, settings.num_branches):
        number = length if branches == "all" else branches
        if number != "auto" and int(number) <= length:
            found.append(Contender(f"K={length} B={number}", model, {"draft_length": length, "num_branches": number}))
    if "auto" in settings.num_branches:
        found.append(Contender("auto", model, {"num_branches": "auto"}))
    if settings.has_compiled:
        compiled = compiled_keywords()
        is_on_gpu = model.device.type == "cuda"
        ours = [contender for contender in found if contender.keywords.get("draft_length")]
        if "auto" in settings.num_branches and (shortest := min(settings.draft_lengths)) > 1:
            auto = {"draft_length": shortest, "num_branches": "auto"}
            ours.append(Contender(f"K={shortest} auto", model, auto))
        found += [
            Contender(
                f"{contender.name} compiled",
                model,
                contender.keywords | compiled,
                is_compiled=True,
                is_counted_within=is_on_gpu,
            )
            for contender in ours
        ]
    if settings.has_packed_weights:
        found = [contender if contender.model is stock else contender.packed() for contender in found]
    by_name = {contender.name: contender for contender in found}
    if unknown := [name for name in settings.only if name not in by_name]:
        raise ValueError(f"There is no {unknown[0]!r} among what these options measure: {', '.join(by_name)}.")
    return [one for name, one in by_name.items() if name == AR or name in settings.only or not settings.only]


@torch.no_grad()
def bench(
    contenders: list[Contender],
    prompts: dict[str, list[torch.Tensor]],
    filler: torch.Tensor,
    settings: Settings,
    on_run: Callable[[], None] = lambda: None,
) -> Bench:
    """Measures all contenders, each prompt with every one of them before the next prompt, in an order that turns.

    Args:
        contenders: plain decoding first.
        prompts: ids [P] of the prompts of each kind; a batch takes those of one kind in turn.
        filler: [F] ids that fill prompts up, after their first.
        on_run: called after each timed run.
    """
    found = Bench([contender.name for contender in contenders])
    models = {id(contender.model): contender.model for contender in contenders}
    models |= {id(a): a for contender in contenders if (a := contender.keywords.get("assistant_model")) is not None}
    with torch.random.fork_rng(), _texts_of_one_length(list(models.values())):
        for length, batch_size in product(settings.prompt_lengths, settings.batch_sizes):
            batches = {
                (kind, batch): batch_of(of_kind, batch_size, length, filler, batch)
                for kind, of_kind in prompts.items()
                for batch in range(settings.num_batches)
            }
            first_ids, first_mask = next(iter(batches.values()))
            with in_plain_form(contenders[0].model, settings.has_packed_weights):
                found.forward_seconds += time_forwards(contenders[0].model, first_ids, first_mask, settings.repeats)
            for temperature in settings.temperatures:
                _bench_cell(found, contenders, batches, settings, (batch_size, length, temperature), on_run)
    return found


def num_runs(contenders: list[Contender], prompts: dict[str, Any], settings: Settings) -> int:
    """Timed runs of a bench, if nothing is refused."""
    num_cells = len(settings.batch_sizes) * len(settings.prompt_lengths) * len(settings.temperatures)
    return num_cells * settings.repeats * settings.num_batches * len(prompts) * len(contenders)


def batch_of(
    prompts: list[torch.Tensor], batch_size: int, length: int | str, filler: torch.Tensor, batch: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The B prompts of one batch of all there are, going round, each filled or cut to `length` or padded on the left.

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
    """The last `length` of the ids, or all behind their first one and as much filler as there is room for."""
    if (room := length - len(ids)) <= 0:
        return ids[-length:]
    filling = filler.repeat(-(-room // len(filler)))[: room - 1]
    return torch.cat([ids[:1], filling, ids])


def _bench_cell(
    found: Bench,
    contenders: list[Contender],
    batches: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
    cell: tuple[int, int | str, float],
    on_run: Callable[[], None],
) -> None:
    """All contenders on batches of one shape at one temperature."""
    options = _sampling_keywords(cell[2]) | {"max_new_tokens": settings.max_new_tokens}
    running = []
    for contender in contenders:
        try:
            found.peak_bytes[(*cell, contender.name)] = _warm_up(found, contender, batches, options, cell)
        except ValueError as error:
            if contender.model is not contenders[0].model:
                raise
            found.refusals[(*cell, contender.name)] = str(error).splitlines()[0]  # transformers': it takes no batches
            continue
        running.append(contender)
    texts: dict[tuple[str, int], torch.Tensor] = {}
    counts_apart: dict[tuple[str, int], Counts] = {}  # of plain decoding, which runs a forward a token in every round
    for repeat, (turn, ((kind, number), (ids, mask))) in product(range(settings.repeats), enumerate(batches.items())):
        turn = (turn + repeat) % len(running)
        runs = []
        for contender in running[turn:] + running[:turn]:
            torch.manual_seed(repeat)
            if contender.is_counted_apart:
                if (kind, number) not in counts_apart:
                    uncompiled = {"compile_config": None, "disable_compile": True}
                    with counted(contender) as counts_apart[kind, number]:
                        _generate(contender.model, ids, mask, options | contender.keywords | uncompiled)
                counts = counts_apart[kind, number]
                sequences, seconds, first = timed(contender, ids, mask, options)
            else:
                with counted(contender) as counts:
                    sequences, seconds, first = timed(contender, ids, mask, options)
            if contender is contenders[0]:
                texts.setdefault((kind, number), sequences)
            runs.append((contender, sequences, seconds, first, counts))
            on_run()
        for contender, sequences, seconds, first, counts in runs:
            num_identical = None
            if not options["do_sample"]:
                num_identical = int((sequences == texts[kind, number]).all(dim=1).sum())
            batch_size, length, temperature = cell
            found.runs.append(
                Run(
                    batch_size=batch_size,
                    prompt_length=length,
                    temperature=temperature,
                    kind=kind,
                    batch=number,
                    repeat=repeat,
                    contender=contender.name,
                    seconds=seconds,
                    first_token_seconds=first,
                    num_forwards=len(counts.num_queries),
                    num_query_tokens=sum(counts.num_queries[1:]),
                    num_assistant_forwards=counts.num_assistant_forwards,
                    num_identical=num_identical,
                )
            )


def _warm_up(
    found: Bench,
    contender: Contender,
    batches: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]],
    options: dict[str, Any],
    cell: tuple[int, int | str, float],
) -> int:
    """Runs a contender once for what only a first call pays, and once for its memory, which is returned in bytes."""
    if contender.is_compiled:
        # Prompts of other lengths have caches of other lengths, which are compiled anew.
        first = sum(timed(contender, *batch, options)[1] for batch in batches.values())
        again = sum(timed(contender, *batch, options)[1] for batch in batches.values())
        found.compile_seconds[(*cell, contender.name)] = first - again
    (ids, mask), *_ = batches.values()
    timed(contender, ids, mask, options | {"max_new_tokens": 2})
    return peak_bytes(lambda: timed(contender, ids, mask, options), contender.model.device)


@dataclass
class Counts:
    """Query tokens a row of each call of a network, and how often its assistant was called."""

    num_queries: list[int] = field(default_factory=list)
    num_assistant_forwards: int = 0


@contextmanager
def counted(contender: Contender) -> Iterator[Counts]:
    """Counts the calls of a contender's network, by a hook on it."""
    counts = Counts()
    if contender.is_counted_within:
        with _counted_within(counts):
            yield counts
        return

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counts.num_queries.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    def count_assistant(module: nn.Module, args: tuple) -> None:
        counts.num_assistant_forwards += 1

    handles = [contender.model.register_forward_pre_hook(count, with_kwargs=True)]
    if (assistant := contender.keywords.get("assistant_model")) is not None:
        handles.append(assistant.register_forward_pre_hook(count_assistant))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _counted_within(counts: Counts) -> Iterator[None]:
    """Counts the steps of any network that drafts, and its prompts: a CUDA graph calls no hooks."""
    run_step, prefill = StepRunner.__call__, DraftNetwork.prefill

    def counted_step(self: StepRunner, plan: Any, state: Any) -> Any:
        num_tokens = state.draft_ids.shape[1]
        counts.num_queries.append(num_tokens + plan.num_blocks(num_tokens) * plan.draft_length)
        return run_step(self, plan, state)

    def counted_prefill(self: DraftNetwork, prompt_ids: torch.Tensor, *args: Any) -> Any:
        counts.num_queries.append(prompt_ids.shape[1])
        return prefill(self, prompt_ids, *args)

    StepRunner.__call__, DraftNetwork.prefill = counted_step, counted_prefill  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepRunner.__call__, DraftNetwork.prefill = run_step, prefill  # type: ignore[method-assign]


class FirstToken(BaseStreamer):
    """Notes when the first new token is handed out, after the prompts."""

    def __init__(self) -> None:
        self.has_prompts = False
        self.at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """The prompts, then new tokens."""
        if self.has_prompts and self.at is None:
            self.at = time.perf_counter()
        self.has_prompts = True

    def put_row(self, row: int, ids: torch.Tensor) -> None:
        """New tokens of one row."""
        self.put(ids)

    def end(self) -> None:
        """Nothing to do."""


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory in tensors during a call above what was in use before it, as torch's allocator tells it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        most = max(most, in_use)
    return most


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what C++ code writes there: the profiler notes its start, and every block it did not see allocated."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def timed(
    contender: Contender, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, float, float]:
    """The sequences of one call [B, P + N], its seconds, and the seconds to its first new token."""
    streamer = FirstToken()
    _synchronize(contender.model.device)
    start = time.perf_counter()
    sequences = _generate(contender.model, ids, mask, options | contender.keywords | {"streamer": streamer})
    _synchronize(contender.model.device)
    end = time.perf_counter()
    assert streamer.at is not None
    return sequences.cpu(), end - start, streamer.at - start


def _generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return model.generate(ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=0, **options)


@torch.no_grad()
def time_forwards(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds of forwards of several numbers of query tokens behind the prompts [B, P], each with all its logits."""
    (batch_size, num_cached), device = ids.shape, model.device
    limit = model.config.get_text_config().max_position_embeddings - num_cached
    rows = {
        num: {"batch_size": batch_size, "num_cached": num_cached, "num_query_tokens": num, "seconds": []}
        for num in QUERY_LENGTHS
        if num <= limit
    }
    cache = DynamicCache(config=model.config)
    model(ids.to(device), attention_mask=mask.to(device), logits_to_keep=1, **{CACHE: cache})
    for _, (num, row) in product(range(-1, max(repeats, 3)), rows.items()):
        query_ids = torch.ones(batch_size, num, dtype=torch.long, device=device)
        whole_mask = nn.functional.pad(mask, (0, num), value=1).to(device)
        positions = num_cached + torch.arange(num, device=device).expand(batch_size, -1)
        used = copy.deepcopy(cache)
        _synchronize(device)
        start = time.perf_counter()
        model(query_ids, attention_mask=whole_mask, position_ids=positions, **{CACHE: used})
        _synchronize(device)
        row["seconds"].append(time.perf_counter() - start)
    for row in rows.values():
        row["seconds"] = row["seconds"][1:]  # the first round warms up
    return list(rows.values())


def _sampling_keywords(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


@contextmanager
def _texts_of_one_length(models: list[PreTrainedModel]) -> Iterator[None]:
    """Puts transformers' own defaults in place of the models' generation configs: no end token, no penalties."""
    kept = [model.generation_config for model in models]
    for model in models:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for model, config in zip(models, kept, strict=True):
            model.generation_config = config


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
