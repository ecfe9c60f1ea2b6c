"""One step of each mode on two processes whose weights are sharded by PyTorch's `fully_shard` (FSDP2), on gloo.

Started by `torch.distributed.run` from test_many_processes.py; prints nothing, fails by assertion.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tidar import random_prompts, tiny_tidar
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.training import gated_adapter_config


def model_of(mode):
    model = tiny_tidar("qwen3", draft_length=4)
    return get_peft_model(model, gated_adapter_config(model, 4)) if mode == "gated" else model


def main() -> None:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    ids = random_prompts(4, 15)
    labels = ids.clone()
    labels[0, :9] = labels[3, :4] = -100
    num_labels = int((labels != -100).sum())
    for mode in ("joint", "gated"):
        objective = DraftObjective(mode=mode, first_token=1)
        whole, sharded = model_of(mode), model_of(mode)
        for layer in (sharded.get_base_model() if mode == "gated" else sharded).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        expected = whole(input_ids=ids, labels=labels, objective=objective, num_items_in_batch=num_labels).loss
        expected.backward()
        mine = slice(2 * rank, 2 * rank + 2)
        loss = sharded(
            input_ids=ids[mine], labels=labels[mine], objective=objective, num_items_in_batch=num_labels
        ).loss
        (loss * size).backward()  # gradients are averaged over the processes
        total = loss.detach().clone()
        distributed.all_reduce(total)
        torch.testing.assert_close(total, expected.detach())
        gradients = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
        num_sharded = 0
        for name, weight in sharded.named_parameters():
            if weight.grad is not None:
                assert isinstance(weight.grad, DTensor)
                torch.testing.assert_close(weight.grad.full_tensor(), gradients[name], atol=1e-5, rtol=1e-4)
                num_sharded += 1
        assert num_sharded == len(gradients) > 0
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
