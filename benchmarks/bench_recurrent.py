"""Every policy of a recurrent-depth model on the same prompts: one table a batch size, and memory over a long text.

    python benchmarks/bench_recurrent.py                                   (the shipped model)
    python benchmarks/bench_recurrent.py --model PATH --prompts prompts.txt
    python benchmarks/bench_recurrent.py --random 1024 --batch 1 8         (no checkpoint: random weights of this width)
    python benchmarks/bench_recurrent.py --reference                       (against the published code's own times)

Seconds are of decoding alone, from the first new token, which the prefill decides. Speed-ups are over full-depth
decoding with the shared cache. "core s" is the time in `core_step`; "engine" the share of the decode outside the
model's three parts (engine, sampling, bookkeeping); "matmul" the share inside its linear layers and attention, told
apart in a run of its own. Agreement is the share of tokens equal to those of full-depth decoding with a cache of every
recurrence, which is what the exact policy promises to write; perplexity is the text's under the full-depth model.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, CompileConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "austen-recurrent-6m"
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "raven_tiny_golden.json"
PARTS = ("prelude", "core_step", "coda")
ROWS: dict[str, dict[str, Any]] = {
    "full-depth AR, shared cache": {"policy": "autoregressive", "kv_cache": "latest-only"},
    "full-depth AR": {"policy": "autoregressive"},
    "half-depth AR": {"policy": "autoregressive", "num_recurrences": "half"},
    "adaptive AR": {"policy": "adaptive"},
    "self-speculative": {"policy": "self-speculative"},
    "diffusion forcing, r'=4": {"preset": "diffusion-forcing-r4"},
    "diffusion forcing, r'=2": {"preset": "diffusion-forcing-r2"},
    "exact": {"policy": "exact"},
}
HEAD = ("policy", "ms/token", "speed-up", "core s", "speed-up", "engine", "matmul", "core passes", "positions",
        "tok/fwd", "agree", "ppl")  # fmt: skip
LINE = "{:28}{:9.2f}{:8.2f}x{:8.2f}{:8.2f}x{:7.0%}{:7.0%}{:12}{:10}{:8.2f}{:7.0%}{:8.2f}"
# ms a token of the published code at 512 tokens of context, 64 new ones, the golden fixture's weights, one CPU thread.
REFERENCE = {
    "full-depth AR, shared cache": (126, {"kv_cache": "latest-only"}),
    "full-depth AR": (82, {}),
    "depth-8 AR": (25, {"num_recurrences": 8}),
    "adaptive AR": (35, {"policy": "adaptive"}),
    "self-speculative": (39, {"policy": "self-speculative", "kv_cache": "latest-only"}),
    "diffusion forcing, r'=4": (31, {"preset": "diffusion-forcing-r4"}),
    "diffusion forcing, r'=8": (58, {"preset": "diffusion-forcing-r4", "inner_recurrence": 8}),
}


class Stopwatch:
    """Seconds spent in named functions, by name.

    The clock is the wall's, or, with "cpu", the seconds this process had of the CPU: on a machine shared with others
    the fairer one, for a single thread.
    """

    def __init__(self, device: torch.device, clock: str):
        self.is_cuda = device.type == "cuda"
        self.clock = time.perf_counter if clock == "wall" else time.process_time
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, the device having done what it was asked."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return self.clock()

    def timed(self, name: str, function: Any) -> Any:
        """The function, its seconds added up under `name`."""

        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.add(name, self.now() - start)
            return result

        return timed

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def time_parts(model: nn.Module, stopwatch: Stopwatch) -> None:
    """Times the model's three parts."""
    for name in PARTS:
        setattr(model, name, stopwatch.timed(name, getattr(model, name)))


def time_matmuls(model: nn.Module, stopwatch: Stopwatch) -> Any:
    """Times linear layers and attention, from now until the function returned is called."""
    implementation = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    ALL_ATTENTION_FUNCTIONS[implementation] = stopwatch.timed("matmul", attention)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.forward = stopwatch.timed("matmul", layer.forward)

    def undo() -> None:
        ALL_ATTENTION_FUNCTIONS[implementation] = attention
        for layer in layers:
            del layer.forward

    return undo


class FirstToken:
    """A streamer that starts the stopwatch anew when the first new token comes, behind the prompt."""

    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch
        self.num_puts = 0

    def put(self, ids: torch.Tensor) -> None:
        """Takes the prompt, then the new tokens."""
        self.num_puts += 1
        if self.num_puts == 2:
            self.stopwatch.seconds = {}
            self.came_at = self.stopwatch.now()

    def put_row(self, row: int, ids: torch.Tensor) -> None:
        """Takes the new tokens of one row of several."""
        self.put(ids)

    def end(self) -> None:
        """Nothing to do."""


class Run:
    """One decode behind its first token: output, seconds, and seconds in each part by name."""

    def __init__(self, model: nn.Module, stopwatch: Stopwatch, prompts: dict, num_new: int, options: dict):
        first = FirstToken(stopwatch)
        options = {**options, "max_new_tokens": num_new, "streamer": first, "return_dict_in_generate": True}
        self.output = model.generate(**prompts, **options)
        self.seconds = stopwatch.now() - first.came_at
        self.parts = dict(stopwatch.seconds)


def median_run(model: nn.Module, stopwatch: Stopwatch, prompts: dict, num_new: int, repeats: int, options: dict) -> Run:
    """The run of median time."""
    runs = [Run(model, stopwatch, prompts, num_new, options) for _ in range(repeats)]
    return sorted(runs, key=lambda run: run.seconds)[repeats // 2]


@torch.no_grad()
def perplexity(model: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, num_recurrences: int) -> float:
    """Of the new tokens under the full-depth model."""
    num_prompt = attention_mask.shape[1]
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(sequences), sequences.shape[1] - num_prompt)], dim=1)
    logits = model(sequences, attention_mask=mask, num_recurrences=num_recurrences, init_scale=0.0).logits
    log_probs = logits[:, num_prompt - 1 : -1].log_softmax(dim=-1)
    return log_probs.gather(2, sequences[:, num_prompt:, None]).mean().neg().exp().item()


def read_prompts(arguments: argparse.Namespace, model: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    """`batch` prompts, left-padded: lines of a file, or random tokens."""
    if arguments.random is None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        if len(lines) < batch:
            raise ValueError(f"{arguments.prompts} has {len(lines)} prompts, one a line, but the batch is {batch}.")
        encoded = tokenizer(lines[:batch], return_tensors="pt", padding=True)
        return {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return random_prompts(model, batch, arguments.prompt_length)


def random_prompts(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, unpadded."""
    ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def random_model(width: int, recurrences: int) -> RecurrentDepthForCausalLM:
    """Random weights in Huginn's proportions: what costs what, not how well it drafts."""
    torch.manual_seed(0)
    config = RecurrentDepthConfig(
        n_embd=width,
        n_heads=width // 64,
        intermediate_size=width * 8 // 3 // 64 * 64,
        vocab_size=8192,
        block_size=4096,
        mean_recurrence=recurrences,
    )
    return RecurrentDepthForCausalLM(config)


def table(model: nn.Module, prompts: dict, depth: int, arguments: argparse.Namespace) -> list[dict]:
    """One line a policy."""
    stopwatch = Stopwatch(model.device, arguments.clock)
    batch = len(prompts["input_ids"])
    print(f"\nbatch {batch}, depth {depth}, {arguments.num_new} new tokens a row")
    print("{:28}{:>9}{:>9}{:>8}{:>9}{:>7}{:>7}{:>12}{:>10}{:>8}{:>7}{:>8}".format(*HEAD))
    results: list[dict] = []
    truth = model.generate(**prompts, max_new_tokens=arguments.num_new, **options_of(ROWS["full-depth AR"], depth))
    truth = truth[:, prompts["input_ids"].shape[1] :]
    for name, row in ROWS.items():
        options = options_of(row, depth)
        undo = time_matmuls(model, stopwatch)
        apart = Run(model, stopwatch, prompts, max(2, arguments.num_new // 4), options)
        undo()
        time_parts(model, stopwatch)
        run = median_run(model, stopwatch, prompts, arguments.num_new, arguments.repeats, options)
        for part in PARTS:
            delattr(model, part)
        new = run.output.sequences[:, prompts["input_ids"].shape[1] :]
        baseline = results[0] if results else {"seconds": run.seconds, "core_seconds": run.parts["core_step"]}
        results.append(
            {
                "policy": name,
                "ms_per_token": 1e3 * run.seconds / new.numel(),
                "speed_up": baseline["seconds"] / run.seconds,
                "core_seconds": run.parts["core_step"],
                "core_speed_up": baseline["core_seconds"] / run.parts["core_step"],
                "share_of_engine": 1 - sum(run.parts.values()) / run.seconds,
                "share_of_matmuls": apart.parts["matmul"] / apart.seconds,
                "core_passes": run.output.num_core_passes,
                "positions": run.output.num_positions,
                "tokens_per_forward": run.output.tokens_per_forward.mean().item(),
                "agreement": (new == truth).float().mean().item(),
                "perplexity": perplexity(model, run.output.sequences, prompts["attention_mask"], depth),
            }
        )
        print(LINE.format(*results[-1].values()), flush=True)
        results[-1]["seconds"] = run.seconds
    return results


def options_of(row: dict, depth: int) -> dict:
    """The keywords of a row at a full depth; greedy, and deterministic."""
    options = {"num_recurrences": depth, "init_scale": 0.0, "do_sample": False, **row}
    if options["num_recurrences"] == "half":
        options["num_recurrences"] = max(1, depth // 2)
    return options


class MemoryMeter:
    """A streamer that notes the memory in use as tokens arrive."""

    def __init__(self, device: torch.device):
        self.device = device
        self.num_tokens = 0
        self.bytes: dict[int, int] = {}

    def put(self, ids: torch.Tensor) -> None:
        """Counts the tokens."""
        self.num_tokens += ids.numel()
        self.bytes[self.num_tokens] = self.in_use()

    def in_use(self) -> int:
        """Bytes of device memory allocated, or of this process in the host's."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def end(self) -> None:
        """Nothing to do."""


def memory_and_pace(model: nn.Module, prompts: dict, depth: int, num_new: int, clock: str) -> list[dict]:
    """What the second half of a long text adds in memory, and its pace against the first half's."""
    results = []
    print(f"\nmemory over {num_new} tokens, batch 1")
    for name in ("diffusion forcing, r'=4", "exact"):
        meter, stopwatch = MemoryMeter(model.device), Stopwatch(model.device, clock)
        start = stopwatch.now()
        model.generate(**prompts, max_new_tokens=num_new, streamer=meter, **options_of(ROWS[name], depth))
        early = min(num for num in meter.bytes if num >= prompts["input_ids"].shape[1] + num_new // 10)
        growth = (max(meter.bytes.values()) - meter.bytes[early]) / 2**20
        results.append(
            {"policy": name, "growth_mib": growth, "ms_per_token": 1e3 * (stopwatch.now() - start) / num_new}
        )
        print(f"{name:28} {growth:8.1f} MiB more than at token {early}; {results[-1]['ms_per_token']:.2f} ms/token")
    return results


def golden_model(block_size: int) -> RecurrentDepthForCausalLM:
    """The golden fixture's weights, for longer texts: its sampler takes as many decode steps as the published runs."""
    fields = json.loads(GOLDEN.read_text())["meta"]["config"]
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**{**fields, "block_size": block_size})).eval()
    stored = load_file(GOLDEN.with_suffix(".safetensors"))
    weights = {name.removeprefix("weights/"): t.float() for name, t in stored.items() if name.startswith("weights/")}
    model.load_state_dict({name: t for name, t in weights.items() if name != "freqs_cis"}, strict=False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def compiling(options: dict) -> dict:
    """The same with a static cache and compiled steps."""
    return {**options, "cache_implementation": "static", "compile_config": CompileConfig()}


def against_reference(arguments: argparse.Namespace) -> list[dict]:
    """The golden fixture's weights at 512 tokens of context, beside the published code's times; modes interleaved."""
    model = golden_model(1024).to(arguments.device)
    stopwatch, prompts, results = Stopwatch(model.device, arguments.clock), random_prompts(model, 1, 512), []
    for name, (published, row) in REFERENCE.items():
        if arguments.policies and not any(part in name for part in arguments.policies):
            continue
        options = options_of(row, row.get("num_recurrences", 32))
        modes = {"eager": options, "compiled": compiling(options)} if arguments.compile else {"eager": options}
        warm_up = stopwatch.now()
        texts = [model.generate(**prompts, max_new_tokens=64, **mode).tolist() for mode in modes.values()]
        warm_up = stopwatch.now() - warm_up
        runs: dict[str, list[Run]] = {mode: [] for mode in modes}
        for _ in range(arguments.repeats):
            for mode, keywords in modes.items():
                runs[mode].append(Run(model, stopwatch, prompts, 64, copy.copy(keywords)))
        for mode, each in runs.items():
            run = sorted(each, key=lambda run: run.seconds)[len(each) // 2]
            ms, passes = 1e3 * run.seconds / 63, run.output.num_core_passes
            results.append({"policy": name, "mode": mode, "ms_per_token": ms, "published": published,
                            "speed_up": published / ms, "core_passes": passes, "steps": run.output.num_steps,
                            "width": run.output.num_positions / passes, "same_text": texts[0] == texts[-1],
                            "warm_up_seconds": warm_up})  # fmt: skip
            print(f"{name:28}{mode:9}{ms:8.2f} ms/token, published {published:4} ({published / ms:.1f}x); {passes} "
                  f"core passes of {1e3 * run.seconds / passes:.2f} ms, {results[-1]['width']:.1f} wide, "
                  f"{run.output.num_steps} steps; same text: {results[-1]['same_text']}; warm-up {warm_up:.0f} s",
                  flush=True)  # fmt: skip
    return results


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="folder or Hub name of a recurrent-depth checkpoint")
    parser.add_argument("--random", type=int, help="instead of a checkpoint: random weights of this width")
    parser.add_argument("--reference", action="store_true", help="the published code's sizes and times")
    parser.add_argument("--compile", action="store_true", help="static cache and compiled steps, too")
    parser.add_argument("--policies", nargs="*", help="only rows whose name has one of these in it")
    parser.add_argument("--prompts", default=str(SHIPPED / "prompts.txt"), help="text file, one prompt a line")
    parser.add_argument("--prompt-length", type=int, default=64, help="of random prompts")
    parser.add_argument("--num-new", type=int, default=64)
    parser.add_argument("--num-recurrences", type=int, help="full depth; the checkpoint's where absent, 32 at random")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--long", type=int, default=0, help="also watch the memory over a text of so many tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.reference:
        results: Any = against_reference(arguments)
    else:
        if arguments.random is None:
            model = RecurrentDepthForCausalLM.from_pretrained(arguments.model)
        else:
            model = random_model(arguments.random, arguments.num_recurrences or 32)
        model = model.eval().to(arguments.device, getattr(torch, arguments.dtype))
        model.generation_config.eos_token_id = None  # every policy writes as many tokens
        depth = arguments.num_recurrences or model.config.mean_recurrence
        num_parameters = sum(p.numel() for p in model.parameters())
        print(f"{num_parameters / 1e6:.1f} M parameters, {arguments.device} ({platform.processor() or 'cpu'}), "
              f"{arguments.dtype}, {arguments.threads} thread(s), {arguments.clock} seconds")  # fmt: skip
        results = {
            f"batch {n}": table(model, read_prompts(arguments, model, n), depth, arguments) for n in arguments.batch
        }
        if arguments.long:
            results["memory"] = memory_and_pace(
                model, read_prompts(arguments, model, 1), depth, arguments.long, arguments.clock
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
