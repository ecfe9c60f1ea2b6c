"""Uploads a local folder to the Hub in one commit: a checkpoint of ours, or a gated adapter."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..hub.hub_repository import (
    LICENCE_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    HubRepository,
    matching_files,
)
from ..hub.model_card import is_hub_id, metadata_of, write_card
from ..modeling_recurrent import OuroForCausalLM, RecurrentDepthForCausalLM
from ..modeling_tidar import TiDARConfig
from ..modeling_tidar.auto_tidar import stock_class_of
from ..modeling_tidar.modeling_tidar import tidar_class, write_adapter_code
from .stock_config import read_json

RECURRENT = {
    model_class.config_class.model_type: model_class for model_class in (RecurrentDepthForCausalLM, OuroForCausalLM)
}
SMALL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "README.md")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    model: str | os.PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figures: str | os.PathLike | None = None,
    include: Iterable[str] = (),
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Any:
    """Uploads a checkpoint or a gated adapter so that it decodes where wavedraft is not installed.

    Code, card and options are written into a copy; the folder itself is not changed.

    Args:
        folder: a TiDAR or recurrent-depth checkpoint, or a gated adapter.
        model: for an adapter, the TiDAR checkpoint it was trained on, if its own files lack its options.
        base_model: the Hub id of the model it was made from, if no card names it.
        license: the base model's licence, if no card names it.
        figures: a file of results (report.json of `wavedraft train`, or the output of benchmarks/drafting.py); by
            default the folder's report.json, if it has one.
        include: patterns of other files to upload.

    Returns:
        the commit's `CommitInfo`.

    Raises:
        ValueError: the folder is neither, or a required value is missing.
        OSError: the Hub refused or interrupted the upload.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as workplace:
        staged = Path(workplace, folder.resolve().name)
        stage(folder, staged, include)
        kind, origin = complete(staged, model, base_model)
        report = Path(figures) if figures is not None else folder / "report.json"
        write_card(
            staged,
            kind,
            repo_id,
            origin=origin,
            figures=read_json(report) if figures is not None or report.is_file() else None,
            base_model=base_model,
            license=license,
        )
        return HubRepository.files.publish(
            staged,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            include=include,
        )


def stage(folder: Path, staged: Path, include: Iterable[str]) -> None:
    """Copies the files that a folder publishes; weights are linked."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Name the folder with config.json or adapter_config.json.")
    staged.mkdir()
    weights = matching_files(folder, WEIGHT_FILES)
    for name in {*weights, *matching_files(folder, [*SMALL_FILES, *TOKENIZER_FILES, *LICENCE_FILES, *include])}:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if name in weights:
            (staged / name).symlink_to((folder / name).resolve())
        else:
            shutil.copyfile(folder / name, staged / name)


def complete(staged: Path, model: str | os.PathLike | None, base_model: str | None) -> tuple[str, Path | None]:
    """Writes the code of a staged folder. Returns its kind of card, and the folder it was made from."""
    if (staged / "adapter_config.json").is_file():
        return "adapter", complete_adapter(staged, model, base_model)
    values = read_json(staged / "config.json")
    if (recurrent := RECURRENT.get(values.get("model_type"))) is not None:
        recurrent.write_code(staged)
        return recurrent.card_kind, None
    config = AutoConfig.from_pretrained(staged, trust_remote_code=False)
    TiDARConfig.from_model_config(config)
    drafting: Any = tidar_class(stock_class_of(config))
    drafting.write_code(staged)
    return drafting.card_kind, None


def complete_adapter(staged: Path, model: str | os.PathLike | None, base_model: str | None) -> Path | None:
    """Writes the code and options for drafting with a gated adapter, and the base model's id into its config."""
    path = staged / "adapter_config.json"
    values = read_json(path)
    invoked = values.get("alora_invocation_tokens")
    if not invoked or len(invoked) != 1:
        raise ValueError(
            f"{path.parent.name} has a PEFT adapter that is not gated (it has no `alora_invocation_tokens`), so it "
            "changes the text of its model. Merge it into its checkpoint, and push the checkpoint."
        )
    named = values.get("base_model_name_or_path")
    trained_on = next((Path(p) for p in (model, named) if p is not None and Path(p, "config.json").is_file()), None)
    base = base_model or metadata_of(staged / "README.md").get("base_model")
    base = base or (metadata_of(trained_on / "README.md").get("base_model") if trained_on else None)
    base = base or (named if is_hub_id(named) else None)
    if base is None:
        raise ValueError(
            f"The adapter's `base_model_name_or_path` is {named!r}, which is not a Hub id, and no card names the "
            "base model. Pass --base-model ORG/NAME: the adapter cannot be loaded without it."
        )
    values["base_model_name_or_path"] = base
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    options_path = staged / "generation_config.json"
    options = read_json(options_path) if options_path.is_file() else {}
    names = "draft_length", "mask_embedding_id", "block_attention"
    tidar = {"mask_token_id": invoked[0], **{name: options.get(name) for name in names}}
    if tidar["draft_length"] is None or tidar["mask_embedding_id"] is None:
        if trained_on is None:
            raise ValueError(
                "The adapter's folder has no generation_config.json with the `draft_length` and `mask_embedding_id` "
                "it was trained with. Pass --model FOLDER: the TiDAR checkpoint it was trained on."
            )
        tidar = read_json(trained_on / "config.json").get("tidar_config") or {}
    vocab_size = max(tidar.get("mask_token_id", 0), tidar.get("mask_embedding_id", 0) + 1)
    write_adapter_code(staged, TiDARConfig.from_dict(tidar, vocab_size=vocab_size))
    return trained_on
