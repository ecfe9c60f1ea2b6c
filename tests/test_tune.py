"""`wavedraft tune`: what is clearly faster is chosen, kept in generation_config.json, and read from there."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from helpers_stock import save_tiny_stock
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM, convert
from wavedraft.bench import tuning
from wavedraft.bench.contenders import AR, DEFAULT, NO_DRAFTS, contenders_of, without_adapter
from wavedraft.bench.tuning import PACKED, TIE_SAFE, UNPACKED, additions, best_plan, packed_or_not, settings_of
from wavedraft.cli import main
from wavedraft.commands import tune as tune_command


def figures(**speeds):
    lines = [{"name": name, "refused": None, "speed_up": {"mean": speed}} for name, speed in speeds.items()]
    return {"cells": [{"contenders": lines}]}


@pytest.fixture(scope="module")
def plans():
    model = tiny_tidar("llama", draft_length=4)
    return contenders_of(model, without_adapter(model), settings_of(4, False, 8))


def test_every_shorter_draft_is_among_the_plans(plans):
    names = {plan.name for plan in plans}
    assert {AR, DEFAULT, NO_DRAFTS, "K=4 B=1", "K=4 B=2", "K=4 B=4", "K=2 B=1", "K=2 B=2"} < names
    assert settings_of(1, False, 8).num_branches == (1,), "a draft of one token has one plan"


@pytest.mark.parametrize(
    "speeds, best",
    [
        ({DEFAULT: 1.40, "K=4 B=1": 1.43, NO_DRAFTS: 1.2}, DEFAULT),
        ({DEFAULT: 1.40, "K=4 B=1": 1.60, NO_DRAFTS: 1.2}, "K=4 B=1"),
        ({DEFAULT: 0.90, "K=4 B=1": 0.80, NO_DRAFTS: 1.1}, NO_DRAFTS),
    ],
)
def test_the_default_stays_unless_another_plan_is_clearly_faster(plans, speeds, best):
    assert best_plan(plans, figures(**{AR: 1.0}, **speeds)).name == best


@pytest.mark.parametrize("pays", [False, True])
def test_weights_are_packed_where_that_is_clearly_faster(plans, monkeypatch, pays):
    monkeypatch.setattr(tuning, "pays_to_pack", lambda model: pays)
    best = next(plan for plan in plans if plan.name == "K=4 B=1")
    other = UNPACKED if pays else PACKED
    assert [one.name for one in additions(best, has_compiled=True)] == [other, TIE_SAFE, "K=4 B=1 compiled"]
    assert packed_or_not(best, {best.name: 1.0, other: 1.02}).keywords == best.keywords
    assert packed_or_not(best, {best.name: 1.0, other: 1.2}).keywords["packed_weights"] is not pays


@pytest.fixture
def folder(tmp_path):
    save_tiny_stock(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock", num_words=61)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\nw4 w5\n")
    return tmp_path / "tidar"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def options_in(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_what_was_found_is_kept_and_generate_reads_it(run, folder, monkeypatch):
    monkeypatch.setattr(tune_command, "PROMPTS", {"refused": []})  # the file's prompts are read instead
    monkeypatch.setattr(
        tuning, "best_plan", lambda plans, figures: next(plan for plan in plans if plan.name == "K=2 B=1")
    )
    before = options_in(folder)
    options = folder, "--prompts", folder.parent / "prompts.txt", "--max-new-tokens", 4, "--dtype", "float32"
    code, out, _ = run(*options, "--print")
    assert code == 0 and "fastest: draft_length=2, num_branches=1" in out and options_in(folder) == before
    assert all(len(line) <= 80 for line in out.splitlines())
    code, _, err = run(*options)
    assert code == 0 and "generation_config.json has them now" in err
    after = options_in(folder)
    chosen = {name: after.pop(name) for name in ("draft_length", "num_branches")}
    after.pop("packed_weights", None)
    assert chosen == {"draft_length": 2, "num_branches": 1} and after == before

    model, tokenizer = TiDARForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    tuned = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    assert {(plan.draft_length, plan.num_branches) for plan in tuned.plans} <= {(2, 1)}
    assert torch.equal(tuned.sequences, model.generate(**inputs, max_new_tokens=6, draft_length=0))


def test_earlier_choices_are_replaced(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"num_branches": 1, "draft_length": 2, "eos_token_id": 3}))
    tune_command.write_keywords(path, {"packed_weights": True})
    assert options_in(tmp_path) == {"eos_token_id": 3, "packed_weights": True, "_from_model_config": False}


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(run, folder):
    code, _, err = run("ORG/NAME")
    assert code == 2 and "tune writes into a folder, but ORG/NAME is none here" in err and "--print" in err
    (folder / "generation_config.json").write_text("[]")
    code, _, err = run(folder)
    assert code == 2 and "not a JSON dictionary" in err
    code, _, err = run(folder, "--columns", "prompt=a", "--print")
    assert code == 2 and "--columns has no effect without --prompts" in err
