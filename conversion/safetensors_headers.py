"""Reads the headers of a safetensors checkpoint, and checks them against the sizes of its files."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
NUM_BITS = {
    **dict.fromkeys(["F64", "I64", "U64", "C64"], 64),
    **dict.fromkeys(["F32", "I32", "U32"], 32),
    **dict.fromkeys(["F16", "BF16", "I16", "U16"], 16),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorHeader:
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * NUM_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file, by name.

    Raises:
        ValueError: the file is cut short, or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a complete safetensors file: its first 8 bytes give a header of {length} bytes, but "
                f"the file has {size}. Download it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text, parse_constant=_no_number)
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError(f"`__metadata__` must have only texts, but is {notes!r}")
        entries = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}
        tensors = {name: _checked(*entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a broken safetensors header ({error!r}). Download it again.") from None
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(
                f"{path}: tensor {name!r} starts at byte {start} of the data, but the tensor before ends at {end}. "
                "The file is damaged: download it again."
            )
        end = stop
    if 8 + length + end != size:
        raise ValueError(
            f"{path} should have {8 + length + end} bytes according to its header, but has {size}: it was cut short or "
            "overwritten. Download it again."
        )
    return tensors


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _checked(dtype: str, shape: list[int], start: int, stop: int) -> TensorHeader:
    if not all(type(size) is int and size >= 0 for size in [*shape, start, stop]):
        raise ValueError(f"sizes must be integers of 0 or more, but are {shape}, {start}, {stop}")
    tensor = TensorHeader(dtype, tuple(shape))
    if tensor.num_elements * NUM_BITS[dtype] != (stop - start) * 8:
        raise ValueError(f"{dtype} of shape {shape} in {stop - start} bytes")
    return tensor


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, as transformers would find them.

    Raises:
        ValueError: there are none, or the index names a file that is missing or lies outside the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(_why_no_weights(folder))
    shards = []
    for name in sorted(set(_weight_map(folder / INDEX_FILE).values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX_FILE} points to {name!r}, which is not the name of a safetensors file in the same "
                "folder. Do not trust this checkpoint; download it again from its publisher."
            )
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} lacks the shard {name}, which {INDEX_FILE} names. Finish the download, or copy the shard "
                "there."
            )
        shards.append(folder / name)
    return shards


def read_tensors(folder: Path, shards: list[Path]) -> dict[str, TensorHeader]:
    """All tensors of a checkpoint, by name.

    Raises:
        ValueError: a shard is damaged, repeats another shard's tensor, or lacks one that the index lists.
    """
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        header = read_header(shard)
        if twice := sorted(set(header) & set(tensors)):
            raise ValueError(f"{folder} has {twice[0]!r} in two shards, one of them {shard.name}. Remove one.")
        if len(shards) > 1 or shard.name != SINGLE_FILE:
            listed = {name for name, file in _weight_map(folder / INDEX_FILE).items() if file == shard.name}
            if lacking := sorted(listed - set(header)):
                raise ValueError(
                    f"{shard} lacks {len(lacking)} tensors that {INDEX_FILE} lists, the first is {lacking[0]!r}. "
                    "Index and shards belong to different checkpoints: download both again."
                )
        tensors |= header
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map, metadata = content["weight_map"], content["metadata"]  # transformers needs both
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("`weight_map` names no files")
        if not isinstance(metadata, dict):
            raise ValueError(f"`metadata` is {metadata!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards ({error!r}). Download it again.") from None
    return weight_map


def _why_no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is loaded. Only "
            "safetensors are converted. If you trust it, rewrite it first: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)."
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: there are no weights to convert."
