"""The command line: output and error messages."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import CompileConfig

from helpers_stock import save_tiny_stock
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM, convert
from wavedraft.bench import contenders
from wavedraft.cli import main
from wavedraft.commands.timed_runs import why_different
from wavedraft.commands.written_texts import told_of_identical
from wavedraft.generation.execution.compiled_layers import CompiledLayers
from wavedraft.training import gated_adapter_config


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "stock"
    save_tiny_stock(folder)
    save_tokenizer(folder, num_words=61)
    return folder


@pytest.fixture(scope="module")
def tidar(stock):
    convert(stock, stock.parent / "tidar", draft_length=4)
    return stock.parent / "tidar"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A stock and a TiDAR checkpoint with a learned table of 64 positions."""
    folder = tmp_path_factory.mktemp("tables")
    save_tiny_stock(folder / "stock", "gpt2")
    save_tokenizer(folder / "stock", num_words=61)
    convert(folder / "stock", folder / "tidar", draft_length=4)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `wavedraft ...` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def test_convert_says_what_it_did(run, stock, tmp_path):
    code, out, _ = run("convert", stock, tmp_path / "tidar", "--draft-length", 6)
    assert code == 0
    assert "TiDAR checkpoint of LlamaForCausalLM" in out and "drafts of 6" in out
    assert "2 of 2 layers: max abs difference 0.0" in out
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").tidar_config.draft_length == 6
    code, out, _ = run("convert", "--to-ar", tmp_path / "tidar", tmp_path / "back")
    assert code == 0 and "stock checkpoint of LlamaForCausalLM" in out
    code, out, _ = run("convert", stock, tmp_path / "fast", "--no-verify", "--link")
    assert code == 0 and "not compared (--no-verify)" in out


def test_a_mistake_is_one_line_and_exit_code_2(run, stock, tidar, tmp_path):
    (tmp_path / "pickled").mkdir()
    for arguments, message in [
        (["convert", stock, tidar], "--overwrite"),
        (["convert", stock, tmp_path / "new", "--draft-length", 99], "between 1 and 64"),
        (["convert", tmp_path / "pickled", tmp_path / "new"], "config.json"),
        (["generate", stock, "w1 w2"], "Convert it first"),
        (["generate", tidar, "w1 w2", "--draft-length", 5], "between 1 and 4"),
        (["generate", tidar, "w1 w2", "--dtype", "int3"], "--dtype"),
        (["generate", tidar, "--raw", ""], "empty"),
        (["generate", tidar, "w1", "--adapter", tmp_path / "no-adapter"], "no-adapter"),
    ]:
        code, _, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("wavedraft: ")]
        assert code == 2 and len(lines) == 1 and message in lines[0], (arguments, err)
        assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_what_can_be_told_is_told_before_the_weights_are_read(run, tidar, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tidar, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
    (tmp_path / "empty").mkdir()
    audit = ["audit", folder, "--prompts", tmp_path / "prompts.txt"]
    for arguments, message in [
        (["generate", folder, "w1", "--draft-length", 5], "between 1 and 4"),
        (["generate", folder, "w1", "--num-branches", 9], "--num-branches must be"),
        (["generate", folder, "w1", "--num-branches", "many"], "--num-branches must be"),
        (["generate", folder, "w1", "--exact", "always"], "--exact must be"),
        (["generate", folder, "w1", "--exact", "tie-safe", "--temperature", 1], "greedy decoding"),
        (["generate", folder, "w1", "--num-branches", "auto", "--seed", 1, "--temperature", 1], "--seed promises"),
        (["generate", folder, "w1", "--temperature", 1, "--top-p", 1.5], "--top-p"),
        (["generate", folder, "w1", "--temperature", 1, "--top-k", -3], "--top-k"),
        (["generate", folder, "w1", "--temperature", 1, "--min-p", 2], "--min-p"),
        (["generate", folder, "w1", "--top-k", 3], "--temperature"),
        (["generate", folder, "w1", "--repetition-penalty", 0], "--repetition-penalty must be above 0"),
        (["generate", folder, "w1", "--seed", -1], "--seed"),
        (["generate", folder, "w1", "--seed", 3], "--seed is for sampling"),
        (["generate", folder, "w1", "--draft-length", 0, "--num-branches", 2], "--num-branches has no effect"),
        (["generate", folder, "w1", "--draft-length", 0, "--exact", "tie-safe"], "--exact has no effect"),
        (
            ["convert", folder, tmp_path / "back", "--to-ar", "--draft-length", 2],
            "--draft-length has no effect with --to-ar",
        ),
        (["data", "regenerate", folder, tmp_path / "prompts.txt", tmp_path / "o", "--seed", 1], "--seed is for sampl"),
        (
            ["data", "regenerate", folder, tmp_path / "prompts.txt", tmp_path / "o", "--device", "no"],
            "--device must be",
        ),
        ([*audit, "--policy", "exact"], "--policy is for recurrent-depth models"),
        (["generate", folder, "w1", "--policy", "exact"], "--policy is for recurrent-depth models"),
        (["generate", folder, "w1", "--device", "tpu9"], "--device"),
        (["generate", folder, "--raw", "w1", ""], "empty"),
        (["generate", folder, "w1", "--adapter", tmp_path / "empty"], "adapter_config.json"),
        (["chat", folder, "--draft-length", 5], "between 1 and 4"),
        ([*audit, "--num-branches", 9], "--num-branches must be"),
        ([*audit, "--adapter", "a/b/c"], "no adapter a/b/c"),
        ([*audit, "--draft-length", 5], "between 1 and 4"),
    ]:
        code, out, err = run(*arguments)
        assert code == 2 and message in err and "Traceback" not in err, (arguments, err)
        assert not out and "weights" not in err and "safetensors" not in err


@pytest.mark.parametrize("arguments", [["convert", "a", "b", "--nope"], ["nope"], ["generate", "only-a-model"]])
def test_an_unknown_word_is_exit_code_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback" not in err


def test_generate_streams_counts_and_compares(run, tidar):
    code, out, _ = run("generate", tidar, "w1 w2 w3", "w7", "--max-new-tokens", 9, "--compare", "--raw")
    assert code == 0 and "identical: yes" in out
    model = TiDARForCausalLM.from_pretrained(tidar)
    for words in ([6, 7, 8], [12]):  # w1 is id 6
        ids = model.generate(torch.tensor([words]), max_new_tokens=9, draft_length=0)[0, len(words) :].tolist()
        text = " ".join(f"w{n - 5}" for n in ids if n >= 5)
        assert text in out, "the text is streamed"
    assert out.count("plain") >= 1 and " 18 " in out, "both prompts' tokens are summed"


def test_generate_takes_a_gated_adapter_and_keeps_the_text(run, tidar, tmp_path):
    model = TiDARForCausalLM.from_pretrained(tidar)
    torch.manual_seed(0)
    get_peft_model(model, gated_adapter_config(model, rank=4, init_lora_weights=False)).save_pretrained(tmp_path / "a")
    options = ["--max-new-tokens", 9, "--compare"]
    plain, adapted = (
        run("generate", tidar, "w1 w2", *options),
        run("generate", tidar, "w1 w2", *options, "--adapter", tmp_path / "a"),
    )
    assert adapted[0] == 0 and "identical: yes" in adapted[1]
    assert plain[1].split("prompt")[0] == adapted[1].split("prompt")[0]


def test_a_seed_draws_the_same_text_again_without_drafts_too(run, tidar):
    options = ["--temperature", 1.5, "--max-new-tokens", 9, "--draft-length", 0]
    texts = [run("generate", tidar, "w1 w2", *options, "--seed", seed)[1].split("prompt")[0] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_samples_with_a_seed(run, tidar):
    options = ["--temperature", 1.5, "--top-k", 20, "--seed", 7, "--max-new-tokens", 9]
    first, second = (run("generate", tidar, "w1 w2", *options)[1].split("prompt")[0] for _ in range(2))
    other = run("generate", tidar, "w1 w2", *options[:-4], "--seed", 8, "--max-new-tokens", 9)[1].split("prompt")[0]
    assert first == second != other


def test_prompts_of_a_file_become_rows_of_json(run, tidar, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w7"}\n')
    options = ["--max-new-tokens", 9, "--raw", "--compare", "--output", "json"]
    code, out, err = run("generate", tidar, "--prompts", tmp_path / "rows.jsonl", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["w1 w2 w3", "w7"]
    model = TiDARForCausalLM.from_pretrained(tidar)
    for row, words in zip(rows, ([6, 7, 8], [12]), strict=True):
        ids = model.generate(torch.tensor([words]), max_new_tokens=9, draft_length=0)[0, len(words) :].tolist()
        assert row["text"] == " ".join(f"w{n - 5}" for n in ids if n >= 5)
        assert row["tokens"] == len(ids) and row["forwards"] < row["plain_forwards"] + 1 and row["seconds"] > 0
        assert row["identical"] is True
    assert err.startswith("Next: wavedraft audit") and err.count("\n") == 1


def test_a_text_that_is_longer_than_a_position_table_is_refused_before_the_weights_are_read(run, tables, tmp_path):
    file, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    file.write_text("w1\n" + "w1 " * 60 + "\n")
    lines = {
        "audit": ["audit", tables / "tidar", "--prompts", file, "--raw"],
        "generate": ["generate", tables / "tidar", "--prompts", file, "--raw", "--draft-length", 0],
        "data": ["data", "regenerate", tables / "stock", file, output, "--dtype", "float32"],
    }
    for name, line in lines.items():
        num_read = 67 if name == "data" else 66  # the template writes one token more
        for max_new in (7, 5 - (name == "data")):
            code, _, err = run(*line, "--max-new-tokens", max_new)
            assert (code == 0) == (max_new < 7), (line, err)
            if code:
                assert f"line 2 has {num_read - 6} tokens. With 7 new ones, {num_read} are read, but" in err
                assert "table has 64 rows" in err and not output.exists()


def test_answers_of_the_model_are_rows_to_learn_from(run, tidar, tmp_path):
    prompts = [
        {"conversations": [{"from": "human", "value": f"w{n} w2"}, {"from": "gpt", "value": "w9"}]} for n in (3, 4)
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps(prompts))
    line = ["data", "regenerate", tidar, tmp_path / "sharegpt.json", tmp_path / "own.jsonl", "--max-new-tokens", 12]
    code, _, err = run(*line, "--dtype", "float32")
    written = [json.loads(row) for row in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert code == 0 and [row["prompt"] for row in written] == ["w3 w2", "w4 w2"], err
    line = ["train", tidar, tmp_path / "own.jsonl", tmp_path / "run", "--max-steps", 1, "--eval-prompts"]
    code, out, err = run(*line, tmp_path / "sharegpt.json", "--num-eval-prompts", 1)
    assert code == 0 and "after: " in out, err


def test_messages_are_read_as_turns_by_the_template(run, tidar, tmp_path):
    folder = tmp_path / "chatty"
    shutil.copytree(tidar, folder)
    template = "{% for m in messages %}{{ '<tool> ' if m.role == 'user' else ' ' }}{{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    question = {"messages": [*turns, {"role": "user", "content": "w3 w4"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "answered.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = ["--max-new-tokens", 4, "--output", "json", "--prompts"]
    code, out, _ = run("generate", folder, *options, tmp_path / "rows.jsonl")
    ids = torch.tensor([[3, 6, 7, 3, 8, 9]])  # <tool> w1 w2 <tool> w3 w4
    expected = TiDARForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=4)[0, 6:].tolist()
    row = json.loads(out)
    assert code == 0 and row["messages"] == question["messages"]
    assert row["text"] == " ".join(f"w{n - 5}" for n in expected if n >= 5)
    code, out, _ = run("generate", folder, *options, tmp_path / "answered.jsonl")
    assert code == 0 and json.loads(out)["prompt"] == "w1", "the last answer is the model's to write"
    code, _, err = run("generate", folder, "--raw", *options, tmp_path / "rows.jsonl")
    assert code == 2 and "`messages` need the chat template" in err


def test_compiled_steps_write_the_same_text(run, tidar, monkeypatch):
    monkeypatch.setattr(contenders, "CompileConfig", partial(CompileConfig, backend="eager", mode="default"))
    calls, compiled_steps = [], CompiledLayers.step

    def step(self, *args):
        calls.append(args)
        return compiled_steps(self, *args)

    monkeypatch.setattr(CompiledLayers, "step", step)
    options = ["w1 w2 w3", "--max-new-tokens", 9, "--raw", "--dtype", "float32", "--num-branches", "all"]
    code, out, err = run("generate", tidar, *options, "--compile", "--compare")
    assert code == 0 and "identical: yes" in out and calls
    assert err.startswith("Compiling the decode steps")


def test_texts_that_differ_are_counted_and_the_reason_is_told():
    model = tiny_tidar("llama")
    assert told_of_identical([True, True], why_different(model)) == "identical: yes"
    assert told_of_identical([True, False], why_different(model)).startswith("identical: 1 of 2. In float32 they must")
    assert "trust=0.5" in why_different(model, trust=0.5)
    told = told_of_identical([False], why_different(model.to(torch.bfloat16)))
    assert told.startswith("identical: 0 of 1. In bfloat16 two tokens can be nearly equal")
