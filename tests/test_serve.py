"""`wavedraft serve` writes vLLM's command line, and says what is missing. The plugin has tests of its own."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wavedraft.cli import app
from wavedraft.commands import serve as serving

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct-gated"


@pytest.fixture
def checkpoint(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tidar_config": {"draft_length": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_the_command_line_is_printed(checkpoint):
    given = ["--adapter", ADAPTER, "--draft-length", "4", "--draft-max-batch", "32", "--draft-keep", "0.35"]
    done = run(checkpoint, *given, "--print", "--", "--port", "8001")
    assert done.exit_code == 0, done.output
    program, verb, model, flag, overrides, *rest = shlex.split(done.stdout)
    assert (program, verb, model, flag, rest) == (
        "vllm",
        "serve",
        str(checkpoint),
        "--hf-overrides",
        ["--port", "8001"],
    )
    assert json.loads(overrides) == {
        "architectures": ["WavedraftLlamaForCausalLM"],
        "wavedraft": {"adapter": str(ADAPTER.resolve()), "draft_length": 4, "keep": 0.35, "max_batch": 32},
    }


def test_a_checkpoint_that_cannot_draft_by_itself_needs_an_adapter(checkpoint):
    assert run(checkpoint, "--print").exit_code == 0
    (checkpoint / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "Name its --adapter" in str(run(checkpoint, "--print").exception)
    assert run(checkpoint, "--adapter", ADAPTER, "--print").exit_code == 0


@pytest.mark.parametrize("word", ["--hf-overrides", "--hf_overrides={}", "--hf-overrides.rope_theta"])
def test_overrides_of_your_own_are_refused(checkpoint, word):
    """vLLM would read them in place of those that make it draft."""
    assert "add your fields to that JSON" in str(run(checkpoint, "--print", "--", word, "{}").exception)


def test_where_vllm_is_missing_it_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setenv("PATH", str(checkpoint))
    monkeypatch.setattr("sys.executable", str(checkpoint / "python"))
    message = str(run(checkpoint).exception)
    assert "There is no command vllm" in message and "pip install 'vllm>=0.32,<0.33'" in message
    assert "--vllm serving/bin/vllm" in message


def test_where_the_plugin_is_missing_it_says_so_and_else_vllm_is_run(checkpoint, monkeypatch):
    program, python = checkpoint / "vllm", checkpoint / "python"
    for file, text in ((program, "exit 0"), (python, "exit 1")):
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    assert "but not its plugin" in str(run(checkpoint, "--vllm", program).exception)
    python.write_text("#!/bin/sh\nexit 0\n")
    ran = []
    monkeypatch.setattr(serving.os, "execv", lambda path, words: ran.append((path, words)))
    assert run(checkpoint, "--vllm", program).exit_code == 0
    assert ran[0][0] == str(program) and ran[0][1][1:3] == ["serve", str(checkpoint)]


def test_what_the_plugin_refuses_is_said_before_vllm_starts(checkpoint, monkeypatch):
    """The real plugin, as another interpreter runs it, with a vLLM of which only the version is there."""
    program, python, stub = checkpoint / "vllm", checkpoint / "python", checkpoint / "stub"
    for folder in (stub / "vllm", stub / "wavedraft_vllm-0.1.0.dist-info"):
        folder.mkdir(parents=True)
    (stub / "vllm" / "__init__.py").write_text('__version__ = "0.32.1"')
    (stub / "wavedraft_vllm-0.1.0.dist-info" / "METADATA").write_text("Name: wavedraft-vllm\nVersion: 0.1.0\n")
    program.write_text("#!/bin/sh\nexit 0\n")
    paths = f"{stub}:{ROOT / 'serving_vllm'}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    python.chmod(0o755)
    monkeypatch.setattr(serving.os, "execv", lambda path, words: pytest.fail("vLLM was started"))
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
    config = json.loads((checkpoint / "config.json").read_text())
    words = [checkpoint, "--adapter", ADAPTER, "--vllm", program]

    def refusal(*more, version="0.32.1", **other):
        (checkpoint / "config.json").write_text(json.dumps(config | sizes | other))
        (stub / "vllm" / "__init__.py").write_text(f'__version__ = "{version}"')
        return str(run(*words, *more).exception)

    assert "taught on another model" in refusal(hidden_size=960)
    assert "must be an integer from 2 to 8" in refusal("--draft-length", 9)
    assert "is tested with vLLM from 0.32" in refusal(version="0.33.0")
    other = checkpoint / "lora"
    other.mkdir()
    for file in ADAPTER.glob("*.safetensors"):
        (other / file.name).symlink_to(file)
    stored = json.loads((ADAPTER / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(stored | {"alora_invocation_tokens": None}))
    words[2] = other
    assert "names no mask token" in refusal()
    words[2] = ADAPTER
    ran = []
    monkeypatch.setattr(serving.os, "execv", lambda path, words: ran.append(path))
    assert refusal() == "None" and ran == [str(program)]


def test_the_verb_and_the_plugin_know_the_same_families():
    text = (ROOT / "serving_vllm" / "wavedraft_vllm" / "__init__.py").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("MODELS = ")]
    assert tuple(f"{name}ForCausalLM" for name in eval(line.removeprefix("MODELS = "))) == serving.SERVED_CLASSES


def test_the_plugin_imports_nothing_of_wavedraft_or_transformers():
    for path in (ROOT / "serving_vllm" / "wavedraft_vllm").glob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        imported = {words[1].split(".")[0] for words in lines if words and words[0] in ("import", "from")}
        assert not imported & {"wavedraft", "transformers", "peft"}, path
