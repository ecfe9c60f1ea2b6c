"""The command line: one thin function a verb."""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .audit import audit as audit_texts
from .audit import read_prompts
from .before_loading import (
    check_adapter,
    check_keywords,
    device_for,
    is_recurrent,
    taught_draft_length,
)
from .bench import Settings, contenders_of, load_assistant, num_runs, without_adapter
from .bench import bench as run_bench
from .bench_prompts import PROMPTS, read_kinds
from .bench_report import has_matplotlib
from .bench_report import notes as bench_notes
from .bench_report import report as bench_report
from .bench_report import save as save_bench
from .bench_report import tables as bench_tables
from .chat import Chat
from .cli_keywords import (
    OF_TIDAR,
    compiled_keywords,
    drafting_keywords,
    read_list,
    recurrent_keywords,
    refuse,
    seed_plain_decoding,
)
from .conversion import convert as convert_checkpoint
from .conversion import push as push_folder
from .conversion import to_ar as convert_back
from .conversion.quiet import quiet_transformers
from .generation.execution.packed_linear import PACKABLE, check_packable, why_no_packed_products
from .modeling_recurrent import RecurrentDepthForCausalLM
from .modeling_tidar import TiDARForCausalLM
from .timed_runs import encode_prompt, identical, runs_table, timed_generate, timed_recurrent

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Options of more than one verb.
NumBranches = Annotated[str | None, typer.Option(help="Numbers of accepted tokens to draft behind, or auto (TiDAR).")]
Exact = Annotated[str | None, typer.Option(help="tie-safe: plain decoding's text in half precision (TiDAR).")]
PackedWeights = Annotated[
    bool, typer.Option("--packed-weights", help="Keep weights a second time, in the order a CPU reads.")
]


def main() -> None:
    """Runs one verb. What the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"wavedraft: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def wavedraft() -> None:
    """Language models that think ahead in parallel and still say exactly what they would have said."""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or a GGUF file.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    draft_length: Annotated[
        int | None,
        typer.Option(help="Tokens drafted at a time, 1 to 64; by default 8. A recurrent-depth model has none."),
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Of a model taught to draft elsewhere.")] = None,
    to_ar: Annotated[bool, typer.Option("--to-ar", help="The way back: a TiDAR checkpoint to its stock one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint folder.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Link to the source's shards instead of copying them.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare logits before and after.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
) -> None:
    """Turn a stock autoregressive checkpoint into a TiDAR checkpoint, or back."""
    options: dict[str, Any] = {"overwrite": overwrite, "link": link, "verify": verify, "revision": revision}
    taught = {"draft_length": draft_length, "mask_token_id": mask_token_id}
    if to_ar:
        refuse(taught, "is of drafts, and --to-ar leaves them out.")
        result = convert_back(source, target, show_progress=True, **options)
    else:
        result = convert_checkpoint(source, target, show_progress=True, **options | taught)
    is_recurrent = result.architecture in ("RecurrentDepthForCausalLM", "OuroForCausalLM")
    kind = "TiDAR" if result.tidar_config is not None else "recurrent-depth" if is_recurrent else "stock"
    print(f"{result.target}: {kind} checkpoint of {result.architecture}, {result.num_parameters:,} parameters")
    if result.tidar_config is not None:
        is_inside = result.tidar_config.mask_embedding_id == result.tidar_config.mask_token_id
        place = "of the vocabulary, never generated" if is_inside else "behind the vocabulary"
        print(f"masks: id {result.tidar_config.mask_token_id}, {place}; drafts of {result.tidar_config.draft_length}")
        print(f"masks read embedding row {result.tidar_config.mask_embedding_id}: {result.mask_reason}")
    if result.proof is None:
        reason = "larger than 2^30 parameters" if is_recurrent and verify else "--no-verify"
        print(f"logits before and after: not compared ({reason})")
    else:
        layers = f"{result.proof.num_layers} of {result.num_layers} layers"
        print(f"logits before and after, {layers}: max abs difference {result.proof.max_abs_difference}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A TiDAR or recurrent-depth checkpoint: a folder or a Hub id.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter that was taught to draft.")] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="Tokens drafted at a time; 0 drafts none (TiDAR, self-speculation).")
    ] = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    packed_weights: PackedWeights = False,
    policy: Annotated[
        str | None, typer.Option(help="Of a recurrent-depth model: exact, diffusion-forcing, ...")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Of a recurrent-depth model: a row of the paper's table.")] = None,
    num_recurrences: Annotated[int | None, typer.Option(help="Full depth of a recurrent-depth model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[
        int | None, typer.Option(help="For sampling; of a recurrent-depth model's first states, too.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly as well, and compare.")] = False,
) -> None:
    """Write text in fewer forwards, and say how many."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    depth = {"policy": policy, "preset": preset, "num_recurrences": num_recurrences}
    drafting = drafting_keywords(num_branches, exact, packed_weights)
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        if has_depth := is_recurrent(model):
            refuse(drafting, OF_TIDAR)
            parallel, plain = recurrent_keywords(model, depth | {"draft_length": draft_length}, options)
        else:
            refuse(depth, f"is for recurrent-depth models, but {model} is none.")
            parallel = {**options, "draft_length": draft_length, **drafting}
            plain = {**options, "draft_length": 0}
        check_keywords(model, parallel)
        if not has_depth and temperature:
            seed_plain_decoding(plain, parallel)
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoded = [encode_prompt(tokenizer, prompt, raw) for prompt in prompts]
        loaded = load(model, dtype, device, adapter)
        if packed_weights:
            check_packable(loaded, exact)
        timed = timed_recurrent if has_depth else timed_generate
        if drafting.get("num_branches") == "auto":
            print("Measuring what a forward costs here ...", file=sys.stderr)  # once a model; not part of any run below
            loaded.generate(**encoded[0].to(device), **parallel | {"max_new_tokens": 2})
        drafted_runs, plain_runs = [], []
        for prompt, inputs in zip(prompts, encoded, strict=True):
            inputs = inputs.to(device)
            print(f"\n> {prompt}\n")
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            drafted_runs.append(timed(loaded, inputs, streamer=streamer, **parallel))
            if compare:
                plain_runs.append(timed(loaded, inputs, **plain))
    print()
    Console().print(runs_table(prompts, drafted_runs, plain_runs))
    if compare:
        print(f"identical: {'yes' if identical(drafted_runs, plain_runs) else 'no'}" if temperature == 0 else SAMPLED)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A TiDAR or recurrent-depth checkpoint: a folder or a Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter that was taught to draft.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first of all.")] = None,
    draft_length: Annotated[int | None, typer.Option(help="Tokens drafted at a time; 0 drafts none.")] = None,
    policy: Annotated[str | None, typer.Option(help="Of a recurrent-depth model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
) -> None:
    """Talk to a model, until the end of input; each turn goes on from the cache of the turn before."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        options["temperature"] = temperature
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        if is_recurrent(model):
            depth = {"policy": policy, "preset": None, "num_recurrences": None, "draft_length": draft_length}
            options, _ = recurrent_keywords(model, depth, options)
        else:
            refuse({"policy": policy}, f"is for recurrent-depth models, but {model} is none.")
            options["draft_length"] = draft_length
        check_keywords(model, options)
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = load(model, dtype, device, adapter)
        conversation = Chat(loaded, tokenizer, system, **options)
        while (text := next_line("> ")) is not None:
            if not text.strip():
                continue
            start = time.perf_counter()
            output = conversation.answer(text, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
            num_new, seconds = output.sequences.shape[1] - conversation.num_prompt, time.perf_counter() - start
            told = f"{num_new} tokens, {seconds:.1f} s"
            if (speed := getattr(output, "tokens_per_forward", None)) is not None:
                told += f", {float(speed[0]):.2f} tokens per forward"
            print(f"({told}; {conversation.num_cached} of {conversation.num_prompt} prompt tokens from the cache)\n")


def next_line(prompt: str) -> str | None:
    """What the user types; None at the end of input."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


SAMPLED = "identical: not compared; sampled texts share a distribution, not their tokens"


def load(model: str, dtype: str, device: str, adapter: str | None) -> Any:
    """A TiDAR model, with its adapter, or a recurrent-depth model, as its config.json says."""
    if is_recurrent(model):
        return RecurrentDepthForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]).to(device).eval()
    tidar = TiDARForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]).to(device).eval()
    if adapter is not None:
        tidar.load_adapter(adapter)
    return tidar


@app.command()
def train(
    model: Annotated[Path, typer.Argument(help="A TiDAR or recurrent-depth checkpoint folder.")],
    data: Annotated[
        str, typer.Argument(help="Rows of prompt and answer, messages, or text: a file, a folder, or a Hub id.")
    ],
    output: Annotated[Path, typer.Argument(help="The folder for checkpoints and the result.")],
    eval_prompts: Annotated[Path | None, typer.Option(help="JSONL prompts to decode before and after.")] = None,
    num_eval_prompts: Annotated[int, typer.Option(min=1, help="Of --eval-prompts.")] = 10,
    split: Annotated[str, typer.Option(help="Of a dataset that has several.")] = "train",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as training comes to them.")] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="gated (default): base frozen, text unchanged. joint: the paper's loss. head: a draft head, behind "
            "either. Recurrent: lora, full."
        ),
    ] = None,
    draft_loss: Annotated[str, typer.Option(help="cross_entropy, kl or tv.")] = "cross_entropy",
    alpha: Annotated[float, typer.Option(help="Weight of the autoregressive loss in joint mode.")] = 1.0,
    slot_decay: Annotated[float, typer.Option(help="Weight of each slot of a draft by that of the one before.")] = 1.0,
    from_adapter: Annotated[Path | None, typer.Option(help="An adapter to go on from, instead of a new one.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Of the LoRA, by default 32; 0, in joint mode, trains every weight. Of a head, 512."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="By default 1e-3 for a LoRA, 2e-3 for a head, else 1e-5.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row is cut to.")] = 320,
    pack: Annotated[bool, typer.Option("--pack", help="Several rows in one sequence: less padding.")] = False,
    eval_steps: Annotated[
        int | None, typer.Option(min=1, help="Decode the prompts every so many steps, and keep the best checkpoint.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="End after so many evaluations without a better one.")] = None,
    report_to: Annotated[str, typer.Option(help="Where else to log: tensorboard, wandb, ...")] = "none",
    save_steps: Annotated[int, typer.Option(min=1, help="Where there are no --eval-steps.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Half the memory, and faster where the machine has it.")] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="The base, by bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="The base, by bitsandbytes.")] = False,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager or flex_attention.")] = None,
    activation_checkpointing: Annotated[bool, typer.Option("--activation-checkpointing")] = False,
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Compile the decoder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Teach a checkpoint to draft, or a recurrent-depth one a text; what drafting is worth is measured by decoding."""
    options = {name: value for name, value in locals().items() if name not in ("model", "data", "output")}
    options["eval_prompts_path"] = options.pop("eval_prompts")
    # Trainer takes seconds to import, which the other verbs do not wait for.
    from accelerate import PartialState

    from .training import TrainingStopped, finetune

    try:
        report = finetune(model, data, output, **options)
    except TrainingStopped as stop:
        print(f"wavedraft: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    process = PartialState()
    if process.use_distributed:
        gc.collect()  # a gloo group whose last holder is a model waits for a thread that waits for Python, for ever
        process.destroy_process_group()
    if not process.is_main_process:
        return
    for moment in ("before", "after"):
        if measured := report[moment]:
            identical = measured["identical"]
            plain = "" if identical is None else f", {identical:.0%} of the texts identical to plain decoding"
            print(f"{moment}: {measured['tokens_per_forward']:.2f} tokens per forward{plain}")
    print(f"{output}: {'adapter' if report['rank'] else 'checkpoint'}, and what was measured in report.json")


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="A TiDAR or recurrent-depth checkpoint: a folder or a Hub id.")],
    prompts: Annotated[Path, typer.Option(help="JSONL rows of `prompt`, or a text file with one a line.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter that was taught to draft.")] = None,
    draft_length: Annotated[int | None, typer.Option(min=1, help="Tokens drafted at a time (TiDAR).")] = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    packed_weights: PackedWeights = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Parallel decoding with a static cache and compiled steps.")
    ] = False,
    policy: Annotated[
        str | None, typer.Option(help="What is audited of a recurrent-depth model; by default exact.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=2, help="Only the first so many.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=2, help="Prompts in a batch of the noise floor.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as they are, without the chat template.")
    ] = False,
    output: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Compare parallel with plain decoding, text by text; plain decoding in a batch is the noise floor."""
    for name, value, known in (("dtype", dtype, list(DTYPES)), ("output", output, ["text", "json"])):
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, but is {value!r}.")
    texts = read_prompts(prompts, num_prompts)
    drafting = drafting_keywords(num_branches, exact, packed_weights)
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        if has_depth := is_recurrent(model):
            refuse(drafting | {"draft_length": draft_length}, OF_TIDAR)
        else:
            refuse({"policy": policy}, f"is for recurrent-depth models, but {model} is none.")
        parallel = {"policy": policy or "exact"} if has_depth else {"draft_length": draft_length, **drafting}
        if compiled and exact:
            raise ValueError("--exact runs steps of several shapes, and --compiled has one. Leave either out.")
        parallel |= compiled_keywords() if compiled else {}
        check_keywords(model, {"do_sample": False, **parallel})
        tokenizer = AutoTokenizer.from_pretrained(model)
        prompt_ids = [encode_prompt(tokenizer, text, raw)["input_ids"][0] for text in texts]
        loaded = load(model, dtype, device, adapter)
        if packed_weights:
            check_packable(loaded, exact)
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("Decoding", total=len(texts))
            found = audit_texts(
                loaded,
                prompt_ids,
                plain={"policy": "autoregressive"} if has_depth else {"draft_length": 0},
                parallel=parallel,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_prompt=lambda: progress.advance(task),
            )
    kind = str(loaded.dtype).removeprefix("torch.")
    if output == "json":
        settings = {"model": model, "dtype": kind, "device": device, "max_new_tokens": max_new_tokens}
        print(json.dumps({**settings, **found.to_dict()}, indent=2))
        return
    print(f"{len(texts)} prompts, {found.num_tokens} new tokens of plain decoding, {kind} on {device}")
    names = {"parallel decoding": found.parallel, f"plain decoding in batches of {found.batch_size}": found.rebatched}
    for name, comparison in names.items():
        share = comparison.num_identical / comparison.num_texts
        print(f"\n{name}: {comparison.num_identical} of {comparison.num_texts} texts identical ({share:.1%})")
        for mismatch in comparison.mismatches:
            margin = "ended" if mismatch.margin is None else f"{mismatch.margin:.4g} between the two best scores"
            ids = (mismatch.plain_id, mismatch.other_id)
            plain_word, word = ("the end" if one is None else repr(tokenizer.decode([one])) for one in ids)
            place = f"prompt {mismatch.prompt + 1}, token {mismatch.position + 1}"
            print(f"  {place}: {word} instead of {plain_word}, {margin}")
    if (cost := found.exact_cost) is not None:
        with_it, without = cost.effort, cost.effort_without
        print(
            f"\n{exact} costs {with_it.num_forwards} forwards and {with_it.num_tie_forwards} of one token, "
            f"{with_it.seconds:.1f} s; without it {without.num_forwards} forwards, {without.seconds:.1f} s "
            f"({with_it.seconds / without.seconds:.2f}x), {cost.without.num_identical} of {cost.without.num_texts} "
            f"texts identical"
        )


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A TiDAR checkpoint: a folder or a Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter that was taught to draft.")] = None,
    assistant: Annotated[str | None, typer.Option(help="A smaller model, for transformers' assisted decoding.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL rows of `prompt` and `kind`, or a text file; else 20 of our own.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="A list, as 1,4,8,16.")] = "1,4",
    prompt_lengths: Annotated[
        str, typer.Option(help="Tokens that prompts are filled or cut to, as 128,2048; own leaves them as they are.")
    ] = "own",
    temperatures: Annotated[str, typer.Option(help="0 decodes greedily; as 0,1.")] = "0",
    draft_lengths: Annotated[str | None, typer.Option(help="K, as 4,8; by default the checkpoint's.")] = None,
    num_branches: Annotated[str, typer.Option(help="B: integers, all, auto.")] = "1,3,all,auto",
    num_batches: Annotated[int, typer.Option(help="Of each kind of prompt.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; a figure is the median of them.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Of every text: no end token ends one.")] = 32,
    num_lookup_tokens: Annotated[int, typer.Option(help="Tokens prompt lookup proposes at a time.")] = 10,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Plain decoding and drafts with a static cache and torch.compile, too.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Lines of the table to measure beside AR, as 'AR compiled,auto'; by default all.")
    ] = None,
    packed_weights: PackedWeights = False,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for bench.json, bench.md and, with matplotlib, bench.png.")
    ] = None,
) -> None:
    """Time every way to decode with the same weights, in turn: plain, transformers' own speed-ups, drafting."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    taught = taught_draft_length(model)
    settings = Settings(
        batch_sizes=read_list(batch_sizes, "--batch-sizes", int),
        prompt_lengths=read_list(prompt_lengths, "--prompt-lengths", int, words=("own",)),
        temperatures=read_list(temperatures, "--temperatures", float),
        draft_lengths=read_list(draft_lengths or str(taught), "--draft-lengths", int),
        num_branches=read_list(num_branches, "--num-branches", int, words=("all", "auto")),
        num_batches=num_batches,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        num_lookup_tokens=num_lookup_tokens,
        has_compiled=compiled,
        has_packed_weights=packed_weights,
        only=tuple(map(str.strip, only.split(","))) if only else (),
    )
    texts = read_kinds(prompts) if prompts is not None else PROMPTS
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoded = {
            kind: [encode_prompt(tokenizer, text, is_raw=False)["input_ids"][0] for text in of_kind]
            for kind, of_kind in texts.items()
        }
        settings.check_against(AutoConfig.from_pretrained(model), encoded)
        filler = tokenizer("\n".join(text for of_kind in texts.values() for text in of_kind), return_tensors="pt")
        helper = None if assistant is None else load_assistant(assistant, DTYPES[dtype], tokenizer)
        device = device_for(device)
        loaded = load(model, dtype, device, adapter=None)
        left_out = None
        if packed_weights and loaded.dtype in PACKABLE and (why := why_no_packed_products(loaded.dtype)):
            left_out = f"`--packed-weights` is left aside: {why}."  # on another machine it would not be
            print(left_out, file=sys.stderr)
            settings = replace(settings, has_packed_weights=False)
        elif packed_weights:
            check_packable(loaded)
        stock = without_adapter(loaded)
        if adapter is not None:
            loaded.load_adapter(adapter)
        contenders = contenders_of(loaded, stock, settings, None if helper is None else helper.to(device))
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("Decoding", total=num_runs(contenders, encoded, settings))
            found = run_bench(contenders, encoded, filler["input_ids"][0], settings, lambda: progress.advance(task))
    options = {"model": model, "adapter": adapter, "assistant": assistant, "prompts": prompts and str(prompts)}
    options["left_out"] = left_out
    figures = bench_report(found, loaded, settings, options)
    for table in bench_tables(figures):
        Console().print(table)
    for note in bench_notes(figures):
        Console(highlight=False).print(note)
    if output is not None:
        print(*save_bench(figures, output), sep="\n")
        if not has_matplotlib():
            print("no picture: matplotlib is not installed (pip install 'wavedraft[plot]')")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint of ours, or a gated adapter.")],
    repo_id: Annotated[str, typer.Argument(help="ORG/NAME on the Hub; made if it is not there.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Annotated[str | None, typer.Option(help="By default that of `hf auth login`.", envvar="HF_TOKEN")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Measured figures (JSON); by default FOLDER/report.json.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="ORG/NAME of the base model, if no card says it.")] = None,
    license: Annotated[str | None, typer.Option(help="The base model's licence, if no card says it.")] = None,
    model: Annotated[Path | None, typer.Option(help="Of an adapter: the checkpoint it was taught on.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="A pattern of other files to upload.")] = None,
) -> None:
    """Publish a folder on the Hub, in one commit, with all it needs where wavedraft is not installed."""
    options = {name: value for name, value in locals().items() if name not in ("folder", "repo_id", "message")}
    options["include"] = include or ()
    with quiet_transformers():
        commit = push_folder(folder, repo_id, commit_message=message, **options)
    print(commit.pr_url or commit.commit_url)


data_app = typer.Typer(no_args_is_help=True, help="Texts to learn from.")
app.add_typer(data_app, name="data")


@data_app.command()
def regenerate(
    model: Annotated[str, typer.Argument(help="The model that answers: a folder or a Hub id.")],
    prompts: Annotated[Path, typer.Argument(help="JSONL rows with `prompt`.")],
    output: Annotated[Path, typer.Argument(help="The JSONL file to write, or to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 192,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For sampling; by default 0.")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(help="Stop once the file holds so many.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
) -> None:
    """Let a model answer prompts itself: what it wrote is what its drafts learn best from."""

    from .training import regenerate as answer
    from .training.dialogue import read_jsonl

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    if not temperature:
        refuse({"seed": seed}, "is for sampling: give a --temperature above 0, or leave it out.")
    device = device_for(device)
    rows = list(read_jsonl(prompts))
    with quiet_transformers():
        answering = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
    num_tokens = answer(
        answering,
        tokenizer,
        rows,
        output,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed or 0,
        max_answer_tokens=max_answer_tokens,
    )
    print(f"{output}: {num_tokens:,} tokens of answers")
