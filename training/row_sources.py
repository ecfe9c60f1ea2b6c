"""Rows of files, folders and datasets.

`wavedraft train`, `data regenerate`, `generate`, `audit` and `bench` all read their rows here. Neither torch nor
transformers is imported, so the command line reads files before it loads those.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .row_forms import Row, check_columns, prompt_row, row_of, short

LINES = ("", ".txt", ".md")  # a file of prompts has one a line


def open_rows(
    source: str | Path, split: str = "train", is_streaming: bool = False, columns: Mapping[str, str] | None = None
) -> Callable[[], Iterator[Row]]:
    """A function that reads the rows of a source from the start at each call.

    Args:
        source: a file (.jsonl or .json, with one row a line or one array; .parquet; .csv and .tsv, with a first line of
            column names; .txt, one text), a folder of such files, a folder written by `Dataset.save_to_disk`, or
            ORG/NAME on the Hub.
        split: the split to read, if a dataset has several.
        is_streaming: streams a Hub dataset instead of downloading it first.
        columns: as of `row_of`.

    Raises:
        ValueError: the source does not exist, or `datasets` is needed and not installed. When rows are read: a row has
            no form that is read.
    """
    columns = None if columns is None else check_columns(columns)
    path = Path(source)
    if path.is_file():
        return lambda: rows_of_file(path, columns)
    if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise ValueError(f"{path} has no file of a supported type: {', '.join(sorted(_READERS))}.")
        return lambda: (row for file in files for row in rows_of_file(file, columns))
    if not path.is_dir() and (len(path.parts) != 2 or path.suffix in _READERS):
        raise ValueError(f"There is no file {path}. Name a file, a folder, or ORG/NAME on the Hub.")
    dataset = _dataset(source, split, is_streaming)
    return lambda: (row_of(row, f"{source}, row {number}", columns) for number, row in enumerate(dataset, start=1))


def _dataset(source: str | Path, split: str, is_streaming: bool) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"Reading {source} needs the `datasets` package: pip install wavedraft[train].") from None
    if Path(source).is_dir():
        dataset = datasets.load_from_disk(str(source))
        if not isinstance(dataset, datasets.DatasetDict):
            return dataset
        if split not in dataset:
            raise ValueError(f"{source} has no split {split!r}, but {', '.join(dataset)}. Choose one with `split`.")
        return dataset[split]
    try:
        return datasets.load_dataset(str(source), split=split, streaming=is_streaming)
    except Exception as error:  # a dozen types, from datasets, huggingface_hub and fsspec
        raise ValueError(f"{source} is not a folder, and it could not be loaded as a Hub dataset: {error}") from error


def read_prompts(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The prompts of a file: rows in the forms of `row_of`, without their last answers; or a text, one prompt a line.

    Raises:
        ValueError: there is no such file, it holds no prompts, or a row has none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give rows with `prompt` or `messages`, or a text with one a line.")
    if path.suffix in LINES:
        if columns is not None:
            raise ValueError(f"{path} is a text with one prompt a line, so it has no columns. Leave `columns` out.")
        with _opened(path) as lines:
            numbered = [(number, line.rstrip("\n")) for number, line in enumerate(lines, start=1)]
        prompts = [prompt_row(line, f"{path}, line {number}") for number, line in numbered if line.strip()]
    else:
        prompts = [row.prompt() for row in rows_of_file(path, columns)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Give rows with `prompt` or `messages`, or a text with one a line.")
    return prompts


def rows_of_file(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a file. Raises ValueError for a file or a row that cannot be read, by its place."""
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is not of a supported type: {', '.join(sorted(_READERS))}.")
    return (row_of(values, place, columns) for place, values in _READERS[path.suffix](path))


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} 0x{byte:02x}. Save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of CSV: {error}.") from None


def read_json(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line or all in one array, each after its place.

    Raises:
        ValueError: names the line that is not JSON, or not an object.
    """
    path = Path(path)
    with _opened(path) as file:
        start = next((letter for letter in iter(lambda: file.read(1), "") if not letter.isspace()), "")
        file.seek(0)
        if start == "[":
            array = _json_of(file.read(), path)
            objects = ((f"{path}, row {number}", value) for number, value in enumerate(array, start=1))
        else:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            objects = ((f"{path}, line {number}", _json_of(line, path, number)) for number, line in lines)
        for place, value in objects:
            if not isinstance(value, dict):
                raise ValueError(f"{place} must be a JSON object, but is {short(value)}.")
            yield place, value


def _json_of(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        place = f"{path}, line {first_line + error.lineno - 1}"
        raise ValueError(f"{place} is not JSON ({error.msg}): {line[:80]!r}.") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ValueError(f"Reading {path} needs the `pyarrow` package: pip install wavedraft[train].") from None
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}.") from None


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row:
                raise ValueError(f"{place} has more values than the first line has column names: {short(row[None])}.")
            yield place, {name: value or None for name, value in row.items()}


def _read_text(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        yield str(path), {"text": file.read()}


_READERS: dict[str, Callable[[Path], Iterable[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
