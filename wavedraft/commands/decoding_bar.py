"""The bar that a terminal shows while many texts are decoded."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def decoding_bar(total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar of `total` steps, with the time left, on stderr where that is a terminal.

    What it yields advances the bar by one step. stdout stays as it is, for results.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    is_hidden = total < 2 or not sys.stderr.isatty()
    with Progress(console=console, transient=True, disable=is_hidden, redirect_stdout=False) as progress:
        task = progress.add_task("Decoding", total=total)
        yield lambda: progress.advance(task)
