"""Reads checkpoints that were trained to draft elsewhere as stock checkpoints.

Their own code is never run. Such a checkpoint is recognized by its `model_type`, or a mask token in a stock config.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .progress_steps import ProgressSteps
from .safetensors_headers import INDEX_FILE, SINGLE_FILE, find_shards, read_tensors
from .shard_copy import copy_renamed, num_bytes_on_disk
from .source_folder import side_files
from .stock_config import read_json


@dataclass(frozen=True)
class Form:
    """How a family of checkpoints differs from the stock model it was made from.

    Attributes:
        model_type, architecture: of the stock model.
        prefixes: of tensor names: theirs, and the stock model's.
        fixed_fields: config fields that the stock model fixes, with their values.
    """

    model_type: str
    architecture: str
    prefixes: tuple[tuple[str, str], ...] = ()
    fixed_fields: tuple[tuple[str, Any], ...] = ()


# Nemotron-Labs-Diffusion (arXiv 2607.05722): Ministral 3 under other names; `ministral_dlm` is an earlier name.
NEMOTRON = Form(
    "ministral3",
    "Ministral3ForCausalLM",
    prefixes=(("encoder.", "model."), ("diffusion_head.", "lm_head.")),
    fixed_fields=(("attention_bias", False), ("mlp_bias", False)),
)
FORMS = {
    "nemotron_labs_diffusion": NEMOTRON,
    "ministral_dlm": NEMOTRON,
    "tidar_qwen2": Form("qwen2", "Qwen2ForCausalLM"),
}


@dataclass(frozen=True)
class Taught:
    """How a checkpoint was trained to draft. `block_length` is None if its config has none."""

    mask_token_id: int
    block_length: int | None

    def check_draft_length(self, draft_length: int) -> None:
        if self.block_length is not None and draft_length > self.block_length:
            raise ValueError(
                f"`draft_length` must be between 1 and {self.block_length}, the block this checkpoint was trained "
                f"to draft (`block_size` in its config.json), but is {draft_length}."
            )


def read_as_stock(
    folder: Path, workplace: Path, mask_token_id: int | None, link: bool, steps: ProgressSteps
) -> tuple[Path, Taught | None]:
    """The folder of a source as a stock checkpoint, and how the source was trained to draft.

    Most sources are stock already. For any other a new folder is made in `workplace`. Its shards are links, or, if
    tensor names differ, copies with rewritten headers.

    Args:
        mask_token_id: the caller's, or None.

    Raises:
        ValueError: the mask token is missing or not in the vocabulary, or the stock model cannot have a field's value.
    """
    values = read_json(folder / "config.json")
    form = FORMS.get(str(values.get("model_type")))
    taught = _taught(values, mask_token_id, folder, is_certain=form is not None)
    if form is None:
        return folder, taught
    for name, value in form.fixed_fields:
        if values.get(name, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: `{name}` must be {value!r}, as in every released checkpoint of the kind "
                f"{values['model_type']!r}, but is {values[name]!r}: {form.architecture} has no such part."
            )
    view = workplace / "source"
    view.mkdir()
    for path in side_files(folder):
        (view / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, view / path)
    values |= {"model_type": form.model_type, "architectures": [form.architecture]}
    values.pop("tidar_config", None)  # theirs; ours is written by the conversion
    (view / "config.json").write_text(json.dumps(values), encoding="utf-8")
    _write_shards(folder, view, form, link, steps)
    return view, taught


def _taught(values: dict[str, Any], mask_token_id: int | None, folder: Path, is_certain: bool) -> Taught | None:
    stored = values.get("mask_token_id") if isinstance(values.get("mask_token_id"), int) else None
    if stored is None and is_certain and (folder / "tokenizer_config.json").is_file():
        stored = _mask_token_of_tokenizer(folder)
    if mask_token_id is not None and stored is not None and mask_token_id != stored:
        raise ValueError(
            f"`mask_token_id` must be {stored}, the mask token {folder} was trained with, but is {mask_token_id}. "
            "Leave it out."
        )
    mask_token_id = stored if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        if is_certain:
            raise ValueError(
                f"{folder} was trained to draft, but neither its config nor its tokenizer names the mask token. "
                "Pass --mask-token-id with the id used in training."
            )
        return None
    vocab_size = values.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(mask_token_id, bool) or not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be in the vocabulary, from 0 to below `vocab_size` ({vocab_size!r} in "
            f"{folder / 'config.json'}), but is {mask_token_id!r}."
        )
    block_length = values.get("block_size")
    return Taught(mask_token_id, block_length if isinstance(block_length, int) and block_length > 0 else None)


def _mask_token_of_tokenizer(folder: Path) -> int | None:
    """The id of the tokenizer's mask token, read from its files."""
    settings = read_json(folder / "tokenizer_config.json")
    token = settings.get("mask_token")
    token = token.get("content") if isinstance(token, dict) else token
    added = settings.get("added_tokens_decoder")
    ids = [key for key, entry in added.items() if entry.get("content") == token] if isinstance(added, dict) else []
    if token is None or ids:
        return int(ids[0]) if ids else None
    if (folder / "tokenizer.json").is_file():
        entries = read_json(folder / "tokenizer.json").get("added_tokens") or []
        return next((entry["id"] for entry in entries if entry.get("content") == token), None)
    return None


def _write_shards(folder: Path, view: Path, form: Form, link: bool, steps: ProgressSteps) -> None:
    shards = find_shards(folder)
    names = read_tensors(folder, shards)  # damaged files are found before anything is written
    has_index = [shard.name for shard in shards] != [SINGLE_FILE]
    if not form.prefixes:
        for shard in shards:
            (view / shard.name).symlink_to(shard.resolve())
        if has_index:
            shutil.copyfile(folder / INDEX_FILE, view / INDEX_FILE)
        return
    rename = _renaming(form.prefixes)
    renamed = {name: rename(name) for name in names}
    if len({*renamed.values()}) < len(renamed):
        raise ValueError(f"{folder} has a tensor under both its own and its stock name. Download it again.")
    if link:
        raise ValueError(
            "`link` must be left out for this checkpoint: its tensor names differ from the stock model's, so its "
            "shards' headers must be rewritten."
        )
    num_bytes = sum(map(num_bytes_on_disk, shards))
    if (free := shutil.disk_usage(view).free) < num_bytes:
        raise ValueError(
            f"{view.parent.parent} has {free / 1e9:.1f} GB free, but the copy needs {num_bytes / 1e9:.1f} GB. Free "
            "some space, or choose a target on another disk."
        )
    steps.begin("Renaming the tensors", num_bytes)
    for shard in shards:
        copy_renamed(shard, view / shard.name, renamed, steps.advance)
    if has_index:
        index = read_json(folder / INDEX_FILE)
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        (view / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _renaming(prefixes: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for theirs, ours in prefixes:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    return rename
