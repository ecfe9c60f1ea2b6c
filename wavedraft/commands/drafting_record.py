"""`--record`: how often drafts stand on one's own prompts, written where the planner of `generate` reads it."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .early_checks import say

OPTIONS = "generation_config.json"
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Also draft on every prompt after each number of accepted tokens, and write how often drafts stand into "
        "generation_config.json of the adapter or, without one, of the checkpoint: generate begins with it.",
    ),
]


def check_recordable(model: str, adapter: str | None) -> Path:
    """The generation_config.json that a record goes into.

    Raises:
        ValueError: as `check_writable`; or the model is a recurrent-depth one.
    """
    from .cli_checks import check_drafts

    check_drafts(model, "--record")
    return check_writable(Path(adapter or model), "--record")


def check_writable(folder: Path, who: str, instead: str = "") -> Path:
    """The generation_config.json of a folder.

    Args:
        who: the option or verb that writes it.
        instead: what else the user may do than copying the folder.

    Raises:
        ValueError: the folder is not here or may not be written, or the file is not a dictionary.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{who} writes into a folder, but {folder} is none here. Download it (`hf download {folder} --local-dir "
            f"FOLDER`), and pass FOLDER. {instead}"
        )
    path = folder / OPTIONS
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{who} writes {path}, but this folder may not be written. Copy it, and pass the copy. {instead}"
        )
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{who} adds to {path}, but this is not a JSON dictionary. Repair or remove it. {instead}")
    return path


def record_drafting(model: Any, prompt_ids: list[Any], kinds: list[str], max_new_tokens: int, path: Path) -> None:
    """Drafts on all prompts [P] after each number of accepted tokens, which shows every slot, and writes what stood.

    Args:
        kinds: of the prompts.
        path: of a generation_config.json. Its other keys stay as they are.
    """
    from ..generation.drafting.options_tidar import ACCEPTANCE
    from ..training import measure_drafting
    from ..training.report import acceptance_record

    report = measure_drafting(model, prompt_ids, max_new_tokens)
    record = acceptance_record(report, dict(Counter(kinds)))
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_whole(path, json.dumps(values | {ACCEPTANCE: record}, indent=2) + "\n")
    chances = ", ".join(f"{chance:.2f}" for chance in record["chances"])
    say(
        f"{path} has the record of {record['num_prompts']} prompts: tokens 2, 3, ... of a draft stand, if those before "
        f"them do, with chances {chances}."
    )


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, and never a part."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
