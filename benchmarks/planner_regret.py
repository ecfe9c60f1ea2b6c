"""What `num_branches="auto"` loses to the best fixed plan in hindsight, on real texts and by a clock without noise.

python benchmarks/planner_regret.py models/SmolLM2-135M-Instruct-TiDAR --adapter adapters/smollm2-135m-instruct-gated

First a few texts show what steps take on this machine: plain ones, and drafting ones by their query tokens. Then every
prompt is decoded with every plan and by the planner. Each forward advances a clock by what such a step takes. The
planner reads that clock, so its choices depend on the texts alone. Its prior is the checkpoint's record, then two false
ones. Last, the adapter is left out: then no draft stands.
"""

import argparse
import json
import platform
import time
from datetime import date
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.progress import track
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.generation.drafting import draft_planner
from wavedraft.generation.drafting.draft_planner import DraftPlanner, StepTimes, plans_up_to
from wavedraft.generation.drafting.draft_step import PLAIN
from wavedraft.generation.execution.gated_linear import active_adapters
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.modeling_tidar.modeling_tidar import acceptance_of, record_acceptance
from wavedraft.training import prompt_ids, read_prompts

NUM_TEXTS_TIMED = 3
FALSE_RECORDS = {"auto, record of 0.95": 0.95, "auto, record of 0.05": 0.05}


class Clock:
    """Goes on by what each forward of a model takes."""

    def __init__(self, model: Any, times: StepTimes):
        self.seconds, self.times = 0.0, times
        self.handle = model.register_forward_pre_hook(self.tick, with_kwargs=True)

    def tick(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        num_queries = (args[0] if args else kwargs["input_ids"]).shape[1]
        line = self.times.plain if num_queries == 1 else self.times.drafting
        self.seconds += line.at(num_queries)


def step_times(model: Any, prompts: list[torch.Tensor], options: dict[str, Any]) -> StepTimes:
    """What steps take here, from the real clock, every plan in turn."""
    turn = cycle([PLAIN, *plans_up_to(model.tidar_config.draft_length, False, False)])
    choose = DraftPlanner.choose
    DraftPlanner.choose = lambda planner: next(turn)  # type: ignore[method-assign]
    for ids in prompts:
        model.generate(ids[None], **options, num_branches="auto")
    DraftPlanner.choose = choose  # type: ignore[method-assign]
    return next(times for times in kept_with(model).step_times.values() if isinstance(times, StepTimes))


def charged(model: Any, clock: Clock, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Seconds of one text after its first token, by the clock. The prompt's forward is the same for every plan."""
    before = clock.seconds
    output = model.generate(ids[None], **options)
    prompt = clock.times.drafting.at(len(ids))
    assert output.num_prefill_forwards >= 1
    return clock.seconds - before - prompt


def forget(model: Any) -> None:
    kept_with(model).step_times.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_prompts(arguments.prompts)[: arguments.num_prompts]
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    options = {"max_new_tokens": arguments.max_new_tokens, "min_new_tokens": arguments.max_new_tokens}
    options |= {"do_sample": False, "return_dict_in_generate": True}
    results: dict[str, Any] = {"date": str(date.today()), "machine": platform.processor(), **vars(arguments)}
    results["output"] = str(arguments.output)
    for drafts in ("taught", "never standing"):
        model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
        if drafts == "taught" and arguments.adapter:
            model.load_adapter(arguments.adapter)
        else:
            record_acceptance(model, None)
        results[drafts] = compared(model, prompts, options, drafts)
        print(json.dumps(results[drafts]["shares"], indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compared(model: Any, prompts: list[torch.Tensor], options: dict[str, Any], drafts: str) -> dict[str, Any]:
    """Every plan's seconds, and what of the best plan's speed the planner reaches."""
    times = step_times(model, prompts[:NUM_TEXTS_TIMED], options)
    plain, longest = times.plain.at(1), model.tidar_config.draft_length
    line = {"plain": plain, "4 queries": times.drafting.at(4), "16 queries": times.drafting.at(16)}
    clock = Clock(model, times)
    draft_planner.time = SimpleNamespace(perf_counter=lambda: clock.seconds)  # type: ignore[assignment]
    ways: dict[str, dict[str, Any]] = {
        f"K={k} B={b}": {"draft_length": k, "num_branches": b} for k, b in plans_up_to(longest, False, False)
    }
    ways |= {"auto": {}, **({name: {} for name in FALSE_RECORDS} if drafts == "taught" else {})}
    seconds: dict[str, list[float]] = {"plain": [plain * (options["max_new_tokens"] - 1)] * len(prompts)}
    record, adapter = acceptance_of(model), active_adapters(model)[:1]
    for name, keywords in ways.items():
        forget(model)
        false = FALSE_RECORDS.get(name)
        told = {"chances": [false] * (longest - 1), "num_prompts": 1} if false else record
        record_acceptance(model, told, *adapter)
        asked = options | {"num_branches": "auto"} | keywords
        seconds[name] = [charged(model, clock, ids, asked) for ids in track(prompts, f"{drafts}, {name}")]
    clock.handle.remove()
    draft_planner.time = time
    totals = {name: sum(of) for name, of in seconds.items()}
    best = min((name for name in totals if not name.startswith("auto")), key=totals.__getitem__)
    autos = [name for name in totals if name.startswith("auto")]
    shares = {name: {"of the best plan": round(totals[best] / totals[name], 3)} for name in autos}
    for name in autos:
        worst = max(of / alone for of, alone in zip(seconds[name], seconds["plain"], strict=True))
        shares[name] |= {
            "worst text over plain": round(worst, 3),
            "over plain": round(totals["plain"] / totals[name], 3),
        }
    return {"step seconds": line, "totals": totals, "best": best, "shares": shares}


if __name__ == "__main__":
    main()
