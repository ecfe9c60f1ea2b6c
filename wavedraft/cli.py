"""The command line: its verbs are registered here, and each stands in a file of commands/."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from . import __version__
from .commands.audit import audit
from .commands.bench import bench
from .commands.chat import chat
from .commands.convert import convert
from .commands.generate import generate
from .commands.push import push
from .commands.regenerate import regenerate
from .commands.teach import teach
from .commands.train import train
from .commands.tune import tune

EXAMPLES: dict[Callable[..., None], str] = {
    convert: "wavedraft convert HuggingFaceTB/SmolLM2-135M-Instruct models/tidar",
    generate: 'wavedraft generate models/tidar --adapter runs/mine --compare "Why is the sky blue?"',
    chat: "wavedraft chat models/tidar --adapter runs/mine --temperature 0.7",
    teach: "wavedraft teach HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2 --hours 2",
    train: "wavedraft train models/tidar answers.jsonl runs/mine --eval-prompts heldout.jsonl",
    audit: "wavedraft audit models/tidar --adapter runs/mine --prompts heldout.jsonl --dtype bfloat16",
    bench: "wavedraft bench models/tidar --adapter runs/mine --batch-sizes 1,8 --compile --output runs/bench",
    tune: "wavedraft tune models/tidar --adapter runs/mine --dtype bfloat16",
    push: "wavedraft push runs/mine ORG/NAME --model models/tidar",
    regenerate: "wavedraft data regenerate models/tidar prompts.jsonl answers.jsonl",
}
EXIT_CODES = """
Exit codes: 0, the work is done. 1, it failed, or nobody reads its output any more. 2, an option, a file or a
checkpoint was refused; one line on stderr says why and what to do. 128 + N, signal N ended a training, which --resume
continues. Results go to stdout, all else to stderr.
"""

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=" ".join(EXIT_CODES.split())
)
data_app = typer.Typer(no_args_is_help=True, help="Make texts to learn from.")
for verb, example in EXAMPLES.items():
    group = data_app if verb is regenerate else app
    group.command(epilog=f"\b\nExample:\n  {example}")(verb)
app.add_typer(data_app, name="data")


def print_version(is_asked: bool) -> None:
    """Prints the version and ends, where --version was given."""
    if is_asked:
        print(f"wavedraft {__version__}")
        raise typer.Exit


@app.callback()
def wavedraft(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models that think ahead in parallel and still say exactly what they would have said."""


def main() -> None:
    """Runs one verb. What the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"wavedraft: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
