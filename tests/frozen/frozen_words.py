"""What the package says: help texts and refusals; and the files that travel with a checkpoint."""

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

import torch
import typer
from frozen_recurrent import PROMPTS, family_model
from frozen_runs import STATIC, gated, leaning
from frozen_tidar import Watcher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config
from typer.testing import CliRunner

from helpers_recurrent import random_model
from helpers_stock import edit_json, save_tiny_stock
from helpers_tidar import random_prompts, with_random_head
from wavedraft import DraftObjective, RecurrentDepthConfig, TiDARForCausalLM, convert, push, to_ar
from wavedraft.cli import app
from wavedraft.generation import tidar
from wavedraft.training import finetune, gated_adapter_config


def save_tokenizer(folder: Path, num_words: int = 61) -> None:
    words = ["<unk>", "<s>", "</s>", "<tool>", "<spare>", *(f"w{n}" for n in range(num_words - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


@cache
def root() -> Path:
    """A folder of tiny checkpoints: stock, TiDAR, recurrent, and such as lack something."""
    folder = Path(mkdtemp(prefix="frozen-"))
    save_tiny_stock(folder / "stock")
    save_tokenizer(folder / "stock")
    convert(folder / "stock", folder / "tidar", draft_length=4)
    random_model(vocab_size=61).save_pretrained(folder / "depth")
    save_tokenizer(folder / "depth")
    gated(leaning()).save_pretrained(folder / "adapter")
    shutil.copytree(folder / "tidar", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "stock", folder / "odd")
    edit_json(folder / "odd" / "config.json", model_type="t5")
    (folder / "empty").mkdir()
    (folder / "prompts.txt").write_text("w1 w2\nw3\n")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "w1 w2", "answer": "w3 w4 w5 w6 w7 w8 w9"}) + "\n")
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    return folder


def normal(text: str) -> str:
    """The text on one line, with temporary folders by one name and without object addresses."""
    text = text.replace(str(root().resolve()), "<tmp>").replace(str(root()), "<tmp>")
    text = re.sub(re.escape(gettempdir()) + r"/\w+", "<tmp>", text)
    return re.sub(r"0x[0-9a-f]{6,}", "<address>", " ".join(text.split()))


def refusal(call: Any) -> list[str]:
    """Kind and words of the error a call ends with."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, normal(str(error))]
    return ["none", ""]


def asked(model: Any, prompt: Any = None, **keywords: Any) -> Any:
    prompt = random_prompts(1, 4) if prompt is None else prompt
    return model.generate(prompt, **{"max_new_tokens": 4} | keywords)


TIDAR: dict[str, dict[str, Any]] = {
    "draft_length 9": {"draft_length": 9},
    "draft_length -1": {"draft_length": -1},
    "draft_length text": {"draft_length": "4"},
    "num_branches 0": {"num_branches": 0},
    "num_branches 5": {"num_branches": 5},
    "num_branches text": {"num_branches": "many"},
    "auto of one": {"num_branches": "auto", "draft_length": 1},
    "auto and seed": {"num_branches": "auto", "do_sample": True, "seed": 1},
    "beams": {"num_beams": 2, "custom_generate": tidar},
    "seeds of other rows": {"seed": [1, 2], "do_sample": True},
    "seed negative": {"seed": -3},
    "seed without drafts": {"seed": 3, "do_sample": True, "draft_length": 0},
    "seed and hidden states": {"seed": 3, "do_sample": True, "output_hidden_states": True},
    "guidance": {"guidance_scale": 1.5, "custom_generate": tidar},
    "misspelt": {"draft_lenght": 3},
    "exact unknown": {"exact": "always"},
    "exact sampled": {"exact": "tie-safe", "do_sample": True},
    "exact static": {"exact": "tie-safe", **STATIC},
    "margin alone": {"tie_margin": 0.5},
    "margin negative": {"exact": "tie-safe", "tie_margin": -1},
    "mask row": {"mask_embedding_id": 61},
    "packed_weights text": {"packed_weights": "yes"},
    "draft_head number": {"draft_head": 3},
    "draft_head nowhere": {"draft_head": "/nowhere/at/all"},
}
DEPTH: dict[str, dict[str, Any]] = {
    "policy": {"policy": "fastest"},
    "policy number": {"policy": 3},
    "preset": {"preset": "best"},
    "headway": {"policy": "exact", "headway": 2},
    "draft_recurrences": {"policy": "exact", "draft_recurrences": 6},
    "draft_recurrences falling": {"policy": "exact", "draft_recurrences": (3, 2)},
    "draft_recurrences several": {"policy": "self-speculative", "draft_recurrences": (1, 2)},
    "inner_recurrence": {"policy": "diffusion-forcing", "inner_recurrence": 0},
    "embedding_ema": {"policy": "diffusion-forcing", "embedding_ema": 2.0},
    "exit_threshold": {"policy": "diffusion-forcing", "exit_threshold": float("nan")},
    "freeze_criterion": {"policy": "diffusion-forcing", "freeze_criterion": "luck"},
    "noise_schedule": {"policy": "diffusion-forcing", "noise_schedule": "pink"},
    "kv_cache": {"policy": "diffusion-forcing", "kv_cache": "none"},
    "max_recurrences": {"policy": "diffusion-forcing", "inner_recurrence": 8, "max_recurrences": 4},
    "max_steps": {"policy": "diffusion-forcing", "max_steps": 4},
    "reference_compat": {"policy": "diffusion-forcing", "reference_compat": "yes"},
    "beams": {"policy": "exact", "num_beams": 3},
    "hidden states": {"policy": "exact", "output_hidden_states": True},
    "no cache": {"policy": "exact", "use_cache": False},
    "guidance": {"policy": "exact", "guidance_scale": 1.5},
    "too long": {"policy": "exact", "max_new_tokens": 1000},
    "num_recurrences": {"num_recurrences": 0},
    "init_scale": {"init_scale": float("inf")},
    "generator": {"generator": 3},
    "misspelt": {"wavefronts": 3},
    "cache": {"cache_implementation": "quantized"},
    "static exact": {"policy": "exact", **STATIC},
}
STORED: dict[str, Any] = {
    "none": None,
    "no length": {"mask_token_id": 61, "mask_embedding_id": 0},
    "length 0": {"draft_length": 0, "mask_token_id": 61, "mask_embedding_id": 0},
    "no row": {"draft_length": 4, "mask_token_id": 61},
    "row": {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 61},
    "token": {"draft_length": 4, "mask_token_id": -1, "mask_embedding_id": 3},
    "fields": {"draft_length": 4, "mask_token_id": 5, "block": 3},
}
TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "mode": ("tidar", {"mode": "magic"}),
    "mode of depth": ("depth", {"mode": "joint"}),
    "pack of depth": ("depth", {"pack": True}),
    "rank of a head": ("tidar", {"mode": "head", "rank": 0}),
    "rank gated": ("tidar", {"rank": 0}),
    "alpha gated": ("tidar", {"alpha": 0.5}),
    "from_adapter nowhere": ("tidar", {"from_adapter": "nowhere"}),
    "full from_adapter": ("tidar", {"mode": "full", "from_adapter": "."}),
    "head compiled": ("tidar", {"mode": "head", "torch_compile": True}),
    "max_steps": ("tidar", {"max_steps": 0}),
    "eval_steps alone": ("tidar", {"eval_steps": 5}),
    "patience": ("tidar", {"patience": 2}),
    "resume": ("tidar", {"resume": True}),
    "eval prompts": ("tidar", {"eval_prompts_path": "nowhere.jsonl"}),
    "pack and streaming": ("tidar", {"pack": True, "streaming": True}),
    "two quantizations": ("tidar", {"load_in_4bit": True, "load_in_8bit": True}),
    "quantized and full": ("tidar", {"mode": "full", "load_in_8bit": True}),
    "draft_loss": ("tidar", {"draft_loss": "hope"}),
    "slot_decay": ("tidar", {"slot_decay": 0.0}),
    "stock": ("stock", {}),
    "no folder": ("nowhere", {}),
}
# Words of a command line; a name of `root()` in braces is its path.
COMMANDS = (
    "convert {stock} {tidar}",
    "convert {stock} {new} --draft-length 99",
    "convert {empty} {new}",
    "convert {tidar} {new} --to-ar --draft-length 2",
    "convert {odd} {new}",
    "generate {stock} w1",
    "generate {bare} w1 --draft-length 5",
    "generate {bare} w1 --num-branches 9",
    "generate {bare} w1 --exact always",
    "generate {bare} w1 --exact tie-safe --temperature 1",
    "generate {bare} w1 --temperature 1 --top-p 1.5",
    "generate {bare} w1 --top-k 3",
    "generate {bare} w1 --seed 3",
    "generate {bare} w1 --dtype int3",
    "generate {bare} w1 --device tpu9",
    "generate {bare} w1 --draft-length 0 --num-branches 2",
    "generate {bare} w1 --draft-length 0 --exact tie-safe",
    "generate {bare} w1 --policy exact",
    "generate {bare} w1 --adapter {empty}",
    "generate {depth} w1 --policy fastest",
    "generate {depth} w1 --preset best",
    "generate {depth} w1 --draft-length 4",
    "generate {depth} w1 --num-branches 2",
    "generate {depth} w1 --adapter a",
    "chat {bare} --draft-length 5",
    "chat {bare} --policy exact",
    "audit {bare} --prompts {prompts.txt} --num-branches 9",
    "audit {bare} --prompts {prompts.txt} --policy exact",
    "audit {bare} --prompts {nowhere}",
    "bench {bare} --draft-lengths 9",
    "data regenerate {bare} {prompts.txt} {new} --seed 1",
    "data regenerate {bare} {prompts.txt} {new} --device no",
    "train {tidar} {rows.jsonl} {new} --mode magic",
    "train {nowhere} {rows.jsonl} {new}",
    "push {empty} me/name",
)


def command(line: str) -> list[Any]:
    """What a command line is refused with: kind and words of the error, or the exit code and what was printed."""
    words = [re.sub(r"\{(.*?)\}", lambda match: str(root() / match[1]), word) for word in line.split()]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return [type(done.exception).__name__, normal(str(done.exception))]
    return [done.exit_code, normal(done.output)]


def with_stored(stored: Any) -> Any:
    config = leaning().config
    config.tidar_config = stored
    return TiDARForCausalLM.from_config(config)


def trained(folder: str, **options: Any) -> Any:
    options = {key: str(root() / value) if value == "nowhere" else value for key, value in options.items()}
    return finetune(root() / folder, root() / "rows.jsonl", root() / "run", **options)


def other_refusals() -> Iterator[tuple[str, Any]]:
    """Of batches, streams, conversions, pushes, objectives and configurations."""
    ids, pair, padded = random_prompts(1, 12), random_prompts(2, 4) % 30, torch.tensor([[5, 6, 0], [5, 6, 7]])
    right = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    yield "tidar, stream of rows", lambda: asked(leaning(), random_prompts(2, 4), streamer=Watcher())
    yield "tidar, stock without numbers", lambda: asked(stock_model(), custom_generate=tidar)
    yield "tidar, merge", lambda: gated(leaning()).merge_and_unload()
    yield "tidar, gated without adapter", lambda: leaning()(ids, labels=ids, objective=DraftObjective(mode="gated"))
    yield "tidar, encoder-decoder", lambda: TiDARForCausalLM.from_config(T5Config())
    yield "tidar, adapter of a head", lambda: gated_adapter_config(with_random_head(leaning()), 0)
    yield "tidar, stock folder", lambda: TiDARForCausalLM.from_pretrained(root() / "stock")
    yield "depth, right padding", lambda: asked(random_model(), padded, policy="exact", **right)
    yield (
        "depth, compat of rows",
        lambda: asked(random_model(), pair, policy="diffusion-forcing", reference_compat=True),
    )
    yield "depth, stream of rows", lambda: asked(random_model(), pair, streamer=Watcher(), policy="exact")
    yield "depth, assisted", lambda: asked(random_model(), assistant_model=random_model(), policy="exact")
    yield "depth, block form", lambda: RecurrentDepthConfig(block_form="upside-down")
    forcing = {"policy": "diffusion-forcing"}
    yield "depth, ouro forcing", lambda: asked(family_model("ouro"), torch.tensor([PROMPTS[0]]), **forcing)
    yield "objective, mode", lambda: DraftObjective(mode="magic")
    yield "objective, decay", lambda: DraftObjective(slot_decay=0.0)
    yield "objective, loss", lambda: DraftObjective(draft_loss="hope")
    for length in (0, 65, 2.0, "8"):
        more = {"draft_length": length}
        yield f"convert, length {length!r}", lambda more=more: convert(root() / "stock", root() / "new", **more)
    yield "convert, again", lambda: convert(root() / "tidar", root() / "new")
    yield "convert, stock back", lambda: to_ar(root() / "stock", root() / "new")
    yield "convert, in itself", lambda: convert(root() / "stock", root() / "stock" / "new", overwrite=True)
    yield "convert, over letters", lambda: convert(root() / "stock", root() / "empty", overwrite=True)
    yield "convert, mask of depth", lambda: convert(root() / "depth", root() / "new", mask_token_id=3)
    yield "push, nothing", lambda: push(root() / "empty", "me/name")


def stock_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root() / "stock")


def error_cases() -> Iterator[tuple[str, Any]]:
    """Every refusal: kind and words of its error."""
    for name, keywords in TIDAR.items():
        yield f"tidar, {name}", partial(refusal, lambda more=keywords: asked(leaning(), **more))
    for name, keywords in DEPTH.items():
        yield f"depth, {name}", partial(refusal, lambda more=keywords: asked(random_model(), **more))
    for name, stored in STORED.items():
        yield f"stored, {name}", partial(refusal, partial(with_stored, stored))
    for name, (folder, options) in TRAINING.items():
        yield f"training, {name}", partial(refusal, partial(trained, folder, **options))
    for name, call in other_refusals():
        yield name, partial(refusal, call)
    for line in COMMANDS:
        yield f"$ {line}", partial(command, line)


def helped(words: list[str]) -> list[str]:
    env = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner().invoke(app, [*words, "--help"], env=env, terminal_width=100)
    assert done.exit_code == 0, done.output
    return [line.rstrip() for line in done.output.splitlines()]


def help_cases() -> Iterator[tuple[str, Any]]:
    """The help of each verb, and of those under it."""

    def below(group: Any, words: list[str]) -> Iterator[tuple[str, Any]]:
        yield " ".join(["wavedraft", *words]), partial(helped, words)
        for name in sorted(getattr(group, "commands", {})):
            yield from below(group.commands[name], [*words, name])

    yield from below(typer.main.get_command(app), [])


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def saved(name: str, make: Any) -> list[str]:
    """Names of the files that `save_pretrained` writes."""
    folder = root() / f"saved {name}"
    make().save_pretrained(folder)
    return names_in(folder)


def travelling_cases() -> Iterator[tuple[str, Any]]:
    """Names of the files that travel with each kind of checkpoint."""
    makers: dict[str, Any] = {
        "tidar": leaning,
        "tidar with a head": lambda: with_random_head(leaning()),
        "gated adapter": lambda: gated(leaning()),
        "recurrent": random_model,
        "ouro": lambda: family_model("ouro"),
    }
    for name, make in makers.items():
        yield f"save_pretrained, {name}", partial(saved, name, make)
    yield "convert, stock", lambda: names_in(root() / "tidar")
    yield "convert, recurrent", lambda: convert(root() / "depth", root() / "ours") and names_in(root() / "ours")
    yield "convert, back", lambda: to_ar(root() / "tidar", root() / "back") and names_in(root() / "back")
