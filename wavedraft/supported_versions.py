"""Says at import, with the remedy, that the installed transformers is one this package does not work with."""

from transformers import __version__

OLDEST = "5.22"
FIRST_UNSUPPORTED = "6"
# What pip installs. 5.24 drafts too, but adds, switches and saves adapters by PEFT 0.22 alone, which PyPI did not have
# on 2026-11-25.
REQUIREMENT = f"transformers>={OLDEST},<5.24"


def check_transformers(version: str) -> None:
    """Raises for a version of transformers that is not supported.

    Raises:
        ImportError: it is older than `OLDEST`, or not yet supported.
    """
    if not _numbers(OLDEST) <= _numbers(version) < _numbers(FIRST_UNSUPPORTED):
        raise ImportError(
            f"wavedraft works with transformers {OLDEST} and newer, below {FIRST_UNSUPPORTED}, but transformers "
            f"{version} is installed. Install one that fits: pip install '{REQUIREMENT}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """(5, 22) of "5.22.0.dev0": pre-releases count as what they lead to."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


check_transformers(__version__)
