"""The command line answers --help and refuses options without importing torch or transformers.

No clock is read: what makes an answer slow is those two, and a process that has not imported them is quick.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from huggingface_hub import constants

import wavedraft
from helpers_hub_server import HubServer
from wavedraft.cli import EXAMPLES, app
from wavedraft.commands import convert, early_checks, options
from wavedraft.commands.early_checks import check_repository, load_library
from wavedraft.commands.train import DRAFT_LOSSES, MODES
from wavedraft.conversion.convert import LONGEST_DRAFT
from wavedraft.generation.recurrent.options_recurrent import POLICIES, PRESETS
from wavedraft.modeling_recurrent.checkpoint_recurrent import SERVED
from wavedraft.modeling_tidar.objective_tidar import DRAFT_LOSSES as TAUGHT_LOSSES
from wavedraft.training.training_arguments import RECURRENT_MODES, TIDAR_MODES

ROOT = Path(__file__).parents[1]
# Runs each command line of a list in one process, as the console script does; prints code and words of each as JSON.
RUNS = """
import contextlib, io, json, sys
sys.path.insert(0, {root!r})
from wavedraft_command import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["wavedraft", *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    slow = {{"torch", "transformers", "peft", "accelerate", "numpy", "prompt_toolkit", "gradio"}}
    heavy = sorted(slow & set(sys.modules))
    print(json.dumps([code, out.getvalue(), heavy]))
"""
TIDAR, DEPTH, HUB = "{tidar}", "{depth}", "some-org/some-model"
REFUSED = [
    (["nope"], "No such command"),
    (["generate", TIDAR, "w1", "--nope"], "--nope"),
    (["generate", TIDAR], "Give prompts either"),
    (["generate", TIDAR, "w1", "--prompts", "{prompts}"], "Give prompts either"),
    (["generate", TIDAR, "--prompts", "{nowhere}"], "There is no file"),
    (["generate", "a/b/c", "w1"], "There is no folder a/b/c"),
    (["generate", HUB, "w1", "--dtype", "int3"], "--dtype must be one of auto, float32"),
    (["generate", HUB, "w1", "--device", "tpu9"], "--device must be one torch knows"),
    (["generate", HUB, "w1", "--output", "xml"], "--output must be one of text, json"),
    (["generate", HUB, "w1", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["generate", HUB, "w1", "--temperature", "-1"], "--temperature"),
    (["generate", HUB, "w1", "--temperature", "1", "--top-p", "1.5"], "--top-p"),
    (["generate", HUB, "w1", "--temperature", "1", "--top-k", "-3"], "--top-k"),
    (["generate", HUB, "w1", "--temperature", "1", "--min-p", "2"], "--min-p"),
    (["generate", HUB, "w1", "--top-k", "3"], "--top-k is for sampling: give a --temperature"),
    (["generate", HUB, "w1", "--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
    (["generate", HUB, "w1", "--seed", "-1"], "--seed"),
    (["generate", HUB, "w1", "--exact", "always"], "--exact must be one of tie-safe"),
    (["generate", HUB, "w1", "--exact", "tie-safe", "--temperature", "1"], "--exact is for greedy decoding"),
    (["generate", HUB, "w1", "--exact", "tie-safe", "--compile"], "--compile has one"),
    (["generate", HUB, "w1", "--trust", "1.5"], "--trust"),
    (["generate", HUB, "w1", "--trust", "0.5", "--exact", "tie-safe"], "--trust 0.5 is another text"),
    (["generate", HUB, "w1", "--trust", "0.5", "--temperature", "1"], "--trust 0.5 is for greedy decoding"),
    (["chat", HUB, "--trust", "0.5", "--draft-length", "0"], "--draft-length 0 drafts nothing"),
    (["audit", TIDAR, "--prompts", "{prompts}", "--trust", "0", "--num-branches", "auto"], "needs every branch"),
    (["generate", TIDAR, "w1", "--trust", "0.5", "--num-branches", "1"], "needs every branch, but --num-branches is 1"),
    (["generate", DEPTH, "w1", "--trust", "0.5"], "--trust is TiDAR's"),
    (["bench", TIDAR, "--trust", "0.5", "--temperatures", "0,1"], "--trust is for greedy decoding"),
    (["generate", HUB, "w1", "--num-branches", "many"], "--num-branches must be auto, all or a number"),
    (["generate", HUB, "w1", "--num-branches", "0"], "--num-branches must be auto, all or a number"),
    (["generate", HUB, "w1", "--num-branches", "auto", "--seed", "1", "--temperature", "1"], "--seed promises"),
    (["generate", HUB, "w1", "--draft-length", "0", "--num-branches", "2"], "--num-branches has no effect"),
    (["generate", HUB, "w1", "--draft-length", "0", "--exact", "tie-safe"], "--exact has no effect"),
    (["generate", HUB, "w1", "--draft-length", "0", "--compile"], "--compile compiles steps that draft"),
    (["generate", HUB, "w1", "--policy", "fastest"], "--policy must be one of"),
    (["generate", HUB, "w1", "--num-recurrences", "0"], "--num-recurrences"),
    (["generate", HUB, "w1", "--preset", "best"], "--preset must be one of"),
    (["generate", TIDAR, "w1", "--policy", "exact"], "--policy is for recurrent-depth models"),
    (["generate", TIDAR, "w1", "--draft-length", "5"], "between 1 and 4, the length this checkpoint"),
    (["generate", TIDAR, "w1", "--num-branches", "5"], "between 1 and 4, the tokens drafted"),
    (["generate", TIDAR, "w1", "--draft-length", "2", "--num-branches", "3"], "between 1 and 2"),
    (["generate", TIDAR, "w1", "--seed", "1"], "--seed is for sampling"),
    (["generate", TIDAR, "w1", "--adapter", "{tidar}"], "adapter_config.json"),
    (["generate", DEPTH, "w1", "--packed-weights"], "--packed-weights is TiDAR's"),
    (["generate", DEPTH, "w1", "--adapter", "a/b"], "--adapter is for TiDAR checkpoints"),
    (["generate", HUB, "w1", "--trace", "x.png"], "--trace must name a file that ends in .html or .svg"),
    (["generate", HUB, "w1", "--trace", "{nowhere}/x.svg"], "there is no folder"),
    (["generate", "{full}", "w1"], "is not a checkpoint folder: it has no config.json"),
    (["generate", "{adapter}", "w1"], "holds an adapter. Name the model that it belongs to, and pass --adapter"),
    (["chat", TIDAR, "--top-p", "0.9"], "--top-p is for sampling"),
    (["chat", TIDAR, "--draft-length", "9"], "between 1 and 4"),
    (["web", TIDAR, "--port", "70000"], "--port"),
    (["web", TIDAR, "--dtype", "int3"], "--dtype must be one of auto, float32"),
    (["web", DEPTH, "--packed-weights"], "--packed-weights is TiDAR's"),
    (["web", TIDAR, "--host", "203.0.113.1"], "--host 203.0.113.1 --port 7860 cannot be served"),
    (["audit", TIDAR], "--prompts"),
    (["audit", TIDAR, "--prompts", "{nowhere}"], "There is no file"),
    (["audit", TIDAR, "--prompts", "{prompts}", "--compile", "--exact", "tie-safe"], "--compile has one"),
    (["bench", TIDAR, "--batch-sizes", "1,x"], "--batch-sizes must be a list of numbers"),
    (["bench", TIDAR, "--draft-lengths", "2", "--num-branches", "3"], "`num_branches` must be"),
    (["bench", TIDAR, "--repeats", "0"], "--repeats"),
    (["convert", "a", "b", "--draft-length", "99"], "--draft-length must be between 1 and 64"),
    (["convert", "a", "b", "--to-ar", "--draft-length", "2"], "--draft-length has no effect with --to-ar"),
    (["push", "{nowhere}", "org/name"], "is no folder"),
    (["serve", "a/b/c", "--print"], "There is no folder a/b/c"),
    (["serve", DEPTH, "--print"], "which vLLM does not run"),
    (["serve", TIDAR, "--print"], "the plugin drafts for LlamaForCausalLM"),
    (["serve", TIDAR, "--adapter", "{tidar}"], "adapter_config.json"),
    (["serve", TIDAR, "--draft-length", "1"], "--draft-length"),
    (["train", TIDAR, "d", "o", "--mode", "magic"], "--mode must be one of"),
    (["train", TIDAR, "d", "o", "--load-in-4bit", "--load-in-8bit"], "exclude each other"),
    (["train", TIDAR, "d", "o", "--eval-steps", "3"], "Give --eval-prompts too"),
    (["train", TIDAR, "d", "{full}"], "is not empty"),
    (["data", "regenerate", HUB, "{prompts}", "o", "--seed", "1"], "--seed is for sampling"),
    (["data", "regenerate", HUB, "{rows}", "o"], "rows.jsonl, line 2 has `words`"),
    (["generate", HUB, "--prompts", "{rows}"], "rows.jsonl, line 2 has `words`"),
    (["audit", HUB, "--prompts", "{rows}"], "rows.jsonl, line 2 has `words`"),
    (["audit", HUB, "--prompts", "{prompts}", "--num-prompts", "3"], "--num-prompts must be at most 2"),
    (["bench", HUB, "--prompts", "{rows}"], "rows.jsonl, line 2 has `words`"),
    (["bench", HUB, "--prompts", "{rows}", "--columns", "ask=words"], "'ask', which is no part of a row"),
    (["bench", HUB, "--columns", "prompt=words"], "--columns has no effect without --prompts"),
    (["generate", HUB, "w1", "--columns", "prompt=words"], "--columns has no effect without --prompts"),
    (["train", TIDAR, "{rows}", "o"], "rows.jsonl, line 1 has a prompt and no answer"),
    (["train", TIDAR, "{rows}", "o", "--columns", "text=words"], "rows.jsonl, line 1 has `prompt`"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of each family with its config alone, and files."""
    root = tmp_path_factory.mktemp("light")
    configs = {"tidar": {"model_type": "llama", "tidar_config": {"draft_length": 4}}, "depth": {"model_type": "ouro"}}
    for name, config in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (root / "prompts.txt").write_text("w1\nw2\n")
    (root / "rows.jsonl").write_text('{"prompt": "w1"}\n{"words": "w2"}\n')
    return {
        "tidar": root / "tidar",
        "depth": root / "depth",
        "prompts": root / "prompts.txt",
        "rows": root / "rows.jsonl",
        "adapter": root / "adapter",
        "nowhere": root / "nowhere",
        "full": root,
    }


def answers_to(lines):
    """Exit code, what was printed, and the heavy modules that were imported by then, of each command line."""
    code = [sys.executable, "-c", RUNS.format(root=str(ROOT)), json.dumps(lines)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


def verbs(group, words=()):
    yield list(words)
    for name, command in getattr(group, "commands", {}).items():
        yield from verbs(command, [*words, name])


def test_every_help_and_the_version_come_without_torch():
    lines = [[*words, "--help"] for words in verbs(typer.main.get_command(app))]
    assert len(lines) == len(EXAMPLES) + 2, "the program, and `data`"
    for line, (code, printed, heavy) in zip(lines, answers_to(lines), strict=True):
        assert code == 0 and "Usage:" in printed and not heavy, (line, heavy)
        is_verb = line[:-1] not in ([], ["data"])
        assert ("Example:" in printed) == is_verb, line
    [(code, printed, heavy)] = answers_to([["--version"]])
    assert (code, printed.strip(), heavy) == (0, f"wavedraft {wavedraft.__version__}", [])


def test_refused_options_are_told_without_torch(places):
    lines = [[word.format(**places) for word in words] for words, _ in REFUSED]
    for line, (_, message), (code, printed, heavy) in zip(lines, REFUSED, answers_to(lines), strict=True):
        assert code == 2 and message in " ".join(printed.split()), (line, printed)
        assert not heavy, (line, heavy)
        assert "Traceback" not in printed


def test_the_words_that_are_checked_early_are_those_of_the_library():
    assert set(options.POLICIES) == set(POLICIES) and set(options.PRESETS) == set(PRESETS)
    assert early_checks.RECURRENT_TYPES == SERVED
    assert set(MODES) == {*TIDAR_MODES, *RECURRENT_MODES}
    assert set(DRAFT_LOSSES) == set(TAUGHT_LOSSES)
    assert convert.LONGEST_DRAFT == LONGEST_DRAFT


def test_every_option_says_what_it_does_in_whole_sentences():
    for words in verbs(typer.main.get_command(app)):
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text and text[-1] in ".)", (words, parameter.name, text)


def test_importing_the_library_is_whole_though_its_names_are_lazy():
    """In a process of its own: what was imported before must not help."""
    code = """
        import wavedraft
        assert set(wavedraft.__all__) <= set(dir(wavedraft))
        import sys
        assert "wavedraft.conversion" not in sys.modules
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        assert "huginn_raven" in CONFIG_MAPPING and "ouro" in CONFIG_MAPPING
        from wavedraft import *
        assert TiDARForCausalLM is wavedraft.TiDARForCausalLM is wavedraft.modeling_tidar.TiDARForCausalLM
        assert convert.__module__ == "wavedraft.conversion.convert"
        try:
            wavedraft.nothing
        except AttributeError as error:
            assert "no attribute 'nothing'" in str(error)
        else:
            raise AssertionError
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_is_nowhere_is_refused_after_one_question(monkeypatch):
    server = HubServer()
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + files)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="There is no folder models/none, and no repository of this name on the Hub"):
        check_repository("models/none")
    assert len([request for request in server.requests if "models/none" in request]) == 1
    server.shutdown()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + files)  # nobody listens
    for checked in (check_repository, load_library):
        with pytest.raises(ValueError, match=r"There is no folder models/none, and the Hub cannot be reached \(Conn"):
            checked("models/none")
    with pytest.raises(ValueError, match="There is no folder models/adapter"):
        load_library(str(ROOT), "models/adapter")
