"""Fine-tuning: data, collators, and trainers based on the Hugging Face Trainer."""

from .adapters import gated_adapter_config
from .finetune import finetune
from .regenerate import regenerate
from .run_folder import TrainingStopped
from .trainer_tidar import DraftingReport, TiDARTrainer, measure_drafting
from .training_arguments import FinetuneArguments

__all__ = [
    "DraftingReport",
    "FinetuneArguments",
    "TiDARTrainer",
    "TrainingStopped",
    "finetune",
    "gated_adapter_config",
    "measure_drafting",
    "regenerate",
]
