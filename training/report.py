"""The result of a run: decoding of held-out prompts before and after training, and the report files.

P tokens of a prompt.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..hub.model_card import write_card
from ..hub.written_files import card_kind_of
from .chat_template import prompt_ids
from .curve import draw_curve
from .dialogue import encode_row
from .row_sources import rows_of_file
from .row_stream import TrainingRows
from .trainer_recurrent import RecurrentReport, measure_recurrent
from .trainer_tidar import DraftingReport, measure_drafting
from .training_arguments import FinetuneArguments

LEAST_FOR_A_HEAD = 1.1  # minimum tokens per forward of masks trained to draft
logger = logging.get_logger(__name__)


class HeldOut(NamedTuple):
    """Rows that are never used for training.

    Attributes:
        prompt_ids: [P] each, to decode.
        rows: encoded rows with an answer, for perplexity.
        kinds: the number of prompts of each kind.
    """

    prompt_ids: list[torch.Tensor]
    rows: list[dict[str, list[int]]]
    kinds: dict[str, int]


def read_held_out(arguments: FinetuneArguments, tokenizer: Any) -> HeldOut:
    """The prompts of `eval_prompts_path`, and their answers for a recurrent-depth model."""
    if not arguments.eval_prompts_path:
        return HeldOut([], [], {})
    rows = list(rows_of_file(arguments.eval_prompts_path, arguments.columns))
    answered = [row for row in rows if row.has_answer or row.text is not None] if arguments.is_recurrent else []
    # The prompts are taken evenly through the rows.
    chosen = rows[:: max(1, len(rows) // arguments.num_eval_prompts)][: arguments.num_eval_prompts]
    return HeldOut(
        [prompt_ids(row, tokenizer) for row in chosen],
        [encode_row(row, tokenizer, arguments.max_length) for row in answered],
        dict(Counter(row.kind or "unnamed" for row in chosen)),
    )


def acceptance_record(report: DraftingReport, kinds: dict[str, int]) -> dict[str, Any]:
    """The `draft_acceptance` of a generation config, from an evaluation."""
    chances = [round(chance, 3) for chance in report.acceptance]
    return {"chances": chances, "num_prompts": sum(kinds.values()), "kinds": kinds}


def measure(
    model: Any, held_out: HeldOut, arguments: FinetuneArguments, compare_with_plain: bool = False
) -> DraftingReport | RecurrentReport | None:
    """Decodes the held-out prompts; None if there are none."""
    if not held_out.prompt_ids:
        return None
    if arguments.is_recurrent:
        return measure_recurrent(model, held_out.prompt_ids, held_out.rows, compare_with_plain=compare_with_plain)
    return measure_drafting(model, held_out.prompt_ids, compare_with_plain=compare_with_plain)


def warn_if_masks_are_untaught(before: Any, arguments: FinetuneArguments) -> None:
    """Warns if a draft head would be trained on masks that predict nothing."""
    if arguments.head_rank and before is not None and before.tokens_per_forward < LEAST_FOR_A_HEAD:
        logger.warning(
            f"{arguments.model_path} drafts {before.tokens_per_forward:.2f} tokens per forward: a head corrects the "
            "masks' predictions and cannot replace them. Train the masks first (`--mode gated`), then a head for them "
            "(`--from-adapter`)."
        )


def run_report(
    arguments: FinetuneArguments, rows: TrainingRows, state: Any, before: Any | None, after: Any | None
) -> dict[str, Any]:
    """The options, amount of data, and measurements of a run.

    Args:
        state: Trainer's state after training.
        before, after: the results of `measure`.
    """
    drafting = {name: getattr(arguments, name) for name in ("draft_loss", "slot_decay", "draft_length")}
    return {
        "mode": arguments.mode,
        **({} if arguments.is_recurrent else drafting),
        "from_adapter": arguments.from_adapter,
        "rank": arguments.lora_rank or arguments.head_rank,
        "rows": None if rows.is_stream else len(rows.known),
        "sequences": None if rows.is_stream else len(rows.dataset),
        "loops": rows.encoder.loops if rows.encoder.loops["kept"] else None,
        "assistant_words": rows.encoder.assistant_words,
        "labels": None if rows.is_stream else rows.num_labels,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "batch_size": arguments.batch_size * arguments.gradient_accumulation_steps,
        "seed": arguments.seed,
        "before": before and asdict(before),
        "after": after and asdict(after),
    }


def write_report(
    report: dict[str, Any], model: Any, log_history: list[dict[str, Any]], arguments: FinetuneArguments
) -> None:
    """Writes report.json, the curve, and the model card if the result has one."""
    folder = Path(arguments.output_dir)
    draw_curve(log_history, folder / "curve.png")
    if not arguments.is_recurrent and (not arguments.lora_rank or arguments.mode == "gated"):
        kind = card_kind_of(folder, model)
        write_card(folder, kind, folder.name, origin=Path(arguments.model_path), figures=report)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
