"""`wavedraft teach`: one command from a stock checkpoint to one that drafts. It says its price, and can be resumed."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from helpers_stock import save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM
from wavedraft.cli import main
from wavedraft.training import read_prompts
from wavedraft.training.teaching import (
    FEWEST_HELD_OUT,
    SEEN,
    SHIPPED_PROMPTS,
    Costs,
    Course,
    hold_out,
    likely_tokens_per_forward,
)

COSTS = Costs(0.002, 0.03, 4.0, 2.0, 2**31, 2**25)


@pytest.mark.parametrize("hours", [0.1, 1, 5])
def test_a_course_of_some_hours_takes_no_longer_and_evaluates_for_at_most_a_tenth(hours):
    course = Course.of_hours(hours, 4, 4000, COSTS, 128)
    assert 0.7 * 3600 * hours < course.seconds(COSTS, 128) <= 3600 * hours
    assert course.num_answers + course.num_held_out <= 4000
    without = Course(course.num_steps, course.num_head_steps, course.num_answers, 0).seconds(COSTS, 128)
    is_least = course.num_held_out == FEWEST_HELD_OUT
    assert is_least or course.seconds(COSTS, 128) - without <= 0.1 * 3600 * hours


def test_a_step_is_taught_however_short_the_time():
    assert Course.of_hours(0.0, 4, 4000, COSTS, 128).num_steps == 1
    assert Course.of_steps(10**6, 4, 20, COSTS, 128).num_answers == 20 - FEWEST_HELD_OUT


def test_more_taught_tokens_are_likely_to_bring_more():
    brought = [likely_tokens_per_forward(num) for num in (0, 10_000, 75_000, 10**5, 10**6, 3 * 10**6, 10**9)]
    assert brought == sorted(brought) and brought[0] == 1
    for num_taught, measured in SEEN:
        assert likely_tokens_per_forward(num_taught) == pytest.approx(measured)


def test_held_out_prompts_of_every_kind_are_not_taught():
    rows = read_prompts(SHIPPED_PROMPTS)
    taught, held_out = hold_out(rows, 100)
    assert len(held_out) == 100 and len(taught) + len(held_out) == len(rows)
    asked_of_held_out, asked = ({str(row.messages) for row in some} for some in (held_out, taught))
    assert not asked_of_held_out & asked
    assert {row.kind for row in held_out} == {row.kind for row in rows}


@pytest.fixture
def source(tmp_path):
    save_tiny_stock(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock", num_words=61)
    words = [f"w{1 + i} w{2 + i} w{3 + 2 * i}" for i in range(16)]
    (tmp_path / "prompts.txt").write_text("\n".join(words))
    return tmp_path / "stock"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", "teach", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def test_one_command_leads_to_a_model_that_drafts_and_goes_on_where_it_was_stopped(run, source, monkeypatch):
    folder = source.parent / "taught"
    options = [source, folder, "--prompts", source.parent / "prompts.txt", "--draft-length", 4, "--rank", 4]
    options += ["--batch-size", 2, "--max-new-tokens", 24, "--no-bf16", "--device", "cpu"]
    code, out, err = run(*options, "--steps", 4, "--dry-run")
    assert code == 0 and not out and "4 steps for the masks, 2 for the head, 5 prompts held out" in err
    assert "tokens per forward by so many taught tokens" in err and not (folder / "answers.jsonl").exists()

    with monkeypatch.context() as broken:
        broken.setattr("wavedraft.commands.teach.report_on", lambda *stages: sys.exit(7))
        assert run(*options)[0] == 7
    written = (folder / "answers.jsonl").read_bytes()
    code, out, err = run(*options)
    assert code == 0 and f"Going on with {folder}" in err and (folder / "answers.jsonl").read_bytes() == written
    assert "tokens per forward, every branch:" in out and "tokens per forward on; it has" in out
    assert f'Next: wavedraft generate {folder}/model --adapter {folder}/adapter "PROMPT" --compare' in err

    asked = {json.loads(line)["prompt"] for line in written.splitlines()}
    held_out = {json.loads(line)["prompt"] for line in (folder / "heldout.jsonl").read_text().splitlines()}
    assert asked and len(held_out) == 5 and not asked & held_out
    model, tokenizer = (
        TiDARForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    model.load_adapter(str(folder / "adapter"))
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    drafted = model.generate(**inputs, max_new_tokens=8, num_branches="all", return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, model.generate(**inputs, max_new_tokens=8, draft_length=0))

    code, _, err = run(*options, "--max-new-tokens", 12)
    assert code == 2 and "max_new_tokens was 24 and is now 12" in err


def test_what_cannot_be_taught_is_refused_before_anything_is_written(run, source):
    few = source.parent / "few.txt"
    few.write_text("w1\nw2\n")
    folder = source.parent / "taught"
    for options, reason in (
        (["--prompts", few], "has 2 prompts, but 5 are held out"),
        (["--steps", 3, "--hours", 1], "--hours and --steps exclude each other"),
        (["--columns", "prompt=a"], "--columns has no effect without --prompts"),
    ):
        code, _, err = run(source, folder, *options)
        assert code == 2 and reason in err and not folder.exists()
    code, _, err = run(source, source)
    assert code == 2 and "is not empty, and no teaching was begun there" in err
