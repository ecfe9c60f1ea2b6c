"""The config of a TiDAR checkpoint: one validated dictionary, `tidar_config`, inside the stock config."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..generation.stock_model import BIDIRECTIONAL, CAUSAL


@dataclass(frozen=True)
class TiDARConfig:
    """How a checkpoint was trained to draft (arXiv 2511.08923).

    These fields are under `tidar_config` in the stock config, which keeps its `model_type`. Decoding options (a shorter
    draft, a seed) do not belong to a checkpoint: see `generate`.

    Args:
        draft_length: K, how many tokens one block of masks drafts; 1 or more.
        mask_token_id: the id of a mask in `input_ids`. A token of the vocabulary (checkpoints trained elsewhere) reads
            its own row, and is never generated. Any other mask is input-only: its id is the first one after the
            vocabulary, wherever that ends now. No text contains it, and it has no logit.
        mask_embedding_id: the row of the embedding table that masks read, in [0, vocabulary size); by default
            `mask_token_id`, if in range.
        draft_head: whether the checkpoint has a draft head, in a separate file.
        block_attention: how masks see one another: "bidirectional", the whole block, as in the paper; or "causal",
            only the masks before. None is bidirectional.
    """

    draft_length: int
    mask_token_id: int
    mask_embedding_id: int | None = None
    draft_head: bool | None = None
    block_attention: str | None = None

    @classmethod
    def from_model_config(cls, config: Any) -> "TiDARConfig":
        """The `tidar_config` of a transformers config, checked against its vocabulary.

        Raises:
            ValueError: there is none, a field is missing or unknown, or a value is out of range.
        """
        stored = getattr(config, "tidar_config", None)
        if not stored:
            raise ValueError(
                f"This {config.model_type!r} checkpoint has no `tidar_config` in its config.json, so it has no mask "
                "token and cannot draft. Convert it first: `wavedraft convert SOURCE TARGET --draft-length 8`."
            )
        return cls.from_dict(stored, vocab_size=config.get_text_config().vocab_size)

    @classmethod
    def from_dict(cls, stored: dict[str, Any], vocab_size: int) -> "TiDARConfig":
        """Checks a stored dictionary against a vocabulary of `vocab_size` rows and fills in the default row."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(stored) - known):
            raise ValueError(
                f"`tidar_config` has the unknown fields {unknown}; it may have {sorted(known)}. "
                "Remove them from config.json, or update wavedraft if a newer version wrote them."
            )
        values: dict[str, Any] = {name: stored.get(name) for name in known}
        for name in ("draft_length", "mask_token_id"):
            if not isinstance(values[name], int) or isinstance(values[name], bool):
                raise ValueError(
                    f"`tidar_config.{name}` must be an integer, but is {values[name]!r}. "
                    "Convert the checkpoint again: `wavedraft convert SOURCE TARGET`."
                )
        if values["draft_length"] < 1:
            raise ValueError(f"`tidar_config.draft_length` must be at least 1, but is {values['draft_length']}.")
        if values["mask_token_id"] < 0:
            raise ValueError(f"`tidar_config.mask_token_id` must be 0 or more, but is {values['mask_token_id']}.")
        if values["mask_embedding_id"] is None:
            values["mask_embedding_id"] = values["mask_token_id"]
        if not isinstance(values["mask_embedding_id"], int) or not 0 <= values["mask_embedding_id"] < vocab_size:
            raise ValueError(
                f"`tidar_config.mask_embedding_id` must be a row of the embedding table, from 0 to {vocab_size - 1} "
                f"(`config.vocab_size` is {vocab_size}), but is {values['mask_embedding_id']!r}. If the vocabulary was "
                "cut, convert the checkpoint again, or set the row in config.json."
            )
        if values["mask_token_id"] != values["mask_embedding_id"]:
            values["mask_token_id"] = vocab_size  # the vocabulary may have been resized since
        if values["draft_head"] is not None and not isinstance(values["draft_head"], bool):
            raise ValueError(
                f"`tidar_config.draft_head` must be true, false or absent, but is {values['draft_head']!r}."
            )
        if values["block_attention"] not in (None, BIDIRECTIONAL, CAUSAL):
            raise ValueError(
                f"`tidar_config.block_attention` must be one of {[BIDIRECTIONAL, CAUSAL]} or absent, but is "
                f"{values['block_attention']!r}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
