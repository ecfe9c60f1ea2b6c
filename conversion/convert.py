"""Converts a stock autoregressive checkpoint to a TiDAR checkpoint (`convert`), and back (`to_ar`).

Weights are copied, never changed. The copy becomes a TiDAR checkpoint through the key `tidar_config` in its config, and
the code beside it.

The mask token is an input-only id: the first one after the vocabulary, `mask_token_id = vocab_size`. No text can
contain it and no logit exists for it. The autoregressive distribution is therefore exactly the source's, and no tensor
is rewritten or added. The mask's embedding is an existing row, `mask_embedding_id`: the one that text uses least. Any
fixed vector will do, since a gated adapter sees the same input at every mask. Three alternatives were rejected:

- An unused reserved id. Many vocabularies have none. Such an id has a logit, and excluding it changes the distribution.
- A new id in a larger vocabulary. Two tensors must be rewritten, and a stock server could generate the id.
- A separate embedding tensor for the mask. The extra tensor makes strict stock loaders fail.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig

from ..generation.stock_model import BIDIRECTIONAL, CAUSAL
from ..hub.model_card import write_card
from ..modeling_tidar.configuration_tidar import TiDARConfig
from ..modeling_tidar.modeling_tidar import tidar_class
from .checkpoint_files import (
    Checkpoint,
    drop_own_options,
    keep_users_card,
    make_room_for_own_options,
    read_checkpoint,
    record_no_drafts,
    write_files,
)
from .mask_token import mask_embedding_id
from .progress_steps import ProgressSteps
from .proof import Proof, check_keys, prove
from .quiet_transformers import quiet_transformers
from .recurrent_source import block_form_values, is_recurrent, prove_recurrent, recurrent_class_of
from .retrofit import DepthOne, check_layout, prove_depth_one, write_retrofitted
from .source_folder import hub_id_of, stock_folder
from .stock_config import kept_values, load_config, read_json
from .taught_elsewhere import Taught, read_as_stock
from .text_tower import prove_tower, write_text_tower
from .whole_folder import NEW, whole_folder

LONGEST_DRAFT = 64
LARGEST_WHOLE_PROOF = 2**30  # parameters; of larger models the first layers are compared


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        target: the folder written.
        architecture: the stock class that also loads the target.
        num_parameters, num_layers: from the tensor headers and the config.
        tidar_config: None unless a TiDAR checkpoint was written.
        mask_reason: why masks read this embedding row.
        proof: None if the models were not compared.
        depth_one: of a model that was given a recurrence, its comparison with the source.
    """

    target: Path
    architecture: str
    num_parameters: int
    num_layers: int
    tidar_config: TiDARConfig | None
    mask_reason: str
    proof: Proof | None
    depth_one: DepthOne | None = None


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    draft_length: int | None = None,
    mask_token_id: int | None = None,
    recurrent: tuple[int, int, int] | None = None,
    block_attention: str | None = None,
    text_only: bool = False,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    show_progress: bool = False,
) -> Conversion:
    """Writes `source` as a TiDAR checkpoint into the new folder `target`, and proves that it is the same model.

    A recurrent-depth checkpoint gets the code to decode with, and does not become a TiDAR checkpoint. A checkpoint
    that was trained to draft elsewhere keeps its own mask token, which is then never generated. The source's files are
    never hard-linked: a write to the target would change the source.

    Args:
        source: a local folder or a Hub id with safetensors, or a GGUF file (or a folder with one).
        draft_length: K, how many tokens a block of masks drafts, 1 to 64; by default 8. How good the drafts are
            depends on training. Leave it out for a recurrent-depth checkpoint.
        mask_token_id: the mask token of a checkpoint that was trained to draft elsewhere, if its config names none.
        recurrent: write a recurrent-depth checkpoint instead: how many layers become prelude, core and coda (see
            retrofit.py). Of a Llama-form or OLMo-2 source.
        block_attention: how the masks of a block will be taught to see one another: "bidirectional" (the default), the
            whole block, as in the paper; "causal", only the masks before, as serving engines attend.
        text_only: write the text tower alone of a model of text and images, where transformers has a class for it. Its
            tensors are copied under that class's names, and its logits compared with the whole model's too.
        overwrite: replace an existing checkpoint folder, once the new one is complete.
        link: link symbolically to the source's shards. The target then takes megabytes, and needs the source.
        verify: compare both models on the same ids: up to 2^30 parameters all layers, in float32; of larger models
            only the first layers, in the checkpoint's own dtype.
        revision: a branch, tag or commit of a Hub repository.

    Raises:
        ValueError: the source is damaged, quantized, or of an architecture that cannot draft; the target exists; the
            disk is too small; or the two models differ. No target is left then.
    """
    _check_draft_length(draft_length)
    if block_attention not in (None, BIDIRECTIONAL, CAUSAL):
        raise ValueError(f"`block_attention` must be one of {[BIDIRECTIONAL, CAUSAL]}, but is {block_attention!r}.")
    target = Path(os.path.abspath(target))
    with whole_folder(target, overwrite=overwrite) as workplace, ProgressSteps(show_progress) as steps:
        steps.begin("Finding the source")
        folder = stock_folder(source, workplace, revision)
        place = _Workplace(source, target, workplace, link, verify, steps)
        if text_only:
            folder = _text_tower(folder, place, recurrent)
        if recurrent is not None:
            _refuse_tidar_options(source, draft_length, mask_token_id, block_attention)
            return _retrofit(folder, place, recurrent)
        if is_recurrent(folder):
            _refuse_tidar_options(source, draft_length, mask_token_id, block_attention)
            return _convert_recurrent(folder, place)
        return _convert_tidar(folder, place, draft_length or 8, mask_token_id, block_attention)


@dataclass(frozen=True)
class _Workplace:
    """The temporary folder of a conversion, and the options that all conversions share.

    Attributes:
        folder: removed at the end. Its subfolder `new` becomes the target.
    """

    source: str | os.PathLike
    target: Path
    folder: Path
    link: bool
    verify: bool
    steps: ProgressSteps

    @property
    def new(self) -> Path:
        return self.folder / NEW


def _check_draft_length(draft_length: int | None) -> None:
    if draft_length is not None and (type(draft_length) is not int or not 1 <= draft_length <= LONGEST_DRAFT):
        raise ValueError(
            f"`draft_length` must be an integer between 1 and {LONGEST_DRAFT} (a decode step reads K + K*K tokens), "
            f"but is {draft_length!r}."
        )


def _refuse_tidar_options(
    source: str | os.PathLike, draft_length: int | None, mask_token_id: int | None, block_attention: str | None
) -> None:
    """Raises ValueError for options that only TiDAR checkpoints have."""
    if block_attention is not None:
        raise ValueError(
            "`block_attention` must be left out for a recurrent-depth checkpoint, which has no masks, but is "
            f"{block_attention!r}."
        )
    if mask_token_id is not None:
        raise ValueError(
            "`mask_token_id` must be left out for a recurrent-depth checkpoint, which has no mask token, but is "
            f"{mask_token_id}."
        )
    if draft_length is not None:
        raise ValueError(
            f"`draft_length` must be left out for a recurrent-depth checkpoint, but is {draft_length}: {source} "
            "decodes several tokens at once with its own `generate(policy='exact')`, without masks."
        )


def _text_tower(folder: Path, place: _Workplace, recurrent: tuple[int, int, int] | None) -> Path:
    """The folder of the source's text tower, written as a stock checkpoint and proved."""
    if place.link:
        raise ValueError("`link` must be left out with `text_only`, which writes the weights under other names.")
    if recurrent is not None:
        raise ValueError("`recurrent` must be left out with `text_only`: take the masks out of its result first.")
    if is_recurrent(folder):
        raise ValueError("`text_only` must be left out for a recurrent-depth checkpoint: it is of text alone already.")
    tower = write_text_tower(folder, place.folder / "text", place.target, place.steps)
    if place.verify:
        place.steps.begin("Comparing the text tower with the whole model")
        prove_tower(tower)
    return tower.folder


def _convert_recurrent(folder: Path, place: _Workplace) -> Conversion:
    """Writes a recurrent-depth checkpoint, which decodes by its own policies without masks."""
    checkpoint = read_checkpoint(folder, place.target, place.steps, recurrent_class_of)
    _write_recurrent(checkpoint, place)
    is_proved = place.verify and checkpoint.num_parameters <= LARGEST_WHOLE_PROOF
    proof = prove_recurrent(folder, place.new, checkpoint.stock_class) if is_proved else None
    return _conversion(checkpoint, place.target, None, "", proof)


def _retrofit(folder: Path, place: _Workplace, layout: tuple[int, int, int]) -> Conversion:
    """Writes a recurrent-depth checkpoint made of a stock one's layers."""
    if place.link:
        raise ValueError("`link` must be left out with `recurrent`, which writes the weights under other names.")
    if is_recurrent(folder):
        raise ValueError(f"`recurrent` must be left out, since {place.source} is a recurrent-depth checkpoint already.")
    checkpoint = read_checkpoint(folder, place.target, place.steps)
    _refuse_tidar(checkpoint, place.source)
    check_layout(layout, checkpoint.config)
    place.steps.begin("Dealing out the layers")
    write_retrofitted(checkpoint, place.new, layout)
    keep_users_card(place.target, place.new)
    base_model = hub_id_of(place.source, folder)
    write_card(place.new, "recurrent", place.target.name, origin=folder, base_model=base_model)
    written = read_checkpoint(place.new, place.target, place.steps, recurrent_class_of)
    is_compared = place.verify and checkpoint.num_parameters <= LARGEST_WHOLE_PROOF
    depth_one = prove_depth_one(folder, place.new, layout) if is_compared else None
    return replace(_conversion(written, place.target, None, "", None), depth_one=depth_one)


def _convert_tidar(
    folder: Path, place: _Workplace, draft_length: int, mask_token_id: int | None, block_attention: str | None
) -> Conversion:
    """Writes a TiDAR checkpoint."""
    folder, taught = read_as_stock(folder, place.folder, mask_token_id, place.link, place.steps)
    checkpoint = read_checkpoint(folder, place.target, place.steps)
    _refuse_tidar(checkpoint, place.source)
    values = kept_values(checkpoint.values, folder / "config.json")
    tidar, mask_reason = _tidar_config(checkpoint, draft_length, taught, block_attention)
    tidar = replace(tidar, block_attention=block_attention)
    values["tidar_config"] = tidar.to_dict()

    new = place.new
    is_own = folder.parent == place.folder and not checkpoint.shards[0].is_symlink()
    write_files(checkpoint, new, values, link=place.link, is_own=is_own, steps=place.steps)
    model_class: Any = tidar_class(checkpoint.stock_class)
    drop_own_options(new / "generation_config.json")  # a stock source means something else by them
    make_room_for_own_options(new / "generation_config.json")
    if taught is None:
        record_no_drafts(new / "generation_config.json", checkpoint.config, draft_length)
    model_class.write_code(new)
    keep_users_card(place.target, new)
    base_model = hub_id_of(place.source, folder)
    write_card(new, model_class.card_kind, place.target.name, origin=folder, base_model=base_model)

    check_keys(new, model_class, type(checkpoint.config).from_pretrained(new))
    proof = _proof(folder, new, checkpoint, checkpoint.config, place.steps) if place.verify else None
    return _conversion(checkpoint, place.target, tidar, mask_reason, proof)


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
    """Writes a TiDAR checkpoint as the stock checkpoint it was made from, without our config keys and code.

    Arguments and errors are those of `convert`.
    """
    target = Path(os.path.abspath(target))
    with whole_folder(target, overwrite=overwrite) as workplace, ProgressSteps(show_progress) as steps:
        steps.begin("Finding the source")
        folder = stock_folder(source, workplace, revision)
        checkpoint = read_checkpoint(folder, target, steps)
        if "tidar_config" not in checkpoint.values:
            raise ValueError(f"{source} has no `tidar_config` in its config.json: it is a stock checkpoint already.")
        values = kept_values(checkpoint.values, folder / "config.json")
        values["architectures"] = [checkpoint.stock_class.__name__]

        new = workplace / NEW
        write_files(checkpoint, new, values, link=link, is_own=False, steps=steps)
        drop_own_options(new / "generation_config.json")
        keep_users_card(target, new)
        config = load_config(values, new / "config.json")
        check_keys(new, checkpoint.stock_class, config)
        proof = _proof(new, folder, checkpoint, config, steps) if verify else None
    return _conversion(checkpoint, target, None, "", proof)


def _conversion(
    checkpoint: Checkpoint, target: Path, tidar: TiDARConfig | None, mask_reason: str, proof: Proof | None
) -> Conversion:
    num_layers, architecture = checkpoint.config.get_text_config().num_hidden_layers, checkpoint.stock_class.__name__
    return Conversion(target, architecture, checkpoint.num_parameters, num_layers, tidar, mask_reason, proof)


def _refuse_tidar(checkpoint: Checkpoint, source: str | os.PathLike) -> None:
    if "tidar_config" in checkpoint.values:
        raise ValueError(
            f"{source} is a TiDAR checkpoint already. Train or decode it as it is, or pass --to-ar to get the stock "
            "checkpoint back."
        )


def _write_recurrent(checkpoint: Checkpoint, place: _Workplace) -> None:
    """Writes a recurrent-depth checkpoint with our code beside it. Tensor names stay as they are."""
    new = place.new
    values = kept_values(checkpoint.values, checkpoint.folder / "config.json")
    values |= block_form_values(checkpoint.config, list(checkpoint.tensors))
    values["architectures"] = [checkpoint.stock_class.__name__]
    write_files(checkpoint, new, values, link=place.link, is_own=False, steps=place.steps)
    checkpoint.stock_class.write_code(new)
    make_room_for_own_options(new / "generation_config.json")
    keep_users_card(place.target, new)
    base_model = hub_id_of(place.source, checkpoint.folder)
    write_card(new, "recurrent", place.target.name, origin=checkpoint.folder, base_model=base_model)
    check_keys(new, checkpoint.stock_class, type(checkpoint.config).from_pretrained(new))


def _tidar_config(
    checkpoint: Checkpoint, draft_length: int, taught: Taught | None, block_attention: str | None
) -> tuple[TiDARConfig, str]:
    """The TiDAR config, and the reason for its mask embedding."""
    if taught is not None:
        taught.check_draft_length(draft_length)
        if block_attention == CAUSAL:
            raise ValueError(
                "`block_attention` must be left out for a checkpoint that was trained to draft elsewhere, with "
                f"bidirectional blocks, but is {block_attention!r}."
            )
        tidar = TiDARConfig(draft_length, taught.mask_token_id, mask_embedding_id=taught.mask_token_id)
        return tidar, "the mask token it was trained with"
    folder, text = checkpoint.folder, checkpoint.config.get_text_config()
    vocab_size, end_ids = text.vocab_size, [getattr(text, "eos_token_id", None)]
    end_ids += [value for name, value in vars(checkpoint.config).items() if name.endswith(("token_id", "token_index"))]
    if (folder / "generation_config.json").is_file():
        end_ids.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    row, reason = mask_embedding_id(
        _tokenizer(folder),
        vocab_size,
        [one for entry in end_ids for one in (entry if isinstance(entry, list) else [entry])],
        _zero_row_test(checkpoint),
    )
    return TiDARConfig(draft_length=draft_length, mask_token_id=vocab_size, mask_embedding_id=row), reason


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None if it has none. Code in the checkpoint is never run."""
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return None
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizer classes raise errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer of {folder} needs its own code, or a package that is not installed: {reason}. Install the "
            "package, or add a tokenizer.json to the folder."
        ) from error
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in tokenizer.get_vocab():  # transformers then looks for its id without end
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has the `unk_token` {unknown!r}, which the tokenizer's vocabulary "
            "lacks. Name a token of the vocabulary there, or null for none."
        )
    return tokenizer


def _zero_row_test(checkpoint: Checkpoint) -> Callable[[int], bool]:
    """A function that tells if a row of the source's embedding table is all zeros. It reads only that row."""
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


def _proof(
    stock: Path, converted: Path, checkpoint: Checkpoint, config: PreTrainedConfig, steps: ProgressSteps
) -> Proof:
    is_whole = checkpoint.num_parameters <= LARGEST_WHOLE_PROOF
    steps.begin("Comparing logits before and after" + ("" if is_whole else " (first layers)"))
    return prove(stock, converted, checkpoint.stock_class, config, is_whole=is_whole)
