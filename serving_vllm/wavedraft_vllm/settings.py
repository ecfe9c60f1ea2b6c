"""How a served checkpoint drafts: read from its folder or its adapter's, and checked before an engine starts.

Nothing here needs vLLM, torch or transformers.

K drafted tokens, D channels, V vocabulary.
"""

import json
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HEAD_FILE, ADAPTER_FILE, ADAPTER_CONFIG = "draft_head.safetensors", "adapter_model.safetensors", "adapter_config.json"
KEEP = 0.08  # of the product of a draft's confidences; at K = 4 and 8, 40 chats have the same within 1% by 0.05 to 0.12
FREE_QUERIES = 256  # query tokens of a step that a GPU of today reads in little more than the time of one
NOT_APPLIED = {  # of an adapter's config: what we do not apply, and its value where it is not in use
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
}


@dataclass(frozen=True)
class DraftSettings:
    """
    Args:
        draft_length: K, 2 or more: a request's step reads 2K tokens.
        num_masks: of them that may be masks, as far as a block was taught; a draft is one token shorter.
        mask_embedding_id: the row of the embedding table that masks read.
        excluded_id: a mask token inside the vocabulary, which is never generated; None without.
        adapter: the folder of the gated adapter; None where the checkpoint itself was taught.
        draft_head: the file of the draft head; None without.
        keep: a draft goes on while the product of its tokens' confidences is above this, from 0 to 1.
        max_batch: no masks ride along in steps of more requests than this, 0 or more.
        block_attention: how the masks of a block saw each other when it was taught.
    """

    draft_length: int
    num_masks: int
    mask_embedding_id: int
    excluded_id: int | None
    adapter: str | None
    draft_head: str | None
    keep: float
    max_batch: int
    block_attention: str = "bidirectional"

    @property
    def num_extra(self) -> int:
        """Query tokens of a request in a step beside its decided one: drafts, then masks."""
        return 2 * self.draft_length - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def longest_draft(self) -> int:
        """A block's first mask stands where the decided token will, so it drafts nothing."""
        return self.num_masks - 1

    @classmethod
    def of(cls, given: dict[str, Any], config: Any, model: str) -> "DraftSettings":
        """From what the user gave, the model's config and the folders.

        Args:
            given: `adapter` (a folder, or ORG/NAME on the Hub), `draft_length`, `keep`, `max_batch`: each may be left
                out.
            config: of the model: `hidden_size`, `num_hidden_layers`, `vocab_size`, perhaps `tidar_config`.
            model: the folder of the model, or ORG/NAME.

        Raises:
            ValueError: something is missing, out of range, or of another model.
        """
        known = {"adapter", "draft_length", "keep", "max_batch"}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"`wavedraft` has the unknown fields {unknown}; it may have {sorted(known)}.")
        adapter = folder_of(given["adapter"]) if given.get("adapter") else None
        taught = taught_by(adapter, config) if adapter else taught_by_itself(config)
        draft_length = _draft_length(given.get("draft_length"), taught["draft_length"])
        if adapter:
            check_adapter(adapter, config, model)
            head = adapter / HEAD_FILE
        else:
            refuse_untaught(model)
            head = folder_of(model) / HEAD_FILE if taught.get("draft_head") else Path()
        if head.is_file():
            check_head(head, config)
        elif not adapter and taught.get("draft_head"):
            raise ValueError(f"`tidar_config.draft_head` of {model} is true, but there is no {head}. Fetch it.")
        return cls(
            draft_length=draft_length,
            num_masks=min(taught["draft_length"], 2 * draft_length - 1),
            mask_embedding_id=taught["mask_embedding_id"],
            excluded_id=taught["excluded_id"],
            adapter=str(adapter) if adapter else None,
            draft_head=str(head) if head.is_file() else None,
            keep=_keep(given.get("keep"), taught.get("keep")),
            max_batch=_max_batch(given.get("max_batch"), draft_length),
            block_attention=taught.get("block_attention") or "bidirectional",
        )

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "DraftSettings":
        """Of the dictionary of `to_dict`, which travels to the workers in the model's config."""
        return cls(**{field.name: stored[field.name] for field in fields(cls)})


def folder_of(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hub.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the Hub's errors are many, and each says that there is no such folder here
        raise ValueError(f"`adapter` is {name!r}, neither a folder nor a repository in reach: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary of a file; {} where there is none. Raises ValueError where it holds none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no dictionary.")
    return found


def taught_by_itself(config: Any) -> dict[str, Any]:
    """What a checkpoint's own `tidar_config` says."""
    taught = getattr(config, "tidar_config", None)
    if not taught:
        raise ValueError(
            "This checkpoint has no `tidar_config` in its config.json, so it has no mask token, and no adapter was "
            "named: it cannot draft. Name an adapter, or convert and teach the checkpoint with wavedraft."
        )
    return _checked(dict(taught), "`tidar_config`", config)


def refuse_untaught(model: str) -> None:
    """Raises ValueError where an evaluation of the checkpoint itself found that no draft stands."""
    found = read_json(Path(model) / "generation_config.json").get("draft_acceptance") or {}
    if isinstance(found, dict) and found.get("chances") and not any(found["chances"]):
        raise ValueError(
            f"{model} was never taught to draft (`draft_acceptance` in its generation_config.json). Name the adapter "
            "that was, teach the checkpoint, or serve it without this plugin."
        )


def taught_by(adapter: Path, config: Any) -> dict[str, Any]:
    """What the files of a gated adapter say."""
    options = read_json(adapter / "generation_config.json")
    tokens = read_json(adapter / ADAPTER_CONFIG).get("alora_invocation_tokens")
    if not isinstance(tokens, list) or len(tokens) != 1:
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG} names no mask token (`alora_invocation_tokens`), so this is no adapter that "
            "was taught to draft. A LoRA of your own goes to vLLM's --lora-modules."
        )
    own = getattr(config, "tidar_config", None) or {}
    row = options.get("mask_embedding_id", own.get("mask_embedding_id"))
    of_blocks = options if "mask_embedding_id" in options else own  # what was written with the adapter speaks for it
    taught = {
        "draft_length": options.get("draft_length", own.get("draft_length")),
        "mask_token_id": tokens[0],
        "mask_embedding_id": row,
        "keep": options.get("draft_keep"),
        "block_attention": of_blocks.get("block_attention"),
    }
    return _checked(taught, f"{adapter / 'generation_config.json'}", config)


def _checked(taught: dict[str, Any], where: str, config: Any) -> dict[str, Any]:
    vocab_size, token = config.vocab_size, taught.get("mask_token_id")
    row = taught.get("mask_embedding_id")
    row = token if row is None else row
    if not _is_integer(taught.get("draft_length"), 1):
        raise ValueError(
            f"`draft_length` of {where} must be an integer of 1 or more, but is {taught.get('draft_length')!r}. "
            "Fetch the file that came with the adapter or checkpoint."
        )
    if not _is_integer(token, 0) or not _is_integer(row, 0) or row >= vocab_size:
        raise ValueError(
            f"The mask token of {where} must be a number and read a row of the embedding table, from 0 to "
            f"{vocab_size - 1}, but `mask_token_id` is {token!r} and `mask_embedding_id` is "
            f"{taught.get('mask_embedding_id')!r}. Fetch the file that came with the adapter or checkpoint."
        )
    if (form := taught.get("block_attention")) not in (None, "bidirectional", "causal"):
        raise ValueError(f"`block_attention` of {where} must be 'bidirectional' or 'causal', but is {form!r}.")
    return taught | {"mask_embedding_id": row, "excluded_id": token if token == row else None}


def check_adapter(adapter: Path, config: Any, model: str) -> None:
    """
    Raises:
        ValueError: the adapter lacks files, is of another model, or of a kind that is not applied here.
    """
    stored = read_json(adapter / ADAPTER_CONFIG)
    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(f"There is no {adapter / ADAPTER_FILE}. Only safetensors are read.")
    for name, unused in NOT_APPLIED.items():
        if stored.get(name) not in unused:
            raise ValueError(f"`{name}` of {adapter / ADAPTER_CONFIG} is {stored[name]!r}, which is not applied here.")
    if not _is_integer(stored.get("r"), 1) or not isinstance(stored.get("lora_alpha"), int | float):
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG} must have numbers as `r` and `lora_alpha`, but has {stored.get('r')!r} and "
            f"{stored.get('lora_alpha')!r}. Fetch the file that came with the adapter."
        )
    shapes = shapes_in(adapter / ADAPTER_FILE)
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in shapes if ".layers." in name}
    widths = {
        shape[-1] for name, shape in shapes.items() if name.endswith("q_proj.lora_A.weight") and len(shape) == 2
    } or {shape[0] for name, shape in shapes.items() if name.endswith("o_proj.lora_B.weight")}
    is_of_all = stored.get("layers_to_transform") is None and not isinstance(stored.get("target_modules"), str)
    num_layers, other_width = max(layers, default=-1) + 1, widths - {config.hidden_size}
    other_depth = num_layers != config.num_hidden_layers if is_of_all else num_layers > config.num_hidden_layers
    if other_depth or other_width or not shapes:
        base = stored.get("base_model_name_or_path")
        raise ValueError(
            f"The adapter {adapter} was taught on another model ({base}): it has {num_layers} layers "
            f"of {sorted(widths)} channels, but {model} has {config.num_hidden_layers} layers of {config.hidden_size}. "
            "Serve the model that it was taught on."
        )


def check_head(head: Path, config: Any) -> None:
    """
    Raises:
        ValueError: the file holds no draft head, or one for another number of channels.
    """
    shapes = shapes_in(head)
    wanted = {"input_weight", "input_bias", "output_weight"}
    if set(shapes) != wanted or shapes["output_weight"][0] != config.hidden_size:
        found = {name: list(shape) for name, shape in sorted(shapes.items())}
        raise ValueError(
            f"{head} must hold {sorted(wanted)} for states of {config.hidden_size} channels, but holds {found}. Take "
            "the head that was taught with this model."
        )


def shapes_in(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file by its header alone. Raises ValueError where it is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, struct.error, MemoryError, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}. Fetch it anew.") from None


def _draft_length(given: Any, taught: int) -> int:
    draft_length = taught if given is None else given
    if not _is_integer(draft_length, 2) or draft_length > taught:
        raise ValueError(
            f"`draft_length` must be an integer from 2 to {taught}, the length that was taught, but is "
            f"{draft_length!r}. To serve without drafts, serve the model without this plugin."
        )
    return draft_length


def _keep(given: Any, taught: Any) -> float:
    keep = next((one for one in (given, taught) if one is not None), KEEP)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep < 1:
        raise ValueError(f"`keep` must be a number from 0 to below 1, but is {keep!r}.")
    return float(keep)


def _max_batch(given: Any, draft_length: int) -> int:
    max_batch = max(1, FREE_QUERIES // (2 * draft_length)) if given is None else given
    if not _is_integer(max_batch, 0):
        raise ValueError(f"`max_batch` must be an integer of 0 or more, but is {max_batch!r}.")
    return max_batch


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
