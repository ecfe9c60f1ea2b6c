"""A conversation that keeps its cache from turn to turn: only what is new is read."""

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
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.cache: Any = None
        self.cached_ids = torch.zeros(0, dtype=torch.long)
        self.num_cached = self.num_prompt = 0

    def answer(self, text: str, streamer: Any = None) -> Any:
        """One turn. An interrupted turn leaves no trace.

        Returns:
            what `generate` returns; the answer joins `messages`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
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
        reply = self.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return output

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
