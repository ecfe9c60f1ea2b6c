"""Runs code in a fresh process in which wavedraft cannot be imported."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BLOCKED = """
    import json, sys

    OURS = ("wavedraft", "modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion")

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in OURS:
                raise ImportError(f"{name} is blocked in this test")

    sys.meta_path.insert(0, Blocked())
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    arguments = json.loads(sys.argv[1])
"""


def run_alone(code: str, arguments: dict[str, Any], folder: Path, **environment: str) -> Any:
    """Runs `code` and returns its `answer`. `code` can use `torch`, `AutoModelForCausalLM` and `arguments`.

    Args:
        folder: the working folder of the process, also for its Hub caches.
    """
    ending = """
    assert not any(name.split(".")[0] == "wavedraft" for name in sys.modules)
    print(json.dumps(answer))
    """
    program = "".join(textwrap.dedent(part) for part in (BLOCKED, code, ending))
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
