"""The Hugging Face Trainer with the TiDAR objective, and tokens per forward measured by decoding."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import Trainer

from ..generation.drafting.draft_head import HEAD_FILE, draft_head_of
from ..modeling_tidar import DraftObjective
from .dialogue import PaddingCollator


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
    (the paper's form). What is measured is the masks: nothing is copied."""
    was_training = model.training
    model.eval()
    histogram = torch.zeros(0)
    num_tokens = num_identical = 0
    for ids in tqdm(prompt_ids, "Decoding held-out prompts", unit="prompt", leave=False, disable=None):  # on a terminal
        arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_branches": "all", "draft_copies": False}
        arguments |= generate_kwargs
        ids = ids[None].to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments)
        counts = output.accepted_lengths.sum(dim=0)
        histogram = counts if not len(histogram) else histogram + counts
        num_tokens += output.sequences.shape[1] - ids.shape[1] - 1
        if compare_with_plain:
            arguments |= {"draft_length": 0, "num_branches": None, "draft_copies": None}
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

    The model's forward computes the loss, so DDP, FSDP, PEFT and gradient accumulation work as for any model. With
    gradient accumulation, a step's loss is one mean over the labels of all its micro-batches.
    `evaluate` decodes the held-out prompts and reports tokens per forward, since token accuracy misleads.

    Trainer and TRL's `SFTTrainer` train a TiDAR checkpoint on the stock autoregressive loss, which teaches no drafts.

    Args:
        objective: the training objective; by default the paper's joint loss. A model with a gated adapter
            (`gated_adapter_config`) needs `DraftObjective(mode="gated")`.
        data_collator: by default `PaddingCollator`, for rows of `input_ids` and `labels`, and `document_ids` if packed.
        eval_prompt_ids: held-out prompts, one [P] tensor each.
        eval_new_tokens: tokens written per prompt in an evaluation.

    Example:
        ```python
        from peft import get_peft_model
        from transformers import AutoTokenizer, TrainingArguments

        from wavedraft import DraftObjective, TiDARForCausalLM
        from wavedraft.training import RowEncoder, TiDARTrainer, gated_adapter_config, open_rows, prompt_ids

        MODEL, DATA, OUTPUT = "model-tidar", "rows.jsonl", "runs/mine"  # MODEL: wavedraft convert SOURCE model-tidar

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = TiDARForCausalLM.from_pretrained(MODEL)
        encode = RowEncoder(tokenizer, max_length=320, draft_length=model.tidar_config.draft_length)
        read_rows = open_rows(DATA)  # JSONL, JSON, Parquet, CSV, text, a folder, or a dataset of the Hub
        rows = [encoded for row in read_rows() for encoded in encode(row)]
        held_out = [prompt_ids(row.prompt(), tokenizer) for row in list(read_rows())[:2]]  # better: rows of their own

        model = get_peft_model(model, gated_adapter_config(model, rank=32))  # the base is frozen, its text unchanged
        trainer = TiDARTrainer(
            model=model,
            args=TrainingArguments(OUTPUT, max_steps=20, per_device_train_batch_size=2, learning_rate=1e-3),
            train_dataset=rows,
            processing_class=tokenizer,
            objective=DraftObjective(mode="gated"),  # without an adapter: DraftObjective(), the paper's joint loss
            eval_prompt_ids=held_out,
        )
        trainer.train()
        print(trainer.evaluate())  # tokens per forward, and the share of texts identical to plain decoding
        trainer.save_model()
        ```
    """

    def __init__(
        self,
        *args: Any,
        objective: DraftObjective | None = None,
        eval_prompt_ids: list[torch.Tensor] | None = None,
        eval_new_tokens: int = 128,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=eval_prompt_ids or None, **kwargs)
        self.model_accepts_loss_kwargs = True  # a step's loss is one mean over the labels of all its micro-batches
        if len(args) < 3 and kwargs.get("data_collator") is None:
            self.data_collator = PaddingCollator(getattr(self.processing_class, "pad_token_id", None) or 0)
        self.objective = objective or DraftObjective()
        self.eval_prompt_ids = eval_prompt_ids or []
        self.eval_new_tokens = eval_new_tokens
        self._drafting_model().has_objective = True
        self.loss_parts: dict[str, torch.Tensor] = {}
        self.steps_of_parts: set[int] = set()  # the steps that `loss_parts` sum over

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
        self.steps_of_parts.add(self.state.global_step)
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
        if "loss" in logs:
            for name, part in self.loss_parts.items():
                logs[name] = round(float(self.accelerator.reduce(part, "sum")) / len(self.steps_of_parts), 4)
            self.loss_parts.clear()
            self.steps_of_parts.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Tokens per forward on the held-out prompts, acceptance at each draft position, and the share of texts
        identical to plain decoding.

        Raises:
            ValueError: there are no prompts to decode.
        """
        if not self.eval_prompt_ids:
            raise ValueError("`evaluate` decodes held-out prompts, but there are none. Give `eval_prompt_ids`.")
        report = measure_drafting(
            self._drafting_model(), self.eval_prompt_ids, self.eval_new_tokens, compare_with_plain=True
        )
        metrics = {
            f"{metric_key_prefix}_tokens_per_forward": report.tokens_per_forward,
            f"{metric_key_prefix}_identical": report.identical,
        }
        for position, share in enumerate(report.acceptance, start=2):
            metrics[f"{metric_key_prefix}_acceptance_{position}"] = round(share, 4)
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _drafting_model(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model
