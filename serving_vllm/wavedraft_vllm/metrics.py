"""Drafts in the metrics of `vllm serve`, beside vLLM's own: `/metrics` has them under `wavedraft:`."""

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from . import PREFIX


class DraftMetrics(StatLoggerBase):
    """Nothing is counted for models that do not draft.

    `wavedraft:steps_total` counts a request's steps with masks, `wavedraft:accepted_tokens_total` the drafted tokens
    that stood in them, and `wavedraft:draft_places_total` the places of the longest draft, whether they were filled or
    not. Tokens per forward are 1 + accepted / steps. `wavedraft:is_drafting` is 1 while masks ride along.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        self.counters: dict[str, Any] | None = None
        if not vllm_config.model_config.architecture.startswith(PREFIX):
            return
        label = str(engine_index)
        self.counters = {
            name: _metric(kind, f"wavedraft:{name}", text).labels(engine=label)
            for name, (kind, text) in {
                "steps": (Counter, "Steps of a request in which a draft could stand."),
                "accepted_tokens": (Counter, "Drafted tokens that stood."),
                "draft_places": (Counter, "Places for drafted tokens, filled or not."),
                "is_drafting": (Gauge, "1 while masks ride along, 0 where the batch is too large."),
            }.items()
        }

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if self.counters is None or scheduler_stats is None:
            return
        drafts = scheduler_stats.spec_decoding_stats
        if scheduler_stats.num_running_reqs or drafts is not None:
            self.counters["is_drafting"].set(int(drafts is not None))
        if drafts is not None:
            self.counters["steps"].inc(drafts.num_drafts)
            self.counters["accepted_tokens"].inc(drafts.num_accepted_tokens)
            self.counters["draft_places"].inc(drafts.num_draft_tokens)

    def log_engine_initialized(self) -> None: ...


@cache
def _metric(kind: Any, name: str, text: str) -> Any:
    """A metric of the process, made once: several engines share it."""
    how = {"multiprocess_mode": "mostrecent"} if kind is Gauge else {}  # of several processes of the server
    return kind(name, text, labelnames=["engine"], **how)
