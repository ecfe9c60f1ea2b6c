"""Products of bfloat16 on a CPU: PyTorch's, ours of packed weights, and float32's, for a forward of so many tokens.

python benchmarks/bfloat16_products.py models/SmolLM2-135M-Instruct-TiDAR

Every linear layer of the model once, in their order, the three kinds in turn; milliseconds are medians. What else a
forward does (attention, norms, Python) is not in them. The last column counts results whose bits are PyTorch's.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from wavedraft.generation.bfloat16_kernel import bfloat16_kernel
from wavedraft.generation.bfloat16_products import WidenedWeight


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 5, 8, 9, 16, 32, 128])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if isinstance(why := bfloat16_kernel(), str):
        parser.error(f"There are no products of ours here: {why}.")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    packed, wide = [WidenedWeight(weight) for weight in weights], [weight.float() for weight in weights]

    table = Table(
        title=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {date.today()}"
    )
    for heading in ("tokens", "PyTorch ms", "ours ms", "float32 ms", "ours, of PyTorch's", "ours GFLOP/s", "same bits"):
        table.add_column(heading, justify="right")
    for num_tokens in arguments.tokens:
        inputs = {d: torch.randn(1, num_tokens, d, dtype=torch.bfloat16) for d in {w.shape[1] for w in weights}}
        wide_inputs = {d: x.float() for d, x in inputs.items()}

        def pytorchs(x: dict[int, torch.Tensor], of: list[torch.Tensor]) -> list[torch.Tensor]:
            return [nn.functional.linear(x[weight.shape[1]], weight) for weight in of]

        ways: dict[str, Callable[[], list[torch.Tensor]]] = {
            "PyTorch": lambda x=inputs: pytorchs(x, weights),
            "ours": lambda x=inputs: [weight.times(x[weight.num_channels], None) for weight in packed],
            "float32": lambda x=wide_inputs: pytorchs(x, wide),
        }
        pairs = zip(ways["PyTorch"](), ways["ours"](), strict=True)
        counts = [(int((theirs == ours).sum()), ours.numel()) for theirs, ours in pairs]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        taken = {name: statistics.median(found) for name, found in seconds.items()}
        rate = 2 * num_tokens * sum(weight.numel() for weight in weights) / taken["ours"] / 1e9
        share = sum(same for same, _ in counts) / sum(of for _, of in counts)
        figures = [f"{1e3 * taken[name]:.1f}" for name in ways] + [f"{taken['ours'] / taken['PyTorch']:.2f}"]
        table.add_row(str(num_tokens), *figures, f"{rate:.0f}", f"{share:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
