"""The model card of a repository: what it is, how to run it, what was measured. One that a user wrote stays."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..generation.drafting.draft_head import HEAD_FILE
from .card_texts import KINDS
from .hub_repository import CARD

CARRIED = ("base_model", "license", "license_name", "license_link", "language")  # from the card of what it was made of
SIGNATURE = re.compile(r"\n<!-- wavedraft wrote this card \((\w+)\) and replaces it until you change its text. -->\n")
LIBRARY_LINES = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model that")


def write_card(
    folder: Path,
    kind: str,
    name: str,
    *,
    origin: Path | None = None,
    loaded_from: str | None = None,
    figures: dict[str, Any] | None = None,
    **metadata: Any,
) -> bool:
    """Writes a folder's README.md, unless a user wrote one.

    Args:
        kind: one of `KINDS`.
        name: what the snippets load: a Hub id or a path.
        origin: the folder this model was made from; base model, licence and language of its card are carried over.
        loaded_from: the base model where no card names one.
        figures: what was measured, as `wavedraft train` (report.json) or benchmarks/drafting.py write it.
        metadata: fields of the card's head that are known better than by any card, such as `base_model`, `license`.

    Returns:
        Whether it was written.
    """
    path = folder / CARD
    if not is_ours_to_write(path):
        return False
    given = {key: value for key, value in metadata.items() if value is not None}
    known = {**carried_metadata(origin), **metadata_of(path), **given}
    if "base_model" not in known and is_hub_id(loaded_from):
        known["base_model"] = loaded_from
    tags, text, differs, library = KINDS[kind]
    tags = [*tags, *(tag for tag in known.pop("tags", None) or [] if tag not in tags)]
    head = {"library_name": library, "pipeline_tag": "text-generation", **known, "tags": tags}
    has_draft_head = (folder / HEAD_FILE).is_file()
    about: dict[str, Any] = {"has_draft_head": has_draft_head, "block_attention": block_attention_of(folder)}
    about["trust"] = values_of(folder / "generation_config.json").get("trust")
    body = text(name, {**known, **about}) + measured(figures, differs) + licence_of(known)
    data = ModelCardData(**head)
    signature = f"\n<!-- wavedraft wrote this card ({digest(body)}) and replaces it until you change its text. -->\n"
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}{signature}", encoding="utf-8")
    return True


def block_attention_of(folder: Path) -> str | None:
    """How the masks of a checkpoint or an adapter see one another, where that is not the paper's way."""
    taught = values_of(folder / "config.json").get("tidar_config") or {}
    return taught.get("block_attention") or values_of(folder / "generation_config.json").get("block_attention")


def values_of(path: Path) -> dict[str, Any]:
    """A file of JSON; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_ours_to_write(path: Path) -> bool:
    """Whether a card is absent, an unchanged one of ours, or a library's empty form."""
    return not path.exists() or is_replaceable(path.read_text(encoding="utf-8"))


def is_replaceable(content: str) -> bool:
    """Whether no user has put a word into a card."""
    text = ModelCard(content, ignore_metadata_errors=True).text
    form = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    if signature := SIGNATURE.search(text):
        if digest(text[: signature.start()]) != signature[1]:
            return False
        text = text[signature.end() :]
    return all(line.strip() in form or line.strip().startswith(LIBRARY_LINES) for line in text.splitlines())


def digest(body: str) -> str:
    return hashlib.sha256(" ".join(body.split()).encode()).hexdigest()[:16]


def metadata_of(path: Path) -> dict[str, Any]:
    """The head of a card; nothing where there is no card or no readable head."""
    if not path.is_file():
        return {}
    data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    if not is_hub_id(data.get("base_model")):
        data.pop("base_model", None)
    return {name: value for name, value in data.items() if value is not None}


def carried_metadata(origin: Path | None) -> dict[str, Any]:
    """What a card inherits from the one of the folder its model was made from."""
    data = metadata_of(origin / CARD) if origin is not None else {}
    return {name: data[name] for name in CARRIED if name in data}


def is_hub_id(name: Any) -> bool:
    """Whether a base model can be linked to: an id, and not a path on this machine that looks like one."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def measured(figures: dict[str, Any] | None, differs: str) -> str:
    """The table of what was measured, from a training report or a benchmark's file.

    Args:
        differs: why a text may differ from plain decoding's.
    """
    figures = figures or {}
    rows = figures.get("figures") or {moment: figures[moment] for moment in ("before", "after") if figures.get(moment)}
    if not rows:
        return "\n## Measured\n\nNothing was measured for this repository yet.\n"
    about = figures.get("about") or figures
    names = ["prompts" if "figures" in figures else "training", "tokens", "forwards", "tokens per forward"]
    names += ["identical to plain decoding", "dtype"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in rows.items():
        tokens, forwards = (row.get(key, row.get(f"num_{key}")) for key in ("tokens", "forwards"))
        identical = "not compared" if row.get("identical") is None else f"{row['identical']:.0%}"
        cells = [name, tokens, "" if forwards is None else forwards, f"{row['tokens_per_forward']:.2f}", identical]
        lines.append("| " + " | ".join(map(str, [*cells, about.get("dtype") or "not recorded"])) + " |")
    facts = {key: about.get(key) for key in ("date", "device", "torch", "max_new_tokens", "mode", "steps")}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None)
    shares = [row["identical"] for row in rows.values() if row.get("identical") is not None]
    reason = f"\n{differs}\n" if any(share < 1 for share in shares) else ""
    return "\n## Measured\n\n" + "\n".join(lines) + f"\n\nDecoded greedily{told and '; '}{told}.\n" + reason


def licence_of(known: dict[str, Any]) -> str:
    if known.get("license"):
        return f"\n## Licence\n\n{known.get('license_name', known['license'])}, as that of the base model.\n"
    return "\n## Licence\n\nThat of the base model, which what this was made from did not state.\n"
