"""Encoded rows for training, read at once or streamed."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset
from transformers.utils import logging

from .dialogue import IGNORED, RowEncoder, pack_rows
from .row_forms import Row
from .training_arguments import FinetuneArguments

logger = logging.get_logger(__name__)

SHUFFLED_TOGETHER = 1000  # rows of a stream that are shuffled in memory


class RowStream(IterableDataset):
    """Encoded rows, shuffled within the next thousand, in another order in each epoch.

    Args:
        read: reads the rows from the start at each call.
        encode: converts a row to any number of encoded rows.
        seed: seed of the order.
    """

    def __init__(self, read: Callable[[], Iterable[Row]], encode: Callable[[Row], Iterable[dict]], seed: int):
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
    read: Callable[[], Iterable[Row]], tokenizer: Any, arguments: FinetuneArguments, num_first: int = 16
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
