"""vLLM's real OpenAI server in processes of its own, and what is asked of it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20


@contextmanager
def served(model: Path, adapter: Path, log: Path, options: dict[str, Any], *words: str) -> Iterator[str]:
    """The address of a server that drafts, as long as this is entered. `options` are fields of `wavedraft`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wavedraft = {"adapter": str(adapter)} | options
    overrides = {"architectures": ["WavedraftLlamaForCausalLM"], "wavedraft": wavedraft}
    words = ("--model", str(model), "--hf-overrides", json.dumps(overrides), "--port", str(port), *words)
    words += ("--dtype", "float32", "--enforce-eager", "--served-model-name", "tidar")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            raise TimeoutError(f"No server after ten minutes: {log.read_text()[-4000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, path: str, **asked: Any) -> Any:
    """The open answer of the server."""
    body = json.dumps({"model": "tidar", "temperature": 0} | asked).encode()
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"}, method="POST")
    return urllib.request.urlopen(request, timeout=1800)


def metric(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
