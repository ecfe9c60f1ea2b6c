"""The progress of a conversion: a line for each step, on stderr."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressSteps:
    """Shows one line per step, with a moving bar if the step counts bytes."""

    def __init__(self, is_shown: bool):
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not is_shown)
        self.task: TaskID | None = None

    def __enter__(self) -> "ProgressSteps":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if not error[0]:
            self._finish()
        self.progress.stop()

    def begin(self, description: str, num_bytes: int | None = None) -> None:
        self._finish()
        self.task = self.progress.add_task(description, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        if self.task is not None:
            self.progress.advance(self.task, num_bytes)

    def _finish(self) -> None:
        if self.task is not None:
            self.progress.update(self.task, total=1, completed=1)
