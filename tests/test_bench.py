"""The bench: counts equal those of hooks, texts are compared row by row, runs alternate, and gaps are reported."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, CompileConfig

from helpers_recurrent import random_model
from helpers_stock import save_tiny_stock
from helpers_tidar import CountedForwards, plain_greedy_loop, random_prompts, tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft import convert
from wavedraft.bench import contenders as bench_contenders
from wavedraft.bench import measure as bench_measure
from wavedraft.bench.contenders import compiled_keywords, contenders_of, without_adapter
from wavedraft.bench.instruments import counted, peak_bytes
from wavedraft.bench.measure import batch_of, bench
from wavedraft.bench.settings import OWN_LENGTH, Settings
from wavedraft.cli import main
from wavedraft.generation.drafting import draft_planner
from wavedraft.generation.execution.packed_linear import PackedLinear
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.training import gated_adapter_config

NUM_NEW = 9


def models(**changes):
    model = tiny_tidar("llama", draft_length=4, **changes)
    return model, without_adapter(model)


def prompts_of(*lengths):
    return [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]


def benched(settings, num_kinds=2, assistant=None):
    model, stock = models()
    prompts = {f"kind {kind}": prompts_of(5 + kind, 8, 7) for kind in range(num_kinds)}
    contenders = contenders_of(model, stock, settings, assistant)
    return bench(contenders, prompts, random_prompts(1, 30)[0], settings), prompts, contenders, model


SMALL = {"draft_lengths": (4,), "num_branches": (1, "all"), "repeats": 2, "num_batches": 1, "max_new_tokens": NUM_NEW}


def test_what_is_counted_is_what_another_hook_counts_and_texts_are_compared_row_by_row():
    settings = Settings(batch_sizes=(1, 3), **SMALL | {"repeats": 1, "num_batches": 2})
    found, prompts, contenders, _ = benched(settings)
    assert {(run.batch_size, run.batch) for run in found.runs} == {(1, 0), (1, 1), (3, 0)}, "a prompt is in two batches"
    for run in found.runs:
        (contender,) = (contender for contender in contenders if contender.name == run.contender)
        ids, mask = batch_of(prompts[run.kind], run.batch_size, OWN_LENGTH, torch.ones(1), run.batch)
        hook = CountedForwards(contender.model)
        contender.model.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, **contender.keywords
        )
        assert run.num_forwards == len(hook.num_queries)
        assert run.num_query_tokens == sum(hook.num_queries[1:])
        assert run.num_identical == run.batch_size  # float32
        assert 0 < run.first_token_seconds < run.seconds
    assert {run.num_forwards for run in found.runs if run.contender in ("AR", "no drafts")} == {NUM_NEW}
    assert any(run.num_query_tokens == (run.num_forwards - 1) * 20 for run in found.runs if run.contender == "K=4 B=4")


def test_what_is_counted_where_the_network_is_called_is_what_a_hook_counts():
    """Which is how steps that are CUDA graphs are counted."""
    model, stock = models()
    contenders = contenders_of(model, stock, Settings(draft_lengths=(4,), num_branches=(1, 3, "all")))
    ids = random_prompts(2, 6)
    for contender in contenders:
        if not contender.keywords.get("draft_length"):
            continue
        hook = CountedForwards(model)
        with counted(replace(contender, is_counted_within=True)) as counts:
            model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, **contender.keywords)
        assert counts.num_queries == hook.num_queries and len(counts.num_queries) > 1


def test_every_contender_has_its_turn_before_any_has_another():
    settings = Settings(batch_sizes=(1,), **SMALL)
    found, *_ = benched(settings)
    names = ["AR", "lookup", "no drafts", "K=4 B=1", "K=4 B=4"]
    assert found.contenders == names
    rounds = [found.runs[start : start + len(names)] for start in range(0, len(found.runs), len(names))]
    assert len(rounds) == settings.repeats * 2
    for of_round in rounds:
        assert sorted(run.contender for run in of_round) == sorted(names)
        assert len({(run.kind, run.repeat) for run in of_round}) == 1
    assert len({of_round[0].contender for of_round in rounds}) > 1, "the same one is always first"


@pytest.mark.parametrize("has_packed_weights", [False, True])
def test_forwards_are_timed_over_the_weights_that_ours_read(has_packed_weights, monkeypatch):
    model, stock = models()
    settings = Settings(batch_sizes=(1,), has_packed_weights=has_packed_weights, **SMALL)
    seen = []

    def time_forwards(timed, *others):
        seen.append(type(timed.lm_head) is PackedLinear)
        return []

    monkeypatch.setattr("wavedraft.bench.measure.time_forwards", time_forwards)
    bench(contenders_of(model, stock, settings), {"all": prompts_of(5)}, torch.ones(1), settings)
    assert seen == [has_packed_weights]


def test_a_text_that_differs_is_not_called_identical(monkeypatch):
    model, stock = models()
    settings = Settings(batch_sizes=(3,), **SMALL)
    contenders = contenders_of(model, stock, settings)
    prompts = prompts_of(5, 8, 7)
    unlike = stock.generate(prompts[1][None], max_new_tokens=NUM_NEW, do_sample=False)[0, -1].item()
    contenders[1].keywords.update(suppress_tokens=[unlike])
    contenders[1].keywords.pop("prompt_lookup_num_tokens")
    found = bench(contenders[:2], {"all": prompts}, torch.ones(1), settings)
    plain, other = (
        [
            model.generate(ids[None], max_new_tokens=NUM_NEW, do_sample=False, draft_length=0, **keywords).tolist()
            for ids in prompts
        ]
        for keywords in ({}, {"suppress_tokens": [unlike]})
    )
    expected = sum(one == another for one, another in zip(plain, other, strict=True))
    assert expected < 3
    assert {run.num_identical for run in found.runs if run.contender == "lookup"} == {expected}


def test_packed_weights_are_for_all_of_ours_and_for_nothing_of_theirs():
    model, stock = tiny_tidar(draft_length=4), object()
    settings = Settings(num_branches=(1, "auto"), has_compiled=True, has_packed_weights=True)
    for one in contenders_of(model, stock, settings):
        assert one.keywords.get("packed_weights", False) is (one.model is model)


def test_the_line_named_default_is_generate_without_a_keyword():
    model, stock = tiny_tidar(draft_length=4), object()
    settings = Settings(num_branches=(1, "auto"), has_compiled=True)
    by_name = {one.name: one.keywords for one in contenders_of(model, stock, settings)}
    assert by_name["default"] == {} and by_name["default compiled"].keys() == compiled_keywords().keys()
    assert "packed_weights" not in by_name["K=8 B=1"] and "draft_length" not in by_name["default compiled"]
    packed = contenders_of(model, stock, replace(settings, has_packed_weights=False))
    assert "default" not in [one.name for one in packed], "it has a keyword"
    assert next(one for one in packed if one.name == "auto").keywords == {"packed_weights": False}


def test_the_planner_of_a_bench_begins_with_the_checkpoints_record(monkeypatch):
    model, stock = models()
    model.generation_config.draft_acceptance = {"chances": [0.5, 0.25, 0.125], "num_prompts": 3}
    seen = []
    planner_of = draft_planner.planner_of

    def seen_planner(run, num_rows, options):
        seen.append(options.draft_acceptance)
        return planner_of(run, num_rows, options)

    monkeypatch.setattr("wavedraft.generation.drafting.decode_tidar.planner_of", seen_planner)
    settings = Settings(batch_sizes=(1,), **SMALL | {"num_branches": ("auto",), "repeats": 1})
    bench(contenders_of(model, stock, settings), {"all": prompts_of(5)}, torch.ones(1), settings)
    assert set(seen) == {(0.5, 0.25, 0.125)}


def test_only_the_named_lines_are_measured_beside_plain_decoding():
    model, stock = tiny_tidar(draft_length=4), object()
    some = Settings(
        num_branches=(1, "auto"), draft_lengths=(4,), has_compiled=True, only=("default", "K=4 B=1 compiled")
    )
    assert [contender.name for contender in contenders_of(model, stock, some)] == ["AR", "default", "K=4 B=1 compiled"]
    with pytest.raises(ValueError, match=r"no 'K=4 B=3' among what these options measure: AR, AR compiled, lookup"):
        contenders_of(model, stock, replace(some, only=("default", "K=4 B=3")))


def test_what_transformers_refuses_is_said_and_the_rest_is_measured():
    assistant = tiny_tidar("llama", seed=3)
    settings = Settings(batch_sizes=(1, 2), **SMALL)
    found, *_ = benched(settings, assistant=without_adapter(assistant))
    refused = {(cell[0], cell[-1]): reason for cell, reason in found.refusals.items()}
    assert set(refused) == {(2, "lookup"), (2, "assisted")}
    assert all("batch_size" in reason for reason in refused.values())
    assert all(run.num_identical == run.batch_size for run in found.runs)
    assert {run.num_assistant_forwards > 0 for run in found.runs if run.contender == "assisted"} == {True}
    assert {run.num_assistant_forwards for run in found.runs if run.contender != "assisted"} == {0}


def test_a_text_that_compiled_something_is_decoded_again(monkeypatch):
    model, stock = models()
    settings = Settings(batch_sizes=(1,), **SMALL | {"repeats": 1, "num_branches": (1,)})
    original, calls = bench_measure.timed, []

    def compiling(contender, *given):
        calls.append(contender.name)
        if calls.count("K=4 B=1") == 3:  # two warm up
            kept_with(contender.model).compiled["another plan"] = None
        return original(contender, *given)

    monkeypatch.setattr(bench_measure, "timed", compiling)
    found = bench(contenders_of(model, stock, settings), {"all": prompts_of(5)}, torch.ones(1), settings)
    assert calls.count("K=4 B=1") == 4 and calls.count("AR") == 3
    (run,) = [run for run in found.runs if run.contender == "K=4 B=1"]
    assert run.num_forwards <= NUM_NEW, "the forwards of both texts are counted"


def test_sampled_texts_are_timed_and_not_compared():
    settings = Settings(batch_sizes=(1,), temperatures=(1.0,), **SMALL)
    state = torch.get_rng_state()
    found, *_, model = benched(settings, num_kinds=1)
    assert {run.num_identical for run in found.runs} == {None}
    assert torch.equal(state, torch.get_rng_state()), "the global generator was left elsewhere"
    assert model.generation_config.pad_token_id == 0, "the model's own generation config was not put back"


def test_plain_decoding_is_a_stock_model_of_the_same_memory_that_an_adapter_does_not_touch():
    model, stock = models(tie_word_embeddings=True)
    peft_model = get_peft_model(model, gated_adapter_config(model, rank=4))
    assert type(stock) is model.stock_class and not hasattr(type(stock), "taught")
    names = dict(stock.named_parameters())
    memory = {parameter.data_ptr() for parameter in peft_model.parameters()}
    assert all(parameter.data_ptr() in memory and parameter.requires_grad for parameter in names.values())
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert not any("lora" in name for name in names)
    prompt = random_prompts(1, 6)
    text = stock.generate(prompt, max_new_tokens=5, do_sample=False)[0]
    assert text.tolist() == plain_greedy_loop(model, prompt[0], 5).tolist()


def test_batches_go_round_are_filled_to_a_length_or_padded():
    prompts, filler = prompts_of(3, 6), torch.arange(100, 120)
    ids, mask = batch_of(prompts, 3, OWN_LENGTH, filler)
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]]
    assert ids[0, 3:].tolist() == ids[2, 3:].tolist() == prompts[0].tolist() and ids[1].tolist() == prompts[1].tolist()
    ids, mask = batch_of(prompts, 3, 30, filler)
    assert ids.shape == (3, 30) and mask.all()
    for row, prompt in zip(ids, (prompts[0], prompts[1], prompts[0]), strict=True):
        assert row[0] == prompt[0] and row[-len(prompt) :].tolist() == prompt.tolist()
        assert (row[1 : -len(prompt)] >= 100).all()
    assert ids[0].tolist() != ids[2].tolist(), "the same prompt twice in a batch"
    assert batch_of(prompts, 2, 4, filler)[0][1].tolist() == prompts[1][-4:].tolist()
    assert batch_of(prompts, 1, OWN_LENGTH, filler, batch=3)[0][0].tolist() == prompts[1].tolist()


def test_peak_memory_is_that_of_tensors_alive_at_once():
    def call():
        for _ in range(3):
            torch.zeros(1 << 20)
        kept = torch.zeros(1 << 18)
        return kept + 1

    assert 4 << 20 <= peak_bytes(call, torch.device("cpu")) < (4 << 20) + (1 << 16)


def test_a_run_says_how_long_threads_waited_for_a_core(monkeypatch):
    waited = iter(range(0, 1000, 3))
    monkeypatch.setattr("wavedraft.bench.measure.waited_seconds", lambda: next(waited))
    found, *_ = benched(Settings(batch_sizes=(1,), **SMALL | {"repeats": 1}), num_kinds=1)
    assert {run.waited_seconds for run in found.runs} == {3}
    assert all(run.cpu_seconds > 0 for run in found.runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (0,)}, "`batch_sizes` must be integers of 1 or more, but one is 0"),
        ({"prompt_lengths": ()}, "`prompt_lengths` must name at least one"),
        ({"temperatures": (-1.0,)}, "`temperatures` must be numbers of 0 or more, but one is -1"),
        ({"temperatures": (float("nan"),)}, "but one is nan"),
        ({"draft_lengths": (4,), "num_branches": (5,)}, "longest of `draft_lengths` .4., but one is 5"),
        ({"repeats": 0}, "`repeats` must be at least 1, but is 0"),
        ({"max_new_tokens": 1}, "`max_new_tokens` must be at least 2, but is 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock and a TiDAR checkpoint with an adapter, a recurrent one, and two files of prompts."""
    parent = tmp_path_factory.mktemp("bench")
    save_tiny_stock(parent / "stock")
    save_tokenizer(parent / "stock", num_words=61)
    convert(parent / "stock", parent / "tidar", draft_length=4)
    adapted = tiny_tidar("llama")
    get_peft_model(adapted, gated_adapter_config(adapted, rank=4)).save_pretrained(parent / "adapter")
    random_model(0).save_pretrained(parent / "recurrent")
    rows = [{"prompt": "w1 w2 w3", "kind": "a"}, {"prompt": "w4", "kind": "b"}, {"prompt": "w9 w8", "kind": "a"}]
    (parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (parent / "empty.txt").write_text("\n")
    return parent


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def test_packed_weights_are_refused_where_the_cpu_has_no_products_of_them(run, folders, monkeypatch):
    options = ["--prompts", folders / "prompts.jsonl", "--num-branches", "1", "--batch-sizes", "1", "--repeats", 1]
    options += ["--max-new-tokens", 3, "--packed-weights"]
    code, _, err = run(folders / "tidar", *options, "--dtype", "float16")
    assert code and "it is for torch.bfloat16 and torch.float32 on a CPU" in " ".join(err.split())
    monkeypatch.setattr("wavedraft.generation.execution.packed_linear.has_packed_products", lambda dtype: False)
    code, _, err = run(folders / "tidar", *options, "--dtype", "float32")
    assert code and "has no oneDNN products of torch.float32" in " ".join(err.split())
    code, _, err = run(folders / "tidar", *options[:-1], "--dtype", "float32")
    assert code == 0, err


def test_the_command_prints_tables_and_writes_json_markdown_and_a_picture(run, folders, tmp_path):
    options = ["--adapter", folders / "adapter", "--assistant", folders / "stock", "--batch-sizes", "1,2"]
    options += ["--num-branches", "1,all,auto", "--repeats", 1, "--max-new-tokens", 5, "--dtype", "float32"]
    options += ["--prompts", folders / "prompts.jsonl", "--temperatures", "0,1"]
    code, out, err = run(folders / "tidar", *options, "--output", tmp_path / "out")
    assert code == 0 and "USDT" not in err, err
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line) and "…" not in out
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert figures["about"]["dtype"] == "float32" and figures["about"]["num_threads"] == torch.get_num_threads()
    assert len(figures["cells"]) == 4
    names = ["AR", "lookup", "assisted", "no drafts", "default", "K=4 B=1", "K=4 B=4"]
    for cell in figures["cells"]:
        assert [contender["name"] for contender in cell["contenders"]] == names
        for contender in cell["contenders"]:
            is_refused = cell["batch_size"] > 1 and contender["name"] in ("lookup", "assisted")
            assert (contender["refused"] is not None) == is_refused
            if is_refused:
                continue
            assert set(contender["kinds"]) == {"a", "b"} and contender["worst_kind"] in contender["kinds"]
            assert contender["num_identical"] == (None if cell["temperature"] else contender["num_rows"])
            assert contender["peak_bytes"] > 0
            speed = contender["speed_up"]
            assert speed["num_pairs"] == (3 if cell["batch_size"] == 1 else 2) and speed["low"] is None
        assert cell["contenders"][0]["speed_up"]["mean"] == 1
        assert cell["contenders"][0]["tokens_per_forward"] == 1
    assert len(figures["runs"]) == 2 * 3 * len(names) + 2 * 2 * (len(names) - 2)
    assert {row["num_query_tokens"] for row in figures["forwards"]} >= {1, 2, 4, 8, 16}
    markdown = (tmp_path / "out" / "bench.md").read_text()
    assert markdown.startswith("`wavedraft bench ") and "--repeats 1" in markdown.splitlines()[0]
    assert markdown.count("| K=4 B=1 |") == 4 + 1 and "batch 1 only" in markdown
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000
    said = " ".join(out.split())
    assert "query tokens" in said and "speed-up by kind of prompt" in said and "are too few for an interval" in said
    assert "speed-ups beside each other" in said
    code, _, err = run(folders / "tidar", *options, "--output", tmp_path / "one.json")
    assert code == 0 and json.loads((tmp_path / "one.json").read_text())["cells"], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "out"]


def test_compiled_decoding_is_timed_after_its_compilation(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_contenders, "CompileConfig", partial(CompileConfig, backend="eager", mode="default"))
    options = ["--compile", "--batch-sizes", 1, "--num-branches", "1,auto", "--repeats", 1, "--max-new-tokens", 4]
    options += ["--draft-lengths", 2]
    options += ["--prompts", folders / "prompts.jsonl", "--dtype", "float32", "--prompt-lengths", 12]
    code, out, _ = run(folders / "tidar", *options, "--output", tmp_path / "out")
    (cell,) = json.loads((tmp_path / "out" / "bench.json").read_text())["cells"]
    found = {contender["name"]: contender for contender in cell["contenders"]}
    assert code == 0 and list(found)[1] == "AR compiled" and found["AR compiled"]["tokens_per_forward"] == 1
    for name in ("AR compiled", "K=2 B=1 compiled", "default compiled"):
        assert found[name]["num_identical"] == found[name]["num_rows"] and found[name]["compile_seconds"] >= 0
    assert found["K=2 B=1 compiled"]["tokens_per_forward"] == found["K=2 B=1"]["tokens_per_forward"]
    assert "to compile, not counted above" in " ".join(out.split())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tidar", ["--dtype", "int8"], "--dtype must be one of"),
        ("tidar", ["--batch-sizes", "1,x"], "--batch-sizes must be a list of numbers, as 1,4, but is '1,x'"),
        ("tidar", ["--num-branches", "most"], "--num-branches must be a list of numbers or all, auto"),
        ("tidar", ["--draft-lengths", "8"], "at most 4, the length this checkpoint was taught"),
        ("tidar", ["--prompt-lengths", "128,4096"], "must fit into 256 positions"),
        ("tidar", ["--prompts", "empty.txt"], "holds no prompts"),
        ("tidar", ["--prompts", "nothing.txt"], "There is no file"),
        ("tidar", ["--assistant", "recurrent"], "tokenizer"),
        ("stock", [], "Convert it first"),
        ("recurrent", [], "bench_recurrent.py"),
    ],
)
def test_bad_options_are_refused_before_any_weight_is_read(run, folders, monkeypatch, model, arguments, message):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr("wavedraft.commands.loading.load", read)
    monkeypatch.chdir(folders)
    code, _, err = run(model, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1, err
