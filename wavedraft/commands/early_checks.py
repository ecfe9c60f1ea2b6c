"""What the command line refuses before torch is imported: by the options, and by a folder's config.json."""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .options import DTYPES, EXACT_MODES, POLICIES, PRESETS

FOR_SAMPLING = "is for sampling: give a --temperature above 0, or leave it out."
FOR_TIDAR = "is TiDAR's. A recurrent-depth model takes --policy."
RECURRENT_TYPES = ("huginn_raven", "ouro")  # `model_type` of a recurrent-depth model
WORDS = {"dtype": DTYPES, "exact": EXACT_MODES, "policy": POLICIES, "preset": PRESETS}
OF_SAMPLING = ("top_k", "top_p", "min_p")
OF_DRAFTS = ("num_branches", "exact", "trust", "packed_weights")
OF_DEPTH = ("policy", "preset", "num_recurrences")


def load_library(model: str | None = None, adapter: str | None = None) -> None:
    """Imports what takes seconds, as `import wavedraft` does elsewhere. A verb calls it after its checks. Before that,
    it looks for the checkpoint and the adapter that the verb will load."""
    if model is not None:
        check_repository(model)
    if adapter is not None:
        check_repository(adapter, "adapter_config.json")
    import_module("wavedraft.auto_classes")


def say(line: str) -> None:
    """One line to the user. It goes to stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def flag(name: str) -> str:
    """--draft-length of draft_length."""
    return f"--{name.replace('_', '-')}"


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises where an option is none of the words it may be."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, but is {value!r}.")


def refuse(options: dict[str, Any], reason: str) -> None:
    """Raises where one of these options was given although it would do nothing."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{flag(name)} {reason}")


def for_recurrent_depth(model: str) -> str:
    """Why a TiDAR checkpoint refuses an option of a recurrent-depth model."""
    return f"is for recurrent-depth models, but {model} is not one."


def check_folder(model: str) -> None:
    """Raises where a path is meant that does not exist."""
    if not Path(model).is_dir() and len(Path(model).parts) > 2:
        raise ValueError(f"There is no folder {model}. Name a checkpoint folder, or ORG/NAME on the Hub.")


def check_repository(name: str, file: str = "config.json") -> None:
    """Raises where a checkpoint or an adapter is neither here, nor in the Hub's local cache, nor on the Hub.

    It asks the Hub once. transformers would ask for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    reason = None
    try:
        if not Path(name).exists() and not isinstance(try_to_load_from_cache(name, file), str):
            get_hf_file_metadata(hf_hub_url(name, file), timeout=10)
    except GatedRepoError:
        pass  # transformers says how to ask for access
    except (RepositoryNotFoundError, HFValidationError):
        reason = "no repository of this name on the Hub"
    except HfHubHTTPError:
        pass  # the repository is there, and transformers says what it lacks
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        reason = f"the Hub cannot be reached ({type(error).__name__})"
    if reason:
        raise ValueError(f"There is no folder {name}, and {reason}. Name a folder, or ORG/NAME on the Hub.")


def check_is_checkpoint(folder: Path) -> None:
    """Raises where a folder is here and holds no checkpoint."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter. Name the model that it belongs to, and pass --adapter {folder}.")
    raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json. Name the folder that holds one.")


def check_file(path: Path | None, instead: str) -> None:
    """Raises where a file that was named does not exist."""
    if path is not None and not path.is_file():
        raise ValueError(f"There is no file {path}. {instead}")


def check_trace(path: Path | None) -> None:
    """Raises where a trace cannot be written, by its name."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".svg"):
        raise ValueError(f"--trace must name a file that ends in .html or .svg, but is {path}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"--trace must name a file to write, but is {path}: {reason}.")


def check_decoding(given: dict[str, Any]) -> None:
    """Raises where options of `generate`, `chat` or `audit` contradict each other, or the checkpoint's folder.

    Args:
        given: the verb's options by their names. A name it lacks is an option the verb does not have.

    Raises:
        ValueError: names the option, what it may be, and what to do.
    """
    for name, words in WORDS.items():
        if given.get(name) is not None:
            check_choice(flag(name), given[name], words)
    check_device(given.get("device"))
    check_folder(given["model"])
    if (penalty := given.get("repetition_penalty")) is not None and not penalty > 0:
        raise ValueError(f"--repetition-penalty must be above 0, but is {penalty}.")
    if not given.get("temperature"):
        refuse({name: given.get(name) for name in OF_SAMPLING}, FOR_SAMPLING)
    _check_drafting(given)
    _check_against_folder(given)
    check_adapter_folder(given.get("adapter"))


def check_device(device: str | None) -> None:
    """Raises where a device is not written as torch writes them. Whether it is there, only torch knows."""
    if device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise ValueError(f"--device must be one torch knows, such as cpu or cuda:0, but is {device!r}.")


def check_adapter_folder(adapter: str | None) -> None:
    """Raises where an adapter is neither a PEFT folder nor an id on the Hub."""
    if adapter is None:
        return
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"--adapter must be a folder with an adapter_config.json, and {adapter} has none.")
    if Path(adapter).is_dir() and not _names_peft_type(Path(adapter) / "adapter_config.json"):
        raise ValueError(f"{adapter}/adapter_config.json names no `peft_type`. Save the adapter again with PEFT.")
    if not Path(adapter).is_dir() and len(Path(adapter).parts) != 2:
        raise ValueError(f"There is no adapter {adapter}. Name a PEFT folder, or ORG/NAME on the Hub.")


def _names_peft_type(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("peft_type"))
    except (ValueError, AttributeError, RecursionError):
        return False


def _check_drafting(given: dict[str, Any]) -> None:
    length, branches, exact = given.get("draft_length"), given.get("num_branches"), given.get("exact")
    if branches not in (None, "auto", "all") and not (branches.isdecimal() and int(branches)):
        raise ValueError(f"--num-branches must be auto, all or a number from 1 up, but is {branches!r}.")
    _check_trust(given)
    if length == 0:
        refuse({"num_branches": branches, "exact": exact}, "has no effect with --draft-length 0, which drafts nothing.")
        refuse({"compile": given.get("compile")}, "compiles steps that draft, and --draft-length 0 drafts nothing.")
    if exact and given.get("temperature"):
        raise ValueError(f"--exact is for greedy decoding, but --temperature is {given['temperature']}. Leave one out.")
    if exact and given.get("compile"):
        raise ValueError("--exact runs steps of several shapes, and --compile has one. Leave one out.")
    if branches == "auto" and given.get("seed") is not None:
        raise ValueError(
            "--seed promises the same text again, but with --num-branches auto the clock decides what is drafted. "
            "Leave one out."
        )


def _check_trust(given: dict[str, Any]) -> None:
    if (trust := given.get("trust")) in (None, 1):
        return
    if given.get("exact"):
        problem = "is another text than the one that --exact promises"
    elif given.get("temperature"):
        problem = f"is for greedy decoding, but --temperature is {given['temperature']}"
    elif given.get("draft_length") == 0:
        problem = "mixes in what masks predict, and --draft-length 0 drafts nothing"
    elif given.get("num_branches") == "auto":
        problem = "needs every branch, but --num-branches is auto"
    else:
        return
    raise ValueError(f"--trust {trust} {problem}. Leave one out.")


def _check_against_folder(given: dict[str, Any]) -> None:
    """The checkpoint's family and its K, where its folder is here. Of a Hub id `cli_checks` tells later."""
    model, file = given["model"], Path(given["model"]) / "config.json"
    check_is_checkpoint(Path(model))
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("model_type") in RECURRENT_TYPES:
        refuse({name: given.get(name) for name in OF_DRAFTS}, FOR_TIDAR)
        refuse({"adapter": given.get("adapter")}, f"is for TiDAR checkpoints, but {model} is a recurrent-depth model.")
    elif config:
        refuse({name: given.get(name) for name in OF_DEPTH}, for_recurrent_depth(model))
        if not given.get("temperature"):
            refuse({"seed": given.get("seed")}, FOR_SAMPLING)
        _check_draft_length(given, (config.get("tidar_config") or {}).get("draft_length"))


def _check_draft_length(given: dict[str, Any], trained: int | None) -> None:
    length, branches = given.get("draft_length"), given.get("num_branches")
    if trained is None:
        return
    if length is not None and length > trained:
        raise ValueError(
            f"--draft-length must be between 1 and {trained}, the length this checkpoint was taught to draft "
            f"(`tidar_config.draft_length` in its config.json), or 0 to decode plainly, but is {length}."
        )
    longest = trained if length is None else length
    if branches not in (None, "auto", "all") and longest and int(branches) > longest:
        raise ValueError(
            f"--num-branches must be auto, all or between 1 and {longest}, the tokens drafted at a time, but is "
            f"{branches}."
        )
    is_part = branches not in (None, "auto", "all") and int(branches) < longest
    if is_part and (trust := given.get("trust")) not in (None, 1):
        raise ValueError(f"--trust {trust} needs every branch, but --num-branches is {branches}. Leave one out.")


def read_list(text: str, option: str, number: Callable[[str], Any], words: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The members of a list such as `1,4,all`: numbers, or one of some words."""
    try:
        return tuple(part if part in words else number(part) for part in map(str.strip, text.split(",")))
    except ValueError:
        also = f" or {', '.join(words)}" if words else ""
        raise ValueError(f"{option} must be a list of numbers{also}, as 1,4, but is {text!r}.") from None
