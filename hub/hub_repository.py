"""A model's folder as a repository that needs nothing of ours installed, and its way to the Hub in one commit."""

import contextlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from transformers import PreTrainedModel

from .model_card import CARD, HEAD_WEIGHTS, CardKind, is_replaceable, write_card
from .travelling_code import imported_first

if TYPE_CHECKING:

    class Stock(PreTrainedModel): ...
else:
    Stock = object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
LICENCE_FILES = ("LICENSE*", "NOTICE*")
WEIGHT_FILES = ("model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors", HEAD_WEIGHTS)
OWN_FILES = ("config.json", "generation_config.json", "adapter_config.json", CARD, "custom_generate/*")


class HubRepository(Stock):
    """`save_pretrained` and `push_to_hub` of a model whose code travels with it.

    Attributes:
        card_kind: which card it gets.
        adapter_card_kind: which card an adapter of it gets; PEFT's own where absent.
    """

    card_kind: CardKind
    adapter_card_kind: CardKind | None = None

    @classmethod
    def write_code(cls, folder: Path) -> None:
        """Writes the model's code into a saved checkpoint."""
        raise NotImplementedError

    def write_repository(self, folder: Path) -> None:
        """Writes all that stands beside the weights: code, card, and the tokenizer of where the model came from."""
        self.write_code(folder)
        origin = origin_folder(self)
        copy_missing(origin, folder, (*TOKENIZER_FILES, *LICENCE_FILES))
        write_card(folder, self.card_kind, folder.name, origin=origin, loaded_from=self.name_or_path)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Stock, plus all that the checkpoint needs where wavedraft is not installed."""
        hub_names = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision")
        hub_kwargs = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        if self.generation_config._from_model_config:  # transformers would drop our keywords in it on loading
            self.generation_config._from_model_config = False
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self.write_repository(Path(save_directory))
            if push_to_hub:
                hub_kwargs.setdefault("repo_id", Path(save_directory).name)
                publish(Path(save_directory), token=kwargs.get("token"), **hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | str | None = None,
    ) -> Any:
        """Uploads the model, its code and its card in one commit; arguments are those of transformers.

        Returns:
            the commit's `CommitInfo`.
        """
        fetch_beside_weights(self, token)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            given = [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
            if (kind := card_kind_of(folder, self)) is not None:
                write_card(folder, kind, repo_id, tags=given or None)
            return publish(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )


def card_kind_of(folder: Path, model: Any) -> CardKind | None:
    """Which card a saved model gets, or an adapter saved of it."""
    return model.adapter_card_kind if (folder / "adapter_config.json").exists() else model.card_kind


def origin_folder(model: Any) -> Path | None:
    """Where a model was loaded from: its folder, or its snapshot in the Hub's cache."""
    name = model.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        revision = getattr(model.config, "_commit_hash", None)
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def fetch_beside_weights(model: Any, token: bool | str | None) -> None:
    """Brings card, tokenizer and licence of the repository a model was loaded from into the Hub's cache, where
    `from_pretrained` left them out."""
    origin, revision = origin_folder(model), getattr(model.config, "_commit_hash", None)
    if origin is not None and not Path(model.name_or_path).is_dir():
        patterns = [CARD, *TOKENIZER_FILES, *LICENCE_FILES]
        with contextlib.suppress(OSError):  # what is not there any more cannot be carried over
            snapshot_download(model.name_or_path, revision=revision, allow_patterns=patterns, token=token)


def matching_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files that a folder has, relative to it."""
    found = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def code_files(folder: Path) -> list[Path]:
    """The files of code a checkpoint's config leads to, relative to it."""
    config = folder / "config.json"
    auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}) if config.is_file() else {}
    modules = {str(reference).split(".")[0] for reference in auto_map.values()}
    files = {path for module in modules for path in imported_first(folder / f"{module}.py")}
    return sorted(path.relative_to(folder.resolve()) for path in files)


def copy_missing(origin: Path | None, folder: Path, patterns: Iterable[str]) -> None:
    """Copies files that `folder` lacks. A tokenizer is taken whole or not at all."""
    if origin is None or not origin.is_dir() or origin.resolve() == folder.resolve():
        return
    has_tokenizer = bool(matching_files(folder, TOKENIZER_FILES))
    tokenizer = set(matching_files(origin, TOKENIZER_FILES))
    for name in matching_files(origin, patterns):
        if not (folder / name).exists() and not (has_tokenizer and name in tokenizer):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((origin / name).read_bytes())


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    include: Iterable[str] = (),
) -> Any:
    """Uploads a folder's model files in one commit: the repository has all of them, or what it had before.

    Shards of an older upload that the new one does not have are taken out, so that no loader mixes them. A card that a
    user wrote on the Hub stays.

    Args:
        include: patterns of other files to upload.

    Returns:
        the commit's `CommitInfo`.

    Raises:
        ValueError: there are no weights to upload.
        PermissionError: the Hub refused the token.
        ConnectionError: the Hub cannot be reached, or broke off.
    """
    files = matching_files(folder, [*OWN_FILES, *WEIGHT_FILES, *TOKENIZER_FILES, *LICENCE_FILES, *include])
    files += [name for name in code_files(folder) if name not in files]
    weights = set(matching_files(folder, WEIGHT_FILES))
    if not weights:
        raise ValueError(f"{folder} has no safetensors to push. Save the model there first; pickles are not pushed.")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        if CARD in there and Path(CARD) in files and is_replaceable((folder / CARD).read_text(encoding="utf-8")):
            card = api.hf_hub_download(repo_id, CARD, revision=revision)
            if not is_replaceable(Path(card).read_text(encoding="utf-8")):
                files.remove(Path(CARD))
        stale = [n for n in there if any(Path(n).match(p) for p in WEIGHT_FILES) and Path(n) not in weights]
        operations: list[Any] = [CommitOperationDelete(name) for name in sorted(stale) if "/" not in name]
        operations += [CommitOperationAdd(name.as_posix(), folder / name) for name in files]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:
        if (told := refusal(error, repo_id, api.endpoint)) is None:
            raise
        raise told from error


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
