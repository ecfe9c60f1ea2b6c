"""Traces as one picture: an SVG file, or an HTML page of such pictures. Neither runs scripts nor loads anything."""

import html
import unicodedata
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from .growing_text import GrowingText
from .trace import Trace, TracedForward, wavefront_cells

NUM_COLUMNS = 96  # characters in a row of text
CELL_WIDTH, ROW_HEIGHT, MARGIN = 8, 20, 16  # pixels
WIDTH = NUM_COLUMNS * CELL_WIDTH + 2 * MARGIN + CELL_WIDTH  # a line's end sign may stand after a full row
BAR_WIDTH, WAVE_HEIGHT = 300, 5
PREFILL_COLOUR, COLOURS = "#e4e4e4", ("#cfe3ff", "#ffe2b8", "#cdeccd", "#f3cfe6", "#e3d8f7", "#f2edb4")
STATES = {"guessed": "#f4c542", "changed": "#d95f4c", "kept": "#8fc1e3", "frozen": "#2b5c8a"}
STYLE = (
    "text{font:13px monospace;white-space:pre;fill:#111}.quiet{fill:#666}"
    ".forward:hover rect{stroke:#111;stroke-width:1.5}"
)
NEWLINE = "\u23ce"


def write_picture(path: Path, traces: list[Trace], tokenizer: Any) -> None:
    """Writes the traces, one below the other, to an .html or .svg file."""
    pictures = [Picture(trace, tokenizer) for trace in traces]
    draw = page if path.suffix.lower() == ".html" else stacked
    path.write_text(draw(pictures), encoding="utf-8")


def page(pictures: list["Picture"]) -> str:
    """An HTML page."""
    rule = "default-src 'none'; style-src 'unsafe-inline'"
    body = "\n".join(f"<section>\n{picture.svg()}\n</section>" for picture in pictures)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>wavedraft trace</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rule}">\n'
        f"<style>body{{background:#fff}}{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def stacked(pictures: list["Picture"]) -> str:
    """An SVG document."""
    parts, top = [], 0
    for picture in pictures:
        parts.append(picture.svg(top))
        top += picture.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">\n<style>{STYLE}</style>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


class Picture:
    """The picture of one trace: its text, coloured by forward, and below it what became of the drafts.

    Attributes:
        height: in pixels.
    """

    def __init__(self, trace: Trace, tokenizer: Any):
        self.trace, self.tokenizer = trace, tokenizer
        self.parts: list[str] = []
        self.height = MARGIN
        self._write_rows(f"> {trace.prompt}", "quiet")
        self._write_rows(trace.told, "quiet")
        self._draw_text()
        if trace.wavefront:
            self._draw_wavefront(trace.wavefront)
        elif trace.slots():
            self._draw_slots()
        self.height += MARGIN

    def svg(self, top: int = 0) -> str:
        """An svg element whose upper edge is at `top`."""
        size = f'y="{top}" width="{WIDTH}" height="{self.height}"'
        return f'<svg {size} xml:space="preserve">' + "\n".join(self.parts) + "</svg>"

    def _write_rows(self, text: str, kind: str) -> None:
        layout = Layout()
        for row, column, part in layout.place(visible(text)):
            self.parts.append(written(column, self.height + row * ROW_HEIGHT, part, kind))
        self.height += (layout.row + 1) * ROW_HEIGHT

    def _draw_text(self) -> None:
        """Every new token, once, in a group for its forward."""
        growing, layout, number = GrowingText(self.tokenizer, skip_special_tokens=False), Layout(), 0
        self.height += MARGIN // 2
        for place, forward in enumerate(self.trace.forwards):
            colour = COLOURS[place % len(COLOURS)] if place else PREFILL_COLOUR
            self.parts.append(f'<g class="forward" data-forward="{place}"><title>{self._told(place, forward)}</title>')
            for token_id in forward.new_ids:
                self.parts.append(f'<g class="token" data-token="{number}">')
                for row, column, part in layout.place(visible(growing.add([token_id])) or "\u00b7"):
                    top = self.height + row * ROW_HEIGHT
                    self.parts.append(rectangle(MARGIN + column * CELL_WIDTH, top, cells(part), colour))
                    self.parts.append(written(column, top, part))
                self.parts.append("</g>")
                number += 1
            self.parts.append("</g>")
        self.height += (layout.row + 1) * ROW_HEIGHT + MARGIN // 2

    def _told(self, place: int, forward: TracedForward) -> str:
        """What a forward did, as shown where the pointer rests."""
        if not place:
            return "The prompt's own forward wrote this token."
        steps = [number for number, step in enumerate(self.trace.wavefront or [], start=1) if step.num_frozen]
        writer = f"Decode step {steps[place - 1]}" if steps else f"Forward {place}"
        lines = [f"{writer}: {len(forward.new_ids)} tokens"]
        if forward.draft_ids:
            lines.append(f"drafted: {self._quoted(forward.draft_ids)}")
        if forward.draft_ids and not self.trace.wavefront:
            lines.append(f"accepted: {forward.num_accepted} of {len(forward.draft_ids)}")
            rejected = forward.draft_ids[forward.num_accepted : forward.num_judged]
            lines += [f"rejected: {self._quoted(rejected)}"] if rejected else []
        return html.escape("\n".join(lines))

    def _quoted(self, ids: list[int]) -> str:
        return " | ".join(visible(self.tokenizer.decode([token_id])).replace("\n", NEWLINE) for token_id in ids)

    def _draw_slots(self) -> None:
        """A bar for each place of the drafts."""
        self._write_rows("Drafted tokens that were accepted, by their place in the draft:", "quiet")
        for slot, (num_accepted, num_judged) in enumerate(self.trace.slots(), start=1):
            share = num_accepted / num_judged if num_judged else 0.0
            width = share * BAR_WIDTH / CELL_WIDTH
            self.parts.append(rectangle(MARGIN + 10 * CELL_WIDTH, self.height, BAR_WIDTH / CELL_WIDTH, "#eee"))
            self.parts.append(rectangle(MARGIN + 10 * CELL_WIDTH, self.height, width, COLOURS[0]))
            self._write_rows(f"{slot:>7}   {num_accepted} of {num_judged} ({share:.0%})", "slot")

    def _draw_wavefront(self, steps: list[Any]) -> None:
        """A row for each decode step: what it did to the tokens that were begun."""
        self._write_rows("The wavefront: places after the prompt to the right, decode steps downwards.", "quiet")
        legend = Layout()
        for state, colour in STATES.items():
            ((_, column, part),) = legend.place(f"   {state}   ")
            self.parts.append(rectangle(MARGIN + column * CELL_WIDTH, self.height, 2, colour))
            self.parts.append(written(column, self.height, part, "quiet"))
        self.height += ROW_HEIGHT + MARGIN // 2
        table = wavefront_cells(steps)
        num_places = max((cell.place for row in table for cell in row), default=0) + 1
        width = min(NUM_COLUMNS / num_places, 1.0)  # of a place, in columns
        for number, row in enumerate(table, start=1):
            begun = steps[number - 1].start - steps[0].start + 1
            self.parts.append(rectangle(MARGIN, self.height, begun * width, STATES["frozen"], WAVE_HEIGHT))
            for cell in row:
                told = f"step {number}, place {cell.place}: {self._quoted([cell.token_id])}, {cell.state}"
                left = MARGIN + cell.place * width * CELL_WIDTH
                box = rectangle(left, self.height, width, STATES[cell.state], WAVE_HEIGHT, html.escape(told))
                self.parts.append(box)
            self.height += WAVE_HEIGHT


class Layout:
    """Places tokens one after another in rows of `NUM_COLUMNS` columns."""

    def __init__(self) -> None:
        self.row = self.column = 0

    def place(self, text: str) -> list[tuple[int, int, str]]:
        """Row, column and text of each part of the next token. It is in one part where a row has room for it."""
        parts, part = [], ""
        first = text.split("\n")[0]
        if self.column + cell_len(first) > NUM_COLUMNS >= cell_len(first):
            self._next_row()
        for character in text:
            is_newline = character == "\n"
            if not is_newline and self.column + cell_len(part + character) > NUM_COLUMNS:
                parts.append((self.row, self.column, part))
                self._next_row()
                part = ""
            part += NEWLINE if is_newline else character
            if is_newline:
                parts.append((self.row, self.column, part))
                self._next_row()
                part = ""
        parts.append((self.row, self.column, part))
        self.column += cell_len(part)
        return [(row, column, part) for row, column, part in parts if part]

    def _next_row(self) -> None:
        self.row, self.column = self.row + 1, 0


def cells(text: str) -> int:
    """Columns of a part of a token, at least one."""
    return max(cell_len(text), 1)


def visible(text: str) -> str:
    """A text whose control characters have become signs. XML allows no others."""

    def sign(character: str) -> str:
        if character == "\n":
            return character
        if ord(character) < 32:
            return chr(0x2400 + ord(character))
        is_refused = unicodedata.category(character) in ("Cc", "Cs", "Cn") or character in "\ufffe\uffff"
        return "\ufffd" if is_refused else character

    return "".join(map(sign, text))


def rectangle(
    left: float, top: float, columns: float, colour: str, height: float = ROW_HEIGHT, title: str | None = None
) -> str:
    """A filled rectangle; `title` is escaped already."""
    place = f'x="{left:g}" y="{top:g}" width="{columns * CELL_WIDTH:g}" height="{height:g}"'
    inside = f"<title>{title}</title>" if title else ""
    return f'<rect {place} fill="{colour}">{inside}</rect>'


def written(column: int, top: float, text: str, kind: str | None = None) -> str:
    """A text at a column, as wide as its characters are in a terminal."""
    place = f'x="{MARGIN + column * CELL_WIDTH}" y="{top + 14}" textLength="{cells(text) * CELL_WIDTH}"'
    named = f' class="{kind}"' if kind else ""
    return f'<text {place} lengthAdjust="spacingAndGlyphs"{named}>{html.escape(text)}</text>'
