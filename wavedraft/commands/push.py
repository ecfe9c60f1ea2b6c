"""`wavedraft push`: a folder becomes a repository of the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .early_checks import check_file, load_library, say

Folder = Annotated[Path, typer.Argument(help="The folder to publish: a checkpoint of ours, or a gated adapter.")]
RepoId = Annotated[str, typer.Argument(help="ORG/NAME on the Hub. It is made if it is not there.")]
Private = Annotated[bool | None, typer.Option("--private/--public", help="Make a new repository private, or public.")]
Revision = Annotated[str | None, typer.Option(help="Push to this branch.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")]
Token = Annotated[
    str | None, typer.Option(help="Push with this token; by default that of `hf auth login`.", envvar="HF_TOKEN")
]
Message = Annotated[str | None, typer.Option(help="Give the commit this message.")]
Figures = Annotated[
    Path | None, typer.Option(help="Tell the figures of this JSON file; by default those of FOLDER/report.json.")
]
BaseModel = Annotated[str | None, typer.Option(help="Name the base model, ORG/NAME, where no card says it.")]
License = Annotated[str | None, typer.Option(help="Name the base model's licence, where no card says it.")]
TaughtOn = Annotated[Path | None, typer.Option(help="The checkpoint that an adapter was taught on.")]
Include = Annotated[list[str] | None, typer.Option(help="Upload other files of this pattern too. May be repeated.")]


def push(
    folder: Folder,
    repo_id: RepoId,
    private: Private = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    token: Token = None,
    message: Message = None,
    figures: Figures = None,
    base_model: BaseModel = None,
    license: License = None,
    model: TaughtOn = None,
    include: Include = None,
) -> None:
    """Publish a folder on the Hub in one commit, with all it needs where wavedraft is not installed."""
    options = {name: value for name, value in locals().items() if name not in ("folder", "repo_id", "message")}
    options["include"] = include or ()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name the one that holds config.json or adapter_config.json.")
    check_file(figures, "Give a JSON file of figures, or leave --figures out.")
    load_library()
    from ..conversion import push as push_folder
    from ..conversion.quiet_transformers import quiet_transformers

    with quiet_transformers():
        commit = push_folder(folder, repo_id, commit_message=message, **options)
    print(commit.pr_url or commit.commit_url)
    say(f"Next: the README of https://huggingface.co/{repo_id} says how others load it.")
