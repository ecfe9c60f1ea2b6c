"""`wavedraft convert`: a stock checkpoint becomes a TiDAR checkpoint, or the other way round."""

from pathlib import Path
from typing import Annotated, Any

import typer


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
    from ..conversion import convert as convert_checkpoint
    from ..conversion import to_ar as convert_back
    from .cli_checks import refuse

    options: dict[str, Any] = {"overwrite": overwrite, "link": link, "verify": verify, "revision": revision}
    drafting = {"draft_length": draft_length, "mask_token_id": mask_token_id}
    if to_ar:
        refuse(drafting, "has no effect with --to-ar, which takes drafting out of the checkpoint. Leave it out.")
        result = convert_back(source, target, show_progress=True, **options)
    else:
        result = convert_checkpoint(source, target, show_progress=True, **options | drafting)
    print_conversion(result, verify)


def print_conversion(result: Any, verify: bool) -> None:
    """Prints what a `Conversion` wrote, where its masks are, and how far its logits are from the source's."""
    tidar, proof = result.tidar_config, result.proof
    has_depth = result.architecture in ("RecurrentDepthForCausalLM", "OuroForCausalLM")
    kind = "TiDAR" if tidar is not None else "recurrent-depth" if has_depth else "stock"
    print(f"{result.target}: {kind} checkpoint of {result.architecture}, {result.num_parameters:,} parameters")
    if tidar is not None:
        is_inside = tidar.mask_embedding_id == tidar.mask_token_id
        place = "of the vocabulary, never generated" if is_inside else "behind the vocabulary"
        print(f"masks: id {tidar.mask_token_id}, {place}; drafts of {tidar.draft_length}")
        print(f"masks read embedding row {tidar.mask_embedding_id}: {result.mask_reason}")
    if proof is None:
        reason = "larger than 2^30 parameters" if has_depth and verify else "--no-verify"
        print(f"logits before and after: not compared ({reason})")
    else:
        layers = f"{proof.num_layers} of {result.num_layers} layers"
        print(f"logits before and after, {layers}: max abs difference {proof.max_abs_difference}")
