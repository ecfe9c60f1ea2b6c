"""Every policy of a recurrent-depth model on the same prompts: one table.

    python benchmarks/bench_recurrent.py --model PATH --prompts prompts.txt
    python benchmarks/bench_recurrent.py --random 384 --batch 8       (no checkpoint: random weights, n_embd 384)

Seconds are of decoding alone: a run of one token, which is the prefill, is taken off. "core s" is the time in
core_step, "other" the share of the decode outside the model's three parts (engine, sampling, bookkeeping). Agreement is
the share of tokens equal to full-depth decoding's, and perplexity that of the text under the full-depth model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM

ROWS = {
    "full-depth AR": {"policy": "autoregressive"},
    "full-depth AR, shared cache": {"policy": "autoregressive", "kv_cache": "latest-only"},
    "half-depth AR": {"policy": "autoregressive", "num_recurrences": "half"},
    "adaptive AR": {"policy": "adaptive"},
    "self-speculative": {"policy": "self-speculative"},
    "diffusion forcing, r'=4": {"preset": "diffusion-forcing-r4"},
    "diffusion forcing, r'=2": {"preset": "diffusion-forcing-r2"},
    "exact": {"policy": "exact"},
}


class Stopwatch:
    """Seconds spent in the model's three parts, by name."""

    def __init__(self, model):
        self.model = model
        self.seconds = dict.fromkeys(("prelude", "core_step", "coda"), 0.0)
        for name in self.seconds:
            setattr(model, name, self._timed(name, getattr(model, name)))

    def _timed(self, name: str, part):
        def timed(*args, **kwargs):
            start = self.now()
            result = part(*args, **kwargs)
            self.seconds[name] += self.now() - start
            return result

        return timed

    def now(self) -> float:
        """Seconds, the device having done what it was asked."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        """Begin again."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)


def measure(model, stopwatch: Stopwatch, prompts: dict, num_new: int, repeats: int, options: dict):
    """The run of median time: its output, decode seconds, seconds in each part."""
    runs = []
    for _ in range(repeats):
        times = []
        for num in (1, num_new):
            stopwatch.reset()
            start = stopwatch.now()
            output = model.generate(**prompts, max_new_tokens=num, return_dict_in_generate=True, **options)
            times.append((stopwatch.now() - start, dict(stopwatch.seconds)))
        (prefill, prefill_parts), (whole, parts) = times
        runs.append((whole - prefill, {name: parts[name] - prefill_parts[name] for name in parts}, output))
    return sorted(runs, key=lambda run: run[0])[len(runs) // 2]


def perplexity(model, sequences: torch.Tensor, attention_mask: torch.Tensor, num_recurrences: int) -> float:
    """Of the new tokens under the full-depth model."""
    num_prompt = attention_mask.shape[1]
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(sequences), sequences.shape[1] - num_prompt)], dim=1)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, num_recurrences=num_recurrences, init_scale=0.0).logits
    log_probs = logits[:, num_prompt - 1 : -1].log_softmax(dim=-1)
    return log_probs.gather(2, sequences[:, num_prompt:, None]).mean().neg().exp().item()


def read_prompts(arguments, model) -> dict[str, torch.Tensor]:
    """`batch` prompts, left-padded: lines of a file, or random tokens."""
    if arguments.prompts:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        lines = Path(arguments.prompts).read_text().splitlines()[: arguments.batch]
        encoded = tokenizer(lines, return_tensors="pt", padding=True)
        return {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (arguments.batch, arguments.prompt_length), generator=generator)
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def random_model(width: int, recurrences: int) -> RecurrentDepthForCausalLM:
    """Random weights: what costs what, not how well it drafts."""
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


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a recurrent-depth checkpoint")
    parser.add_argument("--random", type=int, default=384, help="without --model: width of a random one")
    parser.add_argument("--prompts", help="text file, one prompt a line (needs --model)")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--num-new", type=int, default=64)
    parser.add_argument("--num-recurrences", type=int, default=None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.model:
        model = RecurrentDepthForCausalLM.from_pretrained(arguments.model)
    else:
        model = random_model(arguments.random, arguments.num_recurrences or 32)
    model = model.eval().to(arguments.device, getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = None  # every policy writes as many tokens
    depth = arguments.num_recurrences or model.config.mean_recurrence
    prompts, stopwatch = read_prompts(arguments, model), Stopwatch(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.1f} M parameters, depth {depth}, batch {arguments.batch}, {arguments.device}, "
          f"{arguments.dtype}, {arguments.threads} thread(s), {arguments.num_new} new tokens a row")  # fmt: skip
    head = ("policy", "ms/token", "speed-up", "core s", "other", "core passes", "positions", "tok/fwd", "agree", "ppl")
    print("{:28}{:>9}{:>9}{:>8}{:>7}{:>12}{:>10}{:>8}{:>7}{:>8}".format(*head))
    baseline, results = None, []
    for name, row in ROWS.items():
        options = {"num_recurrences": depth, "init_scale": 0.0, "do_sample": False, **row}
        if options["num_recurrences"] == "half":
            options["num_recurrences"] = max(1, depth // 2)
        seconds, parts, output = measure(model, stopwatch, prompts, arguments.num_new, arguments.repeats, options)
        new = output.sequences[:, prompts["input_ids"].shape[1] :]
        baseline = baseline or (seconds, new)
        result = {
            "policy": name,
            "ms_per_token": 1e3 * seconds / new.numel(),
            "speed_up": baseline[0] / seconds,
            "core_seconds": parts["core_step"],
            "share_outside_model": 1 - sum(parts.values()) / seconds,
            "core_passes": output.num_core_passes,
            "positions": output.num_positions,
            "tokens_per_forward": output.tokens_per_forward.mean().item(),
            "agreement": (new == baseline[1]).float().mean().item(),
            "perplexity": perplexity(model, output.sequences, prompts["attention_mask"], depth),
        }
        results.append(result)
        print("{:28}{:9.2f}{:8.2f}x{:8.2f}{:6.0%}{:12}{:10}{:8.2f}{:7.0%}{:8.2f}".format(*result.values()), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**vars(arguments), "rows": results}, indent=1))


if __name__ == "__main__":
    main()
