"""What one call of `generate`, or one forward, takes: its seconds, its forwards, its memory, all seen from outside.

B rows, P prompt tokens, N new tokens.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ..generation.drafting.draft_network import DraftNetwork
from ..generation.drafting.step_runner import StepRunner
from ..generation.stock_model import CACHE
from .contenders import Contender

QUERY_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEWEST_ROUNDS = 5  # of forwards: the least time of so many is seldom an interrupted one


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


def waited_seconds(process: int | str = "self") -> float | None:
    """Seconds in which threads of a process could run, but other threads had the cores; None where the system does
    not tell (Linux does: `/proc/PROCESS/task/*/schedstat`, second number, nanoseconds)."""
    waited = 0
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            waited += int(path.read_text(encoding="utf-8").split()[1])
    return waited / 1e9 if Path("/proc/self/schedstat").exists() else None


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


@dataclass
class Counts:
    """Query tokens a row of each call of a network, and how often its assistant was called."""

    num_queries: list[int] = field(default_factory=list)
    num_assistant_forwards: int = 0

    @property
    def num_forwards(self) -> int:
        """Calls of the network."""
        return len(self.num_queries)

    @property
    def num_query_tokens(self) -> int:
        """Tokens of one row that all calls but the first read: the first reads the prompt."""
        return sum(self.num_queries[1:])


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


def count_uncompiled(contender: Contender, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]) -> Counts:
    """Counts the calls of a contender that is compiled, in one call of `generate` that is not."""
    uncompiled = {"compile_config": None, "disable_compile": True}
    with counted(contender) as counts:
        _generate(contender.model, ids, mask, options | contender.keywords | uncompiled)
    return counts


@contextmanager
def _counted_within(counts: Counts) -> Iterator[None]:
    """Counts the steps of any network that drafts, and its prompts: a CUDA graph calls no hooks."""
    run_step, prefill = StepRunner.__call__, DraftNetwork.prefill

    def counted_step(self: StepRunner, plan: Any, state: Any) -> Any:
        num_tokens = state.draft_ids.shape[1]
        counts.num_queries.append(num_tokens + plan.num_blocks(num_tokens) * plan.draft_length)
        return run_step(self, plan, state)

    def counted_prefill(
        self: DraftNetwork, prompt_ids: torch.Tensor, position_ids: Any, draft_length: int, has_draft: bool = True
    ) -> Any:
        num_cached = self.rows.cache.max_length
        counts.num_queries.append(prompt_ids.shape[1] - num_cached + has_draft * draft_length)
        return prefill(self, prompt_ids, position_ids, draft_length, has_draft)

    StepRunner.__call__, DraftNetwork.prefill = counted_step, counted_prefill  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepRunner.__call__, DraftNetwork.prefill = run_step, prefill  # type: ignore[method-assign]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes in tensors during a call, above what was in use before it, as torch's allocator counts them."""
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
    """Drops what C++ code writes to stderr: the profiler notes its start, and each block it did not see allocated."""
    sys.stderr.flush()
    original, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)
        os.close(nowhere)


@torch.no_grad()
def time_forwards(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds of forwards that read several numbers of query tokens after the prompts [B, P], with all their logits."""
    (batch_size, num_cached), device = ids.shape, model.device
    limit = model.config.get_text_config().max_position_embeddings - num_cached
    rows = {
        num: {"batch_size": batch_size, "num_cached": num_cached, "num_query_tokens": num, "seconds": []}
        for num in QUERY_LENGTHS
        if num <= limit
    }
    cache = DynamicCache(config=model.config)
    model(ids.to(device), attention_mask=mask.to(device), logits_to_keep=1, **{CACHE: cache})
    for _, (num, row) in product(range(-1, max(repeats, FEWEST_ROUNDS)), rows.items()):
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


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
