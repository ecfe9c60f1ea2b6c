"""Engines in this process, and what is counted of them."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from helpers_tiny import VOCAB

MIB = 2**20
ALIVE: list[LLM] = []  # an engine that is collected takes the process groups of all others with it


def engine(checkpoint: Path, adapter: Path | None = None, options: dict[str, Any] | None = None, **given: Any) -> LLM:
    """vLLM's own engine, or with an adapter the one that drafts. `options` are fields of `wavedraft`."""
    given = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 8 * MIB,
        "enable_prefix_caching": False,
        "seed": 0,
        "disable_log_stats": False,
    } | given
    if adapter is not None:
        import json

        stock = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
        given["hf_overrides"] = {
            "architectures": [f"Wavedraft{stock}"],
            "wavedraft": {"adapter": str(adapter)} | (options or {}),
        }
    ALIVE.append(LLM(model=str(checkpoint), **given))
    return ALIVE[-1]


def engine_that_plans_ahead(*args: Any, **given: Any) -> LLM:
    """An engine that plans a step before it has seen the one before, as on GPUs. vLLM turns that off on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        stock = type(current_platform).check_and_update_config

        def check(vllm_config: Any) -> None:
            stock(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        patch.setattr(type(current_platform), "check_and_update_config", staticmethod(check))
        made = engine(*args, **given)
    assert core_of(made).batch_queue is not None
    return made


def core_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


class Counted:
    """Counts the steps of an engine, their query tokens, and what stood of drafts, while it is entered."""

    def __init__(self, llm: LLM):
        self.scheduler = core_of(llm).scheduler
        self.num_steps = self.num_scheduled = self.num_preempted = self.num_verified = self.num_accepted = 0
        self.most_accepted = 0  # of one request in one step

    def __enter__(self) -> "Counted":
        self.schedule, self.stats = self.scheduler.schedule, self.scheduler.make_spec_decoding_stats

        def schedule(*args: Any) -> Any:
            output = self.schedule(*args)
            self.num_steps += bool(output.total_num_scheduled_tokens)
            self.num_scheduled += output.total_num_scheduled_tokens
            return output

        def stats(*args: Any, **kwargs: Any) -> Any:
            self.num_verified += 1
            self.num_accepted += kwargs["num_accepted_tokens"]
            self.most_accepted = max(self.most_accepted, kwargs["num_accepted_tokens"])
            return self.stats(*args, **kwargs)

        preempt = self.scheduler._preempt_request

        def preempted(*args: Any, **kwargs: Any) -> Any:
            self.num_preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler.make_spec_decoding_stats = schedule, stats
        self.scheduler._preempt_request = preempted
        return self

    def __exit__(self, *raised: Any) -> None:
        del self.scheduler.schedule, self.scheduler.make_spec_decoding_stats, self.scheduler._preempt_request


def prompts(num: int, least: int = 3, most: int = 40, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.randrange(VOCAB - 8) for _ in range(draw.randint(least, most))]} for _ in range(num)
    ]


def texts(llm: LLM, asked: list[Any], params: SamplingParams | list[SamplingParams]) -> list[list[list[int]]]:
    """The ids of each prompt's answers."""
    outputs = llm.generate(asked, params, use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def greedy(num_tokens: int = 40, **given: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, **given)
