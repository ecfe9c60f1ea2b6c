"""The text tower of a model of text and images, as a stock checkpoint of its own (`convert --text-only`).

The tower's tensors are copied byte for byte, under the names of the text class. All other tensors stay behind.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..generation.stock_model import is_composite
from ..modeling_tidar.auto_tidar import PLAIN_FORMS, PREFIX_MODELS, causal_class_of, text_class_of
from .checkpoint_files import check_apart
from .progress_steps import ProgressSteps
from .proof import PROMPT_LENGTH, check_keys, fewest_layers, of_first_layers
from .quiet_transformers import quiet_transformers
from .safetensors_headers import INDEX_FILE, SINGLE_FILE, find_shards, read_tensors
from .shard_copy import copy_renamed
from .source_folder import side_files
from .stock_config import load_config, read_json, refuse_quantized, without_weights

OF_BOTH = ("tie_word_embeddings", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
HEAD = "lm_head.weight"
UNSCALED = {"aya_vision", "cohere2_vision"}  # which leave out the `logit_scale` of their text class
LARGEST_WHOLE = 2**30  # parameters of the tower; of larger ones the first layers are compared


@dataclass(frozen=True)
class TextTower:
    """A text tower written to a folder of its own.

    Attributes:
        source: the folder of the whole model.
        stock_class, config: of the whole model.
        text_class: of the tower.
    """

    folder: Path
    source: Path
    stock_class: type[PreTrainedModel]
    config: PreTrainedConfig
    text_class: type[PreTrainedModel]
    num_parameters: int


def write_text_tower(source: Path, folder: Path, target: Path, steps: ProgressSteps) -> TextTower:
    """Writes the text tower of `source` into the new folder `folder`: config, weights and side files.

    Args:
        target: of the conversion, which must be apart from the source.

    Raises:
        ValueError: the source is no model of several parts, or has no text class; its tensors have unknown names; or
            the disk is too small.
    """
    values = read_json(source / "config.json")
    config = load_config(values, source / "config.json")
    text_class = _checked_text_class(values, config, source)
    text_config = tower_config(config, text_class)
    shards = find_shards(source)
    check_apart(source, shards, target)
    tensors = read_tensors(source, shards)
    renamed = tower_names(list(tensors), text_class, text_config, source)
    num_bytes = sum(tensors[name].num_bytes for name in renamed)
    if (free := shutil.disk_usage(folder.parent).free) < num_bytes:
        raise ValueError(
            f"{folder.parent.parent} has {free / 1e9:.1f} GB free, but the text tower needs {num_bytes / 1e9:.1f} GB. "
            "Free some space, or choose a target on another disk."
        )
    folder.mkdir()
    for path in side_files(source):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    text_values = text_config.to_dict() | {"architectures": [text_class.__name__]}
    (folder / "config.json").write_text(json.dumps(text_values, indent=2), encoding="utf-8")
    steps.begin("Writing the text tower", num_bytes)
    weight_map = {}
    for shard in shards:
        for name in copy_renamed(shard, folder / shard.name, renamed, steps.advance):
            weight_map[name] = shard.name
    if [shard.name for shard in shards] != [SINGLE_FILE]:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    check_keys(folder, text_class, text_config)
    num_parameters = sum(tensors[name].num_elements for name in renamed)
    return TextTower(folder, source, causal_class_of(type(config)), config, text_class, num_parameters)


def _checked_text_class(values: dict[str, Any], config: PreTrainedConfig, source: Path) -> type[PreTrainedModel]:
    """The text class of a source that has a text tower to write. Raises ValueError for any other."""
    if not is_composite(config):
        raise ValueError(
            f"`text_only` must be left out for a {config.model_type!r} model: it is of text alone already."
        )
    if "tidar_config" in values:
        raise ValueError(
            f"`text_only` must be left out: {source} is a TiDAR checkpoint already. Pass --to-ar first, and then "
            "--text-only."
        )
    refuse_quantized(config)
    if config.model_type in PREFIX_MODELS:
        raise ValueError(
            f"The text of a {config.model_type!r} model cannot be written alone: it reads its prompt from both sides, "
            "and its text class does not. Decode it with transformers."
        )
    if (text_class := text_class_of(config)) is None:
        raise ValueError(
            f"The text of a {config.model_type!r} model cannot be written alone: transformers has no causal language "
            f"model for {type(config.get_text_config()).__name__}. Decode the whole model with transformers."
        )
    return text_class


def tower_config(config: PreTrainedConfig, text_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config of the text tower alone. What the whole model's config says of both parts holds."""
    text = config.get_text_config()
    values = text.to_dict()
    for name in OF_BOTH:
        own = getattr(config, name, None)
        if own is not None and (name == "tie_word_embeddings" or values.get(name) is None):
            values[name] = str(own).removeprefix("torch.") if name == "dtype" else own
    if text.model_type in PLAIN_FORMS:
        # Of text alone, time, height and width of a position are one number, and the rotation is the plain one.
        rope = {key: value for key, value in (values.get("rope_parameters") or {}).items() if "mrope" not in key}
        values |= {"model_type": PLAIN_FORMS[text.model_type], "rope_parameters": rope}
        fields = set(text_class.config_class().to_dict()) | {"model_type"}
        values = {key: value for key, value in values.items() if key in fields}
    if config.model_type in UNSCALED:
        values["logit_scale"] = 1.0
    return text_class.config_class.from_dict({key: value for key, value in values.items() if not key.startswith("_")})


def tower_names(
    names: list[str], text_class: type[PreTrainedModel], text_config: PreTrainedConfig, source: Path
) -> dict[str, str]:
    """The tower's tensors: their names in the source's files, and in the text class.

    The tower is found by its embedding table, since the source's files may have names of earlier versions.
    """
    model = without_weights(text_class, text_config)
    base = f"{model.base_model_prefix}."
    inner = [name.removeprefix(base) for name, _ in model.named_parameters() if name.startswith(base)]
    weight = model.get_input_embeddings().weight
    table = next(name for name, one in model.named_parameters() if one is weight).removeprefix(base)
    known = set(names)
    prefixes = [name.removesuffix(table) for name in names if f".{name}".endswith(f".{table}")]
    if not prefixes:
        raise ValueError(
            f"The text tower of {source} cannot be told by the names of its tensors: none ends on {table}. Load the "
            "model with transformers, save it again, and convert that."
        )
    prefix = max(prefixes, key=lambda one: sum(one + name in known for name in inner))
    heads = sorted((name for name in names if name.endswith(HEAD) and not name.startswith(prefix)), key=len)
    found = {name: base + name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return found | dict.fromkeys(heads[:1], HEAD)


def prove_tower(tower: TextTower) -> None:
    """Runs the whole model and its tower on the same ids of text.

    Raises:
        ValueError: their logits differ, or are not finite.
    """
    is_whole = tower.num_parameters <= LARGEST_WHOLE
    dtype = torch.float32 if is_whole else "auto"
    config, text_config = copy.deepcopy(tower.config), tower.text_class.config_class.from_pretrained(tower.folder)
    if not is_whole:
        num_layers = fewest_layers(config.get_text_config())
        config, text_config = (of_first_layers(one, num_layers) for one in (config, text_config))
    ids, logits = _ids_of_text(config), []
    parts: list[tuple[Path, Any, Any]] = [
        (tower.source, tower.stock_class, config), (tower.folder, tower.text_class, text_config)
    ]  # fmt: skip
    with quiet_transformers(), torch.inference_mode():
        for folder, model_class, its_config in parts:
            model = model_class.from_pretrained(folder, config=its_config, dtype=dtype).eval()
            logits.append(model(input_ids=ids, use_cache=False).logits)
            del model
    if not logits[0].isfinite().all():
        raise ValueError(
            f"{tower.source} gives logits that are not finite: its weights are damaged. Download it again."
        )
    if difference := (logits[0] - logits[1]).abs().max().item():
        raise ValueError(
            f"The logits of the text tower differ from those of {tower.source} by up to {difference}: the whole model "
            f"reads text in another way than {tower.text_class.__name__}. Report the architecture "
            f"{tower.config.model_type!r}."
        )


def _ids_of_text(config: PreTrainedConfig) -> torch.Tensor:
    """[1, T] random ids, none of which stands for an image."""
    named = {value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))}
    vocab_size = config.get_text_config().vocab_size
    usual = torch.tensor([number for number in range(vocab_size) if number not in named])
    return usual[torch.randint(len(usual), (1, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))]
