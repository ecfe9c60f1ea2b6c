"""The audit reports identical texts as identical, and a difference with its position and margin."""

import json
import re
import sys
from functools import partial

import pytest
import torch
from transformers import CompileConfig

import wavedraft.audit as audit_of_texts
from helpers_recurrent import random_model
from helpers_tidar import random_prompts, tiny_tidar
from helpers_tokenizers import letter_tokenizer
from wavedraft.audit import audit
from wavedraft.bench import contenders
from wavedraft.cli import main
from wavedraft.training.row_sources import read_prompts

PLAIN = {"draft_length": 0}


def prompts_of(*lengths):
    return [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("end_ids", [None, list(range(20, 50))])
def test_exact_decoding_passes_in_float32(end_ids):
    model = tiny_tidar("qwen3")
    model.generation_config.eos_token_id = end_ids
    found = audit(model, prompts_of(3, 7, 5, 9, 4), plain=PLAIN, parallel={}, max_new_tokens=20, batch_size=2)
    assert found.parallel.num_identical == found.rebatched.num_identical == found.parallel.num_texts == 5
    assert (found.num_tokens == 100) == (end_ids is None)


def test_the_exact_policy_of_a_recurrent_model_passes_and_diffusion_forcing_is_told():
    model, prompts = random_model(0), [ids % 37 for ids in prompts_of(3, 7, 5)]
    options = {"plain": {"policy": "autoregressive"}, "max_new_tokens": 16}
    assert audit(model, prompts, parallel={"policy": "exact"}, **options).parallel.num_identical == 3
    lossy = {"policy": "diffusion-forcing", "num_recurrences": 1, "inner_recurrence": 1, "exit_threshold": 1e9}
    found = audit(model, prompts, parallel=lossy, **options)
    assert found.parallel.num_identical < 3 and found.rebatched.num_identical == 3


def test_a_doctored_text_is_found_where_it_differs_with_the_margin_of_plain_decoding():
    model, prompts = tiny_tidar("qwen3"), prompts_of(3, 7, 5, 9, 4)
    doctored = {"suppress_tokens": [model.generate(prompts[1][None], max_new_tokens=6, **PLAIN)[0, -1].item()]}
    found = audit(model, prompts, plain=PLAIN, parallel=doctored, max_new_tokens=12)
    assert found.rebatched.mismatches == [] and found.parallel.num_identical < 5
    for mismatch in found.parallel.mismatches:
        prompt = prompts[mismatch.prompt][None]
        plain, other = (model.generate(prompt, max_new_tokens=12, **options)[0] for options in (PLAIN, doctored))
        place = len(prompt[0]) + mismatch.position
        assert plain[:place].tolist() == other[:place].tolist()
        assert (plain[place].item(), other[place].item()) == (mismatch.plain_id, mismatch.other_id)
        with torch.no_grad():
            best = model(plain[None, :place]).logits[0, -1].topk(2).values
        assert mismatch.margin == pytest.approx(float(best[0] - best[1]), abs=1e-3)
    assert 1 in {mismatch.prompt for mismatch in found.parallel.mismatches}


def test_a_text_that_ends_earlier_is_a_mismatch():
    model, prompts = tiny_tidar("qwen3"), prompts_of(3, 7)
    text = model.generate(prompts[0][None], max_new_tokens=6, **PLAIN)[0, 3:].tolist()
    found = audit(model, prompts, plain=PLAIN, parallel={"max_new_tokens": 4}, max_new_tokens=6)
    assert [mismatch.position for mismatch in found.parallel.mismatches] == [4, 4]
    assert found.parallel.mismatches[0].other_id is None and found.parallel.mismatches[0].plain_id == text[4]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A TiDAR and a recurrent checkpoint, each with a tokenizer of letters, and a file of prompts."""
    parent = tmp_path_factory.mktemp("audit")
    for name, model in (("tidar", tiny_tidar("qwen3")), ("recurrent", random_model(0, vocab_size=61))):
        model.save_pretrained(parent / name)
        letter_tokenizer().save_pretrained(parent / name)
    (parent / "prompts.txt").write_text("abc\n\nhijklm\nba\n")
    rows = [{"prompt": "abc", "kind": "x"}, {"prompt": "hijklm"}, {"prompt": "ba"}]
    (parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parent


@pytest.mark.parametrize("name", ["tidar", "recurrent"])
def test_the_command_says_what_share_is_identical(run, folders, name):
    options = ("--max-new-tokens", 8, "--dtype", "float32")
    code, out, _ = run(folders / name, "--prompts", folders / "prompts.txt", *options)
    assert code == 0 and "3 prompts, 24 new tokens of plain decoding, float32 on cpu" in out
    assert out.count("3 of 3 texts identical (100.0%)") == 2
    code, out, _ = run(folders / name, "--prompts", folders / "prompts.jsonl", *options, "--output", "json")
    report = json.loads(out)
    assert code == 0 and report["parallel"]["num_identical"] == report["rebatched"]["num_identical"] == 3


def test_the_command_names_the_tokens_that_differ(run, folders):
    lossy = ("--policy", "diffusion-forcing", "--max-new-tokens", 12, "--dtype", "float32")
    code, out, _ = run(folders / "recurrent", "--prompts", folders / "prompts.txt", *lossy)
    assert code == 0 and "instead of" in out and "between the two best scores" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tidar", "prompts.txt", "--num-prompts", "9"), "at most 3"),
        (("tidar", "prompts.txt", "--output", "xml"), "--output must be one of text, json"),
        (("tidar", "prompts.txt", "--dtype", "int8"), "--dtype must be one of"),
        (("recurrent", "prompts.txt", "--draft-length", "3"), "recurrent-depth model takes --policy"),
        (("tidar", "one.txt"), "at least 2 prompts"),
        (("tidar", "bad.jsonl"), "line 1 has `text` and no prompt"),
    ],
)
def test_what_cannot_be_audited_is_refused(run, folders, arguments, message):
    (folders / "one.txt").write_text("abc\n")
    (folders / "bad.jsonl").write_text('{"text": "abc"}\n')
    model, file, *rest = arguments
    code, _, err = run(folders / model, "--prompts", folders / file, *rest)
    assert code == 2 and message in err and err.count("\n") == 1


def test_prompts_are_read_from_lines_or_rows(folders):
    lines, rows = ([row.question for row in read_prompts(folders / name)] for name in ("prompts.txt", "prompts.jsonl"))
    assert lines == rows == ["abc", "hijklm", "ba"]


def test_tie_safe_decoding_and_fewer_branches_can_be_audited(run, folders):
    common = ("--prompts", folders / "prompts.txt", "--max-new-tokens", 8)
    options = ("--dtype", "bfloat16", "--exact", "tie-safe", "--num-branches", 2)
    code, out, _ = run(folders / "tidar", *common, *options)
    assert code == 0 and "parallel decoding: 3 of 3 texts identical" in out
    assert re.search(r"tie-safe costs \d+ forwards and \d+ of one token, [\d.]+ s; without it \d+ forwards", out)
    code, _, err = run(folders / "tidar", *common, "--num-branches", 99)
    assert code == 2 and "--num-branches" in err and "99" in err
    code, _, err = run(folders / "tidar", *common, "--exact", "always")
    assert code == 2 and "always" in err
    code, _, err = run(folders / "recurrent", *common, "--exact", "tie-safe")
    assert code == 2 and "--exact is TiDAR's" in err


def test_packed_weights_and_compiled_steps_can_be_audited(run, folders, monkeypatch):
    seen, generate = [], audit_of_texts._generate

    def spy(model, ids, options):
        seen.append(options)
        return generate(model, ids, options)

    monkeypatch.setattr(audit_of_texts, "_generate", spy)
    monkeypatch.setattr(contenders, "CompileConfig", partial(CompileConfig, backend="aot_eager", mode="default"))
    common = ("--prompts", folders / "prompts.txt", "--max-new-tokens", 8, "--dtype", "float32")
    code, out, _ = run(folders / "tidar", *common, "--packed-weights", "--compile", "--num-branches", 1)
    assert code == 0 and "parallel decoding: 3 of 3 texts identical" in out
    wide = [options for options in seen if options.get("packed_weights")]
    assert len(wide) == 3 and all(options["cache_implementation"] == "static" for options in wide)
    code, _, err = run(folders / "tidar", *common[:-1], "float16", "--packed-weights")
    assert code == 2 and "`packed_weights` must be False" in err
    code, _, err = run(folders / "tidar", *common, "--compile", "--exact", "tie-safe")
    assert code == 2 and "steps of several shapes" in err
    code, _, err = run(folders / "recurrent", *common, "--packed-weights")
    assert code == 2 and "--packed-weights is TiDAR's" in err


def test_what_tie_safe_costs_is_counted_beside_decoding_without_it():
    model, prompts = tiny_tidar("qwen3").bfloat16(), prompts_of(3, 7)
    exact = {"exact": "tie-safe", "tie_margin": 1e9}  # every position is a tie, until forwards are known to agree
    cost = audit(model, prompts, plain=PLAIN, parallel=exact, max_new_tokens=12).exact_cost
    found = [
        [model.generate(ids[None], max_new_tokens=12, return_dict_in_generate=True, **options) for ids in prompts]
        for options in (exact, {})
    ]
    for effort, outputs in zip((cost.effort, cost.effort_without), found, strict=True):
        assert effort.num_forwards == sum(output.num_forwards for output in outputs)
        assert effort.seconds > 0
    assert cost.effort_without.num_tie_forwards == 0
    assert audit(model, prompts, plain=PLAIN, parallel={}, max_new_tokens=3).exact_cost is None


def test_a_missing_file_or_folder_is_named(run, folders):
    code, _, err = run(folders / "tidar", "--prompts", folders / "nothing.txt")
    assert code == 2 and "There is no file" in err and "nothing.txt" in err
    code, _, err = run(folders / "nothing" / "here", "--prompts", folders / "prompts.txt")
    assert code == 2 and "There is no folder" in err
