"""Fine-tuning: data, collators and trainers over the Hugging Face Trainer."""

from .finetune import finetune
from .gated_adapter import gated_adapter_config
from .regenerate import regenerate
from .run_folder import TrainingStopped
from .trainer_tidar import DraftingReport, TiDARTrainer, measure_drafting

__all__ = [
    "DraftingReport",
    "TiDARTrainer",
    "TrainingStopped",
    "finetune",
    "gated_adapter_config",
    "measure_drafting",
    "regenerate",
]
