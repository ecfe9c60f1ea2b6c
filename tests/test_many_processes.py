"""Several processes: two that share weights or gradients, and the launch files read by accelerate."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from torch.multiprocessing import spawn

from helpers_two_ranks import main

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What two ranks left of a recurrent depth's training, after all else that they check."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(main, args=(str(folder),), nprocs=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_shards_lose_and_learn_what_one_process_does(two_ranks):
    """Asserted by the ranks themselves."""
    assert len(two_ranks) == 2


def test_two_ranks_go_equally_deep_whatever_their_generators_say(two_ranks):
    first, second = two_ranks
    assert first["ids"] != second["ids"], "the ranks read the same data"
    assert first["depths"] == second["depths"] and len(set(first["depths"])) > 1
    assert first["gradient"] == second["gradient"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_launch_file_becomes_the_environment_it_promises(name):
    """As `accelerate launch --config_file` reads it. DeepSpeed itself is not started."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{name}.yaml"), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = list(config.deepspeed_config)  # as `accelerate launch` does
    assert arguments.num_processes == config.num_processes == 8 and arguments.mixed_precision == "bf16"
    if name.startswith("zero"):
        _, environment = prepare_deepspeed_cmd_env(arguments)
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
        return
    environment = prepare_multi_gpu_env(arguments)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if name == "fsdp2" else None)
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
