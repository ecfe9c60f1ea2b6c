"""The picture of a wavefront: position against decode step, coloured by what became of each token.

    python benchmarks/picture_recurrent.py --output wavefront.png                  (the shipped model)
    python benchmarks/picture_recurrent.py --model PATH --prompt "Once upon a time" --output wavefront.png
    python benchmarks/picture_recurrent.py --golden tests/data/raven_tiny_golden --output wavefront.png

Needs matplotlib (`pip install wavedraft[plot]`).
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "austen-recurrent-6m"
NOT_BEGUN, GUESSED, CHANGED, KEPT, FROZEN = range(5)
STATES = ("not begun", "guessed", "changed", "kept", "frozen")
COLOURS = ("#ffffff", "#f4c542", "#d95f4c", "#8fc1e3", "#2b5c8a")


def what_became(steps: list, num_positions: int) -> torch.Tensor:
    """[steps, positions] what each decode step did to the token of each new position."""
    first = steps[0].start
    picture = torch.full((len(steps), num_positions), NOT_BEGUN)
    before: dict[int, int] = {first: steps[0].fed_ids[0]}
    for row, step in enumerate(steps):
        picture[row, : step.start - first + 1] = FROZEN
        after = {step.start + i + 1: token for i, token in enumerate(step.predicted_ids)}
        for position, token in after.items():
            place = position - first
            if place >= num_positions:
                continue
            if position <= step.start + step.num_frozen:
                picture[row, place] = FROZEN
            elif position not in before:
                picture[row, place] = GUESSED
            else:
                picture[row, place] = KEPT if before[position] == token else CHANGED
        before = after
    return picture


def draw(picture: torch.Tensor, title: str, output: str) -> None:
    """Write the picture to a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    steps, positions = picture.shape
    figure, axes = pyplot.subplots(figsize=(2 + positions / 8, 1.5 + steps / 12), dpi=150)
    axes.imshow(
        picture, cmap=ListedColormap(COLOURS), norm=BoundaryNorm(range(6), 5), aspect="auto", interpolation="none"
    )
    axes.set_xlabel("position after the prompt")
    axes.set_ylabel("decode step")
    axes.set_title(title, fontsize=9)
    patches = [Patch(facecolor=c, edgecolor="#999999", label=s) for c, s in zip(COLOURS, STATES, strict=True)]
    axes.legend(handles=patches, loc="upper right", fontsize=7)
    figure.tight_layout()
    figure.savefig(output)


def golden_model(stem: str) -> tuple[RecurrentDepthForCausalLM, torch.Tensor]:
    """The tiny model and first prompt of the golden fixture."""
    record = json.loads(Path(stem + ".json").read_text())
    weights = {name: t.float() for name, t in load_file(stem + ".safetensors").items() if name.startswith("weights/")}
    weights = {name.removeprefix("weights/"): tensor for name, tensor in weights.items()}
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**record["meta"]["config"]))
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    return model, torch.tensor([next(iter(record["prompts"].values()))])


def main() -> None:
    """One run, one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=str(SHIPPED), help="folder or Hub name of a recurrent-depth checkpoint")
    source.add_argument("--golden", help="the golden fixture's path, without its suffix")
    parser.add_argument("--prompt", default="Emma Woodhouse, handsome, clever, and rich, had")
    parser.add_argument("--policy", default="diffusion-forcing", choices=["diffusion-forcing", "exact"])
    parser.add_argument("--num-new", type=int, default=48)
    parser.add_argument("--num-recurrences", type=int, default=32)
    parser.add_argument("--inner-recurrence", type=int, default=4, help="core passes a decode step, diffusion forcing")
    parser.add_argument("--output", default="wavefront.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.golden:
        model, ids = golden_model(arguments.golden)
    else:
        model = RecurrentDepthForCausalLM.from_pretrained(arguments.model)
        ids = AutoTokenizer.from_pretrained(arguments.model)(arguments.prompt, return_tensors="pt").input_ids
    options = {"inner_recurrence": arguments.inner_recurrence} if arguments.policy == "diffusion-forcing" else {}
    output = model.eval().generate(
        ids,
        max_new_tokens=arguments.num_new,
        policy=arguments.policy,
        num_recurrences=arguments.num_recurrences,
        init_scale=0.0,
        record_wavefront=True,
        return_dict_in_generate=True,
        **options,
    )
    num_new = output.sequences.shape[1] - ids.shape[1]
    title = (
        f"{arguments.policy}: {num_new} tokens, {output.num_steps} decode steps, {output.num_core_passes} core passes"
    )
    draw(what_became(output.wavefront, num_new), title, arguments.output)
    print(f"{title}; picture in {arguments.output}")


if __name__ == "__main__":
    main()
