"""Times llama.cpp beside this package: the same weights, prompts and threads, prompt by prompt in turn.

    make beside-llama-cpp        (fetches node-llama-cpp 3.21.1 from npm into build/llama_cpp: llama.cpp with kernels
                                  for this CPU; then writes the table into docs/bench.md)

The checkpoint was converted from the GGUF file of 4 bits (Q4_1), so that file holds the same weights. From it are made:
one of bfloat16, one of 8 bits (Q8_0), and one of 4 bits rounded anew (Q4_0), for which llama.cpp has faster kernels.
Every way writes the same number of tokens greedily. Speed-ups are over transformers' plain decoding in bfloat16, paired
by prompt. Seconds of llama.cpp are taken inside its own process, from a whole prompt to its last token. With --compile,
compiled steps are timed too, after the compiler has seen each shape.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_page import put_between_marks
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.bench.contenders import AR, contenders_of, without_adapter
from wavedraft.bench.instruments import timed, waited_seconds
from wavedraft.bench.measure import texts_of_one_length
from wavedraft.bench.paired import BUSY, FEWEST_PAIRS, is_noisy, paired_ratio
from wavedraft.bench.prompts import encode_prompt, read_prompts
from wavedraft.bench.report import processor
from wavedraft.bench.settings import Settings

HERE = Path(__file__).parent
BITS = {"BF16": 16, "Q8_0": 8, "Q4_1": 4, "Q4_0": 4}  # of a weight in each GGUF file, scales not counted
HEAD = (
    "",
    "bits",
    "first token s",
    "next token ms",
    "tokens a second",
    "speed-up over AR (95% interval)",
    "equal texts",
)


@dataclass
class Text:
    """One text of one way."""

    new_ids: list[int]
    first_token_seconds: float
    seconds: float
    waited_seconds: float

    @property
    def decode_seconds(self) -> float:
        """From the first new token to the last."""
        return self.seconds - self.first_token_seconds


Way = Callable[[torch.Tensor, int], Text]  # of prompt ids [P] and a number of new tokens


def requantized(source: Path, target: Path, kind: str) -> Path:
    """A copy of a GGUF file with its matrices in another type; what is there already is kept."""
    if target.is_file():
        return target
    import gguf

    reader, target_type = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(data, target_type), raw_dtype=target_type)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(target)


class LlamaCpp:
    """A GGUF file in a process of its own. Call it as a `Way`."""

    def __init__(self, folder: Path, path: Path, num_threads: int, context_size: int):
        command = ["node", str(HERE / "llama_cpp_worker.mjs"), str(folder.resolve()), str(path.resolve())]
        command += [str(num_threads), str(context_size)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"node ended with status {self.process.wait()}: see its own words above.")
        return json.loads(line)

    def __call__(self, ids: torch.Tensor, num_new: int) -> Text:
        assert self.process.stdin is not None
        before = waited_seconds(self.process.pid) or 0.0
        self.process.stdin.write(json.dumps({"ids": ids.tolist(), "num_new": num_new}) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        waited = (waited_seconds(self.process.pid) or 0.0) - before
        if len(found["ids"]) != num_new:
            raise RuntimeError(f"llama.cpp wrote {len(found['ids'])} tokens instead of {num_new}.")
        return Text(found["ids"], found["first_token_seconds"], found["seconds"], waited)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ours(contender: Any) -> Way:
    """One of `wavedraft bench`'s contenders as a `Way`."""

    def write(ids: torch.Tensor, num_new: int) -> Text:
        before = waited_seconds() or 0.0
        options = {"max_new_tokens": num_new, "do_sample": False}
        sequences, seconds, first = timed(contender, ids[None], torch.ones_like(ids[None]), options)
        return Text(sequences[0, len(ids) :].tolist(), first, seconds, (waited_seconds() or 0.0) - before)

    return write


def measured(
    ways: dict[str, Way], prompts: list[torch.Tensor], num_new: int, repeats: int
) -> dict[str, list[list[Text]]]:
    """Texts of each way, by prompt and round. Every way writes one prompt before any writes the next.

    First, uncounted, every way writes some tokens, and the compiled ones all texts: the compiler waits for each shape.
    """
    for name, write in ways.items():
        is_compiled = name.endswith("compiled")
        for prompt in prompts if is_compiled else prompts[:1]:
            write(prompt, num_new if is_compiled else min(num_new, 16))
    texts: dict[str, list[list[Text]]] = {name: [[] for _ in prompts] for name in ways}
    for turn in range(repeats * len(prompts)):
        names = list(ways)
        place = turn % len(prompts)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            texts[name][place].append(ways[name](prompts[place], num_new))
        print(f"{turn + 1} of {repeats * len(prompts)} texts of each way", flush=True)
    return texts


def figures_of(texts: dict[str, list[list[Text]]], num_threads: int) -> list[dict[str, Any]]:
    """A line of figures for each way."""
    lines = []
    for name, by_prompt in texts.items():
        runs = [run for rounds in by_prompt for run in rounds]
        each = [run.decode_seconds / (len(run.new_ids) - 1) for run in runs]
        pairs = {
            place: [(plain.decode_seconds, own.decode_seconds) for plain, own in zip(*both, strict=True)]
            for place, both in enumerate(zip(texts[AR], by_prompt, strict=True))
        }
        speed_up = paired_ratio(pairs)
        lines.append(
            {
                "name": name,
                "bits": BITS.get(name.split()[-1], 16),
                "first_token_seconds": median(run.first_token_seconds for run in runs),
                "decode_seconds_per_token": median(each),
                "speed_up": speed_up,
                "is_noisy": is_noisy(speed_up),
                "num_equal": sum(a[0].new_ids == b[0].new_ids for a, b in zip(texts[AR], by_prompt, strict=True)),
                "num_texts": len(by_prompt),
                "waited_share": min(
                    1.0, sum(r.waited_seconds for r in runs) / num_threads / sum(r.seconds for r in runs)
                ),
            }
        )
    return lines


def markdown(figures: dict[str, Any]) -> str:
    """The table, after the command that made it, and what makes it doubtful."""
    about = figures["about"]
    rows = [HEAD, ("---",) * len(HEAD)]
    for line in figures["lines"]:
        speed, each = line["speed_up"], line["decode_seconds_per_token"]
        interval = "" if speed["low"] is None else f" ({speed['low']:.2f}-{speed['high']:.2f})"
        rows.append(
            (line["name"], f"{line['bits']}", f"{line['first_token_seconds']:.3f}", f"{1e3 * each:.1f}",
             f"{1 / each:.0f}", f"{speed['mean']:.2f}{'?' * line['is_noisy']}{interval}",
             f"{line['num_equal']}/{line['num_texts']}")
        )  # fmt: skip
    head = (
        f"`{about['command']}`: {about['model']}, {about['device']}, {about['num_threads']} threads, torch "
        f"{about['torch']}, llama.cpp {about['llama_cpp']}, {about['date']}, {about['num_prompts']} prompts, "
        f"{about['repeats']} rounds, texts of {about['max_new_tokens']} tokens."
    )
    doubts = []
    if (share := max(line["waited_share"] for line in figures["lines"])) > BUSY:
        doubts.append(f"TOO BUSY: other programs had the cores for up to {share:.0%} of the time. Run this again idle.")
    if about["num_prompts"] < FEWEST_PAIRS:
        doubts.append(f"{about['num_prompts']} prompts are too few for an interval, which takes {FEWEST_PAIRS}.")
    table = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "", *table, *(f"\n{doubt}" for doubt in doubts)]) + "\n"


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the TiDAR checkpoint that was converted from --gguf")
    parser.add_argument("--gguf", type=Path, required=True, help="the file of 4 bits, Q4_1")
    parser.add_argument("--adapter")
    parser.add_argument(
        "--llama-cpp", type=Path, default=Path("build/llama_cpp"), help="has node_modules; files go here"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(BITS), default=list(BITS))
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts_heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=20, help="taken evenly from the file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="time AR and ours compiled too: minutes more")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    arguments = parser.parse_args()
    if not (arguments.llama_cpp / "node_modules" / "node-llama-cpp").is_dir():
        parser.error(f"{arguments.llama_cpp} has no node-llama-cpp. Run `make beside-llama-cpp`, which fetches it.")
    if arguments.max_new_tokens < 2 or min(arguments.num_prompts, arguments.repeats) < 1:
        parser.error("--max-new-tokens must be at least 2, --num-prompts and --repeats at least 1.")
    return arguments


def main() -> None:
    arguments = arguments_of()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = read_prompts(arguments.prompts)
    step = max(1, len(texts) // arguments.num_prompts)
    texts = texts[::step][: arguments.num_prompts]
    prompts = [encode_prompt(tokenizer, text, is_raw=False)["input_ids"][0] for text in texts]
    num_threads, num_new = torch.get_num_threads(), arguments.max_new_tokens

    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype="bfloat16").eval()
    stock = without_adapter(model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    settings = Settings(num_branches=("auto",), has_compiled=arguments.compile)
    contenders = [one for one in contenders_of(model, stock, settings) if one.name != "lookup"]
    ways: dict[str, Way] = {one.name: ours(one) for one in contenders}
    workers = {}
    for kind in arguments.kinds:
        path = arguments.gguf if kind == "Q4_1" else arguments.llama_cpp / f"{arguments.gguf.name}.{kind}.gguf"
        path = requantized(arguments.gguf, path, kind)
        workers[f"llama.cpp {kind}"] = LlamaCpp(
            arguments.llama_cpp, path, num_threads, max(map(len, prompts)) + num_new
        )
    try:
        with texts_of_one_length([model, stock]):
            found = measured(ways | workers, prompts, num_new, arguments.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    about = {
        "command": "make beside-llama-cpp",
        "model": Path(arguments.model).name,
        "device": processor(),
        "num_threads": num_threads,
        "torch": torch.__version__,
        "llama_cpp": next(iter(workers.values())).about["release"],
        "llama_cpp_system": next(iter(workers.values())).about["system"],
        "date": date.today().isoformat(),
        "num_prompts": len(prompts),
        "repeats": arguments.repeats,
        "max_new_tokens": num_new,
    }
    figures = {"about": about, "lines": figures_of(found, num_threads)}
    print(markdown(figures))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        put_between_marks(arguments.page, "beside llama.cpp", [markdown(figures)])


if __name__ == "__main__":
    main()
