"""What `wavedraft serve` asks before it starts vLLM: `python -m wavedraft_vllm MODEL SETTINGS`.

SETTINGS is the JSON of `wavedraft`'s fields. Nothing is printed where they can draft, and else the reason in one line.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from . import check_vllm_version
from .settings import DraftSettings, read_json


def check(model: str, settings: str) -> None:
    """
    Raises:
        ValueError: the settings, the adapter or the installed vLLM cannot draft for this model.
    """
    file = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model, "config.json"))
    config = read_json(file)
    config |= config.get("text_config") or {}
    if {"hidden_size", "num_hidden_layers", "vocab_size"} <= config.keys():  # else only vLLM knows, and it checks again
        DraftSettings.of(json.loads(settings), SimpleNamespace(**config), model)
    check_vllm_version()  # last, since it imports vLLM


if __name__ == "__main__":
    try:
        check(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
