"""Turns a stock autoregressive checkpoint into a TiDAR checkpoint, and back: `convert` and `to_ar`.

Weights are copied, never rewritten. What makes the copy a TiDAR checkpoint is the key `tidar_config` in its config,
and the code that travels with it.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..generation.drafting.options_tidar import TiDAROptions
from ..hub.model_card import CARD, is_ours_to_write, write_card
from ..modeling_recurrent.checkpoint_recurrent import RECURRENT_CARD
from ..modeling_tidar.configuration_tidar import TiDARConfig
from ..modeling_tidar.modeling_tidar import tidar_class
from .mask_token import mask_embedding_id
from .progress_steps import ProgressSteps
from .proof import Proof, check_keys, prove
from .quiet_transformers import quiet_transformers
from .recurrent_source import block_form_values, is_recurrent, prove_recurrent, recurrent_class_of
from .safetensors_headers import INDEX_FILE, SINGLE_FILE, TensorHeader, find_shards, read_tensors
from .shard_copy import copy_shard, num_bytes_on_disk
from .source_folder import hub_id_of, side_files, stock_folder
from .stock_config import draftable_class_of, kept_values, load_config, read_json
from .taught_elsewhere import Taught, read_as_stock
from .whole_folder import NEW, whole_folder

LONGEST_DRAFT = 64
LARGEST_WHOLE_PROOF = 2**30  # parameters; a larger model is proved on its first layers
SPARE_BYTES = 64 * 2**20  # room for tokenizer, config and code


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        target: the folder written.
        architecture: the stock class it also loads as.
        num_parameters, num_layers: of the model, as headers and config say.
        tidar_config: None where a stock checkpoint was written.
        mask_reason: why masks read the row they read.
        proof: None where the caller asked for none.
    """

    target: Path
    architecture: str
    num_parameters: int
    num_layers: int
    tidar_config: TiDARConfig | None
    mask_reason: str
    proof: Proof | None


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    draft_length: int | None = None,
    mask_token_id: int | None = None,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    show_progress: bool = False,
) -> Conversion:
    """Writes `source` as a TiDAR checkpoint into the new folder `target`, and proves that it is the same model.

    The mask token is an input-only id: the first one behind the vocabulary, `mask_token_id = vocab_size`. No text
    can contain it and no logit exists for it, so the autoregressive distribution is exactly the source's and no
    tensor is rewritten or added. Its embedding is read from a row that is there already, `mask_embedding_id`: one
    that text uses least. Three other ways were weighed:

    - An unused reserved row as the id itself. Many vocabularies have none; its logit exists and must be excluded,
      which changes the distribution.
    - A vocabulary grown by one. It rewrites two tensors, and a stock server of the checkpoint could generate the id.
    - An embedding of its own beside an untouched vocabulary. The extra tensor makes strict stock loaders fail.

    A gated adapter sees a constant input at masks whichever vector it is, so a fixed one costs it nothing.

    A recurrent-depth checkpoint (Huginn, retrofitted recurrences, Ouro) keeps its weights' names, which are read as
    they are, and of its config what we know; it gains the code to decode with, and does not become a TiDAR checkpoint.

    A checkpoint that others taught to draft (Nemotron-Labs-Diffusion and its like, or a stock config that names a
    `mask_token_id`) keeps its own mask token, which is then never generated.

    Files are never hard-linked: whatever writes into the target in place would write into the source. Where the file
    system can share blocks until one side changes (btrfs, xfs), the copy costs neither time nor space.

    Args:
        source: a local folder, a Hub id, or a GGUF file (or a folder with one); safetensors only otherwise.
        draft_length: K, how many tokens a block of masks drafts, 1 to 64; by default 8. Training decides what drafts
            are worth. A recurrent-depth checkpoint has none.
        mask_token_id: the mask token of a checkpoint that was taught to draft elsewhere, where its config does not say.
        overwrite: replace an existing checkpoint folder, which stays whole until the new one is.
        link: write symbolic links to the source's shards: the target costs megabytes, and needs the source to stay
            where it is.
        verify: run the stock and the converted model on the same ids. Up to 2^30 parameters all layers are run in
            float32; of larger models only the first ones, in the checkpoint's own dtype.
        revision: a branch, tag or commit of a Hub repository.

    Raises:
        ValueError: the source is damaged, quantized, or of an architecture that cannot draft; the target exists; the
            disk is too small; or the proof fails. Nothing is left behind.
    """
    if draft_length is not None and (type(draft_length) is not int or not 1 <= draft_length <= LONGEST_DRAFT):
        raise ValueError(
            f"`draft_length` must be an integer between 1 and {LONGEST_DRAFT} (a decode step reads K + K*K tokens), "
            f"but is {draft_length!r}."
        )
    target = Path(os.path.abspath(target))
    with whole_folder(target, overwrite=overwrite) as workplace, ProgressSteps(show_progress) as steps:
        steps.begin("Finding the source")
        folder = stock_folder(source, workplace, revision)
        if is_recurrent(folder) and mask_token_id is not None:
            raise ValueError(
                f"`mask_token_id` must be left out of a recurrent-depth checkpoint, which nobody taught to draft by "
                f"masks, but is {mask_token_id}."
            )
        if is_recurrent(folder) and draft_length is not None:
            raise ValueError(
                f"`draft_length` must be left out of a recurrent-depth checkpoint, but is {draft_length}: {source} "
                "decodes several tokens at once by its own `generate(policy='exact')`, without drafts by masks."
            )
        if is_recurrent(folder):
            checkpoint = _read_checkpoint(folder, target, steps, recurrent_class_of)
            _write_recurrent(checkpoint, target, workplace / NEW, link, hub_id_of(source, folder), steps)
            is_proved = verify and checkpoint.num_parameters <= LARGEST_WHOLE_PROOF
            proof = prove_recurrent(folder, workplace / NEW, checkpoint.stock_class) if is_proved else None
            return checkpoint.converted(target, None, "", proof)
        folder, taught = read_as_stock(folder, workplace, mask_token_id, link, steps)
        checkpoint = _read_checkpoint(folder, target, steps)
        _refuse_tidar(checkpoint, source)
        values = kept_values(checkpoint.values, folder / "config.json")
        tidar, mask_reason = _tidar_config(checkpoint, draft_length or 8, taught)
        values["tidar_config"] = tidar.to_dict()

        new = workplace / NEW
        is_own = folder.parent == workplace and not checkpoint.shards[0].is_symlink()
        _write_files(checkpoint, new, values, link=link, is_own=is_own, steps=steps)
        model_class: Any = tidar_class(checkpoint.stock_class)
        _make_room_for_own_options(new / "generation_config.json")
        model_class.write_code(new)
        _keep_users_card(target, new)
        write_card(new, model_class.card_kind, target.name, origin=folder, base_model=hub_id_of(source, folder))

        check_keys(new, model_class, type(checkpoint.config).from_pretrained(new))
        proof = _proof(folder, new, checkpoint, checkpoint.config, steps) if verify else None
    return checkpoint.converted(target, tidar, mask_reason, proof)


def to_ar(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    show_progress: bool = False,
) -> Conversion:
    """Writes a TiDAR checkpoint as the stock one it was converted from: our config keys and our code are left out.

    Arguments and errors are those of `convert`.
    """
    target = Path(os.path.abspath(target))
    with whole_folder(target, overwrite=overwrite) as workplace, ProgressSteps(show_progress) as steps:
        steps.begin("Finding the source")
        folder = stock_folder(source, workplace, revision)
        checkpoint = _read_checkpoint(folder, target, steps)
        if "tidar_config" not in checkpoint.values:
            raise ValueError(f"{source} has no `tidar_config` in its config.json: it is a stock checkpoint already.")
        values = kept_values(checkpoint.values, folder / "config.json")
        values["architectures"] = [checkpoint.stock_class.__name__]

        new = workplace / NEW
        _write_files(checkpoint, new, values, link=link, is_own=False, steps=steps)
        _drop_own_options(new / "generation_config.json")
        _keep_users_card(target, new)
        config = load_config(values, new / "config.json")
        check_keys(new, checkpoint.stock_class, config)
        proof = _proof(new, folder, checkpoint, config, steps) if verify else None
    return checkpoint.converted(target, None, "", proof)


@dataclass(frozen=True)
class _Checkpoint:
    """A source folder whose headers were read and fit its config."""

    folder: Path
    values: dict[str, Any]  # of its config.json
    stock_class: type[PreTrainedModel]
    config: PreTrainedConfig
    shards: list[Path]
    tensors: dict[str, TensorHeader]

    @property
    def num_parameters(self) -> int:
        """Of the file: a tied pair that is stored twice counts twice."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def converted(self, target: Path, tidar: TiDARConfig | None, mask_reason: str, proof: Proof | None) -> Conversion:
        num_layers, architecture = self.config.num_hidden_layers, self.stock_class.__name__
        return Conversion(target, architecture, self.num_parameters, num_layers, tidar, mask_reason, proof)


def _read_checkpoint(
    folder: Path,
    target: Path,
    steps: ProgressSteps,
    class_of: Callable[[PreTrainedConfig], type[PreTrainedModel]] = draftable_class_of,
) -> _Checkpoint:
    """Reads config and headers; nothing is written before this has passed."""
    steps.begin("Reading config and headers")
    values = read_json(folder / "config.json")
    config = load_config(values, folder / "config.json")
    stock_class = class_of(config)
    shards = find_shards(folder)
    for path in [folder, *shards]:
        real = path.resolve()
        if target.resolve() in [real, *real.parents] or (path == folder and real in target.resolve().parents):
            raise ValueError(f"{target} and the source {real} lie in one another. Choose a target elsewhere.")
    tensors = read_tensors(folder, shards)
    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"{folder / 'config.json'} promises {config.num_hidden_layers} layers, but the shards hold no more than "
            f"{len(tensors)} tensors. Config and weights are not of one checkpoint."
        )
    check_keys(folder, stock_class, config)
    return _Checkpoint(folder, values, stock_class, config, shards, tensors)


def _refuse_tidar(checkpoint: _Checkpoint, source: str | os.PathLike) -> None:
    if "tidar_config" in checkpoint.values:
        raise ValueError(
            f"{source} is a TiDAR checkpoint already. Train or decode it as it is, or pass --to-ar to get the stock "
            "checkpoint back."
        )


def _write_recurrent(
    checkpoint: _Checkpoint, target: Path, new: Path, link: bool, base_model: str | None, steps: ProgressSteps
) -> None:
    """Writes a recurrent-depth checkpoint with our code beside it; its weights have the names we read already."""
    values = kept_values(checkpoint.values, checkpoint.folder / "config.json")
    values |= block_form_values(checkpoint.config, list(checkpoint.tensors))
    values["architectures"] = [checkpoint.stock_class.__name__]
    _write_files(checkpoint, new, values, link=link, is_own=False, steps=steps)
    checkpoint.stock_class.write_code(new)
    _make_room_for_own_options(new / "generation_config.json")
    _keep_users_card(target, new)
    write_card(new, RECURRENT_CARD, target.name, origin=checkpoint.folder, base_model=base_model)
    check_keys(new, checkpoint.stock_class, type(checkpoint.config).from_pretrained(new))


def _tidar_config(checkpoint: _Checkpoint, draft_length: int, taught: Taught | None) -> tuple[TiDARConfig, str]:
    """Where a mask's id and embedding come from, and why from there."""
    if taught is not None:
        taught.check_draft_length(draft_length)
        tidar = TiDARConfig(draft_length, taught.mask_token_id, mask_embedding_id=taught.mask_token_id)
        return tidar, "the mask token it was taught with"
    folder, vocab_size = checkpoint.folder, checkpoint.config.vocab_size
    end_ids = [checkpoint.config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        end_ids.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    row, reason = mask_embedding_id(
        _tokenizer(folder),
        vocab_size,
        [one for given in end_ids for one in (given if isinstance(given, list) else [given])],
        _zero_row_test(checkpoint),
    )
    return TiDARConfig(draft_length=draft_length, mask_token_id=vocab_size, mask_embedding_id=row), reason


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, None where it has none; code it may bring is not run."""
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class raises what it likes
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer of {folder} cannot be loaded without code of its own or a package that is missing: "
            f"{reason}. Install the package, or put a tokenizer.json in its place."
        ) from error


def _zero_row_test(checkpoint: _Checkpoint) -> Callable[[int], bool]:
    """Whether a row of the source's embedding table is all zeros, read straight from its shard."""
    with torch.device("meta"):
        model = checkpoint.stock_class(checkpoint.config)
    weight = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters() if parameter is weight]
    names += [name.removeprefix(f"{model.base_model_prefix}.") for name in names]

    def is_zero_row(row: int) -> bool:
        for shard in checkpoint.shards:
            with safe_open(shard, framework="pt") as file:
                for name in set(names) & set(file.keys()):
                    return not file.get_slice(name)[row : row + 1].any()
        return False

    return is_zero_row


def _write_files(
    checkpoint: _Checkpoint, new: Path, values: dict[str, Any], *, link: bool, is_own: bool, steps: ProgressSteps
) -> None:
    """Writes config, weights and side files. `is_own`: the shards are our own rewriting of a GGUF file."""
    must_copy = [] if link or is_own else checkpoint.shards
    num_bytes = sum(map(num_bytes_on_disk, must_copy))
    if (free := shutil.disk_usage(new).free) < num_bytes + SPARE_BYTES:
        raise ValueError(
            f"{new.parent.parent} has {free / 1e9:.1f} GB free, but the copy needs {num_bytes / 1e9:.1f} GB. Make "
            "room, choose a target on another disk, or pass --link to write links to the source's shards."
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
    steps.begin("Bringing the weights", num_bytes)
    for shard in checkpoint.shards:
        if is_own:
            os.link(shard, new / shard.name)
        elif link:
            (new / shard.name).symlink_to(shard.resolve())
        else:
            copy_shard(shard, new / shard.name, steps.advance)


def _keep_users_card(target: Path, new: Path) -> None:
    """What a user wrote into the card of a folder that is replaced stays."""
    if not is_ours_to_write(target / CARD):
        shutil.copyfile(target / CARD, new / CARD)


def _make_room_for_own_options(path: Path) -> None:
    """A generation config that says it was made from the model config loses the keywords of our `generate` when it is
    loaded, so that it no longer says so."""
    if path.exists() and (values := read_json(path)).get("_from_model_config"):
        path.write_text(json.dumps(values | {"_from_model_config": False}, indent=2) + "\n", encoding="utf-8")


def _drop_own_options(path: Path) -> None:
    """Takes the keywords of our `generate` out of a generation config, which may say again what it was made from."""
    if path.exists():
        values = {key: value for key, value in read_json(path).items() if key not in TiDAROptions.KEYWORDS}
        if values.get("_from_model_config") is False:
            values["_from_model_config"] = True
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _proof(
    stock: Path, converted: Path, checkpoint: _Checkpoint, config: PreTrainedConfig, steps: ProgressSteps
) -> Proof:
    is_whole = checkpoint.num_parameters <= LARGEST_WHOLE_PROOF
    steps.begin("Comparing logits before and after" + ("" if is_whole else " (first layers)"))
    return prove(stock, converted, checkpoint.stock_class, config, is_whole=is_whole)
