"""One file of a folder or Hub repository, where it has that file."""

import os
from typing import Any

from transformers.utils import cached_file


def file_if_there(
    name_or_path: str | os.PathLike, name: str, commit: str | None = None, may_be_offline: bool = False, **hub: Any
) -> str | None:
    """The path of a file, downloaded where need be; None where the repository has none.

    Args:
        commit: of the repository, where it is known. What the cache knows of that commit is then believed.
        may_be_offline: None, and no error, where the Hub cannot be reached.
        hub: `cache_dir`, `revision`, `token` and the like, of transformers' `from_pretrained`.
    """
    return cached_file(
        name_or_path,
        name,
        _commit_hash=commit,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not may_be_offline,
        **hub,
    )


def commit_of(model: Any) -> str | None:
    """The commit of the Hub repository that a model was loaded from."""
    return getattr(model.config, "_commit_hash", None)
