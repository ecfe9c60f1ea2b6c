"""Converts checkpoint folders with random damage: each is refused by a ValueError, or converted well.

    python tests/fuzz/fuzz_folders.py FIRST COUNT [SECONDS]

A case is its number. Every failure is printed with its number and its damage.
"""

import copy
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from helpers_stock import digests, save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM, convert

VALUES = [
    None, True, False, 0, 1, -1, 3, 61, 2**31, 2**70, 0.5, -1.0, float("nan"), float("inf"), "", "x", "float16", "none",
    [], [1, 2], ["x"], [None], {}, {"x": 1}, {"rope_type": "x"}, {"rope_type": "dynamic"}, [[[]]], "../config.json",
]  # fmt: skip
OTHER_KEYS = {
    "dtype", "torch_dtype", "rope_scaling", "rope_theta", "sliding_window", "layer_types", "quantization_config",
    "tidar_config", "auto_map", "mask_token_id", "block_size", "text_config", "alibi", "is_encoder_decoder",
    "pad_token", "mean_recurrence", "is_causal", "attn_implementation", "num_labels", "id2label", "head_dim",
    "tie_word_embeddings", "chat_template", "max_length", "temperature", "draft_length", "num_branches",
    "draft_acceptance",
}  # fmt: skip


def random_place(tree: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container inside a JSON tree, and a key or an index in it."""
    while True:
        if not isinstance(tree, dict | list) or not tree:
            return None, None
        key = draw.choice(sorted(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        if not isinstance(tree[key], dict | list) or not tree[key] or draw.random() < 0.3:
            return tree, key
        tree = tree[key]


def damage_tree(tree: Any, draw: random.Random) -> str:
    """Changes one value of a JSON tree in place; says which."""
    container, key = random_place(tree, draw)
    if container is None:
        return "nothing"
    kind = draw.randrange(4)
    if kind == 0 and isinstance(container, dict):
        del container[key]
        return f"without {key!r}"
    if kind == 1 and isinstance(tree, dict):
        container, key = tree, draw.choice(sorted({*tree, *OTHER_KEYS}))
    container[key] = copy.deepcopy(draw.choice(VALUES))  # which another change may change
    return f"{key!r} = {container[key]!r}"


def damage_json(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    kind = draw.randrange(12)
    if kind == 0:
        path.write_bytes(content[: draw.randrange(len(content))])
        return "cut short"
    if kind == 1:
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
        return f"byte {place} changed"
    if kind == 2:
        path.write_bytes(draw.choice([b"", b"[]", b"3", b"null", b"[" * 100_000, b"\xff\xfe{}", b'{"a": 1}', b"\x00"]))
        return "other content"
    tree = json.loads(content)
    said = [damage_tree(tree, draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    path.write_text(json.dumps(tree), encoding="utf-8")
    return "; ".join(said)


def damage_shard(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    kind = draw.randrange(6)
    if kind == 0:
        path.write_bytes(content[: draw.randrange(len(content))])
        return "cut short"
    if kind == 1:
        place = draw.randrange(8 + length)
        path.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
        return f"byte {place} of the header changed"
    if kind == 2:
        path.write_bytes(content + bytes(draw.randrange(1, 9)))
        return "longer"
    if kind == 3:
        size = len(content) - 8 - length
        path.write_bytes(content[: 8 + length] + draw.randbytes(size))
        return "random weights"
    header = json.loads(content[8 : 8 + length])
    said = damage_tree(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return said


def damage_files(path: Path, draw: random.Random) -> str:
    kind = draw.randrange(4)
    path.unlink()
    if kind == 0:
        return "absent"
    if kind == 1:
        path.mkdir()
        return "a folder"
    if kind == 2:
        path.symlink_to("nowhere")
        return "a broken link"
    extra = draw.choice(["adapter_config.json", "pytorch_model.bin", "modeling_x.py", "tokenizer.model", "vocab.json"])
    path.with_name(extra).write_bytes(draw.choice([b"", b"{}", b'{"r": 4}', b"x"]))
    return f"{extra} instead"


def damage(folder: Path, draw: random.Random) -> str:
    """Damages one file of a folder; says how."""
    path = draw.choice(sorted(folder.iterdir()))
    change: Callable[[Path, random.Random], str] = damage_json if path.suffix == ".json" else damage_shard
    if path.suffix not in (".json", ".safetensors") or draw.random() < 0.05:
        change = damage_files
    return f"{path.name}: {change(path, draw)}"


def plain_text(model_class: Any, folder: Path, **options: Any) -> list[int] | None:
    """What a model writes; None where transformers cannot load it or write with it."""
    try:
        model = model_class.from_pretrained(folder).eval()
        ids = torch.tensor([[5, 7, 11]])
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, **options)[
            0
        ].tolist()
    except Exception:  # whatever transformers itself raises for the source
        return None


def failure_of(number: int, base: Path, place: Path) -> tuple[str | None, str]:
    """What went wrong with one case, or None; and its damage."""
    draw = random.Random(number)
    source, target = place / "source", place / "target"
    shutil.copytree(base, source)
    said = damage(source, draw)
    before = digests(source)
    try:
        convert(source, target, draft_length=4)
    except ValueError as error:
        failure = None if len(str(error)) > 20 else f"says only {error}"
    except Exception as error:
        failure = f"raw {error!r}"[:300]
    else:
        expected, options = plain_text(AutoModelForCausalLM, source), {"num_branches": "all"}
        found = plain_text(TiDARForCausalLM, target, **options)
        failure = None if expected is None or expected == found else f"writes {found}, not {expected}"
        shutil.rmtree(target)
    if sorted(path.name for path in place.iterdir()) != ["source"]:
        failure = f"left {sorted(path.name for path in place.iterdir())}"
    if digests(source) != before:
        failure = "the source changed"
    return failure, said


def run(first: int, count: int, seconds: float = float("inf")) -> tuple[int, list[str]]:
    """Runs cases until the count or the time is up; how many, and the failures."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failures, start, done = [], time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_tiny_stock(base, max_shard_size="20KB")
        save_tokenizer(base)
        for number in range(first, first + count):
            if time.monotonic() - start > seconds:
                break
            place = Path(folder) / str(number)
            place.mkdir()
            failure, said = failure_of(number, base, place)
            if failure:
                failures.append(f"{number}: {said}: {failure}")
                print(failures[-1], flush=True)
            shutil.rmtree(place)
            done += 1
    return done, failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    done, failures = run(int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
    print(f"{done} folders, {len(failures)} failures")
    sys.exit(bool(failures))
