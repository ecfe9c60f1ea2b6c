"""The script for a lent GPU: every part runs, with a tiny model on a CPU. Without a GPU it refuses in one line."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_quarter_hour.sh"
PARTS = ["bench-1", "bench-8", "bench-16", "warm", "recurrent", "captured", "answers", "teach", "head", "taught",
         "step-1.5b", "step-8b"]  # fmt: skip


def run(folder, *parts, **variables):
    variables = {"OUT": str(folder / "out"), "WORK": str(folder / "work"), "OMP_NUM_THREADS": "1", **variables}
    # The shell's own choice of a Python is that of the repository; tests may run under another.
    found = subprocess.run([SCRIPT, *parts], env=os.environ | variables, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    code, out, error = run(tmp_path)
    assert code == 2 and out == "" and "sees no GPU" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    code, _, error = run(tmp_path, "bench-1", "benhc", DRY_RUN="1")
    assert code == 2 and "no part benhc" in error and error.strip().endswith(f"{' '.join(PARTS)}.")


def test_the_bounds_of_all_parts_are_within_fourteen_minutes():
    text = SCRIPT.read_text()
    bounds = [int(line.split("$name ")[1].split()[0]) for line in text.splitlines() if " $name " in line
              and ("bench $name" in line or "part $name" in line)]  # fmt: skip
    assert len(bounds) == len(PARTS) - 1  # the two steps share a line
    assert sum(bounds) + bounds[-1] <= 840


def test_a_part_that_fails_is_named_and_the_next_is_run_and_what_is_done_is_not_run_again(tmp_path):
    (tmp_path / "work" / "dry").mkdir(parents=True)
    (tmp_path / "work" / "dry" / "adapter").touch()  # no tiny model is made, so `taught` cannot run
    for name in ("prompts.jsonl", "tidar"):
        (tmp_path / "work" / "dry" / name).mkdir()
    (tmp_path / "work" / "dry" / "tidar" / "config.json").touch()
    code, out, error = run(tmp_path, "taught", "step-8b", DRY_RUN="1")
    failed, done = out.splitlines()
    assert (
        failed.startswith("taught: FAILED (1) in ") and done.startswith("step-8b: done in ") and "| tiny, 1 |" in done
    )
    assert code == 1 and error.startswith("Not done: taught.")
    assert (tmp_path / "out" / "summary.txt").read_text() == out
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as kept:
        assert {"./taught.log", "./step-8b.log", "./step-8b.json"} <= set(kept.getnames())
    code, out, _ = run(tmp_path, "step-8b", DRY_RUN="1")
    assert code == 0 and out == "step-8b: done before\n"


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    code, out, error = run(tmp_path, DRY_RUN="1")
    assert code == 0, out + error
    assert [line.split(":")[0] for line in out.splitlines()] == PARTS
    assert all(": done in " in line for line in out.splitlines())
    assert not list((tmp_path / "out").glob("running.log")) and len(list((tmp_path / "out").iterdir())) <= 8
    with tarfile.open(next((tmp_path / "out").glob("adapter.tar.*"))) as adapter:
        assert "./draft_head.safetensors" in adapter.getnames()
