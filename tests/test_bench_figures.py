"""The figures of a bench: ratios are paired, intervals are honest, costs never fall, and doubts are said."""

import random
import subprocess
import sys
from itertools import product
from math import exp
from pathlib import Path

import pytest
import torch

from helpers_tidar import tiny_tidar
from wavedraft.bench import picture
from wavedraft.bench.contenders import contenders_of, without_adapter
from wavedraft.bench.forward_costs import cost_note, forwards_with_costs, free_query_tokens, monotone_costs
from wavedraft.bench.measure import Bench, Run
from wavedraft.bench.paired import is_noisy, paired_ratio
from wavedraft.bench.report import report
from wavedraft.bench.settings import Settings
from wavedraft.bench.tables import doubts, line, sweeps


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_two_busy_threads_on_one_core_wait_half_of_the_time():
    program = (
        "import os, threading, time\n"
        "from wavedraft.bench.instruments import waited_seconds\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "other = os.fork()\n"
        "end = time.perf_counter() + 1\n"
        "while time.perf_counter() < end: pass\n"
        "if other: os.waitpid(other, 0); print(waited_seconds())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 0.2


def test_a_paired_ratio_is_that_of_each_batch_however_slow_the_machine_was_meanwhile():
    pairs = {batch: [(2 * slow, slow), (20 * slow, 10 * slow)] for batch, slow in enumerate((1.0, 3.0, 1.0, 50.0, 2.0))}
    found = paired_ratio(pairs)
    assert found["mean"] == pytest.approx(2) == pytest.approx(found["low"]) == pytest.approx(found["high"])
    assert found["num_pairs"] == 5 and not is_noisy(found)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    draw, num_covered, num_tries = random.Random(5), 0, 200
    for _ in range(num_tries):
        pairs = {batch: [(draw.lognormvariate(0.3, 0.2), 1.0)] for batch in range(20)}
        found = paired_ratio(pairs)
        num_covered += found["low"] <= exp(0.3) <= found["high"]
    assert 0.88 <= num_covered / num_tries <= 0.98


def test_few_batches_have_no_interval_and_a_wide_one_is_noisy():
    few = paired_ratio({batch: [(batch + 1.0, 1.0)] for batch in range(4)})
    assert few["low"] is few["high"] is None and not is_noisy(few)
    assert is_noisy(paired_ratio({batch: [(10.0 ** (batch % 2), 1.0)] for batch in range(10)}))


def test_costs_never_fall_and_noise_is_refused():
    assert monotone_costs([1.0, 1.2, 1.1, 1.8]) == [1.0, 1.1, 1.1, 1.8]
    assert monotone_costs([1.0, 0.9, 2.0]) == pytest.approx([1.0, 1.0, 2 / 0.9])
    assert monotone_costs([1.0, 0.63, 0.37, 1.2]) is None


def test_free_query_tokens_end_at_the_first_width_that_costs():
    def rows(*seconds):
        return [
            {"batch_size": 2, "num_cached": 9, "num_query_tokens": 1 << place, "seconds": [one, 5 * one]}
            for place, one in enumerate(seconds)
        ]

    forwards = forwards_with_costs(rows(1.0, 1.1, 1.2, 1.6, 3.0))
    assert free_query_tokens(forwards) == {(2, 9): 4}
    assert cost_note(forwards, 4, False).startswith("batch 2, 9 cached tokens: 4 query tokens a row are free here")
    forwards = forwards_with_costs(rows(1.0, 0.63, 0.37, 1.2))
    assert free_query_tokens(forwards) == {(2, 9): None}
    assert "too noisy to say" in cost_note(forwards, None, False) and "a forward of 4 took 0.37" in cost_note(
        forwards, None, False
    )


def figures_of(num_batches=10, speeds=(1.2,), waited=0.0, cells=((1, "own", 0.0),)):
    """Figures of AR and `default` on made-up times."""
    found = Bench(["AR", "default"])
    for num, seconds in ((1, 1.0), (2, 1.1), (4, 1.5)):
        row = {"batch_size": 1, "num_cached": 7, "num_query_tokens": num, "seconds": [seconds]}
        found.forward_seconds.append(row)
    for cell, kind, batch in product(cells, ("chat", "code"), range(num_batches // 2)):
        at = dict(zip(("batch_size", "prompt_length", "temperature"), cell, strict=True))
        for name, seconds in (("AR", 2.0), ("default", 0.5 + 1.5 / speeds[batch % len(speeds)])):
            run = Run(**at, kind=kind, batch=batch, repeat=0, contender=name, seconds=seconds, first_token_seconds=0.5,
                      num_forwards=9, num_query_tokens=8, num_assistant_forwards=0)  # fmt: skip
            run.cpu_seconds, run.waited_seconds = seconds, waited * seconds * torch.get_num_threads()
            found.runs.append(run)
            found.peak_bytes[(*cell, name)] = 1 << 20
    model, settings = tiny_tidar("llama", draft_length=4), Settings(max_new_tokens=9)
    return report(found, model, contenders_of(model, without_adapter(model), settings), settings, {})


def test_the_report_pairs_runs_and_says_when_the_machine_was_too_busy():
    figures = figures_of(waited=0.2, speeds=(1.2, 1.3))
    (cell,) = figures["cells"]
    speed = cell["contenders"][1]["speed_up"]
    assert 1.2 < speed["low"] < speed["mean"] < speed["high"] < 1.3 and not cell["contenders"][1]["is_noisy"]
    assert cell["waited_share"] == pytest.approx(0.2)
    assert "TOO BUSY. Other programs had the cores for 20%" in doubts(cell)[0] and len(doubts(cell)) == 1
    assert doubts(figures_of(waited=0.01, speeds=(1.2, 1.3))["cells"][0]) == []


def test_wide_intervals_and_few_batches_are_said():
    (cell,) = figures_of(speeds=(0.5, 5.0))["cells"]
    assert "too noisy to say how fast these are: default" in doubts(cell)[0]
    assert "? (" in line(cell["contenders"][1])[3]
    (cell,) = figures_of(num_batches=2)["cells"]
    assert "2 batches of prompts are too few" in doubts(cell)[0] and line(cell["contenders"][1])[3] == "1.20"


def test_one_cell_is_drawn_as_bars_and_a_sweep_as_lines(tmp_path, monkeypatch):
    drawn = []
    for name in ("draw_bars", "draw_lines"):
        original = getattr(picture, name)
        monkeypatch.setattr(
            picture, name, lambda *given, name=name, original=original: (drawn.append(name), original(*given))
        )
    sweep = ((1, 128, 0.0), (1, 2048, 0.0))
    for cells in (((1, "own", 0.0),), sweep):
        assert picture.draw(figures_of(cells=cells), tmp_path / "one.png").stat().st_size > 10_000
    assert drawn == ["draw_bars", "draw_lines"]
    assert picture.swept(figures_of(cells=sweep)["cells"])[0] == "prompt_length"


def test_cells_of_a_sweep_stand_beside_each_other():
    figures = figures_of(cells=((1, 128, 0.0), (4, 128, 0.0), (1, 2048, 0.0)))
    ((columns, rows),) = sweeps(figures)
    assert columns == ("", "batch 1\n128 tok.", "batch 4\n128 tok.", "batch 1\n2048 tok.")
    assert rows[1] == ["default", "1.20", "1.20", "1.20"]
