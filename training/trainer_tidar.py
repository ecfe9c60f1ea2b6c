"""The Hugging Face Trainer with the TiDAR objective, and tokens per forward measured by decoding."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer

from ..generation.drafting.draft_head import HEAD_FILE, draft_head_of
from ..modeling_tidar import DraftObjective


@dataclass(frozen=True)
class DraftingReport:
    """How well a model drafts on a set of prompts.

    Attributes:
        tokens_per_forward: new tokens divided by decode forwards, over all prompts.
        acceptance: for each draft position 2..K, the share accepted if the previous position was accepted.
        identical: the share of prompts whose text equals that of plain decoding.
        num_tokens, num_forwards: new tokens of decode forwards, and decode forwards, summed over the prompts.
    """

    tokens_per_forward: float
    acceptance: list[float]
    identical: float | None
    num_tokens: int
    num_forwards: int


def measure_drafting(
    model: Any,
    prompt_ids: list[torch.Tensor],
    max_new_tokens: int = 128,
    compare_with_plain: bool = False,
    **generate_kwargs: Any,
) -> DraftingReport:
    """Decodes prompts [P] one by one, and counts tokens and forwards. By default it decodes greedily, with every branch
    (the paper's form)."""
    was_training = model.training
    model.eval()
    histogram = torch.zeros(0)
    num_tokens = num_identical = 0
    for ids in prompt_ids:
        arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_branches": "all", **generate_kwargs}
        ids = ids[None].to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments)
        counts = output.accepted_lengths.sum(dim=0)
        histogram = counts if not len(histogram) else histogram + counts
        num_tokens += output.sequences.shape[1] - ids.shape[1] - 1
        if compare_with_plain:
            arguments |= {"draft_length": 0, "num_branches": None}
            plain = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
            num_identical += torch.equal(plain, output.sequences)
    model.train(was_training)
    num_forwards = int(histogram.sum())
    reached = histogram.flip(0).cumsum(0).flip(0)  # forwards that accepted at least 1, 2, ... K tokens
    return DraftingReport(
        tokens_per_forward=num_tokens / max(num_forwards, 1),
        acceptance=(reached[1:] / reached[:-1].clamp(min=1)).tolist(),
        identical=num_identical / len(prompt_ids) if compare_with_plain else None,
        num_tokens=num_tokens,
        num_forwards=num_forwards,
    )


class TiDARTrainer(Trainer):
    """Trainer for a drafting model.

    The model's forward computes the loss, so DDP, FSDP, PEFT and gradient accumulation work as for any model.
    `evaluate` decodes the held-out prompts and reports tokens per forward, since token accuracy misleads.

    Args:
        objective: the training objective.
        eval_prompt_ids: held-out prompts, one [P] tensor each.
        eval_new_tokens: tokens written per prompt in an evaluation.
    """

    def __init__(
        self,
        *args: Any,
        objective: DraftObjective,
        eval_prompt_ids: list[torch.Tensor] | None = None,
        eval_new_tokens: int = 128,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=eval_prompt_ids or None, **kwargs)
        self.model_accepts_loss_kwargs = True  # a step's loss is one mean over the labels of all its micro-batches
        self.objective = objective
        self.eval_prompt_ids = eval_prompt_ids or []
        self.eval_new_tokens = eval_new_tokens
        self.loss_parts: dict[str, torch.Tensor] = {}
        self.num_steps_logged = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Stock, with a first token of blocks drawn for each step, the same on every process."""
        seed = self.args.seed * 1_000_003 + self.state.global_step
        config = self.accelerator.unwrap_model(model).config
        first_token = random.Random(seed).randrange(config.tidar_config["draft_length"])
        objective = replace(self.objective, first_token=first_token)
        inputs = {**inputs, "objective": objective}
        loss, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name in ("ar_loss", "diffusion_loss"):
            if (part := getattr(output, name)) is not None:
                self.loss_parts[name] = self.loss_parts.get(name, 0) + part.detach()
        return (loss, output) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Stock, plus the draft head from its own file. In head mode, only the head is loaded."""
        if self.objective.mode != "head":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Stock, plus the draft head."""
        if self.objective.mode != "head":
            super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, folder: str | None) -> None:
        head = draft_head_of(self.accelerator.unwrap_model(self.model))
        if head is not None and folder is not None and (path := Path(folder, HEAD_FILE)).is_file():
            head.load_state_dict(load_file(str(path)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Stock, plus the parts of the loss, summed over the micro-batches and processes of a step."""
        num_steps = self.state.global_step - self.num_steps_logged
        if "loss" in logs and num_steps:
            for name, part in self.loss_parts.items():
                logs[name] = round(float(self.accelerator.reduce(part, "sum")) / num_steps, 4)
            self.loss_parts.clear()
            self.num_steps_logged = self.state.global_step
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Tokens per forward on the held-out prompts, acceptance at each draft position, and the share of texts
        identical to plain decoding."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        report = measure_drafting(model, self.eval_prompt_ids, self.eval_new_tokens, compare_with_plain=True)
        metrics = {
            f"{metric_key_prefix}_tokens_per_forward": report.tokens_per_forward,
            f"{metric_key_prefix}_identical": report.identical,
        }
        for position, share in enumerate(report.acceptance, start=2):
            metrics[f"{metric_key_prefix}_acceptance_{position}"] = round(share, 4)
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
