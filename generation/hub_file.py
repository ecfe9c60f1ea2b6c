"""One file of a folder or Hub repository, where it has that file."""

import os
from typing import Any

from transformers.utils import cached_file


def file_if_there(name_or_path: str | os.PathLike, name: str, may_be_offline: bool = False, **hub: Any) -> str | None:
    """The path of a file, downloaded where need be; None where the repository has none.

    Args:
        may_be_offline: None, and no error, where the Hub cannot be reached.
        hub: `cache_dir`, `revision`, `token` and the like, of transformers' `from_pretrained`. Where the revision is a
            commit, what the cache knows of it is believed, and the Hub is not asked.
    """
    return cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not may_be_offline,
        **hub,
    )
