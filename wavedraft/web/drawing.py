"""The lanes of a race, its outcome and its trace as HTML."""

import base64
import html
from typing import Any

from ..commands.timed_runs import Run, is_identical, told_of
from ..live_view import printable
from ..trace import Trace
from ..trace_picture import Picture, page
from .lane import Lane, Moment
from .race import Frame, Race

STYLE = """
.lane {border: 1px solid #8884; border-radius: 8px; padding: 12px; min-height: 14em}
.lane h3 {margin: 0 0 4px; font-size: 1em}
.lane .counts {margin: 0 0 10px; opacity: .75; font-variant-numeric: tabular-nums}
.lane .text {white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace}
.lane .odd {color: #1d63b8}
.dark .lane .odd {color: #7db7ff}
.lane .draft {opacity: .45}
.told {min-height: 1.6em}
.failed {border: 1px solid #c33; border-radius: 8px; padding: 10px; background: #c332; white-space: pre-wrap}
iframe.trace {width: 100%; height: 420px; border: 1px solid #8884; border-radius: 8px; background: #fff}
"""
TITLES = "Parallel decoding", "Plain decoding"
SAMPLED = "Sampled texts share a distribution, not their tokens, so they are not compared."


def lanes(frame: Frame, counts_forwards: bool) -> list[str]:
    """Both lanes of a frame.

    Args:
        counts_forwards: whether each piece of text is of one forward. It is TiDAR's; plain decoding of any model too.
    """
    forwards = counts_forwards, True
    shown = zip(TITLES, frame.lanes, frame.moments, frame.seconds, forwards, strict=True)
    return [lane(*one) for one in shown]


def empty_lane(title: str) -> str:
    """A lane before the first race."""
    return f'<div class="lane"><h3>{title}</h3><p class="counts">&nbsp;</p></div>'


def lane(title: str, of: Lane, moment: Moment, seconds: float, counts_forwards: bool) -> str:
    """One lane: counts, then the text in two shades that change with each forward, and the draft after it, dim."""
    pieces = "".join(
        f'<span class="{"odd" if place % 2 else "even"}">{escaped(piece)}</span>'
        for place, piece in enumerate(of.pieces[: moment.num_pieces])
    )
    draft = f'<span class="draft">{escaped(moment.draft)}</span>' if moment.draft else ""
    return (
        f'<div class="lane"><h3>{title}</h3><p class="counts">{counts(moment, seconds, counts_forwards)}</p>'
        f'<div class="text">{pieces}{draft}</div></div>'
    )


def counts(moment: Moment, seconds: float, counts_forwards: bool) -> str:
    """A lane's numbers at one moment."""
    parts, num_forwards = [f"{seconds:.1f} s", f"{moment.num_tokens} tokens"], moment.num_pieces - 1
    if counts_forwards and num_forwards > 0:
        parts += [f"{num_forwards} forwards", f"{(moment.num_tokens - 1) / num_forwards:.2f} tokens per forward"]
    if seconds and moment.num_tokens:
        parts.append(f"{moment.num_tokens / seconds:.1f} tokens a second")
    return " · ".join(parts)


def told(text: str) -> str:
    """What is going on."""
    return f'<p class="told">{escaped(text)}</p>'


def failed(message: str) -> str:
    """What went wrong, and what to do."""
    return f'<div class="failed" role="alert">{escaped(message)}</div>'


def outcome(race: Race, is_sampled: bool, reason: str) -> str:
    """How a race ended.

    Args:
        reason: why the texts of these two decodes may differ.
    """
    ours, plain = race.runs
    if ours is None or plain is None:
        return told("Stopped.")
    ratio = plain.seconds / ours.seconds
    lines = [
        f"Parallel decoding took {ours.seconds:.1f} s, plain decoding {plain.seconds:.1f} s: {ratio:.2f} times its "
        f"speed. {told_of(ours)}.",
        texts_compared(ours, plain, is_sampled, reason),
    ]
    if ratio < 1:
        lines.append("It did not pay here. The page Will it pay? of the documentation says when it does.")
    return "".join(map(told, lines))


def texts_compared(ours: Run, plain: Run, is_sampled: bool, reason: str) -> str:
    """Whether both wrote the same text."""
    if is_sampled:
        return SAMPLED
    return "The texts are identical." if is_identical(ours, plain) else f"The texts differ. {reason}"


def trace_frame(trace: Trace, tokenizer: Any) -> str:
    """The page that `wavedraft generate --trace` writes, in a frame of its own, and a link that saves it."""
    text = page([Picture(trace, tokenizer)])
    data = base64.b64encode(text.encode()).decode()
    link = f'<a download="trace.html" href="data:text/html;base64,{data}">Save the trace as a file</a>'
    return f'<iframe class="trace" sandbox title="trace" srcdoc="{html.escape(text)}"></iframe><p>{link}</p>'


def escaped(text: str) -> str:
    """A text whose characters a browser shows and does not obey."""
    return html.escape(printable(text))
