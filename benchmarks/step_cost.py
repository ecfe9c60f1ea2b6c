"""What a drafting step costs beside a step of plain decoding, on random weights of several shapes.

    python benchmarks/step_cost.py                                            (a tiny model: does it run)
    python benchmarks/step_cost.py --shapes 1.5b 8b --device cuda --compiled  (a GPU: half a minute and a few)

The shape of a step does not depend on what is accepted, so random drafts, which are hardly ever right, cost what good
ones do; every figure is of forwards that a hook saw to read K(1 + B) tokens. A step is timed with all that is done
around it: seconds behind the first token by the forwards that took them. "gain at 4" is the speed-up if a forward gave
four tokens: acceptance is assumed there, not measured.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from wavedraft import TiDARForCausalLM
from wavedraft.bench.contenders import AR, Contender, contenders_of, without_adapter
from wavedraft.bench.measure import bench
from wavedraft.bench.settings import Settings

SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=509,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
    ),
    "1.5b": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "8b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def random_model(shape: str, draft_length: int, device: str, dtype: torch.dtype) -> Any:
    """A drafting model of random weights."""
    config = SHAPES[shape]
    config.tidar_config = {"draft_length": draft_length, "mask_token_id": config.vocab_size, "mask_embedding_id": 3}
    torch.manual_seed(0)
    with torch.device(device):
        return TiDARForCausalLM.from_config(config, dtype=dtype).eval()


def step_costs(shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a step of each contender, for each batch size, and what it is of the fastest plain step."""
    longest = max(arguments.draft_lengths)
    model = random_model(shape, longest, arguments.device, getattr(torch, arguments.dtype))
    settings = Settings(
        batch_sizes=tuple(arguments.batch_sizes),
        prompt_lengths=(arguments.context,),
        draft_lengths=tuple(arguments.draft_lengths),
        num_branches=(1, 2, 3, "all"),
        repeats=arguments.repeats,
        max_new_tokens=arguments.max_new_tokens,
        has_compiled=arguments.compiled,
    )
    contenders = [c for c in contenders_of(model, without_adapter(model), settings) if c.name != "lookup"]
    if arguments.compiled:
        contenders = [c for c in contenders if c.is_compiled or c.name == AR]
    if arguments.static:
        contenders += [with_static_cache(c) for c in contenders if c.name.startswith("K=")]
    prompt = torch.randint(1, 500, (arguments.context,), generator=torch.Generator().manual_seed(1))
    found = bench(contenders, {"random": [prompt]}, prompt, settings)
    lines = []
    for batch_size in settings.batch_sizes:
        ms = {}
        for contender in contenders:
            runs = [run for run in found.runs if (run.batch_size, run.contender) == (batch_size, contender.name)]
            ms[contender.name] = 1e3 * median(run.decode_seconds / (run.num_forwards - 1) for run in runs)
            length, branches = contender.keywords.get("draft_length", 0), contender.keywords.get("num_branches", 0)
            expected, seen = (length or 1) * (1 + branches), runs[0].num_query_tokens / (runs[0].num_forwards - 1)
            lines.append(
                {
                    "shape": shape,
                    "batch_size": batch_size,
                    "contender": contender.name,
                    "ms": ms[contender.name],
                    "queries": seen,
                    "expected_queries": expected,
                }
            )
        plain = min(ms[name] for name in (AR, "AR compiled") if name in ms)
        for line in lines[-len(contenders) :]:
            line["of_plain"] = line["ms"] / plain
    return lines


def with_static_cache(contender: Contender) -> Contender:
    return Contender(
        f"{contender.name} static", contender.model, contender.keywords | {"cache_implementation": "static"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["tiny"])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compiled", action="store_true", help="plain and drafting steps over a static cache, compiled, and no others"
    )
    parser.add_argument("--static", action="store_true", help="also drafting with a static cache")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()

    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "cpu"
    print(f"{name}, {arguments.dtype}, torch {torch.__version__}, {date.today().isoformat()}, random weights")
    lines = []
    for shape in arguments.shapes:
        lines += step_costs(shape, arguments)
        print("\n| shape, batch | step | ms | of a plain step | gain at 4 | queries |\n|" + "---|" * 6)
        for line in (line for line in lines if line["shape"] == shape):
            is_drafting = line["contender"].startswith("K=")
            gain = f"{4 / line['of_plain']:.2f}" if is_drafting else ""
            ms = f"{line['ms']:.2f} | {line['of_plain']:.2f}"
            queries = f"{line['queries']:.1f} of {line['expected_queries']}"
            print(f"| {shape}, {line['batch_size']} | {line['contender']} | {ms} | {gain} | {queries} |")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"about": vars(arguments), "steps": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
