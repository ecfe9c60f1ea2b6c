"""The draft head: each token of a draft is chosen knowing the one before it.

The masks of a forward predict side by side: none knows the token that will stand before it. The head mends each mask's
last state for that token, slot by slot and without a forward of the network, as sequentially dependent draft heads do
(Hydra, arXiv 2402.05109). It changes what is drafted, never what is written.

A rows, N slots, D channels, R channels of the head, C candidates, V vocabulary.
"""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils.hub import extract_commit_hash

from ..execution.gated_linear import active_adapters
from ..kept_with_model import kept_with
from ..stock_model import candidate_logits, device_of, file_if_there, lm_head_logits

HEAD_FILE = "draft_head.safetensors"
NUM_CANDIDATES = 64  # each mask's likeliest tokens, which are scored anew


class DraftHead(nn.Module):
    """Two layers from a mask's last state and the token before it to what that state should be.

    Its weights are not an `nn.Linear`, so that an adapter on "all-linear" layers leaves them alone.

    Args:
        num_channels, rank: D, and R, 1 or more.

    Attributes:
        adapter: the PEFT config of the adapter that it was taught with; None: it was taught with the model itself.
    """

    adapter: Any = None

    def __init__(self, num_channels: int, rank: int):
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` of a draft head must be at least 1, but is {rank}.")
        bound = (2 * num_channels) ** -0.5
        self.input_weight = nn.Parameter(torch.empty(rank, 2 * num_channels).uniform_(-bound, bound))
        self.input_bias = nn.Parameter(torch.zeros(rank))
        self.output_weight = nn.Parameter(torch.zeros(num_channels, rank))  # at first it changes nothing

    def forward(self, states: Tensor, previous: Tensor) -> Tensor:
        """Masks' last states [..., D], mended for the embeddings [..., D] of the tokens before them."""
        return self.mend(states, self.read(states), previous)

    def read(self, states: Tensor) -> Tensor:
        """The first layer's part that depends on the states alone, [..., R]."""
        return functional.linear(self._normed(states), self.input_weight[:, : states.shape[-1]], self.input_bias)

    def mend(self, states: Tensor, read: Tensor, previous: Tensor) -> Tensor:
        read = read + functional.linear(self._normed(previous), self.input_weight[:, states.shape[-1] :])
        return states + functional.linear(functional.silu(read), self.output_weight).to(states.dtype)

    def _normed(self, channels: Tensor) -> Tensor:
        return functional.rms_norm(channels.to(self.input_weight.dtype), channels.shape[-1:])


class DraftChain:
    """The draft of one decode step, slot after slot.

    Args:
        logits: [A, N, V] of the slots' masks, as they stand.
        states: [A, N, D] the masks' last states.
    """

    def __init__(self, model: nn.Module, head: DraftHead, logits: Tensor, states: Tensor):
        self.model, self.logits, self.states = model, logits, states
        self.head = head.to(states.device)  # an offloaded model's may be elsewhere
        self.read = self.head.read(states)
        self.candidates = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), sorted=False).indices.to(states.device)

    def logits_after(self, slot: int, previous_ids: Tensor) -> Tensor:
        """Logits [A, 1, V] of one slot after the tokens [A, 1] before it: its candidates are scored anew."""
        states = self._states_after(slot, previous_ids)
        candidates = self.candidates[:, slot]
        mended = candidate_logits(self.model, states, candidates)
        if mended is None:
            return lm_head_logits(self.model, states)[:, None].to(self.logits.device)
        logits = self.logits[:, slot]
        return logits.scatter(1, candidates.to(logits.device), mended.to(logits))[:, None]

    def _states_after(self, slot: int, previous_ids: Tensor) -> Tensor:
        """One slot's states [A, D], mended for the tokens [A, 1] before it."""
        embedding = self.model.get_input_embeddings()
        previous = embedding(previous_ids[:, 0].to(device_of(self.model))).to(self.states.device)
        return self.head.mend(self.states[:, slot], self.read[:, slot], previous)


def draft_head_of(model: Any) -> DraftHead | None:
    """The head of an active adapter, or else the model's own; None without either."""
    heads = (head_taught_with(model, adapter) for adapter in (*active_adapters(model), None))
    return next((head for head in heads if head is not None), None)


def head_taught_with(model: Any, adapter: Any) -> DraftHead | None:
    """The head of one adapter, given by its PEFT config; of None, the model's own."""
    if adapter is None:
        return getattr(model, "draft_head", None)
    return next((head for head in getattr(model, "adapter_heads", ()) if head.adapter is adapter), None)


def attach_draft_head(model: Any, head: DraftHead, adapter: Any = None) -> None:
    """Gives a model or its adapter a head. It is saved in a file of its own: the weights keep their stock names."""
    for part in (head, *head.parameters()):
        part._is_hf_initialized = True  # type: ignore[assignment]
    head.adapter = adapter
    if adapter is None:
        model.draft_head = head
        if (taught := getattr(model.config, "tidar_config", None)) is not None:
            model.config.tidar_config = {**taught, "draft_head": True}
    else:
        drop_head(model, adapter)
        model.adapter_heads.append(head)
    ignored = {name for name, _ in model.named_parameters() if name.startswith(("draft_head.", "adapter_heads."))}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *ignored}


def drop_head(model: Any, adapter: Any) -> None:
    """Drops an adapter's head, and those of deleted adapters."""
    kept = [config for config in model.peft_config.values() if config is not adapter]
    heads = getattr(model, "adapter_heads", ())
    model.adapter_heads = nn.ModuleList(head for head in heads if any(head.adapter is config for config in kept))


def new_draft_head(model: Any, rank: int) -> DraftHead:
    """An untaught head in float32, attached to a model, or to its active adapter."""
    head = DraftHead(model.get_input_embeddings().weight.shape[-1], rank)
    attach_draft_head(
        model, head.to(model.get_output_embeddings().weight.device), next(iter(active_adapters(model)), None)
    )
    return head


def load_draft_head(
    model: Any, name_or_path: str | os.PathLike, beside: str = "adapter_config.json", **hub: Any
) -> DraftHead | None:
    """The head of a folder or Hub repository, frozen, for a model; None without.

    Args:
        beside: a file of the same repository that was fetched just now, which says the revision.
        hub: as of `file_if_there`.

    Raises:
        ValueError: the file holds no head, or one for another number of channels.
    """
    if Path(name_or_path).is_dir():
        path = Path(name_or_path, hub.get("subfolder") or "", HEAD_FILE)
        found = str(path) if path.is_file() else None
    else:
        fetched = try_to_load_from_cache(
            str(name_or_path), beside, cache_dir=hub.get("cache_dir"), revision=hub.get("revision")
        )
        commit = extract_commit_hash(fetched if isinstance(fetched, str) else None, None)
        hub |= {"revision": commit} if commit else {}
        found = file_if_there(str(name_or_path), HEAD_FILE, may_be_offline=True, **hub)
    if found is None:
        return None
    head, num_channels = read_draft_head(found), model.get_input_embeddings().weight.shape[-1]
    if head.output_weight.shape[0] != num_channels:
        raise ValueError(
            f"The draft head is for states of {head.output_weight.shape[0]} channels, but {type(model).__name__} has "
            f"{num_channels}. Take the head that was taught with this model."
        )
    weight = model.get_output_embeddings().weight
    return head.to(device=None if weight.is_meta else weight.device, dtype=model.dtype).requires_grad_(False)


def chosen_head(model: Any, draft_head: str | bool | None) -> DraftHead | None:
    """The head of a call of `generate`. One that the call names is read once.

    Raises:
        ValueError: there is none where the call names one.
    """
    if not isinstance(draft_head, str):
        return None if draft_head is False else draft_head_of(model)
    heads = kept_with(model).heads
    if draft_head not in heads:
        try:
            heads[draft_head] = load_draft_head(model, draft_head)
        except HFValidationError:  # neither a folder nor the name of a repository
            heads[draft_head] = None
    if heads[draft_head] is None:
        del heads[draft_head]
        raise ValueError(
            f"`draft_head` is {draft_head!r}, but there is no {HEAD_FILE} there. Leave it out to draft without."
        )
    return heads[draft_head]


def read_draft_head(path: str | Path) -> DraftHead:
    """The head of a file.

    Raises:
        ValueError: it holds no draft head.
    """
    try:
        tensors = load_file(str(path))
        head = DraftHead(tensors["output_weight"].shape[0], tensors["output_weight"].shape[1])
        head.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no draft head: {error}. Fetch or teach it anew.") from None
    return head.to(tensors["output_weight"].dtype)
