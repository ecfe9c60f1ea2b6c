"""Copies a weight file: shares its blocks if the file system can, and keeps its holes."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

FICLONE = 0x40049409  # Linux: share all blocks of another file, copy-on-write
CHUNK = 64 * 2**20


def copy_shard(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Copies a file; calls `advance` with the bytes of each chunk.

    Never a hard link: a write to the target would change the source.
    """
    size = source.stat().st_size
    with source.open("rb") as reading, target.open("wb") as writing:
        if not _shared_blocks(reading.fileno(), writing.fileno()):
            for start, stop in _written_ranges(reading.fileno(), size):
                writing.seek(start)
                _copy_range(reading, writing, start, stop, advance)
            writing.truncate(size)


def copy_renamed(source: Path, target: Path, renamed: dict[str, str], advance: Callable[[int], None]) -> list[str]:
    """Writes the tensors of a safetensors file that `renamed` names, under their new names. No file without any.

    Returns:
        the new names.
    """
    with source.open("rb") as reading:
        (length,) = struct.unpack("<Q", reading.read(8))
        header, begin = json.loads(reading.read(length)), 8 + length
        kept = sorted((entry["data_offsets"], name) for name, entry in header.items() if name in renamed)
        if not kept:
            return []
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for (start, stop), name in kept:
            entries[renamed[name]] = header[name] | {"data_offsets": [end, end + stop - start]}
            end += stop - start
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as writing:
            writing.write(struct.pack("<Q", len(text)) + text)
            for (start, stop), _ in kept:
                _copy_range(reading, writing, begin + start, begin + stop, advance)
    return [renamed[name] for _, name in kept]


def _copy_range(reading: BinaryIO, writing: BinaryIO, start: int, stop: int, advance: Callable[[int], None]) -> None:
    """Copies the bytes from `start` to `stop` to where the writing file stands."""
    reading.seek(start)
    while start < stop:
        chunk = reading.read(min(CHUNK, stop - start))
        if not chunk:
            raise OSError(f"{reading.name} ended at byte {start} during the copy, not at {stop}.")
        writing.write(chunk)
        start += len(chunk)
        advance(len(chunk))


def num_bytes_on_disk(path: Path) -> int:
    status = path.stat()
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def _shared_blocks(reading: int, writing: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(writing, FICLONE, reading)
    except (ImportError, OSError):
        return False
    return True


def _written_ranges(file: int, size: int) -> list[tuple[int, int]]:
    """The parts of a file that are not holes."""
    ranges, start = [], 0
    try:
        while start < size:
            start = os.lseek(file, start, os.SEEK_DATA)
            stop = os.lseek(file, start, os.SEEK_HOLE)
            ranges.append((start, stop))
            start = stop
    except OSError as error:
        if error.errno != 6:  # ENXIO: only a hole is left
            return [(0, size)]
    except AttributeError:  # the system does not report holes
        return [(0, size)]
    return ranges
