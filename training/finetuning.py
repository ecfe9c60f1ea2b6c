"""Fine-tuning of a converted checkpoint to a model that drafts, with Trainer and PEFT."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer, EarlyStoppingCallback, set_seed

from ..generation.execution.gated_linear import active_adapters
from ..modeling_tidar.modeling_tidar import record_acceptance
from .adapters import load_model, save_trained, with_adapter
from .dialogue import PaddingCollator
from .report import (
    HeldOut,
    acceptance_record,
    measure,
    read_held_out,
    run_report,
    warn_if_masks_are_untaught,
    write_report,
)
from .row_sources import open_rows
from .row_stream import TrainingRows, training_rows
from .run_folder import SafeStop, TrainingStopped, check_manifest, data_fingerprint, fingerprint, write_manifest
from .trainer_recurrent import RecurrentTrainer
from .trainer_tidar import DraftingReport, TiDARTrainer
from .training_arguments import FinetuneArguments


def finetune(model_path: str | Path, data: str | Path, output_dir: str | Path, **options: Any) -> dict[str, Any]:
    """Fine-tunes a checkpoint, and reports measured tokens per forward before and after.

    A TiDAR checkpoint learns to draft. A recurrent-depth checkpoint learns the text itself, at a depth drawn for each
    step, with back-propagation through the last core steps. It is evaluated with diffusion forcing.

    Args:
        model_path, data, output_dir, options: the fields of `FinetuneArguments`.

    Returns:
        The report, which is also written to `output_dir`/report.json, with curve.png if matplotlib is installed.

    Raises:
        ValueError: an option is wrong (see `FinetuneArguments`), no row has enough labels, or the run to resume had
            other options.
        TrainingStopped: SIGTERM or Ctrl-C stopped the run; the last step is saved.
    """
    arguments = FinetuneArguments(model_path=str(model_path), data=str(data), output_dir=str(output_dir), **options)
    read_rows = open_rows(arguments.data, arguments.split, arguments.streaming, arguments.columns)
    PartialState(cpu=arguments.use_cpu).wait_for_everyone()  # until all processes have checked the folder
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    rows, held_out = training_rows(read_rows, tokenizer, arguments), read_held_out(arguments, tokenizer)
    model = load_model(arguments)
    trained = with_adapter(model, arguments)

    trainer = new_trainer(trained, rows, held_out, tokenizer, arguments)
    begin_or_resume(trainer, rows, arguments)
    before = measure(model, held_out, arguments)
    warn_if_masks_are_untaught(before, arguments)
    train(trainer, arguments)
    after = measure(model, held_out, arguments, compare_with_plain=True)
    if isinstance(after, DraftingReport):
        record_acceptance(model, acceptance_record(after, held_out.kinds), *active_adapters(model)[:1])

    save_trained(trained, trainer, tokenizer, arguments)
    dtype = str(model.dtype).removeprefix("torch.")
    report = {"dtype": dtype, **run_report(arguments, rows, trainer.state, before, after)}
    if trainer.is_world_process_zero():
        write_report(report, model, trainer.state.log_history, arguments)
    return report


def new_trainer(
    trained: Any, rows: TrainingRows, held_out: HeldOut, tokenizer: Any, arguments: FinetuneArguments
) -> TiDARTrainer | RecurrentTrainer:
    """The Trainer of a run, with a compiled decoder if `torch_compile`."""
    common = {
        "model": trained,
        "args": arguments,
        "train_dataset": rows.dataset,
        "data_collator": PaddingCollator(tokenizer.pad_token_id or 0),
        "eval_prompt_ids": held_out.prompt_ids,
    }
    if arguments.is_recurrent:
        trainer: Any = RecurrentTrainer(**common, held_out_rows=held_out.rows)
    else:
        trainer = TiDARTrainer(**common, objective=arguments.objective)
    if arguments.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=arguments.patience))
    if arguments.compiles_decoder:
        model = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
        model.base_model.compile(dynamic=True)
    return trainer


def begin_or_resume(trainer: Any, rows: TrainingRows, arguments: FinetuneArguments) -> None:
    """Writes the options that determine the loss curve to the run's folder, or compares them with those of the run.

    Raises:
        ValueError: the run to resume had other options.
    """
    same = ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "bf16", "seed")
    manifest = {
        "model": fingerprint(trainer.model),
        "data": data_fingerprint(rows.known if rows.is_stream else rows.dataset),
        **(asdict(arguments.objective) if arguments.objective else {"mode": arguments.mode}),
        **{name: getattr(arguments, name) for name in same},
        **{name: str(value) for name, value in arguments.trainer_options.items()},
    }
    if arguments.resume:
        check_manifest(Path(arguments.output_dir), manifest)
    elif trainer.is_world_process_zero():
        write_manifest(Path(arguments.output_dir), manifest)


def train(trainer: Any, arguments: FinetuneArguments) -> None:
    """Trains to the end.

    Raises:
        TrainingStopped: a signal stopped the run; the last step is saved.
    """
    safe_stop = SafeStop(trainer.accelerator)
    trainer.add_callback(safe_stop)
    checkpoint = arguments.last_checkpoint
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if safe_stop.stopped_by is not None:
        raise TrainingStopped(trainer.state.global_step, Path(arguments.output_dir), safe_stop.stopped_by)
