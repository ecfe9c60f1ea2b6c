"""vLLM itself in a process of its own: as it runs on a CPU, by Model Runner V1 and without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
engine, asked, params = json.load(sys.stdin)
llm = LLM(dtype="float32", enforce_eager=True, **engine)
ask = llm.chat if isinstance(asked[0], list) else llm.generate
outputs = ask(asked, SamplingParams(**params), use_tqdm=False)
print("ANSWERS" + json.dumps([[[one.text, list(one.token_ids)] for one in output.outputs] for output in outputs]))
"""
AWAY = ("PYTHONPATH", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")  # of the tests' own environment


def plain_answers(model: Path, asked: list[Any], engine: dict[str, Any], **params: Any) -> list[list[Any]]:
    """The text and the ids of each answer, by prompt. A prompt is a chat, or {"prompt_token_ids": [...]}."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([{"model": str(model)} | engine, asked, params]),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in AWAY},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    return json.loads(line.removeprefix("ANSWERS"))
