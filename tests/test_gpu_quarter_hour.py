"""The script for a lent GPU: every part runs, with a tiny model on a CPU. Without a GPU it refuses in one line."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from helpers_commands import check_command
from helpers_tidar import tiny_tidar
from wavedraft.bench.contenders import contenders_of, without_adapter
from wavedraft.bench.settings import Settings

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


@pytest.fixture
def stub(tmp_path):
    """A stand-in for Python: it notes how it is called, fails at `drafting.py`, and hangs at the recurrent bench."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/sh
case "$1" in -c) exit 0;; esac
printf "%s\\t" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls
case "$*" in
    *drafting.py*) echo no such adapter; exit 3;;
    *bench_recurrent.py*) echo begun; exec sleep 60;;
    *step_cost.py*) echo "| 8b, 1 | K=4 B=1 |"; echo more;;
esac
"""
    )
    path.chmod(0o755)
    return {"PYTHON": str(path), "MODEL": str(tmp_path / "model"), "LIMIT": "20"}


def test_what_a_gpu_is_given_to_do_are_commands_that_there_are(tmp_path, stub):
    """The options of a GPU are not those of the dry run, so the command line and the scripts are asked for each."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    parts = [part for part in PARTS if part != "recurrent"]
    run(tmp_path, *parts, **stub | {"LIMIT": "840"})
    calls = [line.rstrip("\t").split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == len(parts)
    for words in calls:
        if words[:2] == ["-m", "pytest"]:
            assert (ROOT / words[-1]).is_file()
        else:
            check_command(["wavedraft", *words[2:]] if words[0] == "-m" else ["python", *words], None)
    assert sum("--compile" in words for words in calls) == 3 and sum("cuda" in words for words in calls) == 7


def test_the_lines_of_a_bench_that_a_gpu_measures_are_ones():
    model = tiny_tidar("llama", draft_length=8)
    settings = Settings(draft_lengths=(8,), num_branches=(3, "auto"), has_compiled=True)
    names = {one.name for one in contenders_of(model, without_adapter(model), settings)}
    wanted = [part for line in re.findall(r'ONLY="([^"]*K=8[^"]*)"', SCRIPT.read_text()) for part in line.split(",")]
    assert len(wanted) == 7 and set(wanted) <= names


def test_parts_that_fail_or_hang_are_named_and_the_next_are_run_and_what_is_done_is_not_run_again(tmp_path, stub):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    code, out, error = run(tmp_path, "taught", "step-8b", "recurrent", "warm", **stub)
    lines = out.splitlines()
    assert lines[0].startswith("taught: FAILED (3) in ") and lines[0].endswith("s: no such adapter")
    assert lines[1].startswith("step-8b: done in ") and lines[1].endswith("s: | 8b, 1 | K=4 B=1 |")
    assert lines[2].startswith("recurrent: STOPPED at its limit in ") and lines[2].endswith("s: begun")
    assert lines[3] == "warm: not begun, the time is over" and len(lines) == 4
    assert code == 1 and error.startswith("Not done: taught recurrent.")
    assert (tmp_path / "out" / "summary.txt").read_text() == out
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as kept:
        assert {"./taught.log", "./step-8b.log", "./recurrent.log"} <= set(kept.getnames())
    code, out, _ = run(tmp_path, "step-8b", **stub)
    assert code == 0 and out == "step-8b: done before\n"


def test_the_bounds_of_all_parts_are_within_fourteen_minutes():
    lines = [line for line in SCRIPT.read_text().splitlines() if "bench $name " in line or " part $name " in line]
    bounds = [int(line.split("$name ")[1].split()[0]) for line in lines]
    assert len(bounds) == len(PARTS) - 1  # the two steps share a line
    assert sum(bounds) + bounds[-1] <= 840


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    code, out, error = run(tmp_path, DRY_RUN="1")
    assert code == 0, out + error
    assert [line.split(":")[0] for line in out.splitlines()] == PARTS
    assert all(": done in " in line for line in out.splitlines())
    assert not list((tmp_path / "out").glob("running.log")) and len(list((tmp_path / "out").iterdir())) <= 8
    with tarfile.open(next((tmp_path / "out").glob("adapter.tar.*"))) as adapter:
        assert "./draft_head.safetensors" in adapter.getnames()
