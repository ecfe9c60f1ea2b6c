"""What a checkpoint carries, written afresh from the package's own sources, and told plainly when the Hub refuses."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .custom_generate import OLDEST_TRANSFORMERS, one_file
from .hub_repository import CarriedFiles, for_adapter, origin_folder, source_file
from .model_card import is_replaceable, write_card
from .travelling_code import flat_sources

# Our own files do not change while they run, and reading them takes longer than writing a small checkpoint.
flat_sources_once = cache(flat_sources)
one_file_once = cache(one_file)


class WrittenFiles(CarriedFiles):
    """Code and card of a model of this package."""

    def origin_of(self, model: Any) -> Path | None:
        return origin_folder(model)

    def write_code(self, model_class: type, folder: Path) -> None:
        """Writes the source files of `model_class` into a saved checkpoint.

        Raises:
            ValueError: two files of the same name would overwrite each other.
        """
        for name, text in flat_sources_once(source_file(model_class)).items():
            (folder / name).write_text(text, encoding="utf-8")

    def write_custom_generate(
        self, generate: Any, folder: Path, origin: Path | None = None, taught: dict[str, int] | None = None
    ) -> None:
        """Writes custom_generate/generate.py as one file.

        transformers takes a missing second file for a repository that has no custom decode at all, and would decode
        plainly without a word.
        """
        target = folder / "custom_generate"
        target.mkdir(exist_ok=True)
        (target / "generate.py").write_text(
            one_file_once(source_file(generate)) + for_adapter(taught), encoding="utf-8"
        )
        (target / "requirements.txt").write_text(f"transformers>={OLDEST_TRANSFORMERS}\n", encoding="utf-8")

    def write_card(
        self, model: Any, folder: Path, name: str, *, origin: Path | None = None, tags: list[str] | None = None
    ) -> None:
        if (kind := card_kind_of(folder, model)) is not None:
            write_card(folder, kind, name, origin=origin, loaded_from=model.name_or_path, tags=tags)

    def replaces_card(self, card: Path, fetch_theirs: Callable[[], str]) -> bool:
        cards = (lambda: card, lambda: Path(fetch_theirs()))
        return all(is_replaceable(find().read_text(encoding="utf-8")) for find in cards)

    def publish(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """As `CarriedFiles.publish`, with an error that says what to do.

        Raises:
            ValueError: there are no weights to upload.
            PermissionError: the Hub refused the token.
            ConnectionError: the Hub cannot be reached, or broke off.
        """
        try:
            return super().publish(folder, repo_id, **options)
        except Exception as error:
            if (told := refusal(error, repo_id, constants.ENDPOINT)) is None:
                raise
            raise told from error


def card_kind_of(folder: Path, model: Any) -> str | None:
    """Which card a saved model gets, or an adapter saved of it."""
    return model.adapter_card_kind if (folder / "adapter_config.json").exists() else model.card_kind


def refusal(error: BaseException, repo_id: str, endpoint: str) -> Exception | None:
    """What went wrong with the Hub, in a sentence; None where it was something else."""
    if isinstance(error, ValueError):  # the card's head, a repository's name: said well enough
        return None
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    remedy = "A commit is whole or absent. Run the same again: what was uploaded already is not sent twice."
    for cause in causes:
        if isinstance(cause, LocalTokenNotFoundError):
            return PermissionError(f"There is no token for {endpoint}. Log in with `hf auth login`, or pass a token.")
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status in (401, 403):
                return PermissionError(
                    f"{endpoint} refused the token for {repo_id} (HTTP {status}): it must be one that may write "
                    "there. Nothing was published. Log in with `hf auth login`, or pass another token."
                )
            reason = " ".join(str(cause).split())
            return ConnectionError(f"{endpoint} refused the upload to {repo_id} (HTTP {status}): {reason}. {remedy}")
    for cause in causes:  # uploads through Xet break off with a RuntimeError
        is_transport = type(cause).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "hf_xet")
        if is_transport or isinstance(cause, RuntimeError | TimeoutError | ConnectionError):
            reason = " ".join(str(cause).split())
            return ConnectionError(
                f"The connection to {endpoint} broke off while {repo_id} was uploaded ({reason}). {remedy}"
            )
    return None
