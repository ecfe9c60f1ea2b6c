"""What a bench measures, and what of that it refuses. B rows, P prompt tokens, N new tokens, K drafted tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OWN_LENGTH = "own"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        batch_sizes: B.
        prompt_lengths: P: prompts are filled with other text, or cut, at their beginning; "own" leaves them as they
            are, padded on the left.
        temperatures: 0 decodes greedily; others sample from the whole vocabulary.
        draft_lengths: K.
        num_branches: for how many numbers of accepted tokens a next draft is prepared: an integer, "all", or "auto",
            which chooses K too and is `generate`'s default.
        num_batches: of each kind of prompt, at most: no prompt is in two of them.
        repeats: rounds; in each every contender decodes every batch once.
        max_new_tokens: N, of every text: no end token ends one.
        num_lookup_tokens: `prompt_lookup_num_tokens` of transformers' prompt lookup.
        has_compiled: measure plain decoding and drafts with a static cache and torch.compile too.
        has_packed_weights: our own contenders read packed weights; by default where `generate` would.
        only: names of the contenders that are measured beside plain decoding; all where empty.
    """

    batch_sizes: tuple[int, ...] = (1, 4)
    prompt_lengths: tuple[int | str, ...] = (OWN_LENGTH,)
    temperatures: tuple[float, ...] = (0.0,)
    draft_lengths: tuple[int, ...] = (8,)
    num_branches: tuple[int | str, ...] = (1, 3, "all", "auto")
    num_batches: int = 2
    repeats: int = 2
    max_new_tokens: int = 32
    num_lookup_tokens: int = 10
    has_compiled: bool = False
    has_packed_weights: bool | None = None
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A text of one token has no decode to time.
        for name, least in (("num_batches", 1), ("repeats", 1), ("num_lookup_tokens", 1), ("max_new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}.")
        lists = ("batch_sizes", "prompt_lengths", "temperatures", "draft_lengths", "num_branches")
        for name in lists:
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one, but is empty.")
        for name, word in (("batch_sizes", None), ("prompt_lengths", OWN_LENGTH), ("draft_lengths", None)):
            for value in getattr(self, name):
                if value != word and value < 1:
                    raise ValueError(f"`{name}` must be integers of 1 or more, but one is {value}.")
        for temperature in self.temperatures:
            if not 0 <= temperature < float("inf"):
                raise ValueError(f"`temperatures` must be numbers of 0 or more, but one is {temperature}.")
        for branches in self.num_branches:
            if branches not in ("all", "auto") and not 1 <= int(branches) <= max(self.draft_lengths):
                raise ValueError(
                    "`num_branches` must be 'all', 'auto' or integers from 1 to the longest of `draft_lengths` "
                    f"({max(self.draft_lengths)}), but one is {branches}."
                )

    def check_against(self, config: Any, prompts: "dict[str, list[torch.Tensor]]") -> None:
        """Refuses what a checkpoint of this `config` cannot do with prompts of these ids [P], before it is loaded."""
        trained, longest = config.tidar_config["draft_length"], max(self.draft_lengths)
        if longest > trained:
            raise ValueError(
                f"`draft_lengths` must be at most {trained}, the length this checkpoint was taught to draft "
                f"(`config.tidar_config.draft_length`), but one is {longest}."
            )
        if "auto" in self.num_branches and trained == 1:
            raise ValueError("`num_branches` cannot be 'auto' where the checkpoint drafts 1 token. Leave it out.")
        own = max(len(ids) for of_kind in prompts.values() for ids in of_kind)
        longest_prompt = max(own if length == OWN_LENGTH else int(length) for length in self.prompt_lengths)
        limit = config.get_text_config().max_position_embeddings
        if longest_prompt + self.max_new_tokens > limit:
            raise ValueError(
                f"Prompts and new tokens must fit into {limit} positions (`config.max_position_embeddings`), but the "
                f"longest prompt has {longest_prompt} tokens and `max_new_tokens` is {self.max_new_tokens}."
            )
