"""A recurrent-depth source: the class that loads it, and the proof that conversion keeps its logits."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..modeling_recurrent import OuroForCausalLM, RecurrentDepthForCausalLM
from ..modeling_recurrent.checkpoint_recurrent import block_form_of
from .proof import PROMPT_LENGTH, Proof
from .quiet_transformers import quiet_transformers
from .stock_config import read_json

CLASSES: dict[str, Any] = {
    model_class.config_class.model_type: model_class for model_class in (RecurrentDepthForCausalLM, OuroForCausalLM)
}


def is_recurrent(folder: Path) -> bool:
    return str(read_json(folder / "config.json").get("model_type")) in CLASSES


def recurrent_class_of(config: PreTrainedConfig) -> Any:
    return CLASSES[config.model_type]


def block_form_values(config: Any, tensor_names: list[str]) -> dict[str, str]:
    """The `block_form` to add to a config, by its tensor names: released configs lack it. Empty for Ouro."""
    if getattr(config, "block_form", "") is not None:
        return {}
    return {"block_form": block_form_of(tensor_names)}


def prove_recurrent(source: Path, converted: Path, model_class: Any) -> Proof:
    """Runs both folders' models at full depth, in float32, on the same ids.

    Raises:
        ValueError: logits differ, or are not finite.
    """
    logits = []
    with quiet_transformers(), torch.inference_mode():
        for folder in (source, converted):
            model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (1, PROMPT_LENGTH), generator=generator)
            logits.append(model(ids).logits)
    if not logits[0].isfinite().all():
        raise ValueError(f"{source} gives logits that are not finite: its weights are damaged. Download it again.")
    if difference := (logits[0] - logits[1]).abs().max().item():
        raise ValueError(
            f"The converted model's logits differ from those of {source} by up to {difference}. A key in its "
            "config.json changes the model, but our config class has no such field. Report the key."
        )
    return Proof(max_abs_difference=0.0, num_layers=model.config.num_hidden_layers)
