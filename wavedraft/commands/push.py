"""`wavedraft push`: a folder becomes a repository of the Hub."""

from pathlib import Path
from typing import Annotated

import typer


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
    from ..conversion import push as push_folder
    from ..conversion.quiet_transformers import quiet_transformers

    with quiet_transformers():
        commit = push_folder(folder, repo_id, commit_message=message, **options)
    print(commit.pr_url or commit.commit_url)
