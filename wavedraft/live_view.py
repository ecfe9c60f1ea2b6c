"""An answer in a terminal while it is written: text, the draft after it, and a status line.

The cursor rests at the end of the text. Everything after it is erased and drawn again at each forward, so a resized
terminal loses nothing: no row is counted twice.
"""

import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from rich.cells import cell_len
from transformers.generation.streamers import BaseStreamer

from .growing_text import GrowingText

ERASE_BELOW = "\033[J"
ONE_ROW_DOWN, UP, SAVE_CURSOR, RESTORE_CURSOR = "\033D", "\033[{}A", "\0337", "\0338"
DIM, PLAIN, CYAN = "2", "", "36"


class LiveView(BaseStreamer):
    """A streamer of one text for a terminal.

    The draft stands dim after the text. Tokens of one forward have one shade, those of the next forward the other.

    Args:
        tokenizer: decodes the ids.
        counts_forwards: whether each call of `put` is a forward. It is TiDAR's; of a recurrent-depth model the status
            tells tokens alone.
        shades: of forwards in turn, as numbers of ANSI colours. ("",) draws all alike.

    Attributes:
        text: the text so far.
    """

    def __init__(self, tokenizer: Any, counts_forwards: bool = True, shades: tuple[str, ...] = (PLAIN, CYAN)):
        self.growing = GrowingText(tokenizer)
        self.counts_forwards, self.shades = counts_forwards, shades
        self.text = ""
        self.line = ""  # of the text on the screen, what follows its last newline
        self.held: list[tuple[str, str]] = []  # characters, with their shades, that would fill a row exactly
        self.num_tokens = self.num_puts = 0
        self.is_stopped = False
        self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, P], which is not shown, and then the ids [n] that each forward decided.

        Raises:
            KeyboardInterrupt: the answer was stopped (`is_stopped`).
        """
        if self.is_stopped:
            raise KeyboardInterrupt
        if value.dim() == 2:
            self._draw("")
            return
        shade = self.shades[self.num_puts % len(self.shades)]
        self.num_puts += 1
        self.num_tokens += len(value)
        self._add(self.growing.add(value.tolist()), shade)
        self._draw("")

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """Takes the draft [1, K] that follows the text."""
        self._draw(printable(self.growing.preview(value[0].tolist())))

    def end(self) -> None:
        """Leaves the text alone on the screen, with a newline. Calling it twice changes nothing."""
        self._add(self.growing.rest(), PLAIN)
        self._write(ERASE_BELOW + self._settled(is_end=True) + ("\n" if self.line else ""))
        self.line = ""

    def _add(self, text: str, shade: str) -> None:
        self.text += text
        self.held += [(character, shade) for character in printable(text)]

    def _draw(self, draft: str) -> None:
        width, height = shutil.get_terminal_size()
        settled = self._settled(width)
        undrawn = [*self.held, *((character, DIM) for character in draft)]
        status = fitting(self._status(), width - 1)
        for shown in (undrawn, self.held):
            num_rows = num_rows_below(shown, width)
            if num_rows < height - 1:  # at the first row, tmux would keep what is erased among the rows of the past
                below = styled(shown) + "\n" + styled((character, DIM) for character in status)
                below = ONE_ROW_DOWN * num_rows + UP.format(num_rows) + SAVE_CURSOR + below + RESTORE_CURSOR
                self._write(ERASE_BELOW + settled + below)
                return
        self._write(ERASE_BELOW + settled)

    def _settled(self, width: int = 0, is_end: bool = False) -> str:
        """The held characters that can be written for good.

        After a row that is full to its last column, terminals differ in where the cursor is. So the last character of
        such a row waits for the next one.
        """
        num = len(self.held)
        text = "".join(character for character, _ in self.held)
        while num and not is_end and fills_its_row((self.line + text[:num]).rsplit("\n", 1)[-1], width):
            num -= 1
        self.line = (self.line + text[:num]).rsplit("\n", 1)[-1]
        settled, self.held = self.held[:num], self.held[num:]
        return styled(settled)

    def _status(self) -> list[str]:
        if not self.num_tokens:
            return ["reading the prompt"]
        num_forwards, seconds = self.num_puts - 1, time.perf_counter() - self.start
        parts = [f"{self.num_tokens} tokens"]
        if self.counts_forwards and num_forwards:
            parts += [f"{num_forwards} forwards", f"{(self.num_tokens - 1) / num_forwards:.2f} tokens/forward"]
        return [*parts, f"{self.num_tokens / seconds:.1f} tokens/s"]

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def printable(text: str) -> str:
    """A text whose characters a terminal shows and does not obey. A tab becomes four spaces."""
    text = text.replace("\t", "    ").replace("\r", "")
    return "".join("\ufffd" if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts, from the first on, as fit into `width` columns."""
    while len(parts) > 1 and cell_len(", ".join(parts)) > width:
        parts = parts[:-1]
    return ", ".join(parts)[: max(width, 0)]


def fills_its_row(line: str, width: int) -> bool:
    """Whether a line that starts at the first column ends exactly at the last one. A wide character never wraps."""
    column = 0
    for character in line:
        cells = cell_len(character)
        column = cells if column + cells > width else column + cells
    return column >= width


def num_rows_below(shown: list[tuple[str, str]], width: int) -> int:
    """At most so many rows are below the cursor's after these characters and a status line, wherever it starts."""
    lines = "".join(character for character, _ in shown).split("\n")
    usable = max(width - 1, 1)  # a wide character may leave the last column empty
    return len(lines) + sum(-(-cell_len(line) // usable) for line in lines)


def styled(characters: Iterable[tuple[str, str]]) -> str:
    """Characters in their shades."""
    text = ""
    for shade, group in groupby(characters, key=lambda pair: pair[1]):
        run = "".join(character for character, _ in group)
        text += f"\033[{shade}m{run}\033[0m" if shade else run
    return text
