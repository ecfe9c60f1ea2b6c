"""The work of each of two gloo processes: training and decoding with `fully_shard` (FSDP2), decoding with
`tp_plan="auto"`, and training a recurrent depth, whose processes must use equal depths or they deadlock.

`torch.multiprocessing.spawn` starts it from test_many_processes.py. It fails by assertion.
"""

import itertools
import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from helpers_recurrent import random_model
from helpers_tidar import random_prompts, tiny_tidar
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar
from wavedraft.generation.drafting import draft_planner
from wavedraft.generation.drafting.draft_head import new_draft_head
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.modeling_tidar.generation_tidar import generate
from wavedraft.training import gated_adapter_config


def model_of(mode):
    model = tiny_tidar("qwen3", draft_length=4)
    if mode == "head":
        model.requires_grad_(False)
        torch.nn.init.normal_(new_draft_head(model, 4).output_weight, std=0.3)
    return get_peft_model(model, gated_adapter_config(model, 4)) if mode == "gated" else model


def main(rank: int, folder: str) -> None:
    """Runs one of two ranks, which rendezvous in the folder."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    check_losses(rank, mesh)
    check_generate(rank, mesh)
    check_tensor_parallel(rank, folder)
    train_recurrent(rank, folder)
    distributed.barrier()  # a rank that exits early may end a waiting one
    distributed.destroy_process_group()


def check_losses(rank, mesh) -> None:
    """A step of each mode has the loss and gradients of a single process."""
    ids = random_prompts(4, 15)
    labels = ids.clone()
    labels[0, :9] = labels[3, :4] = -100
    num_labels = int((labels != -100).sum())
    for mode in ("joint", "gated", "head"):
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
        (loss * mesh.size()).backward()  # gradients are averaged over the processes
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


def check_generate(rank, mesh) -> None:
    """Ranks whose texts end at different tokens run equally many forwards, or they would deadlock."""
    ids = random_prompts(2, 6)[rank : rank + 1]
    length = {"max_new_tokens": 3 + 4 * rank, "do_sample": False}
    whole = tiny_tidar("qwen3")
    expected = whole.generate(ids, **length).tolist()
    ours = tiny_tidar("qwen3")
    stock = AutoModelForCausalLM.from_config(whole.config).eval()
    stock.load_state_dict(whole.state_dict())
    for model in (ours, stock):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert ours.generate(ids, **length, synced_gpus=True).tolist() == expected
    assert generate(ids, model=stock, **length, synced_gpus=True).tolist() == expected  # as by `custom_generate="path"`
    with pytest.raises(ValueError, match="`synced_gpus`"):
        stock.generate(ids, **length, custom_generate=tidar, synced_gpus=True)
    recurrent, sharded = random_model(), random_model()
    expected = recurrent.generate(ids % 37, **length).tolist()
    fully_shard(sharded, mesh=mesh)
    assert sharded.generate(ids % 37, **length, synced_gpus=True).tolist() == expected


def check_tensor_parallel(rank: int, folder: str) -> None:
    """Ranks of one model draft alike, though each has a clock of its own: rank 0 chooses."""
    whole = tiny_tidar("qwen3", num_attention_heads=4, num_key_value_heads=2)
    if rank == 0:
        whole.save_pretrained(f"{folder}/whole")
    distributed.barrier()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    sharded = TiDARForCausalLM.from_pretrained(f"{folder}/whole", tp_plan="auto").eval()
    assert sharded.tp_size == 2
    clock = itertools.accumulate(iter(random.Random(rank).random, 1.0))
    draft_planner.time = SimpleNamespace(perf_counter=lambda: next(clock))
    seen = set()
    asked = {"max_new_tokens": 60, "do_sample": False, "num_branches": "auto", "return_dict_in_generate": True}
    for prompt in random_prompts(2, 6)[:, None]:
        output = sharded.generate(prompt, **asked)
        plans = [None, None]
        distributed.all_gather_object(plans, output.plans)
        assert plans[0] == plans[1]
        seen |= set(plans[0])
        assert output.sequences.tolist() == whole.generate(prompt, **asked | {"num_branches": "all"}).sequences.tolist()
    assert len(seen) > 2


def train_recurrent(rank: int, folder: str) -> None:
    """Trains a recurrent depth for three steps, and saves its depths and gradients in the folder."""
    model = random_model(0, n_layers_in_recurrent_block=1, mean_recurrence=8).train()
    torch.manual_seed(rank)  # as after a rank's own data loader
    torch.rand(10 * rank)
    parallel = DistributedDataParallel(model)
    depths = []
    for _ in range(3):
        ids = torch.randint(1, 37, (1, 6))
        output = parallel(input_ids=ids, labels=ids, output_hidden_states=True)
        depths.append(len(output.hidden_states) - 2)
        output.loss.backward()
    gradient = float(model.transformer["adapter"].weight.grad.double().sum())
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump({"depths": depths, "gradient": gradient, "ids": ids.tolist()}, file)
    # Destroying the group waits for a gloo thread that may wait for Python: `parallel` must be freed first.
    del parallel, output
