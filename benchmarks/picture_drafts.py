"""The animation of drafts that turn into text: one frame a forward of a real decode, as a self-contained SVG.

    python benchmarks/picture_drafts.py models/SmolLM2-135M-Instruct-TiDAR \\
        --adapter adapters/smollm2-135m-instruct-gated --output docs/pictures/drafts.svg

Each frame shows the text, the tokens that this forward accepted, and the draft that the next forward verifies. Below
stands what plain decoding has written after as many forwards. It is computed in float32, with every branch, so that the
picture does not depend on the clock.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from wavedraft import TiDARForCausalLM
from wavedraft.training.dialogue import chat_prompt_ids

COLUMNS, LINE_HEIGHT, CHARACTER = 84, 20, 8.4  # characters a line; pixels
SECONDS_A_FRAME, SECONDS_AT_THE_END = 0.5, 4.0
TEXT, ACCEPTED, DRAFT, QUIET = "#1f2933", "#15803d", "#b45309", "#6b7280"
STYLE = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px;white-space:pre"


@dataclass
class Forwards(BaseStreamer):
    """Records a decode: the prompt, and for each forward the draft it verified and the tokens it accepted."""

    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    has_prompt: bool = False

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        self.waiting = value.flatten().tolist()

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.drafts.append(self.waiting)
            self.accepted.append(value.flatten().tolist())
        self.has_prompt, self.waiting = True, []

    def end(self) -> None:
        """Nothing is buffered."""


def wrapped(pieces: list[tuple[str, str]]) -> Iterator[tuple[int, int, str, str]]:
    """Line, column, text and colour of each run of characters, wrapped at `COLUMNS` between words."""
    text = "".join(piece for piece, _ in pieces)
    colours = [colour for piece, colour in pieces for _ in piece]
    line, start = 0, 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if end - start > COLUMNS:
            space = text.rfind(" ", start, start + COLUMNS)
            end = space if space > start else start + COLUMNS
        first = start
        for place in range(start + 1, end + 1):
            if place == end or colours[place] != colours[first]:
                if text[first:place].strip():
                    yield line, first - start, text[first:place], colours[first]
                first = place
        start = end + (end < len(text) and text[end] in " \n")
        line += 1


def lines_of(pieces: list[tuple[str, str]], top: int) -> list[str]:
    return [
        f'<text x="{20 + column * CHARACTER:.1f}" y="{top + line * LINE_HEIGHT}" fill="{colour}" '
        f'xml:space="preserve">{escape(text)}</text>'
        for line, column, text, colour in wrapped(pieces)
    ]


def animation(tokenizer: Any, run: Forwards, prompt: str) -> str:
    """The SVG: a group a frame, each visible in its own part of the cycle."""

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    ids = [token for group in run.accepted for token in group]

    def num_lines(num_tokens: int) -> int:
        return max((line for line, *_ in wrapped([(decoded(ids[:num_tokens]), TEXT)])), default=0) + 1

    num_frames = len(run.accepted)
    low = 130 + (num_lines(len(ids)) + 1) * LINE_HEIGHT
    height = low + 12 + num_lines(num_frames) * LINE_HEIGHT
    cycle = num_frames * SECONDS_A_FRAME + SECONDS_AT_THE_END
    frames, num_before = [], 0
    for number, group in enumerate(run.accepted):
        num_after = num_before + len(group)
        draft = run.drafts[number + 1] if number + 1 < num_frames else []
        before, after = decoded(ids[:num_before]), decoded(ids[:num_after])
        with_draft = decoded(ids[:num_after] + draft)
        pieces = [(before, TEXT), (after[len(before) :], ACCEPTED), (with_draft[len(after) :], DRAFT)]
        counts = f"{number} forward{'s' * (number != 1)} after the prompt's: {num_after} tokens"
        plain = f"plain decoding, as many forwards: {number + 1} tokens"
        begin, end = number * SECONDS_A_FRAME / cycle, (number + 1) * SECONDS_A_FRAME / cycle
        last = number + 1 == num_frames
        times = f"0;{begin:.4f}" if last else f"0;{begin:.4f};{end:.4f}"
        values = "hidden;visible" if last else "hidden;visible;hidden"
        if not number:
            times, values = f"0;{end:.4f}", "visible;hidden"
        shown = "visible" if last else "hidden"  # where nothing moves, the whole text
        frames.append(
            f'<g visibility="{shown}"><animate attributeName="visibility" calcMode="discrete" dur="{cycle:.1f}s" '
            f'repeatCount="indefinite" keyTimes="{times}" values="{values}"/>'
            f'<text x="20" y="82" fill="{QUIET}">{counts}</text>'
            + "".join(lines_of(pieces, 106))
            + f'<text x="20" y="{low - 12}" fill="{QUIET}">{plain}</text>'
            + "".join(lines_of([(decoded(ids[: number + 1]), TEXT)], low + 12))
            + "</g>"
        )
        num_before = num_after
    width = int(40 + COLUMNS * CHARACTER)
    legend = (
        f'<text x="20" y="30" fill="{TEXT}" font-weight="bold">{escape(prompt)}</text>'
        f'<text x="20" y="54" fill="{QUIET}"><tspan fill="{ACCEPTED}">accepted</tspan> by '
        f'this forward, <tspan fill="{DRAFT}">drafted</tspan> for the next</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{STYLE}" role="img">'
        f'<title>Drafts turn into text</title><rect width="100%" height="100%" rx="8" fill="#ffffff" '
        f'stroke="#d1d5db"/>{legend}{"".join(frames)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompt", default="Write a Python function that counts the vowels in a string.")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path("drafts.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    run = Forwards()
    ids = chat_prompt_ids(arguments.prompt, tokenizer)[None]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        num_branches="all",
        streamer=run,
        return_dict_in_generate=True,
    )
    arguments.output.write_text(animation(tokenizer, run, arguments.prompt), encoding="utf-8")
    num_new = output.sequences.shape[1] - ids.shape[1]
    print(f"{num_new} tokens, {output.num_forwards} forwards; animation in {arguments.output}")


if __name__ == "__main__":
    main()
