"""The bar that a terminal shows while many texts are decoded."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def decoding_bar(total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar of `total` steps on stderr where that is a terminal; what it yields advances the bar by one step."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Decoding", total=total)
        yield lambda: progress.advance(task)
