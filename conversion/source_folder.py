"""Finds the checkpoint a user names: a local folder, a repository of the Hub, or a GGUF file."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..hub.hub_repository import CARD, LICENCE_FILES, TOKENIZER_FILES, matching_files
from .gguf import gguf_file_of, write_stock_checkpoint
from .safetensors_headers import INDEX_FILE

# Files copied beside config and weights. Everything else (code, pickles, other formats) is left out.
SIDE_FILES = ("generation_config.json", *TOKENIZER_FILES, *LICENCE_FILES)


def stock_folder(source: str | os.PathLike, workplace: Path, revision: str | None) -> Path:
    """The folder with the source's config.json and safetensors, downloaded or rewritten if necessary.

    Args:
        workplace: where a GGUF file is rewritten as a checkpoint.

    Raises:
        ValueError: there is no such folder, file or repository, or it cannot be reached.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return _hub_snapshot(str(source), revision)
    if file := gguf_file_of(path):
        folder = workplace / "source"
        folder.mkdir()
        write_stock_checkpoint(file, folder)
        return folder
    if not path.is_dir():
        raise ValueError(
            f"{path} is neither a folder nor a .gguf file. Name the folder with config.json and safetensors."
        )
    return path.resolve()


def side_files(folder: Path) -> list[Path]:
    """The files of `SIDE_FILES` that a folder has, relative to it."""
    return matching_files(folder, SIDE_FILES)


def hub_id_of(source: str | os.PathLike, folder: Path) -> str | None:
    """The Hub id of a source, also if it is a folder in the Hub's cache; None for any other folder."""
    if not Path(source).expanduser().exists():
        return str(source)
    names = [part.removeprefix("models--") for part in folder.parts if part.startswith("models--")]
    return names[-1].replace("--", "/") if names and folder.parent.name == "snapshots" else None


def _hub_snapshot(repo_id: str, revision: str | None) -> Path:
    patterns = ["config.json", "*.safetensors", INDEX_FILE, CARD, *SIDE_FILES]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(
            f"There is no folder or file {repo_id}, and it is not a Hub id (such as 'org/name')."
        ) from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"There is no local folder {repo_id}, and it could not be loaded from the Hub: {reason}"
        ) from error
