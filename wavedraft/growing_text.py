"""The text that tokens add one after another, without decoding the whole text again for each."""

from typing import Any


class GrowingText:
    """
    Args:
        tokenizer: decodes the ids.
        skip_special_tokens: whether end tokens and the like add nothing.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        # ids[start:read] is decoded again with what follows: a first token alone may lose its space.
        self.start = self.read = 0

    def add(self, ids: list[int]) -> str:
        """The text that these ids add. Bytes of an unfinished character wait for the ids that finish it."""
        self.ids += ids
        new = self._after_read(self.ids)
        if new.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return new

    def preview(self, ids: list[int]) -> str:
        """The text that these ids would add, unfinished characters included. They are not kept."""
        return self._after_read([*self.ids, *ids])

    def rest(self) -> str:
        """What still waits: the text ends in the middle of a character."""
        new = self._after_read(self.ids)
        self.start, self.read = self.read, len(self.ids)
        return new

    def _after_read(self, ids: list[int]) -> str:
        before = self._decode(ids[self.start : self.read])
        return self._decode(ids[self.start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)
