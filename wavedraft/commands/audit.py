"""`wavedraft audit`: are the texts of parallel decoding those of plain decoding?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.row_forms import read_columns
from ..training.row_sources import read_prompts
from .decoding_bar import decoding_bar
from .drafting_record import Record, check_recordable, record_drafting
from .early_checks import check_choice, check_decoding, load_library, say
from .options import (
    PROMPT_ROWS,
    Adapter,
    Columns,
    Compile,
    Device,
    DraftLength,
    Dtype,
    Exact,
    MaxNewTokens,
    Model,
    NumBranches,
    PackedWeights,
    Policy,
    Raw,
    Trust,
)

Prompts = Annotated[Path, typer.Option(help=f"The file of prompts: {PROMPT_ROWS}.")]
NumPrompts = Annotated[int | None, typer.Option(min=2, help="Take only the first prompts of the file, this many.")]
BatchSize = Annotated[int, typer.Option(min=2, help="Measure the noise floor in batches of this many prompts.")]
Output = Annotated[str, typer.Option(help="Print as text, or as json.")]


def audit(
    model: Model,
    prompts: Prompts,
    adapter: Adapter = None,
    draft_length: DraftLength = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    trust: Trust = None,
    packed_weights: PackedWeights = None,
    compile: Compile = False,
    policy: Policy = None,
    columns: Columns = None,
    num_prompts: NumPrompts = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    raw: Raw = False,
    output: Output = "text",
    record: Record = False,
) -> None:
    """Compare parallel with plain decoding, text by text. Plain decoding in a batch is the noise floor."""
    check_decoding(dict(locals()))
    check_choice("--output", output, ("text", "json"))
    texts = first_of(read_prompts(prompts, read_columns(columns)), num_prompts, prompts)
    load_library(model, adapter)
    from transformers import AutoConfig, AutoTokenizer

    from ..audit import audit as audit_texts
    from ..bench.prompts import encode_prompt
    from ..conversion.quiet_transformers import quiet_transformers
    from ..generation.execution.packed_linear import check_packable
    from ..training.position_table import check_fit
    from .cli_checks import check_adapter, check_keywords, device_for
    from .cli_keywords import audited_keywords, drafting_keywords
    from .loading import load

    recorded_in = check_recordable(model, adapter) if record else None
    drafting = drafting_keywords(num_branches, exact, packed_weights, trust)
    with quiet_transformers():
        check_adapter(adapter, model)
        parallel, plain = audited_keywords(model, policy, {"draft_length": draft_length, **drafting}, compile)
        check_keywords(model, {"do_sample": False, **parallel})
        tokenizer = AutoTokenizer.from_pretrained(model)
        prompt_ids = [encode_prompt(tokenizer, text, raw)["input_ids"][0] for text in texts]
        check_fit(AutoConfig.from_pretrained(model), zip(texts, map(len, prompt_ids), strict=True), max_new_tokens)
        loaded = load(model, dtype, device := device_for(device), adapter)
        if packed_weights:
            check_packable(loaded)
        with decoding_bar(len(texts)) as advance:
            sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
            result = audit_texts(loaded, prompt_ids, plain=plain, parallel=parallel, on_prompt=advance, **sizes)
        if recorded_in is not None:
            record_drafting(loaded, prompt_ids, [row.kind or "all" for row in texts], max_new_tokens, recorded_in)
    about = {"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), "device": device}
    if output == "json":
        print(json.dumps(about | {"max_new_tokens": max_new_tokens} | result.to_dict(), indent=2))
    else:
        print_audit(result, tokenizer, exact, about)
    say(f"Next: wavedraft bench {model} times these ways beside each other.")


def first_of(texts: list[Any], num_prompts: int | None, path: Path) -> list[Any]:
    """The first prompts of a file. Raises ValueError if it has fewer."""
    if num_prompts is not None and num_prompts > len(texts):
        raise ValueError(f"--num-prompts must be at most {len(texts)}, the prompts of {path}, but is {num_prompts}.")
    return texts[:num_prompts]


def print_audit(result: Any, tokenizer: Any, exact: str | None, about: dict[str, Any]) -> None:
    """Prints what share of the texts is identical, each first token that differs, and what `exact` costs."""
    where = f"{about['dtype']} on {about['device']}"
    print(f"{result.parallel.num_texts} prompts, {result.num_tokens} new tokens of plain decoding, {where}")
    names = {
        "parallel decoding": result.parallel,
        f"plain decoding in batches of {result.batch_size}": result.rebatched,
    }
    for name, comparison in names.items():
        share = comparison.num_identical / comparison.num_texts
        print(f"\n{name}: {comparison.num_identical} of {comparison.num_texts} texts identical ({share:.1%})")
        if comparison is result.parallel and result.trust < 1:
            print(f"  A text that differs is no fault: trust={result.trust:g} counts what the masks predict.")
        for mismatch in comparison.mismatches:
            margin = "ended" if mismatch.margin is None else f"{mismatch.margin:.4g} between the two best scores"
            ids = (mismatch.plain_id, mismatch.other_id)
            plain_word, word = ("the end" if one is None else repr(tokenizer.decode([one])) for one in ids)
            place = f"prompt {mismatch.prompt + 1}, token {mismatch.position + 1}"
            print(f"  {place}: {word} instead of {plain_word}, {margin}")
    if (cost := result.exact_cost) is not None:
        with_it, without = cost.effort, cost.effort_without
        print(
            f"\n{exact} costs {with_it.num_forwards} forwards and {with_it.num_tie_forwards} of one token, "
            f"{with_it.seconds:.1f} s; without it {without.num_forwards} forwards, {without.seconds:.1f} s "
            f"({with_it.seconds / without.seconds:.2f}x), {cost.without.num_identical} of {cost.without.num_texts} "
            f"texts identical"
        )
    if (keys := result.shared_keys) is not None:
        print_shared_keys(keys)


def print_shared_keys(keys: Any) -> None:
    """Prints whether a recurrent-depth model shares keys across its recurrences, and which policies that makes safe."""
    print(
        f"\nshared keys: {keys.num_same} of {keys.num_tokens} next tokens are the same ({keys.share:.1%}) where each "
        f"reads only the last keys of those before it.\nThe states of a prompt move {keys.movement:.1%} in their last "
        f"recurrence.\nsafe policies: {', '.join(keys.safe_policies)}"
    )
    if not keys.is_shared:
        print(
            f"not safe: {', '.join(keys.readers)}. They read the last keys, and this model needs those of each depth."
        )
