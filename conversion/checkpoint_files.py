"""Reads the source checkpoint's config and headers; writes the target's config, weights and side files."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..generation.drafting.draftable import refuse_undraftable
from ..generation.drafting.options_tidar import ACCEPTANCE, TiDAROptions
from ..hub.hub_repository import CARD, FROM_MODEL_CONFIG, TOKENIZER_FILES, matching_files
from ..hub.model_card import is_ours_to_write
from .progress_steps import ProgressSteps
from .proof import check_keys
from .safetensors_headers import INDEX_FILE, SINGLE_FILE, TensorHeader, find_shards, read_tensors
from .shard_copy import copy_shard, num_bytes_on_disk
from .source_folder import side_files
from .stock_config import draftable_class_of, load_config, read_json, without_weights

logger = logging.get_logger(__name__)
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
SPARE_BYTES = 64 * 2**20  # room for tokenizer, config and code


@dataclass(frozen=True)
class Checkpoint:
    """A source folder whose tensor headers fit its config."""

    folder: Path
    values: dict[str, Any]  # the contents of config.json
    stock_class: type[PreTrainedModel]
    config: PreTrainedConfig
    shards: list[Path]
    tensors: dict[str, TensorHeader]

    @property
    def num_parameters(self) -> int:
        """Parameters in the files: a tied pair that is stored twice counts twice."""
        return sum(tensor.num_elements for tensor in self.tensors.values())


def read_checkpoint(
    folder: Path,
    target: Path,
    steps: ProgressSteps,
    class_of: Callable[[PreTrainedConfig], type[PreTrainedModel]] = draftable_class_of,
) -> Checkpoint:
    """Reads and checks config and headers, before anything is written."""
    steps.begin("Reading config and headers")
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder} has an {ADAPTER_CONFIG}, so transformers takes it for an adapter and loads another model. "
            "Convert the adapter's base model; or remove that file, if the folder has a whole model."
        )
    values = read_json(folder / "config.json")
    config = load_config(values, folder / "config.json")
    stock_class = class_of(config)
    shards = find_shards(folder)
    check_apart(folder, shards, target)
    tensors = read_tensors(folder, shards)
    num_layers = config.get_text_config().num_hidden_layers
    if num_layers > len(tensors):
        raise ValueError(
            f"{folder / 'config.json'} says {num_layers} layers, but the shards have only {len(tensors)} "
            "tensors. Config and weights belong to different checkpoints."
        )
    _check_generation_config(folder)
    if class_of is draftable_class_of:
        refuse_undraftable(stock_class, config, without_weights(stock_class, config))
    check_keys(folder, stock_class, config)
    return Checkpoint(folder, values, stock_class, config, shards, tensors)


def check_apart(folder: Path, shards: list[Path], target: Path) -> None:
    """Raises ValueError if writing the target would touch the source, or the other way round."""
    for path in [folder, *shards]:
        real = path.resolve()
        if target.resolve() in [real, *real.parents] or (path == folder and real in target.resolve().parents):
            raise ValueError(f"{target} and the source {real} must not contain each other. Choose another target.")


def _check_generation_config(folder: Path) -> None:
    if not (folder / "generation_config.json").exists():
        return
    try:
        values = read_json(folder / "generation_config.json") | {FROM_MODEL_CONFIG: False}  # as it is written
        GenerationConfig.from_dict(values).to_json_string()
    except Exception as error:  # on bad values it raises errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder / 'generation_config.json'} is not valid: {reason}. Correct it, or remove it."
        ) from None


def write_files(
    checkpoint: Checkpoint, new: Path, values: dict[str, Any], *, link: bool, is_own: bool, steps: ProgressSteps
) -> None:
    """Writes config, weights and side files. `is_own`: the shards are our own temporary files."""
    must_copy = [] if link or is_own else checkpoint.shards
    num_bytes = sum(map(num_bytes_on_disk, must_copy))
    if (free := shutil.disk_usage(new).free) < num_bytes + SPARE_BYTES:
        raise ValueError(
            f"{new.parent.parent} has {free / 1e9:.1f} GB free, but the copy needs {num_bytes / 1e9:.1f} GB. Free "
            "some space, choose a target on another disk, or pass --link to link to the source's shards."
        )
    (new / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in side_files(checkpoint.folder):
        (new / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, new / name)
    if (new / "tokenizer_config.json").exists():
        tokenizer_values = read_json(new / "tokenizer_config.json")
        if tokenizer_values.pop("auto_map", None):
            text = json.dumps(tokenizer_values, indent=2, ensure_ascii=False) + "\n"
            (new / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if [shard.name for shard in checkpoint.shards] != [SINGLE_FILE]:
        shutil.copyfile(checkpoint.folder / INDEX_FILE, new / INDEX_FILE)
    if not matching_files(checkpoint.folder, TOKENIZER_FILES):
        logger.warning(
            "The source has no tokenizer, so the target gets none, and its prompts are ids. To write texts, save a "
            "tokenizer into the target (`tokenizer.save_pretrained`)."
        )
    steps.begin("Writing the weights", num_bytes)
    for shard in checkpoint.shards:
        if is_own:
            os.link(shard, new / shard.name)
        elif link:
            (new / shard.name).symlink_to(shard.resolve())
        else:
            copy_shard(shard, new / shard.name, steps.advance)


def keep_users_card(target: Path, new: Path) -> None:
    """Keeps a model card that the user edited when its folder is replaced."""
    if not is_ours_to_write(target / CARD):
        shutil.copyfile(target / CARD, new / CARD)


def make_room_for_own_options(path: Path) -> None:
    """Clears the flag that a generation config was made from the model config. With that flag, loading the config
    would drop the keywords of our `generate`."""
    if path.exists() and (values := read_json(path)).get(FROM_MODEL_CONFIG):
        path.write_text(json.dumps(values | {FROM_MODEL_CONFIG: False}, indent=2) + "\n", encoding="utf-8")


def record_no_drafts(path: Path, config: Any, draft_length: int) -> None:
    """Records in a generation config that no drafted token has stood yet: the checkpoint is to be taught first."""
    values = read_json(path) if path.exists() else GenerationConfig.from_model_config(config).to_diff_dict()
    record = {"chances": [0.0] * (draft_length - 1), "num_prompts": 0}
    values |= {FROM_MODEL_CONFIG: False, ACCEPTANCE: record}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def drop_own_options(path: Path) -> None:
    """Removes the keywords of our `generate` from a generation config, and sets a cleared flag again."""
    if path.exists():
        ours = (*TiDAROptions.KEYWORDS, ACCEPTANCE)
        values = {key: value for key, value in read_json(path).items() if key not in ours}
        if values.get(FROM_MODEL_CONFIG) is False:
            values[FROM_MODEL_CONFIG] = True
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
