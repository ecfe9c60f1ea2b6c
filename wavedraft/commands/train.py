"""`wavedraft train`: a checkpoint learns to draft, or a recurrent-depth one learns a text."""

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.row_forms import read_columns
from ..training.row_sources import rows_of_file
from .early_checks import check_choice, check_file, flag, load_library, say
from .options import Columns

MODES = ("gated", "joint", "full", "head", "lora")
DRAFT_LOSSES = ("cross_entropy", "kl", "tv", "lk")

Checkpoint = Annotated[Path, typer.Argument(help="The TiDAR or recurrent-depth checkpoint folder to teach.")]
Data = Annotated[
    str, typer.Argument(help="Rows of prompt and answer, messages, or text: a file, a folder, or a Hub id.")
]
Output = Annotated[Path, typer.Argument(help="The folder for checkpoints and the result.")]
EvalPrompts = Annotated[Path | None, typer.Option(help="Decode the prompts of this file of rows before and after.")]
NumEvalPrompts = Annotated[int, typer.Option(min=1, help="Decode this many of --eval-prompts.")]
Split = Annotated[str, typer.Option(help="Read this split of a dataset that has several.")]
Streaming = Annotated[bool, typer.Option("--streaming", help="Read rows when training comes to them.")]
Mode = Annotated[
    str | None,
    typer.Option(
        help="gated (default) freezes the base and leaves its text unchanged. joint is the paper's loss, and full the "
        "same on every weight. head teaches a draft head. A recurrent-depth model takes lora (default) or full."
    ),
]
DraftLoss = Annotated[str, typer.Option(help=f"Teach drafts by {', '.join(DRAFT_LOSSES[:-1])} or {DRAFT_LOSSES[-1]}.")]
Alpha = Annotated[float, typer.Option(help="Weigh the autoregressive loss of joint mode by this.")]
SlotDecay = Annotated[float, typer.Option(help="Weigh each slot of a draft by this share of the slot before.")]
FromAdapter = Annotated[Path | None, typer.Option(help="Go on from this adapter instead of a new one.")]
Rank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Give the LoRA this rank, by default 32. 0, in joint mode, trains every weight. A head has 512.",
    ),
]
MaxSteps = Annotated[int, typer.Option(min=1, help="Train this many steps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Read this many rows in a forward of one process.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Add up the gradients of this many forwards before a step.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Learn at this rate; by default 1e-3 for a LoRA, 2e-3 for a head, else 1e-5.")
]
MaxLength = Annotated[int, typer.Option(min=2, help="Cut rows to this many tokens.")]
Pack = Annotated[bool, typer.Option("--pack", help="Put several rows into one sequence, which needs less padding.")]
EvalSteps = Annotated[
    int | None, typer.Option(min=1, help="Decode the prompts every this many steps, and keep the best checkpoint.")
]
Patience = Annotated[
    int | None, typer.Option(min=1, help="End after this many evaluations in a row without a better one.")
]
ReportTo = Annotated[str, typer.Option(help="Log to tensorboard, wandb, ... as well.")]
SaveSteps = Annotated[int, typer.Option(min=1, help="Save every this many steps, where there are no --eval-steps.")]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16", help="Compute in bfloat16, which takes half the memory; by default where it is faster."
    ),
]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the base in 4 bits, by bitsandbytes.")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Load the base in 8 bits, by bitsandbytes.")]
Attention = Annotated[str | None, typer.Option(help="Attend by sdpa, eager or flex_attention.")]
Checkpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Compute activations again in the backward: less memory.")
]
TorchCompile = Annotated[
    bool, typer.Option("--torch-compile", help="Compile the decoder. The first steps wait for it.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")]
Seed = Annotated[int, typer.Option(min=0, help="Draw rows, noise and weights by this seed.")]


def train(
    model: Checkpoint,
    data: Data,
    output: Output,
    eval_prompts: EvalPrompts = None,
    num_eval_prompts: NumEvalPrompts = 10,
    columns: Columns = None,
    split: Split = "train",
    streaming: Streaming = False,
    mode: Mode = None,
    draft_loss: DraftLoss = "cross_entropy",
    alpha: Alpha = 1.0,
    slot_decay: SlotDecay = 1.0,
    from_adapter: FromAdapter = None,
    rank: Rank = None,
    max_steps: MaxSteps = 300,
    batch_size: BatchSize = 4,
    gradient_accumulation_steps: Accumulation = 1,
    learning_rate: LearningRate = None,
    max_length: MaxLength = 320,
    pack: Pack = False,
    eval_steps: EvalSteps = None,
    patience: Patience = None,
    report_to: ReportTo = "none",
    save_steps: SaveSteps = 100,
    bf16: Bf16 = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    attn_implementation: Attention = None,
    activation_checkpointing: Checkpointing = False,
    torch_compile: TorchCompile = False,
    resume: Resume = False,
    seed: Seed = 0,
) -> None:
    """Teach a checkpoint to draft, or a recurrent-depth one a text. What drafting is worth is measured by decoding."""
    options = {name: value for name, value in locals().items() if name not in ("model", "data", "output")}
    options["columns"] = read_columns(columns)
    check_training(model, data, output, options)
    load_library(str(model))
    options["eval_prompts_path"] = options.pop("eval_prompts")
    from ..training import TrainingStopped, finetune
    from .cli_checks import multiplies_bfloat16

    options["bf16"] = multiplies_bfloat16() if bf16 is None else bf16
    if bf16 is None and options["bf16"]:
        say("Computing in bfloat16, which this machine multiplies faster. --no-bf16 computes in float32.")
    try:
        report = finetune(model, data, output, **options)
    except TrainingStopped as stop:
        print(f"wavedraft: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    if leave_process_group():
        print_report(report, output)
        result = f"{model} --adapter {output}" if report["rank"] else output
        say(f'Next: wavedraft generate {result} "PROMPT" --compare')


def check_training(model: Path, data: str, output: Path, options: dict[str, Any]) -> None:
    """Raises where options contradict each other or the folders. `FinetuneArguments` tells what else it cannot do."""
    if options["mode"] is not None:
        check_choice("--mode", options["mode"], MODES)
    check_choice("--draft-loss", options["draft_loss"], DRAFT_LOSSES)
    if not model.is_dir() and len(model.parts) != 2:
        raise ValueError(f"There is no folder {model}. Make one: `wavedraft convert SOURCE {model}`.")
    check_file(options["eval_prompts"], "Give rows with `prompt` or `messages`.")
    for name, needed in (("eval_steps", "eval_prompts"), ("patience", "eval_steps")):
        if options[name] is not None and options[needed] is None:
            raise ValueError(f"{flag(name)} is {options[name]}, but has nothing to go by. Give {flag(needed)} too.")
    for one, other in (("load_in_4bit", "load_in_8bit"), ("pack", "streaming")):
        if options[one] and options[other]:
            raise ValueError(f"{flag(one)} and {flag(other)} exclude each other. Leave one out.")
    if not options["resume"] and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Continue with --resume, or choose another folder.")
    check_first_row(data, options["columns"])


def check_first_row(data: str, columns: dict[str, str] | None) -> None:
    """Raises if a file has no rows, or if there is nothing to learn from its first."""
    if Path(data).is_file():
        first = next(rows_of_file(data, columns), None)
        if first is None:
            raise ValueError(
                f"{data} holds no rows. Give rows with `prompt` and `answer`, with `messages`, or with `text`."
            )
        first.check_teaches()


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
