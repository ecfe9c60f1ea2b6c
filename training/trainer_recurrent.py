"""The Hugging Face Trainer for recurrent-depth models, and the savings of their wavefront, measured by decoding."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from ..modeling_recurrent import DepthSampler, OuroForCausalLM
from .dialogue import PaddingCollator


@dataclass(frozen=True)
class RecurrentReport:
    """The decoding speed and quality of a recurrent-depth model.

    Attributes:
        tokens_per_forward: tokens divided by forwards of full depth, over all prompts. The token decided by each
            prefill is not counted.
        core_passes_per_token: core passes divided by the same tokens.
        identical: the share of prompts whose text equals that of full depth, token for token.
        perplexity: perplexity of the held-out answers or texts at full depth; None for rows with only prompts.
        num_tokens, num_core_passes: sums over the prompts.
    """

    tokens_per_forward: float
    core_passes_per_token: float
    identical: float | None
    perplexity: float | None
    num_tokens: int
    num_core_passes: int


def measure_recurrent(
    model: Any,
    prompt_ids: list[torch.Tensor],
    held_out_rows: list[dict[str, list[int]]],
    max_new_tokens: int = 64,
    compare_with_plain: bool = False,
) -> RecurrentReport:
    """Decodes prompts [P] one by one, greedily, with diffusion forcing (the exact policy for Ouro models)."""
    was_training = model.training
    model.eval()
    decoder = {"policy": "exact"} if isinstance(model, OuroForCausalLM) else {"preset": "diffusion-forcing-r4"}
    num_tokens = num_core_passes = num_identical = 0
    for ids in prompt_ids:
        ids = ids[None].to(model.device)
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False}
        output = model.generate(ids, return_dict_in_generate=True, **arguments, **decoder)
        num_tokens += output.sequences.shape[1] - ids.shape[1] - 1
        num_core_passes += output.num_core_passes
        if compare_with_plain:
            plain = model.generate(ids, **arguments, policy="autoregressive")
            num_identical += torch.equal(plain, output.sequences)
    perplexity = held_out_perplexity(model, held_out_rows) if held_out_rows else None
    model.train(was_training)
    return RecurrentReport(
        tokens_per_forward=num_tokens * model.config.mean_recurrence / max(num_core_passes, 1),
        core_passes_per_token=num_core_passes / max(num_tokens, 1),
        identical=num_identical / len(prompt_ids) if compare_with_plain else None,
        perplexity=perplexity,
        num_tokens=num_tokens,
        num_core_passes=num_core_passes,
    )


@torch.no_grad()
def held_out_perplexity(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """The perplexity of the labels of encoded rows, at full depth, with initial states of zeros."""
    total, count = 0.0, 0
    for row in rows:
        batch = {name: tensor.to(model.device) for name, tensor in PaddingCollator(0)([row]).items()}
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        if num_labels:
            total += model(**batch, init_scale=0.0).loss.item() * num_labels
            count += num_labels
    return math.exp(total / max(count, 1))


class RecurrentTrainer(Trainer):
    """Trainer of a recurrent-depth model.

    Each step's depth is drawn from the seed and the step, so every process and a resumed run use the same depth.
    Back-propagation goes through the last `mean_backprop_depth` core steps.

    Args:
        eval_prompt_ids: held-out prompts, one [P] tensor each.
        held_out_rows: encoded rows for perplexity.
    """

    def __init__(
        self,
        *args: Any,
        eval_prompt_ids: list[torch.Tensor] | None = None,
        held_out_rows: list[dict[str, list[int]]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=eval_prompt_ids or None, **kwargs)
        self.model_accepts_loss_kwargs = True  # a step's loss is one mean over the labels of all its micro-batches
        self.eval_prompt_ids, self.held_out_rows = eval_prompt_ids or [], held_out_rows or []
        self.step_of_sampler = -1

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Stock, with a depth drawn for each forward."""
        recurrent = self._recurrent_model(model)
        if self.step_of_sampler != self.state.global_step:
            self.step_of_sampler = self.state.global_step
            seed = self.args.seed * 1_000_003 + self.state.global_step
            recurrent.depth_sampler = DepthSampler(recurrent.config.mean_recurrence, seed)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Tokens per forward on the held-out prompts, the share of texts identical to full depth, and perplexity."""
        model = self._recurrent_model(self.model)
        report = measure_recurrent(model, self.eval_prompt_ids, self.held_out_rows, compare_with_plain=True)
        metrics = {
            f"{metric_key_prefix}_{name}": getattr(report, name)
            for name in ("tokens_per_forward", "core_passes_per_token", "identical", "perplexity")
            if getattr(report, name) is not None
        }
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _recurrent_model(self, model: Any) -> Any:
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model
