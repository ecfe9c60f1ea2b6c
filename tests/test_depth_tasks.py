"""Problems whose difficulty is depth, their training, and the table on them."""

import argparse
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_depth
import depth_tasks
import train_depth

from wavedraft.modeling_recurrent import RecurrentCache

ARGUMENTS = {
    "layers": (1, 1, 1), "n_embd": 32, "n_heads": 2, "full_depth": 12, "learning_rate": 1e-3, "seed": 0, "rest": 0.1,
    "batch_size": 4, "sharing": 1, "init_scale": 0.0, "minutes": 1, "decay": 0.3, "right": 0.9,
}  # fmt: skip


def by_hand(words, num_answers=6):
    """The answers of a problem, from its words."""
    shown = {word[0]: word[1] for word in words[:8]}
    if words[8] == "roots":
        answers = []
        for here in words[9:15]:
            while shown[here] != here:
                here = shown[here]
            answers.append(here)
        assert words[15:] == ["="]
        return answers
    here, answers = words[9], []
    for _ in range(num_answers):
        for _ in range(int(words[8])):
            here = shown[here]
        answers.append(here)
    return answers


@pytest.mark.parametrize("level", depth_tasks.LEVELS)
def test_answers_are_those_of_a_walk_over_the_words(level):
    problems = depth_tasks.test_problems(level, 60)
    assert len(problems) == 60 and depth_tasks.is_held_out(problems.maps).all()
    tokenizer = depth_tasks.task_tokenizer()
    for ids, answers in zip(problems.prompt_ids, problems.answers, strict=True):
        words = [depth_tasks.WORDS[i] for i in ids]
        assert by_hand(words) == [depth_tasks.WORDS[i] for i in answers]
        assert tokenizer(" ".join(words))["input_ids"] == ids.tolist() and tokenizer.decode(ids) == " ".join(words)


def test_training_never_shows_a_map_of_the_tests_nor_a_way_as_long_as_the_hardest():
    generator = torch.Generator().manual_seed(0)
    for task in depth_tasks.TASKS:
        shown = depth_tasks.drawn(task, 500, generator, held_out=False)
        assert not depth_tasks.is_held_out(shown.maps).any()
        tests = depth_tasks.test_problems(task, 500)
        assert not {tuple(f) for f in shown.maps.tolist()} & {tuple(f) for f in tests.maps.tolist()}
    assert shown.task == "roots" and shown.hops.max() == depth_tasks.TRAINED_HEIGHT
    harder = depth_tasks.test_problems("roots, harder", 200)
    assert (harder.hops.max(dim=1).values == depth_tasks.TRAINED_HEIGHT + 1).all()


def test_another_seed_is_other_problems_and_two_lookups_answer_few():
    for level in depth_tasks.LEVELS:
        first, again, other = (depth_tasks.test_problems(level, 300, seed) for seed in (1, 1, 2))
        assert torch.equal(first.prompt_ids, again.prompt_ids) and not torch.equal(first.prompt_ids, other.prompt_ids)
        assert (first.after(2) == first.answers).all(1).float().mean() < 0.3
        assert torch.equal(first.after(first.hops), first.answers)


@torch.no_grad()
def test_the_training_forward_is_the_models_and_reads_a_prompt_first_as_a_cache_of_the_last_keys_does():
    torch.manual_seed(0)
    model = train_depth.new_model(argparse.Namespace(**ARGUMENTS)).eval()
    problems = depth_tasks.test_problems("roots", 4)
    ids, num_prompt = train_depth.inputs_of(problems), problems.prompt_ids.shape[1]
    plan = {"depth": 5, "prompt_depth": 0, "stagger": 0, "init_scale": 0.0, "num_backprop": 0}
    found, _, _ = train_depth.recurred(model, ids, num_prompt, plan)
    torch.testing.assert_close(found, model(ids, num_recurrences=5, init_scale=0.0).logits[:, -6:])

    found, _, _ = train_depth.recurred(model, ids, num_prompt, plan | {"prompt_depth": 7})
    cache = RecurrentCache.latest_only(model.config, 4, 64, torch.float32, "cpu")
    model(ids[:, : num_prompt - 1], cache=cache, num_recurrences=7, init_scale=0.0)
    after = model(ids[:, num_prompt - 1 :], cache=cache, num_recurrences=5, init_scale=0.0).logits
    torch.testing.assert_close(found, after)


def test_staggered_answers_begin_one_after_the_other():
    torch.manual_seed(0)
    model = train_depth.new_model(argparse.Namespace(**ARGUMENTS)).eval()
    problems = depth_tasks.test_problems("walk", 2)
    plan = {"depth": 6, "prompt_depth": 3, "stagger": 2, "init_scale": 0.0, "num_backprop": 2}
    logits, moved, depths = train_depth.recurred(model, train_depth.inputs_of(problems), 10, plan)
    assert depths.tolist() == [6, 4, 2, 1, 1, 1] and logits.shape == (2, 6, len(depth_tasks.WORDS))
    assert moved.shape == (2, 15) and (moved > 0).all()


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    runs = []
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        arguments = argparse.Namespace(**ARGUMENTS, output=tmp_path / name)
        arguments.output.mkdir()
        for place, stop in enumerate(stops):
            torch.manual_seed(0)
            training = train_depth.Training(arguments)
            if place:
                training.load()
            training.counts["depth"] = 3
            training.model.train()
            while training.counts["step"] < stop:
                training.step(1e-3)
            training.save()
        runs.append(dict(training.model.named_parameters()))
    before = dict(train_depth.Training(arguments).model.named_parameters())
    assert any(not torch.equal(before[name], weight) for name, weight in runs[0].items())
    assert all(torch.equal(runs[1][name], weight) for name, weight in runs[0].items())


def test_core_passes_of_a_problem_alone_are_those_it_has_in_a_batch():
    torch.manual_seed(0)
    model = train_depth.new_model(argparse.Namespace(**ARGUMENTS)).eval()
    problems = depth_tasks.test_problems("roots", 6)
    rows = {name: row for name, row in bench_depth.table_rows(12).items() if "r32" not in name and "r64" not in name}
    for name, options in rows.items():
        line = bench_depth.measured(model, problems, options, None, batch_size=3, num_alone=6)
        assert line["same_alone"], name
        assert line["core_passes"] == pytest.approx(line["core_passes_of_those_alone"], rel=1e-5), name
    plain = bench_depth.measured(model, problems, {"policy": "autoregressive"}, None, 3, 0)
    assert plain["core_passes"] == 6 * 12 and plain["tokens_per_forward"] == pytest.approx(1.0)


def test_the_interval_is_wilsons():
    low, high = bench_depth.wilson(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))
    assert bench_depth.wilson(0, 50)[0] == 0.0 and bench_depth.wilson(50, 50)[1] == 1.0
    widths = [high - low for low, high in (bench_depth.wilson(n // 2, n) for n in (20, 80, 320))]
    assert all(later < earlier for earlier, later in itertools.pairwise(widths))
