"""`wavedraft train`: a checkpoint learns to draft, or a recurrent-depth one learns a text."""

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str, typer.Argument(help="Rows of prompt and answer, messages, or text: a file, a folder, or a Hub id.")
]
EvalPrompts = Annotated[Path | None, typer.Option(help="JSONL prompts to decode before and after.")]
Streaming = Annotated[bool, typer.Option("--streaming", help="Read rows as training comes to them.")]
Mode = Annotated[
    str | None,
    typer.Option(
        help="gated (default): base frozen, text unchanged. joint: the paper's loss. head: a draft head, behind "
        "either. Recurrent: lora, full."
    ),
]
Alpha = Annotated[float, typer.Option(help="Weight of the autoregressive loss in joint mode.")]
SlotDecay = Annotated[float, typer.Option(help="Weight of each slot of a draft by that of the one before.")]
FromAdapter = Annotated[Path | None, typer.Option(help="An adapter to go on from, instead of a new one.")]
Rank = Annotated[
    int | None,
    typer.Option(min=0, help="Of the LoRA, by default 32; 0, in joint mode, trains every weight. Of a head, 512."),
]
LearningRate = Annotated[float | None, typer.Option(help="By default 1e-3 for a LoRA, 2e-3 for a head, else 1e-5.")]
Pack = Annotated[bool, typer.Option("--pack", help="Several rows in one sequence: less padding.")]
EvalSteps = Annotated[
    int | None, typer.Option(min=1, help="Decode the prompts every so many steps, and keep the best checkpoint.")
]
Patience = Annotated[int | None, typer.Option(help="End after so many evaluations without a better one.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Half the memory, and faster where the machine has it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")]


def train(
    model: Annotated[Path, typer.Argument(help="A TiDAR or recurrent-depth checkpoint folder.")],
    data: Data,
    output: Annotated[Path, typer.Argument(help="The folder for checkpoints and the result.")],
    eval_prompts: EvalPrompts = None,
    num_eval_prompts: Annotated[int, typer.Option(min=1, help="Of --eval-prompts.")] = 10,
    split: Annotated[str, typer.Option(help="Of a dataset that has several.")] = "train",
    streaming: Streaming = False,
    mode: Mode = None,
    draft_loss: Annotated[str, typer.Option(help="cross_entropy, kl or tv.")] = "cross_entropy",
    alpha: Alpha = 1.0,
    slot_decay: SlotDecay = 1.0,
    from_adapter: FromAdapter = None,
    rank: Rank = None,
    max_steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: LearningRate = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row is cut to.")] = 320,
    pack: Pack = False,
    eval_steps: EvalSteps = None,
    patience: Patience = None,
    report_to: Annotated[str, typer.Option(help="Where else to log: tensorboard, wandb, ...")] = "none",
    save_steps: Annotated[int, typer.Option(min=1, help="Where there are no --eval-steps.")] = 100,
    bf16: Bf16 = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="The base, by bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="The base, by bitsandbytes.")] = False,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager or flex_attention.")] = None,
    activation_checkpointing: Annotated[bool, typer.Option("--activation-checkpointing")] = False,
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Compile the decoder.")] = False,
    resume: Resume = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Teach a checkpoint to draft, or a recurrent-depth one a text; what drafting is worth is measured by decoding."""
    options = {name: value for name, value in locals().items() if name not in ("model", "data", "output")}
    options["eval_prompts_path"] = options.pop("eval_prompts")
    from ..training import TrainingStopped, finetune

    try:
        report = finetune(model, data, output, **options)
    except TrainingStopped as stop:
        print(f"wavedraft: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    if leave_process_group():
        print_report(report, output)


def leave_process_group() -> bool:
    """Ends this process's part in a run of several processes, and says whether it is the one that reports."""
    from accelerate import PartialState

    process = PartialState()
    if process.use_distributed:
        gc.collect()  # a gloo group whose last holder is a model waits for a thread that waits for Python, for ever
        process.destroy_process_group()
    return process.is_main_process


def print_report(report: dict[str, Any], output: Path) -> None:
    """Prints what drafting was worth before and after, and what was written."""
    for moment in ("before", "after"):
        if measured := report[moment]:
            identical = measured["identical"]
            plain = "" if identical is None else f", {identical:.0%} of the texts identical to plain decoding"
            print(f"{moment}: {measured['tokens_per_forward']:.2f} tokens per forward{plain}")
    print(f"{output}: {'adapter' if report['rank'] else 'checkpoint'}, and what was measured in report.json")
