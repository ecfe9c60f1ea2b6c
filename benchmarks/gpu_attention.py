"""Attention of one decode step on a GPU in several forms, as a CUDA graph runs them, each compiled.

    python benchmarks/gpu_attention.py [--heads 12 2 128] [--slots 1024 4096] [--queries 1 16 32 72 272]

- repeated: transformers' sdpa under a boolean mask; keys and values are copied for each query head of a group.
- grouped: the heads of a group are read as further queries, under a mask made once a step.
- products: two batched products, and a softmax in float32 between them.
- flex: flex_attention under a block mask made once a step.

Each line: A rows, Q queries, S slots of which 0.6 are in use, microseconds of one layer (the median of --rounds replays
of --layers layers), and the greatest difference from attention in float64.
"""

import argparse
from datetime import date
from itertools import product
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from wavedraft.generation.execution import attention_forms


def graph_of(call):
    """A function that replays what `call` does, and what it returned."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    graph.replay()
    return graph.replay, kept


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs=3, default=[12, 2, 128], metavar=("H", "KEY_HEADS", "D"))
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 72])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forms", nargs="+", default=["repeated", "grouped", "products", "flex"])
    args = parser.parse_args()
    num_heads, num_key_heads, dim = args.heads
    num_groups, place = num_heads // num_key_heads, {"device": "cuda", "dtype": torch.bfloat16}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}, heads {args.heads}", flush=True)
    attention = SimpleNamespace(num_key_value_groups=num_groups, is_causal=True, training=False)
    for num_slots, num_queries, num_rows in product(args.slots, args.queries, args.rows):
        torch._dynamo.reset()
        query = torch.randn(args.layers, num_rows, num_queries, num_heads, dim, **place).transpose(2, 3)
        key, value = torch.randn(2, args.layers, num_rows, num_key_heads, num_slots, dim, **place)
        used = int(0.6 * num_slots)
        slot, row = torch.arange(num_slots, device="cuda"), torch.arange(num_queries, device="cuda")
        is_seen = (slot < used) | ((slot - used <= row[:, None]) & (slot >= used))
        is_seen = is_seen[None, None].expand(num_rows, -1, -1, -1)
        wide = torch.zeros(is_seen.shape, **place).masked_fill(~is_seen, -torch.inf).repeat(1, 1, num_groups, 1)
        length = torch.tensor(used, device="cuda")

        def may_see(b, h, q, kv, length=length):
            return (kv < length) | (kv - length <= q)

        block = create_block_mask(may_see, 1, 1, num_queries, num_slots, device="cuda")
        forms = {
            "repeated": lambda q, k, v, m=is_seen: sdpa_attention_forward(attention, q, k, v, m)[0],
            "grouped": lambda q, k, v, m=wide: attention_forms.attend_in_step(attention, q, k, v, m)[0],
            "products": lambda q, k, v, m=wide: attention_forms.attend_in_step(attention, q, k, v, m)[0],
            "flex": lambda q, k, v, m=block: flex_attention(q, k, v, block_mask=m, enable_gqa=True).transpose(1, 2),
        }
        exact = nn.functional.scaled_dot_product_attention(
            query[0].double(),
            key[0].double().repeat_interleave(num_groups, 1),
            value[0].double().repeat_interleave(num_groups, 1),
            attn_mask=is_seen,
        ).transpose(1, 2)
        said = []
        for name in args.forms:
            attention_forms.FEW_TILES = 10**9 if name == "products" else 0
            form = torch.compile(forms[name], dynamic=False)

            def layers(form=form, query=query, key=key, value=value):
                return [form(query[i], key[i], value[i]) for i in range(args.layers)]

            try:
                replay, states = graph_of(layers)
                seconds = []
                for _ in range(args.rounds):
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    replay()
                    end.record()
                    torch.cuda.synchronize()
                    seconds.append(begin.elapsed_time(end))
                off = (states[0].double() - exact).abs().max().item()
                said.append(f"{name} {1e3 * median(seconds) / args.layers:.1f} ({off:.0e})")
            except Exception as error:
                said.append(f"{name} failed: {type(error).__name__} {str(error)[:200]}")
        print(f"A={num_rows} Q={num_queries} S={num_slots}: " + "  ".join(said) + " us", flush=True)


if __name__ == "__main__":
    main()
