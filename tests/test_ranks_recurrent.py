"""Training on several ranks: two real processes, which must go equally deep or wait for each other for ever."""

import json

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from helpers_recurrent import random_model


def train(rank: int, folder: str) -> None:
    """Three steps of one rank; leaves the depths it went to, and its gradients, in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = random_model(0, n_layers_in_recurrent_block=1, mean_recurrence=8).train()
    torch.manual_seed(rank)  # as a rank's own data loader would leave it
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
    # Its end waits for a gloo thread that may itself wait for Python: not the group's last holder, it has no such end.
    del parallel, output
    dist.destroy_process_group()


def test_two_ranks_go_equally_deep_whatever_their_generators_say(tmp_path):
    spawn(train, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["ids"] != second["ids"], "the ranks read the same data"
    assert first["depths"] == second["depths"] and len(set(first["depths"])) > 1
    assert first["gradient"] == second["gradient"]
