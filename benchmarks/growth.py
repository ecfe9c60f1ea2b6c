"""How drafting grows: what it gains by acceptance, draft length, branches, batch, context, model and machine.

    python benchmarks/growth.py --measure models/SmolLM2-135M-Instruct-TiDAR \\
        --adapter adapters/smollm2-135m-instruct-gated
    python benchmarks/growth.py        (prints the tables of docs/growth.md and draws its figure)

`--measure` writes growth_measured.json: what forwards of so many query tokens cost on this machine, how often each
token of a draft was right, and what drafts of several lengths and branches then gained, by the clock. Without it the
gains are predicted from the first two and compared with the third; and a roofline of GPUs takes the place of measured
costs for larger models.

K drafted tokens, B branches, Q query tokens a row, R rows.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from growth_hybrids import print_hybrids

MEASURED = Path(__file__).with_name("growth_measured.json")
ON_GPU = Path(__file__).with_name("step_cost_h200.json")
FIGURE = Path(__file__).parents[1] / "build" / "growth.png"
PLANS = [(8, 8), (8, 3), (8, 1), (4, 4), (4, 1), (2, 1)]
CALIBRATING = (8, 1)


# -- tokens by acceptance


def tokens_and_misses(chances: list[float], draft_length: int, num_branches: int) -> tuple[float, float]:
    """What a forward that verifies K tokens decides, and how often none of its B branches comes true.

    Args:
        chances: that draft token i + 2 is right where all before it are; token 1 is decided already.
    """
    reaches = [1.0]
    for chance in chances[: draft_length - 1]:
        reaches.append(reaches[-1] * chance)
    stops = [here - further for here, further in pairwise([*reaches, 0.0])]
    return sum(reaches), max(0.0, 1 - sum(sorted(stops, reverse=True)[:num_branches]))


def speed_up(
    chances: list[float], draft_length: int, num_branches: int, seconds: Callable[[int], float], plain: float
) -> float:
    """Over plain decoding, whose forward takes `plain` seconds; `seconds` is a forward's by its query tokens a row.

    Behind a miss, a forward reads one token and drafts behind it.
    """
    num_tokens, misses = tokens_and_misses(chances, draft_length, num_branches)
    step = seconds(draft_length * (1 + num_branches)) + misses * seconds(1 + draft_length)
    return (num_tokens + misses) / step * plain


def best_plan(
    chances: list[float], seconds: Callable[[int], float], plain: float, longest: int = 16
) -> tuple[float, int, int]:
    """The greatest speed-up, and its K and B; (1, 0, 0) is plain decoding."""
    lengths = [length for length in (2, 4, 8, 16) if length <= longest]
    plans = [(length, branches) for length in lengths for branches in {1, 2, 3, length} if branches <= length]
    found = [(speed_up(chances, *plan, seconds, plain), *plan) for plan in plans]
    return max([*found, (1.0, 0, 0)])


# -- seconds by machine


@dataclass(frozen=True)
class Machine:
    """GPUs that share each layer of a model.

    Attributes:
        bandwidth, flops, memory: of one GPU as its maker says: bytes and operations a second (dense, bfloat16), bytes.
        bus: bytes a second of a large all-reduce.
        latency: seconds of a small all-reduce.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    num_gpus: int = 1
    bus: float = 366e9
    latency: float = 10e-6


@dataclass(frozen=True)
class Model:
    """A dense decoder in bfloat16: parameters, layers, channels, key and value channels, vocabulary."""

    name: str
    num_parameters: float
    num_layers: int
    width: int
    kv_width: int
    vocab_size: int


# Shares of the maker's figures that a forward reaches, and how softly one bound gives way to the other: fitted to
# PUBLISHED.
MEMORY_SHARE, COMPUTE_SHARE, SOFTNESS = 0.60, 0.56, 2.5
H100, H200 = Machine("H100", 3.35e12, 989e12, 80e9), Machine("H200", 4.8e12, 989e12, 141e9)
MODELS = [
    Model("1.5B", 1.54e9, 28, 1536, 256, 151_936),
    Model("8B", 8.2e9, 36, 4096, 1024, 151_936),
    Model("32B", 32.8e9, 64, 5120, 1024, 151_936),
    Model("70B", 70.6e9, 80, 8192, 1024, 128_256),
]
# Milliseconds of an H100 forward of a 32B model over 1024 cached tokens, by query tokens (arXiv 2511.08923, figure 1).
PUBLISHED = {1: 32.3, 64: 33.7, 256: 42.4, 512: 67.7}


def cache_bytes(model: Model, num_rows: int, context: int) -> float:
    return 2 * 2 * model.num_layers * model.kv_width * context * num_rows


def has_room(model: Model, machine: Machine, num_rows: int, context: int) -> bool:
    """Whether weights and cache leave a tenth of the memory free."""
    needed = 2 * model.num_parameters + cache_bytes(model, num_rows, context)
    return needed < 0.9 * machine.num_gpus * machine.memory


def forward_seconds(
    model: Model, machine: Machine, num_queries: int, num_rows: int, context: int, num_read: int | None = None
) -> float:
    """A roofline: weights and cache are read once, and each query token is multiplied with every weight.

    Args:
        num_read: query tokens a row whose logits are made; by default all.
    """
    head = model.vocab_size * model.width
    num_tokens, num_read = num_rows * num_queries, num_rows * (num_queries if num_read is None else num_read)
    attention = 4 * model.num_layers * model.width * (context + num_queries) * num_tokens
    flops = 2 * (model.num_parameters - head) * num_tokens + 2 * head * num_read + attention
    memory = (2 * model.num_parameters + cache_bytes(model, num_rows, context)) / (
        machine.num_gpus * machine.bandwidth * MEMORY_SHARE
    )
    compute = flops / (machine.num_gpus * machine.flops * COMPUTE_SHARE)
    seconds = (memory**SOFTNESS + compute**SOFTNESS) ** (1 / SOFTNESS)
    if machine.num_gpus > 1:  # two all-reduces a layer
        seconds += 2 * model.num_layers * (machine.latency + 2 * model.width * num_tokens / machine.bus)
    return seconds


def curve(points: dict[int, float]) -> Callable[[int], float]:
    """Seconds by query tokens between measured points: straight on a doubly logarithmic scale, and beyond the last."""
    widths = sorted(points)

    def seconds(width: int) -> float:
        right = next((i for i, known in enumerate(widths) if known >= width), len(widths) - 1)
        low, high = widths[max(right, 1) - 1], widths[max(right, 1)]
        slope = log(points[high] / points[low]) / log(high / low)
        return points[low] * (width / low) ** slope

    return seconds


def steady_chance(tokens_per_forward: float, draft_length: int) -> float:
    """The chance of every draft token that gives so many tokens a forward with all branches."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        num_tokens, _ = tokens_and_misses([middle] * (draft_length - 1), draft_length, draft_length)
        low, high = (middle, high) if num_tokens < tokens_per_forward else (low, middle)
    return low


# -- measuring


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Costs, acceptance and gains on this machine, at batch 1."""
    import torch
    from transformers import AutoTokenizer

    from wavedraft import TiDARForCausalLM
    from wavedraft.bench.contenders import Contender, without_adapter
    from wavedraft.bench.instruments import counted, time_forwards, timed
    from wavedraft.bench.measure import batch_of
    from wavedraft.bench.prompts import encode_prompt, read_kinds
    from wavedraft.bench.settings import OWN_LENGTH

    model = TiDARForCausalLM.from_pretrained(arguments.measure, dtype=getattr(torch, arguments.dtype)).eval()
    stock = without_adapter(model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    tokenizer = AutoTokenizer.from_pretrained(arguments.measure)
    kinds = read_kinds(Path(__file__).with_name("prompts_heldout.jsonl"))
    texts = [text for of_kind in kinds.values() for text in of_kind[: arguments.prompts_per_kind]]
    prompts = [encode_prompt(tokenizer, text, is_raw=False)["input_ids"] for text in texts]
    longest = model.tidar_config.draft_length
    plans = [plan for plan in PLANS if plan[0] <= longest]
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "eos_token_id": None}
    contenders = {"plain": Contender("plain", stock)}
    for length, branches in plans:
        keywords = {"draft_length": length, "num_branches": branches, "draft_copies": False}
        contenders[f"{length}, {branches}"] = Contender("drafting", model, keywords)
    for contender in contenders.values():  # warms up
        timed(contender, prompts[0], torch.ones_like(prompts[0]), options | {"max_new_tokens": 4})
    costs = {}
    for name, network in (("stock", stock), ("drafting", model)):
        rows = time_forwards(network, *batch_of([ids[0] for ids in prompts], 1, OWN_LENGTH, prompts[0][0]), repeats=3)
        costs[name] = {row["num_query_tokens"]: median(row["seconds"]) for row in rows}
    seconds, num_forwards = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0)
    for place, ids in enumerate(prompts):
        names = list(contenders)
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            with counted(contenders[name]) as counts:
                _, whole, first = timed(contenders[name], ids, torch.ones_like(ids), options)
            seconds[name] += whole - first
            num_forwards[name] += len(counts.num_queries) - 1
    accepted = torch.zeros(longest)
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "draft_copies": False}
    for ids in prompts:
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        accepted += output.accepted_lengths[0]
    num_decided = len(prompts) * (arguments.max_new_tokens - 1)
    reached = accepted.flip(0).cumsum(0).flip(0)
    return {
        "about": {"date": date.today().isoformat(), "num_threads": torch.get_num_threads(), **vars(arguments)},
        "costs": costs,
        "chances": [float(after / before) if before else 0.0 for before, after in pairwise(reached)],
        "tokens_per_forward": {name: num_decided / num for name, num in num_forwards.items()},
        "speed_up": {name: seconds["plain"] / taken for name, taken in seconds.items()},
    }


# -- telling


def step_overhead(measured: dict[str, Any]) -> float:
    """Seconds a drafting step takes beyond a plain forward of as many query tokens, by the clock of one plan."""
    costs = {int(width): taken for width, taken in measured["costs"]["drafting"].items()}
    length, branches = CALIBRATING
    name = f"{length}, {branches}"
    _, misses = tokens_and_misses(measured["chances"], length, branches)
    forward = (curve(costs)(length * (1 + branches)) + misses * curve(costs)(1 + length)) / (1 + misses)
    step = measured["costs"]["stock"]["1"] / measured["speed_up"][name] * measured["tokens_per_forward"][name]
    return step - forward


def compared(measured: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """Of each plan, tokens per forward and speed-up, each as predicted and as measured."""
    costs = {int(width): taken for width, taken in measured["costs"]["drafting"].items()}
    overhead, forward, plain, rows = step_overhead(measured), curve(costs), measured["costs"]["stock"]["1"], []
    for name in (name for name in measured["speed_up"] if name != "plain"):
        length, branches = map(int, name.split(", "))
        num_tokens, misses = tokens_and_misses(measured["chances"], length, branches)
        gain = speed_up(measured["chances"], length, branches, lambda width: forward(width) + overhead, plain)
        per_forward = (num_tokens + misses) / (1 + misses)
        rows.append((name, per_forward, measured["tokens_per_forward"][name], gain, measured["speed_up"][name]))
    return rows


def print_check(measured: dict[str, Any]) -> None:
    print("| K, B | tokens per forward, predicted | measured | speed-up, predicted | measured | error |")
    print("|" + "---|" * 6)
    errors = []
    for name, tokens, real_tokens, gain, real_gain in compared(measured):
        is_calibrating = name == "{}, {}".format(*CALIBRATING)
        if not is_calibrating:
            errors.append(gain / real_gain - 1)
        error = "calibrates" if is_calibrating else f"{errors[-1]:+.0%}"
        print(f"| {name} | {tokens:.2f} | {real_tokens:.2f} | {gain:.2f} | {real_gain:.2f} | {error} |")
    print(f"\n{1e3 * step_overhead(measured):.1f} ms a step beyond the forward")
    print(f"\nmean error {sum(map(abs, errors)) / len(errors):.0%}, greatest {max(map(abs, errors)):.0%}\n")


def print_roofline() -> None:
    print("| query tokens | published ms | roofline ms | error |\n|---|---|---|---|")
    for width, published in PUBLISHED.items():
        ms = 1e3 * forward_seconds(MODELS[2], H100, width, 1, 1024)
        print(f"| {width} | {published} | {ms:.1f} | {ms / published - 1:+.0%} |")


def print_gpu_check() -> None:
    """Steps that a GPU ran (`benchmarks/step_cost.py`), beside the roofline's forward of so many query tokens."""
    measured = json.loads(ON_GPU.read_text(encoding="utf-8"))
    print(f"{measured['device']}, {measured['command']}")
    print("\n| shape, step | queries | ms | of plain | roofline, ms | of plain |\n|" + "---|" * 6)
    for model in MODELS[:2]:
        plain = forward_seconds(model, H200, 1, 1, measured["about"]["context"])
        for step in measured["steps"]:
            if step["shape"] == model.name.lower() and step["contender"] != "AR":
                seconds = forward_seconds(model, H200, step["expected_queries"], 1, measured["about"]["context"])
                name = step["contender"].removesuffix(" compiled").replace("AR", "plain")
                seen = f"{step['expected_queries']} | {step['ms']:.2f} | {step['of_plain']:.2f}"
                print(f"| {model.name}, {name} | {seen} | {1e3 * seconds:.2f} | {seconds / plain:.2f} |")


def machines_of(model: Model) -> list[Machine]:
    """One GPU of either kind where the weights leave room, and eight."""
    eight = replace(H100, name="8 x H100", num_gpus=8)
    return [H100, H200, eight] if 2 * model.num_parameters < 70e9 else [eight]


def gain_on(chances: list[float], model: Model, machine: Machine, rows: int, context: int) -> tuple[float, int, int]:
    """The best plan's speed-up, K and B. The head is read for the draft and for one branch."""

    def seconds(width: int) -> float:
        return forward_seconds(model, machine, width, rows, context, num_read=min(width, 16))

    return best_plan(chances, seconds, forward_seconds(model, machine, 1, rows, context))


def print_growth(levels: dict[str, list[float]], context: int) -> None:
    batches = (1, 8, 32, 64, 128, 256)
    for level, chances in levels.items():
        print(f"\nDrafts as good as: {level}. {context:,} tokens of context:\n")
        print("| model, machine | " + " | ".join(f"batch {rows}" for rows in batches) + " |")
        print("|---" * (len(batches) + 1) + "|")
        for model in MODELS:
            for machine in machines_of(model):
                gains = [gain_on(chances, model, machine, rows, context) for rows in batches]
                cells = [f"{gain:.2f} ({k}, {b})" if k else "plain" for gain, k, b in gains]
                fits = [has_room(model, machine, rows, context) for rows in batches]
                cells = [cell if fit else "no room" for cell, fit in zip(cells, fits, strict=True)]
                print(f"| {model.name}, {machine.name} | " + " | ".join(cells) + " |")


def draw(measured: dict[str, Any], levels: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    check, batch, slots = figure.subplots(1, 3)
    for name, _, _, gain, real_gain in compared(measured):
        check.plot(gain, real_gain, "o")
        check.annotate(f"K, B = {name}", (gain, real_gain), fontsize=7, xytext=(3, 3), textcoords="offset points")
    check.axline((0.5, 0.5), slope=1, color="black", linewidth=0.8)
    check.set(xlabel="predicted speed-up", ylabel="measured speed-up", title="this CPU, 135M, batch 1")
    rows = [2**i for i in range(10)]
    for model in MODELS:
        machine = machines_of(model)[0]
        for style, (level, chances) in zip(("-", "--", ":"), levels.items(), strict=False):
            gains = [gain_on(chances, model, machine, num, 2048)[0] for num in rows]
            color = f"C{MODELS.index(model)}"
            label = f"{model.name}, {machine.name}, {level}" if model is MODELS[1] else f"{model.name}, {machine.name}"
            batch.plot(rows, gains, style, color=color, label=label if style == "-" or model is MODELS[1] else None)
    batch.set_xscale("log", base=2)
    batch.axhline(1, color="black", linewidth=0.8)
    batch.set(xlabel="batch", ylabel="best speed-up", title="roofline, context 2048")
    batch.legend(fontsize=6)
    widths = [2**i for i in range(11)]
    for model in MODELS:
        for machine in dict.fromkeys((machines_of(model)[0], machines_of(model)[-1])):
            costs = [forward_seconds(model, machine, width, 1, 2048) for width in widths]
            label = f"{model.name}, {machine.name}"
            slots.plot(widths, [cost / costs[0] for cost in costs], label=label)
    own = {int(width): taken for width, taken in measured["costs"]["stock"].items()}
    slots.plot(
        list(own), [taken / own[1] for taken in own.values()], "ko-", markersize=3, label="135M, this CPU (measured)"
    )
    slots.set_xscale("log", base=2)
    slots.set_yscale("log")
    slots.set(xlabel="query tokens", ylabel="forwards of one", title="free slots, batch 1")
    slots.legend(fontsize=6)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    print(f"\n{FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help="a TiDAR checkpoint to measure costs, acceptance and gains of")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts-per-kind", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", default=str(MEASURED))
    arguments = parser.parse_args()
    if arguments.measure:
        Path(arguments.output).write_text(json.dumps(measure(arguments), indent=1) + "\n", encoding="utf-8")
        return
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    levels = {
        "the shipped adapter's": measured["chances"] + [measured["chances"][-1]] * 8,
        "4 tokens per forward at K=16": [steady_chance(4.0, 16)] * 15,
        "7.45 at K=16, the paper's 1.5B": [steady_chance(7.45, 16)] * 15,
    }
    print_check(measured)
    print_roofline()
    print_hybrids()
    print_gpu_check()
    print_growth(levels, 2048)
    print_growth({"7.45 at K=16, the paper's 1.5B": levels["7.45 at K=16, the paper's 1.5B"]}, 32_768)
    draw(measured, levels)


if __name__ == "__main__":
    main()
