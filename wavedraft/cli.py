"""The command line: its verbs are registered here, and each stands in a file of commands/."""

import sys

import typer

from .commands.audit import audit
from .commands.bench import bench
from .commands.chat import chat
from .commands.convert import convert
from .commands.generate import generate
from .commands.push import push
from .commands.regenerate import regenerate
from .commands.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in (convert, generate, chat, train, audit, bench, push):
    app.command()(verb)
data_app = typer.Typer(no_args_is_help=True, help="Texts to learn from.")
data_app.command()(regenerate)
app.add_typer(data_app, name="data")


@app.callback()
def wavedraft() -> None:
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
