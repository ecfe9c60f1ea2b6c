"""Sources of training rows: files, folders or Hub datasets, read at once or streamed."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset
from transformers.utils import logging

from .dialogue import IGNORED, RowEncoder, pack_rows, read_jsonl
from .training_arguments import FinetuneArguments

logger = logging.get_logger(__name__)

SHUFFLED_TOGETHER = 1000  # rows of a stream that are shuffled in memory


def open_rows(source: str | Path, split: str = "train", is_streaming: bool = False) -> Callable[[], Iterable[dict]]:
    """A function that reads the rows of a source from the start at each call.

    Args:
        source: a file (.jsonl or .json with one row per line; .parquet; .txt, one text), a folder of such files, a
            folder written by `Dataset.save_to_disk`, or ORG/NAME on the Hub.
        split: the split to read, if a dataset has several.
        is_streaming: streams a Hub dataset instead of downloading it first.

    Raises:
        ValueError: the source does not exist, or `datasets` is needed and not installed.
    """
    path = Path(source)
    if path.is_file():
        return lambda: _rows_of_file(path)
    if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise ValueError(f"{path} has no file of a supported type: {', '.join(sorted(_READERS))}.")
        return lambda: (row for file in files for row in _rows_of_file(file))
    if not path.is_dir() and len(path.parts) != 2:
        raise ValueError(f"There is no file {path}. Name a file, a folder, or ORG/NAME on the Hub.")
    datasets = _datasets(source)
    if path.is_dir():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            dataset = _split_of(dataset, split, source)
    else:
        try:
            dataset = datasets.load_dataset(str(source), split=split, streaming=is_streaming)
        except Exception as error:  # a dozen types, from datasets, huggingface_hub and fsspec
            raise ValueError(
                f"{source} is not a folder, and it could not be loaded as a Hub dataset: {error}"
            ) from error
    return lambda: dataset


def _split_of(splits: Any, split: str, source: str | Path) -> Any:
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}, but {', '.join(splits)}. Choose one with `split`.")
    return splits[split]


def _datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"Reading {source} needs the `datasets` package: pip install wavedraft[train].") from None
    return datasets


def _rows_of_file(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is not of a supported type: {', '.join(sorted(_READERS))}.")
    return _READERS[path.suffix](path)


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    _datasets(path)  # brings pyarrow
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}.") from None


def _rows_of_text(path: Path) -> Iterator[dict[str, Any]]:
    yield {"text": path.read_text(encoding="utf-8")}


_READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": _rows_of_parquet,
    ".txt": _rows_of_text,
}


class RowStream(IterableDataset):
    """Encoded rows, shuffled within the next thousand, in another order in each epoch.

    Args:
        read: reads the rows from the start at each call.
        encode: converts a row to any number of encoded rows.
        seed: seed of the order.
    """

    def __init__(self, read: Callable[[], Iterable[dict]], encode: Callable[[dict], Iterable[dict]], seed: int):
        self.read, self.encode, self.seed, self.epoch = read, encode, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def in_order(self) -> Iterator[dict[str, list[int]]]:
        for row in self.read():
            yield from self.encode(row)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        draw = random.Random(self.seed * 1_000_003 + self.epoch)
        waiting: list[dict[str, list[int]]] = []
        for row in self.in_order():
            if len(waiting) < SHUFFLED_TOGETHER:
                waiting.append(row)
                continue
            place = draw.randrange(len(waiting))
            waiting[place], row = row, waiting[place]
            yield row
        draw.shuffle(waiting)
        yield from waiting


class TrainingRows(NamedTuple):
    """The encoded rows of a run.

    Attributes:
        dataset: the rows for Trainer: a list, packed or not, or a stream.
        known: the rows before packing; the first few rows of a stream.
        encoder: the encoder of the rows, with its counts.
        is_stream: whether there may be more rows than `known`.
    """

    dataset: Any
    known: list[dict[str, list[int]]]
    encoder: RowEncoder
    is_stream: bool

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for row in self.known for label in row["labels"])


def training_rows(
    read: Callable[[], Iterable[dict]], tokenizer: Any, arguments: FinetuneArguments, num_first: int = 16
) -> TrainingRows:
    """Encodes the rows of `read`; of a stream only the first `num_first`, to check that rows have labels.

    Raises:
        ValueError: no row has enough labels.
    """
    encoder = RowEncoder(tokenizer, arguments.max_length, arguments.draft_length)
    stream = RowStream(read, encoder, arguments.seed)
    known = list(islice(stream.in_order(), num_first if arguments.streaming else None))
    if encoder.refused:
        logger.warning(f"{encoder.refused} rows of {arguments.data} are dropped. {encoder.reason}")
    if not known:
        raise ValueError(
            f"No row of {arguments.data} has more than {arguments.draft_length} tokens to learn from (the checkpoint's "
            f"draft length) within `max_length` {arguments.max_length}. {encoder.reason}"
        )
    packed = pack_rows(known, arguments.max_length) if arguments.pack else known
    return TrainingRows(stream if arguments.streaming else packed, known, encoder, arguments.streaming)
