"""Writes a folder completely, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: remains of a killed run must be removed by hand
    fcntl = None  # type: ignore[assignment]

OLD, NEW = "old", "new"


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target`. At the end one rename turns its subfolder `new` into `target`.

    If the run is killed, `target` is absent or complete, and the temporary folder stays. The next run for the same
    target removes that folder, and puts back an old target it finds there.

    Raises:
        ValueError: `target` exists, and `overwrite` is false or it is not a checkpoint.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_killed_runs(target)
    check_target(target, overwrite=overwrite)
    workplace = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    lock = _lock(workplace)
    try:
        (workplace / NEW).mkdir()
        yield workplace
        check_target(target, overwrite=overwrite)
        if target.exists():
            target.rename(workplace / OLD)
        try:
            (workplace / NEW).rename(target)
        except OSError:
            if (workplace / OLD).exists():
                (workplace / OLD).rename(target)
            raise
    finally:
        _unlock(lock)
        shutil.rmtree(workplace, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"{target} already exists. Choose another target, or pass --overwrite to replace it.")
    if target.is_symlink() or not (target / "config.json").is_file():
        raise ValueError(
            f"{target} exists and is not a checkpoint folder (it has no config.json), so it is not overwritten. "
            "Choose another target, or remove it yourself."
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.wavedraft-"


def _clear_killed_runs(target: Path) -> None:
    for workplace in target.parent.glob(_prefix(target) + "*"):
        lock = _lock(workplace)
        if lock is None:
            continue  # still running
        if (workplace / OLD).exists() and not os.path.lexists(target):
            (workplace / OLD).rename(target)
        shutil.rmtree(workplace, ignore_errors=True)
        _unlock(lock)


def _lock(folder: Path) -> int | None:
    """A lock that ends with this process; None if another process has it."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
