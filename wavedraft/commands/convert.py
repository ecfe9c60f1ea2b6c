"""`wavedraft convert`: a stock checkpoint becomes a TiDAR checkpoint, or the other way round."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .early_checks import load_library, refuse, say

LONGEST_DRAFT = 64  # a decode step reads K + K*K tokens

Source = Annotated[
    str, typer.Argument(help="The checkpoint to convert: a folder, ORG/NAME on the Hub, or a GGUF file.")
]
Target = Annotated[Path, typer.Argument(help="The folder to write. It must not exist, save with --overwrite.")]
DraftLength = Annotated[
    int | None,
    typer.Option(
        help=f"Draft at most this many tokens at a time, 1 to {LONGEST_DRAFT}; by default 8. Recurrent-depth models "
        "have none."
    ),
]
MaskTokenId = Annotated[
    int | None, typer.Option(min=0, help="Read this id as the mask: of a model taught to draft elsewhere.")
]
Recurrent = Annotated[
    str | None,
    typer.Option(
        help="Write a recurrent-depth checkpoint instead: so many layers of prelude, core and coda, as 4,8,4. (Of a "
        "Llama-form or OLMo-2 source.)"
    ),
]
BlockAttention = Annotated[
    str | None,
    typer.Option(
        help="How masks of a block see one another, and are to be taught: bidirectional (the default), or causal, as "
        "serving engines attend."
    ),
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Write the text tower alone of a model of text and images.")
]
ToAr = Annotated[bool, typer.Option("--to-ar", help="Go the other way: write the stock checkpoint of a TiDAR one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that the folder holds.")]
Link = Annotated[bool, typer.Option("--link", help="Link to the source's weight files instead of copying them.")]
Verify = Annotated[bool, typer.Option(help="Compare the logits before and after.")]
Revision = Annotated[str | None, typer.Option(help="Read this branch, tag or commit of the Hub repository.")]


def convert(
    source: Source,
    target: Target,
    draft_length: DraftLength = None,
    mask_token_id: MaskTokenId = None,
    recurrent: Recurrent = None,
    block_attention: BlockAttention = None,
    text_only: TextOnly = False,
    to_ar: ToAr = False,
    overwrite: Overwrite = False,
    link: Link = False,
    verify: Verify = True,
    revision: Revision = None,
) -> None:
    """Turn a stock autoregressive checkpoint into a TiDAR checkpoint, or back. No weight changes."""
    options: dict[str, Any] = {"overwrite": overwrite, "link": link, "verify": verify, "revision": revision}
    drafting = {"draft_length": draft_length, "mask_token_id": mask_token_id, "block_attention": block_attention}
    layout = None if recurrent is None else layout_of(recurrent)
    if to_ar:
        refuse(drafting, "has no effect with --to-ar, which takes drafting out of the checkpoint. Leave it out.")
        others = {"recurrent": recurrent, "text_only": text_only}
        refuse(others, "has no effect with --to-ar. Leave one of the two out.")
    if draft_length is not None and not 1 <= draft_length <= LONGEST_DRAFT:
        raise ValueError(
            f"--draft-length must be between 1 and {LONGEST_DRAFT} (a decode step reads K + K*K tokens), but is "
            f"{draft_length}."
        )
    load_library()
    from ..conversion import convert as convert_checkpoint
    from ..conversion import to_ar as convert_back

    if to_ar:
        result = convert_back(source, target, show_progress=True, **options)
    else:
        drafting |= {"recurrent": layout, "text_only": text_only}
        result = convert_checkpoint(source, target, show_progress=True, **options | drafting)
    print_conversion(result, verify)
    if layout is not None:
        say(f"Next: wavedraft train {target} DATA OUTPUT teaches its core to recur.")
    elif result.tidar_config is not None:
        say(f"Next: wavedraft train {target} DATA OUTPUT teaches it to draft.")
    elif not to_ar:
        say(f'Next: wavedraft generate {target} "PROMPT" --compare')
    else:
        say(f"Next: AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it with transformers alone.")


def layout_of(recurrent: str) -> tuple[int, int, int]:
    """The layers of prelude, core and coda. Raises ValueError if they are not three numbers."""
    parts = recurrent.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"--recurrent must be three numbers, the layers of prelude, core and coda, as 4,8,4, but is {recurrent!r}."
        )
    prelude, core, coda = map(int, parts)
    return prelude, core, coda


def print_conversion(result: Any, verify: bool) -> None:
    """Prints what a `Conversion` wrote, where its masks are, and how far its logits are from the source's."""
    tidar, proof = result.tidar_config, result.proof
    has_depth = result.architecture in ("RecurrentDepthForCausalLM", "OuroForCausalLM")
    kind = "TiDAR" if tidar is not None else "recurrent-depth" if has_depth else "stock"
    print(f"{result.target}: {kind} checkpoint of {result.architecture}, {result.num_parameters:,} parameters")
    if tidar is not None:
        is_causal = tidar.block_attention == "causal"
        is_inside = tidar.mask_embedding_id == tidar.mask_token_id
        place = "of the vocabulary, never generated" if is_inside else "after the vocabulary"
        print(f"masks: id {tidar.mask_token_id}, {place}; drafts of {tidar.draft_length}{', causal' * is_causal}")
        print(f"masks read embedding row {tidar.mask_embedding_id}: {result.mask_reason}")
    if (depth_one := result.depth_one) is not None:
        print_depth_one(depth_one)
    elif proof is None:
        reason = "larger than 2^30 parameters" if has_depth and verify else "--no-verify"
        print(f"logits before and after: not compared ({reason})")
    else:
        layers = f"{proof.num_layers} of {result.num_layers} layers"
        print(f"logits before and after, {layers}: max abs difference {proof.max_abs_difference}")


def print_depth_one(found: Any) -> None:
    """Prints how near a model that was given a recurrence is to its source at depth 1."""
    print(
        f"at depth 1 beside the source, on texts the source wrote: {found.share_same:.1%} of the likeliest next tokens "
        f"the same, perplexity {found.perplexity:.4g} (source {found.source_perplexity:.4g}), logits differ by up to "
        f"{found.max_abs_difference:.3g}; {found.num_dropped} layers dropped"
    )
