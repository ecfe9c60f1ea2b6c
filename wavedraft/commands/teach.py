"""`wavedraft teach`: from a stock checkpoint to one that drafts, in one command that can be stopped and resumed."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.row_forms import Row, read_columns
from ..training.row_sources import read_prompts
from .decoding_bar import decoding_bar
from .early_checks import check_device, check_folder, load_library, refuse, say
from .options import PROMPT_ROWS, Columns, Device

PLAN = "teach.json"
HOURS = 1.0
SLOT_DECAY = 0.85  # as the shipped adapter was taught: early slots stand in more drafts

Source = Annotated[str, typer.Argument(help="The stock checkpoint: a folder, ORG/NAME on the Hub, or a GGUF file.")]
Output = Annotated[Path, typer.Argument(help="The folder to write. An unfinished one is gone on with.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help=f"Teach on answers to this file: {PROMPT_ROWS}. By default 5,800 prompts of eleven kinds."),
]
Hours = Annotated[float | None, typer.Option(min=0.0, help="Take at most this long; by default an hour.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Take this many training steps instead.")]
DraftLength = Annotated[int, typer.Option(min=2, max=64, help="Draft at most this many tokens at a time.")]
Rank = Annotated[int, typer.Option(min=1, help="Give the adapter this rank.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Teach this many answers in a step.")]
MaxNewTokens = Annotated[int, typer.Option(min=8, help="An answer ends after this many tokens, if not before.")]
Bf16 = Annotated[
    bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; by default where it is faster.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it will take and bring, and stop there.")]


@dataclass(frozen=True)
class Stages:
    """The folders of one teaching, and what is the same in all stages."""

    folder: Path
    options: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "heldout.jsonl"

    @property
    def masks(self) -> Path:
        return self.folder / "masks"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def teach(
    source: Source,
    output: Output,
    prompts: Prompts = None,
    columns: Columns = None,
    hours: Hours = None,
    steps: Steps = None,
    draft_length: DraftLength = 8,
    rank: Rank = 32,
    batch_size: BatchSize = 4,
    max_new_tokens: MaxNewTokens = 128,
    bf16: Bf16 = None,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Teach any checkpoint to draft: convert it, let it answer prompts, teach by its answers, tune, and measure."""
    check_device(device)
    check_folder(source)
    if steps is not None:
        refuse({"hours": hours}, "and --steps exclude each other. Leave one out.")
    if prompts is None:
        refuse({"columns": columns}, "has no effect without --prompts.")
    load_library(source)
    from ..training.teaching import FEWEST_HELD_OUT, SHIPPED_PROMPTS
    from .cli_checks import device_for, multiplies_bfloat16

    rows = read_prompts(prompts or SHIPPED_PROMPTS, read_columns(columns))
    if len(rows) <= FEWEST_HELD_OUT:
        raise ValueError(
            f"{prompts} has {len(rows)} prompts, but {FEWEST_HELD_OUT} are held out to measure drafting, and the "
            f"others teach. Give more than {FEWEST_HELD_OUT}."
        )
    options = {
        "source": source,
        "prompts": None if prompts is None else str(prompts.resolve()),
        "draft_length": draft_length,
        "rank": rank,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "bf16": multiplies_bfloat16() if bf16 is None else bf16,
        "device": device_for(device),
    }
    stages = begin(output, options)
    convert_source(stages)
    course = chosen_course(stages, rows, hours, steps)
    if dry_run:
        return
    taught, held_out = split(stages, rows, course)
    answer_prompts(stages, taught)
    teach_masks_and_head(stages, course)
    report_on(stages, held_out)


def begin(folder: Path, options: dict[str, Any]) -> Stages:
    """The stages of a new folder, or of one that was begun with the same options.

    Raises:
        ValueError: the folder holds something else, or was begun with other options.
    """
    path = folder / PLAN
    if folder.is_dir() and any(folder.iterdir()):
        if not path.is_file():
            raise ValueError(f"{folder} is not empty, and no teaching was begun there. Choose another folder.")
        begun = json.loads(path.read_text(encoding="utf-8"))["options"]
        if differing := [name for name in options if begun.get(name) != options[name]]:
            said = "; ".join(f"{name} was {begun.get(name)!r} and is now {options[name]!r}" for name in differing)
            raise ValueError(f"{folder} was begun with other options: {said}. Give those, or choose another folder.")
        say(f"Going on with {folder}.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"options": options}, indent=2) + "\n", encoding="utf-8")
    return Stages(folder, options)


def note(stages: Stages, **values: Any) -> dict[str, Any]:
    """Adds values to the folder's plan, and returns all of it."""
    from .drafting_record import write_whole

    path = stages.folder / PLAN
    plan = json.loads(path.read_text(encoding="utf-8")) | values
    write_whole(path, json.dumps(plan, indent=2) + "\n")
    return plan


def convert_source(stages: Stages) -> None:
    """Makes the TiDAR checkpoint."""
    if (stages.model / "config.json").is_file():
        return
    from ..conversion import convert

    say(f"1 of 5: converting {stages.options['source']}")
    convert(stages.options["source"], stages.model, draft_length=stages.options["draft_length"])


def training_options(stages: Stages, **changes: Any) -> dict[str, Any]:
    """The keywords of `finetune` for the masks; with `changes`, for the head."""
    options = {
        "mode": "gated",
        "rank": stages.options["rank"],
        "batch_size": stages.options["batch_size"],
        "slot_decay": SLOT_DECAY,
        "bf16": stages.options["bf16"],
        "use_cpu": stages.options["device"] == "cpu",
    }
    return options | changes


def of_head(stages: Stages) -> dict[str, Any]:
    """What is other for the head, which mends the drafts of the masks."""
    return {"mode": "head", "rank": None, "from_adapter": str(stages.masks)}


def chosen_course(stages: Stages, rows: list[Row], hours: float | None, steps: int | None) -> Any:
    """How much is taught, and what that takes and brings; measured once, and then read from the folder's plan."""
    from ..training import FinetuneArguments
    from ..training.teaching import Costs, Course, as_dict, measure_costs

    plan = note(stages)
    options = stages.options
    if "course" not in plan:
        from transformers import AutoTokenizer

        say("2 of 5: measuring three steps")
        tokenizer = AutoTokenizer.from_pretrained(stages.model)
        measured_in = stages.folder / "measured"  # nothing is written there
        masks = FinetuneArguments(
            model_path=str(stages.model), data="", output_dir=str(measured_in), **training_options(stages)
        )
        head_options = training_options(stages, mode="head", rank=None)
        head = FinetuneArguments(model_path=str(stages.model), data="", output_dir=str(measured_in), **head_options)
        costs = measure_costs(masks, head, tokenizer, rows, answers_at_a_time(len(rows)))
        amount = (options["batch_size"], len(rows), costs, options["max_new_tokens"])
        course = Course.of_steps(steps, *amount) if steps else Course.of_hours(hours or HOURS, *amount)
        plan = note(stages, **as_dict(costs, course))
    costs, course = Costs(**plan["costs"]), Course(**plan["course"])
    print_expectation(stages, costs, course)
    return course


def answers_at_a_time(num_prompts: int) -> int:
    return min(32, num_prompts)


def print_expectation(stages: Stages, costs: Any, course: Any) -> None:
    """Says what the course takes and is likely to bring."""
    from ..training.teaching import likely_tokens_per_forward

    num_tokens = stages.options["max_new_tokens"]
    taught = (course.num_steps + course.num_head_steps) * stages.options["batch_size"] * num_tokens
    on_disk = sum(path.stat().st_size for path in stages.model.glob("*.safetensors"))
    on_disk += 12 * costs.trained_bytes  # adapter and optimizer states, in each of two checkpoints, of masks and head
    say(
        f"{course.num_answers:,} answers of at most {num_tokens} tokens, {course.num_steps:,} steps for the masks, "
        f"{course.num_head_steps:,} for the head, {course.num_held_out} prompts held out.\n"
        f"This takes at most about {course.seconds(costs, num_tokens) / 60:.0f} minutes, then two to tune; at least "
        f"{costs.peak_bytes / 2**30:.1f} GiB of memory and {on_disk / 2**30:.1f} GiB on disk.\n"
        f"A model of 135 million weights came to about {likely_tokens_per_forward(taught):.1f} tokens per forward "
        f"by so many taught tokens. Ctrl-C stops; the same command goes on."
    )


def split(stages: Stages, rows: list[Row], course: Any) -> tuple[list[Row], list[Row]]:
    """Prompts to answer and held-out ones, which are written to a file of their own."""
    from ..training.teaching import hold_out

    taught, held_out = hold_out(rows, course.num_held_out)
    lines = [json.dumps(row.prompt_columns(), ensure_ascii=False) + "\n" for row in held_out]
    stages.held_out.write_text("".join(lines), encoding="utf-8")
    return taught[: course.num_answers], held_out


def answer_prompts(stages: Stages, rows: list[Row]) -> None:
    """Lets the model answer the prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..conversion.quiet_transformers import quiet_transformers
    from ..training import regenerate

    say("3 of 5: the model answers prompts")
    dtype = torch.bfloat16 if stages.options["bf16"] else torch.float32
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(stages.model)
        model = AutoModelForCausalLM.from_pretrained(stages.model, dtype=dtype).to(stages.options["device"]).eval()
    regenerate(
        model,
        tokenizer,
        rows,
        stages.answers,
        max_new_tokens=stages.options["max_new_tokens"],
        batch_size=answers_at_a_time(len(rows)),
    )


def teach_masks_and_head(stages: Stages, course: Any) -> None:
    """Teaches the adapter's masks, and then a head for them. Held-out prompts are decoded before and after the head."""
    say("4 of 5: teaching")
    run_training(stages, stages.masks, training_options(stages, max_steps=course.num_steps))
    head = training_options(stages, **of_head(stages), max_steps=course.num_head_steps)
    head |= {"eval_prompts_path": stages.held_out, "num_eval_prompts": course.num_held_out}
    run_training(stages, stages.adapter, head)


def run_training(stages: Stages, output: Path, options: dict[str, Any]) -> None:
    """One training, from its last whole checkpoint where there is one."""
    from ..training import TrainingStopped, finetune
    from ..training.run_folder import last_whole_checkpoint

    if (output / "report.json").is_file():
        return
    is_begun = last_whole_checkpoint(output) is not None
    if not is_begun:
        shutil.rmtree(output, ignore_errors=True)  # of a run that was killed before its first checkpoint
    try:
        finetune(stages.model, stages.answers, output, resume=is_begun, **options)
    except TrainingStopped as stop:
        print(f"wavedraft: stopped in {output}. The same command goes on.", file=sys.stderr)
        sys.exit(128 + stop.signal_number)


def report_on(stages: Stages, held_out: list[Row]) -> None:
    """Tunes, and says what drafting brings here: by kind of text, beside the stock model, and from where on it pays."""
    from ..bench.tuning import num_tuning_runs, settings_of
    from ..bench.tuning import tune as run_tuning
    from ..conversion.quiet_transformers import quiet_transformers
    from .drafting_record import OPTIONS
    from .loading import load_with_stock
    from .tune import encoded_for, print_tuned, write_keywords

    say("5 of 5: tuning, on held-out prompts")
    by_kind: dict[str, list[Row]] = {}
    for row in held_out:
        by_kind.setdefault(row.kind or "all", []).append(row)
    settings = settings_of(stages.options["draft_length"], False, 32)
    model, adapter = str(stages.model), str(stages.adapter)
    with quiet_transformers():
        encoded, filler = encoded_for(model, settings, by_kind)
        dtype = "bfloat16" if stages.options["bf16"] else "float32"
        loaded, stock = load_with_stock(model, adapter, dtype, stages.options["device"])
        with decoding_bar(num_tuning_runs(encoded, settings)) as advance:
            tuned = run_tuning(loaded, stock, encoded, filler, settings, advance)
    write_keywords(stages.model / OPTIONS, tuned.keywords)
    print_tuned(tuned)
    print_worth(stages, tuned)
    say(f'Next: wavedraft generate {model} --adapter {adapter} "PROMPT" --compare')


def print_worth(stages: Stages, tuned: Any) -> None:
    """Prints tokens per forward by kind of text, and from how many on drafts pay."""
    from ..bench.tuning import drafting_line, pays_from

    report = json.loads((stages.adapter / "report.json").read_text(encoding="utf-8"))
    line = drafting_line(tuned.reports[0])
    kinds = ", ".join(f"{kind} {figures['tokens_per_forward']:.2f}" for kind, figures in line["kinds"].items())
    print(f"tokens per forward, every branch: {report['after']['tokens_per_forward']:.2f} of all held-out prompts")
    print(f"tokens per forward, {line['name']}: {kinds}")
    least = pays_from(tuned.reports[0], line)
    verdict = "pays" if line["tokens_per_forward"] > least else "does not pay"
    print(f"drafting with {line['name']} pays from {least:.2f} tokens per forward on; it has "
          f"{line['tokens_per_forward']:.2f}, and {verdict}")  # fmt: skip
