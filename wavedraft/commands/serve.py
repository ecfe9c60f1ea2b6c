"""`wavedraft serve`: hands a checkpoint to vLLM, whose plugin wavedraft-vllm drafts."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .early_checks import RECURRENT_TYPES, check_adapter_folder, check_folder, say
from .options import Adapter

Served = Annotated[str, typer.Argument(help="The TiDAR checkpoint, or an adapter's base: a folder, or ORG/NAME.")]
ToVllm = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- OPTIONS OF VLLM", help="All after -- goes to vLLM, as -- --port 8001."),
]
DraftLength = Annotated[
    int | None, typer.Option(min=2, help="K, at most and by default as was taught: a step reads 2K tokens.")
]
DraftKeep = Annotated[
    float | None,
    typer.Option(min=0.0, max=0.99, help="A draft ends where its confidence falls below this; by default 0.08."),
]
DraftMaxBatch = Annotated[
    int | None,
    typer.Option(
        min=0, help="Draft in steps of at most this many requests; by default 256 query tokens, 16 requests at K = 8."
    ),
]
Vllm = Annotated[
    str | None, typer.Option(help="The vllm command, in an environment of its own; by default the one in PATH.")
]
Print = Annotated[bool, typer.Option("--print", help="Print vLLM's command line, and run nothing.")]

# transformers' classes that the plugin has a drafting class for.
SERVED_CLASSES = tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Qwen3Moe"))
INSTALL = (
    "vLLM and wavedraft want different versions of transformers, so vLLM has an environment of its own: "
    "`python -m venv serving`, then `serving/bin/pip install 'vllm>=0.32,<0.33'` and, from a clone of wavedraft, "
    "`serving/bin/pip install ./serving_vllm`. Then name it here: --vllm serving/bin/vllm"
)


def serve(
    model: Served,
    to_vllm: ToVllm = None,
    adapter: Adapter = None,
    draft_length: DraftLength = None,
    draft_keep: DraftKeep = None,
    draft_max_batch: DraftMaxBatch = None,
    vllm: Vllm = None,
    print_only: Print = False,
) -> None:
    """Serve a checkpoint with vLLM: many requests at once, an OpenAI server, several GPUs."""
    check_folder(model)
    check_adapter_folder(adapter)
    refuse_other_overrides(to_vllm or [])
    drafting = {"draft_length": draft_length, "keep": draft_keep, "max_batch": draft_max_batch}
    if adapter and Path(adapter).is_dir():
        adapter = str(Path(adapter).resolve())
    given = {name: value for name, value in ({"adapter": adapter} | drafting).items() if value is not None}
    words = command_line(model, given, to_vllm or [])
    if print_only:
        print(shlex.join(["vllm", *words]))
        return
    program = vllm_program(vllm)
    ask_the_plugin(program, model, given)
    say(f"Running {shlex.join([program, *words])}")
    os.execv(program, [program, *words])


def command_line(model: str, given: dict[str, Any], to_vllm: list[str]) -> list[str]:
    """The words after `vllm`.

    Args:
        given: of the plugin's `wavedraft` settings.

    Raises:
        ValueError: the checkpoint cannot draft, or the plugin does not know its family.
    """
    architecture = served_architecture(model, bool(given.get("adapter")))
    overrides = json.dumps({"architectures": [f"Wavedraft{architecture}"], "wavedraft": given})
    return ["serve", model, "--hf-overrides", overrides, *to_vllm]


def refuse_other_overrides(to_vllm: list[str]) -> None:
    """Of two --hf-overrides vLLM reads the last, and would serve without drafts, silently."""
    if any(word.replace("_", "-").startswith("--hf-overrides") for word in to_vllm):
        raise ValueError(
            "--hf-overrides is what `wavedraft serve` writes itself. Take its command from --print, and add your "
            "fields to that JSON."
        )


def served_architecture(model: str, has_adapter: bool) -> str:
    """The stock class that a checkpoint's config.json names."""
    config = config_of(model)
    if config.get("model_type") in RECURRENT_TYPES:
        raise ValueError(f"{model} is a recurrent-depth model, which vLLM does not run. Use transformers serve.")
    (architecture, *_) = config.get("architectures") or [""]
    if architecture not in SERVED_CLASSES:
        raise ValueError(
            f"{model} is a {architecture or 'checkpoint without `architectures`'}, and the plugin drafts for "
            f"{', '.join(SERVED_CLASSES)}. vLLM serves it without drafts: vllm serve {model}"
        )
    if not has_adapter and not config.get("tidar_config"):
        raise ValueError(f"{model} has no `tidar_config`, so it cannot draft by itself. Name its --adapter.")
    return architecture


def config_of(model: str) -> dict[str, Any]:
    """config.json of a folder, or of a repository of the Hub."""
    file = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model, "config.json"))
    if not file.is_file():
        raise ValueError(f"There is no {file}. Name a checkpoint folder, or ORG/NAME on the Hub.")
    return json.loads(file.read_text(encoding="utf-8"))


def vllm_program(named: str | None) -> str:
    """The path of the vllm command, in whose environment the plugin is.

    Raises:
        ValueError: one of them is missing: says what to install.
    """
    beside = Path(sys.executable).parent / "vllm"
    found = shutil.which(named or "vllm") or (str(beside) if beside.is_file() and not named else None)
    if found is None:
        raise ValueError(f"There is no command {named or 'vllm'}. {INSTALL}, or see the command with --print.")
    found = str(Path(found).absolute())
    python = python_of(found)
    if python.is_file():
        look = "from importlib.metadata import version; version('wavedraft-vllm')"
        if subprocess.run([str(python), "-c", look], capture_output=True).returncode:
            raise ValueError(
                f"{found} is there, but not its plugin: {python} -m pip install ./serving_vllm, from a clone of "
                "wavedraft."
            )
    return found


def python_of(program: str) -> Path:
    """The interpreter beside the vllm command; there may be none."""
    return Path(program).parent / "python"


def ask_the_plugin(program: str, model: str, given: dict[str, Any]) -> None:
    """Lets the plugin look at everything by itself: vLLM's own start is long, and so are its errors.

    Raises:
        ValueError: with the plugin's reason.
    """
    python = python_of(program)
    if not python.is_file():
        return
    asked = subprocess.run(
        [str(python), "-m", "wavedraft_vllm", model, json.dumps(given)], capture_output=True, text=True
    )
    if asked.returncode:
        raise ValueError((asked.stderr.strip().splitlines() or [f"{python} -m wavedraft_vllm failed."])[-1])
