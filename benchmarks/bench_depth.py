"""The paper's table on a model that needs its depth: accuracy against core passes, for every policy and preset.

    python benchmarks/bench_depth.py --json build/depth.json --plot docs/pictures/depth.png --page docs/recurrent.md
    python benchmarks/bench_depth.py --ablation                  (one option of diffusion forcing at a time)
    python benchmarks/bench_depth.py --seed 7 --num 400          (other problems)

An answer of six tokens counts only whole. Its interval is Wilson's, of 95%. Core passes are those of one problem, the
reading of the prompt included: alone, and its share in a batch. Seconds are of the process's CPU time, relative to full
depth in the same run. "as full depth" is the share of answers that are those of full depth, right or wrong.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from bench_page import put_between_marks
from depth_tasks import LEVELS, NUM_ANSWERS, Problems, test_problems

from wavedraft.generation.recurrent.options_recurrent import PRESETS
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "hops-recurrent"
FORCING = {"policy": "diffusion-forcing"}
COLOURS = {"depth": "#2b5c8a", "forcing": "#d95f4c", "adaptive": "#f4a742", "drafts": "#5a9e6f"}


def table_rows(full_depth: int) -> dict[str, dict[str, Any]]:
    """Name and keywords of each row: full and half depth, the other policies, then the presets as they are."""
    rows: dict[str, dict[str, Any]] = {
        "full depth": {"policy": "autoregressive"},
        "half depth": {"policy": "autoregressive", "num_recurrences": full_depth // 2},
        "full depth, last keys alone": {"policy": "autoregressive", "kv_cache": "latest-only"},
        "adaptive": {"policy": "adaptive"},
        "self-speculative": {"policy": "self-speculative"},
        "exact": {"policy": "exact"},
    }
    rows |= {f"diffusion forcing, r'={inner}": {**FORCING, "inner_recurrence": inner} for inner in (2, 4, 8)}
    return rows | {f"preset {name}": {"preset": name} for name in PRESETS}


def front_rows(full_depth: int) -> dict[str, dict[str, Any]]:
    """More rows for the picture: every depth, and each policy at several settings."""
    rows: dict[str, dict[str, Any]] = {}
    for depth in range(1, full_depth, 2):
        rows[f"depth {depth}"] = {"policy": "autoregressive", "num_recurrences": depth}
    rows["adaptive, threshold 0.1"] = {"policy": "adaptive", "exit_threshold": 0.1}
    for inner in (1, 2):
        for threshold in (0.1, 0.3):
            name = f"diffusion forcing, r'={inner}, threshold {threshold}"
            rows[name] = {**FORCING, "inner_recurrence": inner, "exit_threshold": threshold}
    rows["exact, drafts at 1, 2, 4 and 8"] = {"policy": "exact", "draft_recurrences": (1, 2, 4, 8)}
    return rows


def ablation_rows() -> dict[str, dict[str, Any]]:
    """Diffusion forcing at r'=2 and 4, and with one option changed."""
    changes: dict[str, dict[str, Any]] = {"as it is": {}}
    changes |= {f"noise {noise}, {schedule}": {"state_noise": noise, "noise_schedule": schedule}
                for noise in (0.2, 0.5) for schedule in ("dampened", "constant")}  # fmt: skip
    changes |= {f"headway {headway}": {"headway": headway} for headway in (2, 3)}
    changes |= {f"threshold {threshold}": {"exit_threshold": threshold} for threshold in (0.01, 0.1, 0.3)}
    changes |= {f"freeze by {name}": {"freeze_criterion": name}
                for name in ("latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed")}  # fmt: skip
    changes |= {f"embedding mean {share}": {"embedding_ema": share} for share in (0.0, 0.3)}
    changes |= {"wavefront of 2": {"max_wavefront": 2}, "random first states": {"init_scale": 1.0},
                "keys of the last 4": {"kv_cache": 4}}  # fmt: skip
    return {f"r'={inner}, {name}": {**FORCING, "inner_recurrence": inner, **change}
            for inner in (2, 4) for name, change in changes.items()}  # fmt: skip


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    z, share = 1.96, num_right / num
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, middle - half), min(1.0, middle + half)


def decoded(
    model: RecurrentDepthForCausalLM, problems: Problems, options: dict[str, Any], batch_size: int
) -> dict[str, Any]:
    """Answers [B, M] of all problems, core passes of each alone and of the batches, and seconds."""
    keywords = {"init_scale": 0.0, "do_sample": False, "max_new_tokens": NUM_ANSWERS, **options}
    answers, alone, in_batch, seconds = [], [], 0, 0.0
    for ids in problems.prompt_ids.split(batch_size):
        start = time.process_time()
        output: Any = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **keywords)
        seconds += time.process_time() - start
        answers.append(output.sequences[:, ids.shape[1] :])
        read = output.num_prefill_core_passes
        full_depth = keywords.get("num_recurrences") or PRESETS.get(keywords.get("preset", ""), {}).get(
            "num_recurrences", model.config.mean_recurrence
        )
        alone += [read + full_depth * (NUM_ANSWERS - 1) / speed for speed in output.tokens_per_forward.tolist()]
        in_batch += read + output.num_core_passes
    return {"answers": torch.cat(answers), "alone": alone, "in_batch": in_batch, "seconds": seconds}


def measured(
    model: RecurrentDepthForCausalLM,
    problems: Problems,
    options: dict[str, Any],
    truth: torch.Tensor | None,
    batch_size: int,
    num_alone: int,
) -> dict[str, Any]:
    """One line of the table. `num_alone` problems are also decoded one by one, for the seconds."""
    found = decoded(model, problems, options, batch_size)
    answers, alone, num = found["answers"], torch.tensor(found["alone"]), len(problems)
    num_right = int((answers == problems.answers).all(1).sum())
    line = {
        "right": num_right / num,
        "interval": wilson(num_right, num),
        "num": num,
        "as_full_depth": 1.0 if truth is None else (answers == truth).all(1).float().mean().item(),
        "core_passes": alone.mean().item(),
        "core_passes_half_width": 1.96 * alone.std().item() / math.sqrt(num),
        "core_passes_in_batch": found["in_batch"] / num,
        "seconds_in_batch": found["seconds"] / num,
    }
    line["tokens_per_forward"] = NUM_ANSWERS * model.config.mean_recurrence / line["core_passes"]
    if num_alone:
        few = Problems(problems.task, *(getattr(problems, name)[:num_alone]
                                        for name in ("prompt_ids", "maps", "starts", "hops")))  # fmt: skip
        one_by_one = decoded(model, few, options, 1)
        line["seconds"] = one_by_one["seconds"] / num_alone
        line["core_passes_of_those_alone"] = one_by_one["in_batch"] / num_alone
        line["same_alone"] = bool((one_by_one["answers"] == answers[:num_alone]).all())
    return line | {"answers": answers}


def head_of(level: str, num: int, batch_size: int) -> str:
    """What stands above the lines of a level's table."""
    return (
        f"**{level}**, {num} problems\n\n| policy | right | core passes alone | in a batch of {batch_size} | tokens "
        "per forward | seconds alone | in the batch | as full depth |\n|---|---|---|---|---|---|---|---|"
    )


def line_of(name: str, line: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of a table; seconds are relative to the first line's."""
    low, high = line["interval"]
    seconds = f"{line['seconds'] / first['seconds']:.2f}x" if "seconds" in line else ""
    return (
        f"| {name} | {line['right']:.1%} ({low:.0%} to {high:.0%}) | {line['core_passes']:.1f} ± "
        f"{line['core_passes_half_width']:.1f} | {line['core_passes_in_batch']:.1f} | {line['tokens_per_forward']:.2f} "
        f"| {seconds} | {line['seconds_in_batch'] / first['seconds_in_batch']:.2f}x | {line['as_full_depth']:.1%} |"
    )


def run(
    model: RecurrentDepthForCausalLM, rows: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All rows on all levels, printed as they come."""
    results: dict[str, dict[str, Any]] = {}
    for level in arguments.levels:
        problems = test_problems(level, arguments.num, arguments.seed)
        truth = decoded(model, problems, {"policy": "autoregressive"}, arguments.batch_size)["answers"]
        print(f"\n{head_of(level, arguments.num, arguments.batch_size)}", flush=True)
        lines = results[level] = {}
        for name, options in rows.items():
            line = measured(model, problems, options, truth, arguments.batch_size, arguments.num_alone)
            del line["answers"]
            lines[name] = line
            print(line_of(name, line, next(iter(lines.values()))), flush=True)
    return results


def tables_of(results: dict[str, dict[str, Any]], names: list[str], batch_size: int) -> list[str]:
    """The tables in Markdown, one a level, of the rows with these names."""
    tables = []
    for level, lines in results.items():
        first = next(iter(lines.values()))
        rows = [line_of(name, lines[name], first) for name in names if name in lines]
        tables.append("\n".join([head_of(level, first["num"], batch_size), *rows]))
    return tables


def kind_of(name: str) -> str | None:
    """Which series of the picture a row belongs to."""
    if name.startswith("depth "):
        return "depth"
    if name.startswith(("diffusion forcing", "preset diffusion")):
        return "forcing"
    if name.startswith("adaptive"):
        return "adaptive"
    if name in ("full depth", "half depth"):
        return "depth"
    return "drafts" if name.startswith(("exact", "self-speculative")) else None


def draw(results: dict, full_depth: int, output: str) -> None:
    """Accuracy against core passes: one panel a level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"depth": f"one token after the other, depth 1 to {full_depth}", "forcing": "diffusion forcing",
              "adaptive": "adaptive", "drafts": "exact and self-speculative"}  # fmt: skip
    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4.2), dpi=130, sharey=True)
    for axes, (level, lines) in zip(panels, results.items(), strict=True):
        for kind, colour in COLOURS.items():
            found = sorted((line for name, line in lines.items() if kind_of(name) == kind),
                           key=lambda line: line["core_passes"])  # fmt: skip
            places = [line["core_passes"] for line in found], [line["right"] for line in found]
            errors = [[line["right"] - line["interval"][0] for line in found],
                      [line["interval"][1] - line["right"] for line in found]]  # fmt: skip
            style = {"marker": "o", "linestyle": "-" if kind == "depth" else "none", "markersize": 4}
            axes.errorbar(*places, yerr=errors, color=colour, label=labels[kind], elinewidth=0.8, **style)
        axes.set_title(level)
        axes.set_xlabel("core passes of a problem, prompt included")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("whole answers right")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(output)


def main() -> None:
    """Print the tables; write the numbers and the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--num", type=int, default=200, help="problems of each level")
    parser.add_argument("--num-alone", type=int, default=0, help="of these, decoded one by one too, for the seconds")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1, help="of the problems; their maps are never those of training")
    parser.add_argument("--ablation", action="store_true", help="one option of diffusion forcing at a time")
    parser.add_argument("--levels", nargs="*", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--only", nargs="*", help="only rows whose name has one of these in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--page", help="put the tables between the marks of this page")
    parser.add_argument("--plot", help="draw the picture here, with every depth and setting; needs matplotlib")
    parser.add_argument("--measured", nargs="*", help="take these files of --json instead of measuring")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = RecurrentDepthForCausalLM.from_pretrained(arguments.model).eval()
    full_depth = model.config.mean_recurrence
    rows = ablation_rows() if arguments.ablation else table_rows(full_depth)
    if arguments.plot:
        rows |= front_rows(full_depth)
    if arguments.only:
        rows = {name: row for name, row in rows.items() if any(part in name for part in arguments.only)}
    print(f"{arguments.model}: {sum(p.numel() for p in model.parameters()):,} parameters, full depth {full_depth}")
    if arguments.measured:
        files = [json.loads(Path(path).read_text(encoding="utf-8"))["results"] for path in arguments.measured]
        results = {level: lines for file in files for level, lines in file.items()}
    else:
        results = run(model, rows, arguments)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "results": results}, indent=1) + "\n")
    if arguments.page:
        names = ablation_rows() if arguments.ablation else table_rows(full_depth)
        section = "ablation" if arguments.ablation else "bench-depth"
        put_between_marks(Path(arguments.page), section, tables_of(results, list(names), arguments.batch_size))
    if arguments.plot:
        draw(results, full_depth, arguments.plot)


if __name__ == "__main__":
    main()
