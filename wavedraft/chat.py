"""A conversation that keeps its cache from turn to turn: only what is new is read."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .generation.stock_model import CACHE


class Chat:
    """
    Args:
        tokenizer: with a chat template.
        system: what the model is told before the first turn.
        options: keywords of `generate` for every turn. With a `cache_implementation`, which `generate` refuses beside a
            cache of ours, each turn reads the whole conversation.

    Attributes:
        messages: the conversation as chat templates take it.
        num_cached, num_prompt: tokens of the last turn's prompt that were in the cache, and all of them.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, **options: Any):
        if not tokenizer.chat_template:
            raise ValueError(
                "The checkpoint has no chat template, so it does not know turns. Use `wavedraft generate --raw`."
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.first_messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first_messages)
        self.cache: Any = None
        self.cached_ids = torch.zeros(0, dtype=torch.long)
        self.num_cached = self.num_prompt = 0

    def answer(self, text: str, streamer: Any = None) -> Any:
        """One turn. An interrupted turn leaves no trace; `add_turn` can keep what was written of its answer.

        Returns:
            what `generate` returns; the answer joins `messages`.
        """
        ids = self._prompt_ids([*self.messages, {"role": "user", "content": text}])
        cache, self.cache = self._cache_of_prefix(ids[0]), None
        output = self.model.generate(
            ids.to(self.model.device),
            streamer=streamer,
            return_dict_in_generate=True,
            **{CACHE: cache},
            **self.options,
        )
        if "cache_implementation" not in self.options:
            self.cache, self.cached_ids = getattr(output, CACHE), output.sequences[0, :-1].cpu()
        self.add_turn(text, self.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True))
        return output

    def add_turn(self, text: str, reply: str) -> None:
        """Puts a question and its answer at the end of the conversation."""
        self.messages = [*self.messages, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def set_options(self, options: dict[str, Any]) -> None:
        """Takes other keywords of `generate`. The cache may not fit them: the next turn reads all anew."""
        self.options, self.cache, self.cached_ids = options, None, torch.zeros(0, dtype=torch.long)

    def reset(self) -> None:
        """Forgets all turns. What the model was told before the first one stays."""
        self.messages = list(self.first_messages)

    def save(self, path: Path) -> None:
        """Writes the conversation as one row of JSON, in the form of the rows that `wavedraft train` learns from.

        Raises:
            ValueError: the file exists and holds something else. It stays as it is.
        """
        if path.exists():
            read_messages(path)
        path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Goes on from a saved conversation, in place of this one.

        Raises:
            ValueError: the file holds no conversation, or the model's template does not take it. Nothing changes.
        """
        messages = read_messages(path)
        try:
            self._prompt_ids([*messages, {"role": "user", "content": "?"}])
        except Exception as error:  # whatever a template raises
            raise ValueError(f"The model's chat template does not take the conversation in {path}: {error}") from None
        self.messages = messages

    def _prompt_ids(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """[1, P] the conversation as the model reads it, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def _cache_of_prefix(self, ids: torch.Tensor) -> Any:
        """The part of the cache that holds the beginning of a prompt [P]; at least the last token is read anew.

        A template may write an answer differently from the model. What follows the first difference is read anew.
        """
        length = min(len(self.cached_ids), len(ids) - 1)
        differs = (self.cached_ids[:length] != ids[:length]).nonzero()
        num_kept = int(differs[0]) if len(differs) else length
        num_dropped = len(self.cached_ids) - num_kept
        self.num_cached, self.num_prompt = num_kept, len(ids)
        if self.cache is not None and num_kept and (not num_dropped or isinstance(self.cache, DynamicCache)):
            if num_dropped:
                self.cache.crop(-num_dropped)
            return self.cache
        self.num_cached = 0
        return None


def read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation.

    Raises:
        ValueError: the file does not hold one.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        is_conversation = all(isinstance(message[key], str) for message in messages for key in ("role", "content"))
    except (ValueError, KeyError, TypeError):
        is_conversation = False
    if not is_conversation:
        raise ValueError(
            f'{path} is not a saved conversation: {{"messages": [...]}} with a "role" and a "content" in each message.'
        )
    return messages
