"""Fine-tuning: data, collators, and trainers based on the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import gated_adapter_config
    from .chat_template import prompt_ids
    from .dialogue import PaddingCollator, RowEncoder, pack_rows
    from .finetuning import finetune
    from .regeneration import regenerate
    from .row_forms import Row, row_of
    from .row_sources import open_rows, read_prompts
    from .run_folder import TrainingStopped
    from .trainer_tidar import DraftingReport, TiDARTrainer, measure_drafting
    from .training_arguments import FinetuneArguments

_PUBLIC_NAMES = {
    "adapters": ("gated_adapter_config",),
    "chat_template": ("prompt_ids",),
    "dialogue": ("PaddingCollator", "RowEncoder", "pack_rows"),
    "row_forms": ("Row", "row_of"),
    "row_sources": ("open_rows", "read_prompts"),
    "run_folder": ("TrainingStopped",),
    "trainer_tidar": ("DraftingReport", "TiDARTrainer", "measure_drafting"),
    "training_arguments": ("FinetuneArguments",),
    "finetuning": ("finetune",),
    "regeneration": ("regenerate",),
}  # by the file that has them
__all__ = [
    "DraftingReport",
    "FinetuneArguments",
    "PaddingCollator",
    "Row",
    "RowEncoder",
    "TiDARTrainer",
    "TrainingStopped",
    "finetune",
    "gated_adapter_config",
    "measure_drafting",
    "open_rows",
    "pack_rows",
    "prompt_ids",
    "read_prompts",
    "regenerate",
    "row_of",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562): the rows of data need no torch."""
    for file, names in _PUBLIC_NAMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{file}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
