"""A model's folder as a repository that needs nothing of ours installed, and its way to the Hub in one commit.

This is the only file of hub/ that travels with a checkpoint. A model that was loaded from its own code passes on the
files it came with. Where wavedraft is installed, `WrittenFiles` writes them afresh.
"""

import contextlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

if TYPE_CHECKING:

    class Stock(PreTrainedModel): ...
else:
    Stock = object

logger = logging.get_logger(__name__)
CARD = "README.md"
CUSTOM_GENERATE = ("custom_generate/*",)
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
FROM_MODEL_CONFIG = "_from_model_config"  # of a generation config, in memory and in its file
LICENCE_FILES = ("LICENSE*", "NOTICE*")
WEIGHT_FILES = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model.safetensors",
    "draft_head.safetensors",
)
OWN_FILES = ("config.json", "generation_config.json", "adapter_config.json", CARD, *CUSTOM_GENERATE)


class CarriedFiles:
    """Code and card of a model that was loaded with `trust_remote_code`: copies of the files it came with."""

    def origin_of(self, model: Any) -> Path | None:
        """The folder with the files a model came with."""
        fetch_beside_weights(model)
        return origin_folder(model)

    def write_code(self, model_class: type, folder: Path) -> None:
        """Writes the code of a class into a saved checkpoint."""
        for path in source_file(model_class).parent.glob("*.py"):
            if path.name != "__init__.py":
                (folder / path.name).write_bytes(path.read_bytes())

    def write_custom_generate(
        self, generate: Any, folder: Path, origin: Path | None, taught: dict[str, int] | None = None
    ) -> None:
        """Writes custom_generate/, with which an unmodified stock model drafts.

        Args:
            generate: the function that drafts.
            origin: where the model came from.
            taught: the `tidar_config` of an adapter, for stock models, whose configs have none.
        """
        names = matching_files(origin, CUSTOM_GENERATE) if origin is not None and origin.is_dir() else []
        if not names:
            logger.warning(f"{folder} gets no custom_generate/, with which a stock model drafts: {origin} has none.")
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            text = (origin / name).read_text(encoding="utf-8")
            (folder / name).write_text(text + for_adapter(taught) * (name.suffix == ".py"), encoding="utf-8")

    def write_card(
        self, model: Any, folder: Path, name: str, *, origin: Path | None = None, tags: list[str] | None = None
    ) -> None:
        """Writes the README.md of a saved model, which snippets load by `name`, with more `tags` in its head."""
        copy_missing(origin, folder, [CARD])
        if tags and (folder / CARD).is_file():
            card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
            card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
            card.save(folder / CARD)

    def replaces_card(self, card: Path, fetch_theirs: Callable[[], str]) -> bool:
        """Whether `card` takes the place of the one that is on the Hub, which `fetch_theirs` brings here."""
        return False

    def publish(
        self,
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

        Shards of an older upload that the new one does not have are taken out, so that no loader mixes them. A card
        that a user wrote on the Hub stays.

        Args:
            include: patterns of other files to upload.

        Returns:
            the commit's `CommitInfo`.

        Raises:
            ValueError: there are no weights to upload.
        """
        files = matching_files(folder, [*OWN_FILES, *WEIGHT_FILES, *TOKENIZER_FILES, *LICENCE_FILES, *include])
        files += [name for name in code_files(folder) if name not in files]
        weights = set(matching_files(folder, WEIGHT_FILES))
        if not weights:
            raise ValueError(
                f"{folder} has no safetensors to push. Save the model there first; pickles are not pushed."
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not create_pr and revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        if CARD in there and Path(CARD) in files:
            fetch = partial(api.hf_hub_download, repo_id, CARD, revision=revision)
            if not self.replaces_card(folder / CARD, fetch):
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


class HubRepository(Stock):
    """`save_pretrained` and `push_to_hub` of a model whose code travels with it.

    Attributes:
        files: how its code and card are written, and how they are published.
        card_kind: which card it gets.
        adapter_card_kind: which card an adapter of it gets; PEFT's own where absent.
    """

    files = CarriedFiles()
    card_kind: str
    adapter_card_kind: str | None = None
    loaded_revision: str | None = None  # of a Hub repository, as the caller named it

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock; the model also keeps the revision that the caller named."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.loaded_revision = kwargs.get("revision")
        return loaded

    @classmethod
    def write_code(cls, folder: Path, origin: Path | None = None) -> None:
        """Writes the model's code into a saved checkpoint. Code that travels copies some of it from `origin`."""
        raise NotImplementedError

    def write_repository(self, folder: Path) -> None:
        """Writes all that stands beside the weights: code, card, and the tokenizer of where the model came from."""
        origin = self.files.origin_of(self)
        self.write_code(folder, origin)
        copy_missing(origin, folder, (*TOKENIZER_FILES, *LICENCE_FILES))
        self.files.write_card(self, folder, folder.name, origin=origin)

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
        keep_own_options(self.generation_config)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self.write_repository(Path(save_directory))
            if push_to_hub:
                hub_kwargs.setdefault("repo_id", Path(save_directory).name)
                self.files.publish(Path(save_directory), token=kwargs.get("token"), **hub_kwargs)

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
            self.files.write_card(self, folder, repo_id, tags=given or None)
            return self.files.publish(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )


def point_config_at(
    model_class: type, folder: Path, architecture: str | None = None, config_class: type | None = None
) -> None:
    """Makes a saved checkpoint's config name the code of `model_class` beside it.

    Args:
        folder: a checkpoint folder with a config.json.
        architecture: the class of transformers to leave in `architectures`, where tools look one up by name.
        config_class: of a model whose config is not transformers' own.
    """
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if architecture is not None:
        config["architectures"] = [architecture]
    auto = "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"
    config["auto_map"] = {auto: f"{source_file(model_class).stem}.{model_class.__name__}"}
    if config_class is not None:
        config["auto_map"]["AutoConfig"] = f"{source_file(config_class).stem}.{config_class.__name__}"
    partial_path = config_path.with_suffix(".json.partial")
    partial_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial_path.replace(config_path)


def source_file(defined: Any) -> Path:
    """The file in which a class or function was defined."""
    return Path(inspect.getsourcefile(sys.modules[defined.__module__]) or "").resolve()


def for_adapter(taught: dict[str, int] | None) -> str:
    """What custom_generate/generate.py says after its code: nothing, or what an adapter was taught."""
    if taught is None:
        return ""
    return f"\n\nimport functools  # noqa: E402\n\ngenerate = functools.partial(generate, taught={taught!r})\n"


def keep_own_options(generation_config: GenerationConfig) -> None:
    """Makes a generation config keep the keywords of our `generate` when it is saved and loaded.

    transformers drops what it does not know from one that says that it was made from the model config.
    """
    setattr(generation_config, FROM_MODEL_CONFIG, False)


def origin_folder(model: Any) -> Path | None:
    """Where a model was loaded from: its folder, or its snapshot in the Hub's cache."""
    name = model.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision_of(model))
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def revision_of(model: Any) -> str | None:
    """The revision of the Hub repository that a model was loaded from; None for its main branch."""
    return getattr(model, "loaded_revision", None)


def fetch_beside_weights(model: Any, token: bool | str | None = None) -> None:
    """Brings card, tokenizer, licence and custom_generate/ of the repository a model was loaded from into the Hub's
    cache. `from_pretrained` leaves them out."""
    origin, revision = origin_folder(model), revision_of(model)
    if origin is not None and not Path(model.name_or_path).is_dir():
        patterns = [CARD, *CUSTOM_GENERATE, *TOKENIZER_FILES, *LICENCE_FILES]
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
    modules = {folder.resolve() / f"{str(reference).split('.')[0]}.py" for reference in auto_map.values()}
    imported = {Path(file).resolve() for module in modules for file in get_relative_import_files(module)}
    return sorted(path.relative_to(folder.resolve()) for path in modules | imported)


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
