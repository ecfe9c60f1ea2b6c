"""Three forms of the attention of a drafting step on a CPU, side by side, with the greatest difference between them.

Of a GPU: gpu_attention.py.

    python benchmarks/attention_forms.py [--dtype bfloat16] [--heads 9 3 64]

- repeated: transformers' sdpa with a mask; keys and values are copied for each query head of a group.
- grouped: ours; the heads of a group are read as further queries (`generation/execution/attention_forms.py`).
- split: the prefix densely and the last Q slots under the mask, merged by the log-sum-exp of each.

Each line: Q queries, S slots, microseconds of one layer (the least of --rounds, forms in turn).
"""

import argparse
import time

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from wavedraft.generation.execution.attention_forms import attend_grouped

SHAPES = [(9, 256), (9, 2048), (20, 512), (20, 2048), (72, 512)]


class Attention(nn.Module):
    is_causal = True

    def __init__(self, num_key_value_groups: int):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def split(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[1, Q, H, D]: what the prefix gives and what the corner gives, weighted by how much of the softmax each has."""
    num_rows, num_heads, num_queries, _ = query.shape
    num_groups, num_before = num_heads // key.shape[1], key.shape[2] - num_queries
    grouped = query.reshape(num_rows, key.shape[1], num_groups * num_queries, -1)
    corner = mask[..., num_before:].expand(-1, num_groups, -1, -1).flatten(1, 2).unsqueeze(1)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    prefix_states, prefix_lse = attend(grouped, key[:, :, :num_before], value[:, :, :num_before])
    corner_states, corner_lse = attend(grouped, key[:, :, num_before:], value[:, :, num_before:], attn_mask=corner)
    share = (prefix_lse - corner_lse).sigmoid()[..., None].to(prefix_states.dtype)
    states = torch.lerp(corner_states, prefix_states, share)
    return states.view(num_rows, num_heads, num_queries, -1).transpose(1, 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("H", "KEY_HEADS", "D"))
    parser.add_argument("--layers", type=int, default=10, help="layers whose keys and values are not in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    num_heads, num_key_heads, head_dim = args.heads
    dtype = getattr(torch, args.dtype)
    place = {"dtype": dtype}
    attention = Attention(num_heads // num_key_heads)
    for num_queries, num_slots in SHAPES:
        query = torch.randn(args.layers, 1, num_queries, num_heads, head_dim, **place).transpose(2, 3)
        key, value = torch.randn(2, args.layers, 1, num_key_heads, num_slots, head_dim, **place)
        is_hidden = torch.rand(1, 1, num_queries, num_slots) < 0.5
        is_hidden[..., : num_slots - num_queries + 1] = False
        mask = torch.zeros(is_hidden.shape, **place).masked_fill(is_hidden, torch.finfo(dtype).min)
        forms = {
            "repeated": lambda q, k, v, m=mask: sdpa_attention_forward(attention, q, k, v, m)[0],
            "grouped": lambda q, k, v, m=mask: attend_grouped(attention, q, k, v, m)[0],
            "split": lambda q, k, v, m=mask: split(q, k, v, m),
        }
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(args.rounds):
            for name, form in forms.items():
                start = time.perf_counter()
                for layer in range(args.layers):
                    form(query[layer], key[layer], value[layer])
                best[name] = min(best[name], time.perf_counter() - start)
        states = [form(query[0], key[0], value[0]) for form in forms.values()]
        difference = max((one - states[0]).abs().max().item() for one in states)
        times = "  ".join(f"{name} {1e6 * seconds / args.layers:.0f}" for name, seconds in best.items())
        print(f"Q={num_queries} S={num_slots}: {times} us; greatest difference {difference:.1e}")


if __name__ == "__main__":
    main()
