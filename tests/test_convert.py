"""Conversion: what is preserved, what is refused, and that a target folder is complete or absent."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers_stock import digests, edit_json, save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM, convert, to_ar
from wavedraft.conversion.mask_token import mask_embedding_id
from wavedraft.conversion.safetensors_headers import read_header
from wavedraft.generation import tidar
from wavedraft.modeling_tidar import generation_tidar

SHARDED = "20KB"


@pytest.fixture
def stock(tmp_path) -> Path:
    folder = tmp_path / "stock"
    save_tiny_stock(folder, max_shard_size=SHARDED)
    save_tokenizer(folder)
    return folder


def test_a_sharded_checkpoint_keeps_its_bytes_and_gains_one_config_key_and_code(stock, tmp_path):
    before = digests(stock)
    result = convert(stock, tmp_path / "tidar", draft_length=5)

    after = digests(tmp_path / "tidar")
    assert digests(stock) == before
    assert len([name for name in before if name.endswith(".safetensors")]) > 2
    rewritten = ("config.json", "generation_config.json")
    assert {name: after.get(name) for name in before if name not in rewritten} == {
        name: digest for name, digest in before.items() if name not in rewritten
    }
    beside_code = {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert {name for name in set(after) - set(before) if "/" in name or not name.endswith(".py")} == beside_code
    options = json.loads((tmp_path / "tidar" / "generation_config.json").read_text())
    assert options.pop("_from_model_config") is False, "else transformers would drop our keywords from it"
    assert options.pop("draft_acceptance") == {"chances": [0.0] * 4, "num_prompts": 0}, "nothing was taught yet"
    assert options.items() <= json.loads((stock / "generation_config.json").read_text()).items()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (stock, tmp_path / "tidar"))
    assert new.pop("tidar_config") == {"draft_length": 5, "mask_token_id": 61, "mask_embedding_id": 50}
    assert new.pop("auto_map") == {"AutoModelForCausalLM": "modeling_tidar.TiDARLlamaForCausalLM"}
    assert new == old
    assert result.proof.max_abs_difference == 0.0 and "no token" in result.mask_reason
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tidar")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(stock).chat_template


def test_the_way_back_gives_the_source_again(stock, tmp_path):
    convert(stock, tmp_path / "tidar")
    result = to_ar(tmp_path / "tidar", tmp_path / "back")
    expected, found = digests(stock), digests(tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((stock / name).read_text())
        expected.pop(name), found.pop(name)
    assert found == expected
    assert result.proof.max_abs_difference == 0.0
    with pytest.raises(ValueError, match="stock checkpoint already"):
        to_ar(stock, tmp_path / "again")
    with pytest.raises(ValueError, match="TiDAR checkpoint already"):
        convert(tmp_path / "tidar", tmp_path / "again")


def test_links_cost_nothing_and_load(stock, tmp_path):
    convert(stock, tmp_path / "tidar", link=True)
    shards = sorted((tmp_path / "tidar").glob("*.safetensors"))
    assert shards and all(shard.is_symlink() and shard.resolve().parent == stock for shard in shards)
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").tidar_config.draft_length == 8


@pytest.mark.parametrize("link", [False, True])
def test_a_model_saved_over_the_target_leaves_the_source_alone(stock, tmp_path, link):
    convert(stock, tmp_path / "tidar", link=link)
    before = digests(stock)
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "tidar")
    assert digests(stock) == before


def test_copies_are_no_hard_links(stock, tmp_path):
    convert(stock, tmp_path / "tidar")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "tidar").iterdir() if path.is_file())


def test_an_existing_target_is_refused_then_replaced(stock, tmp_path):
    convert(stock, tmp_path / "tidar", draft_length=3)
    before = digests(tmp_path / "tidar")
    with pytest.raises(ValueError, match="--overwrite"):
        convert(stock, tmp_path / "tidar", draft_length=4)
    assert digests(tmp_path / "tidar") == before
    convert(stock, tmp_path / "tidar", draft_length=4, overwrite=True)
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").tidar_config.draft_length == 4
    assert digests(tmp_path / "tidar")["README.md"] == before["README.md"], "a card nobody touched is written anew"
    (tmp_path / "tidar" / "README.md").write_text("# My words")
    convert(stock, tmp_path / "tidar", overwrite=True)
    to_ar(tmp_path / "tidar", tmp_path / "back")
    assert (tmp_path / "tidar" / "README.md").read_text() == "# My words" and not (tmp_path / "back/README.md").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        convert(stock, tmp_path / "letters", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "letters", "stock", "tidar"]


def test_a_target_in_the_source_or_around_it_is_refused(stock, tmp_path):
    for source, target in [(stock, stock), (stock, stock / "tidar")]:
        with pytest.raises(ValueError, match="must not contain each other"):
            convert(source, target, overwrite=True)
    convert(stock, tmp_path / "tidar", link=True)
    with pytest.raises(ValueError, match="must not contain each other"):  # would delete the shards the links point to
        to_ar(tmp_path / "tidar", stock, overwrite=True)


@pytest.mark.parametrize("draft_length", [0, -1, 65, 2.0, True, "8"])
def test_a_draft_length_out_of_range_is_refused(stock, tmp_path, draft_length):
    with pytest.raises(ValueError, match="between 1 and 64"):
        convert(stock, tmp_path / "tidar", draft_length=draft_length)


# -- damaged sources


HOSTILE = [
    ("config.json", {"dtype": 0}, "`dtype` must name a dtype"),
    ("config.json", {"text_config": -1}, "`text_config` must be an object, but is -1"),
    ("config.json", {"pad_token_id": "x"}, "pad_token_id"),
    ("config.json", {"model_type": [1, 2]}, r"`model_type` \[1, 2\]"),
    ("config.json", {"vocab_size": 0}, "cannot be built as config.json says"),
    ("config.json", {"hidden_act": "x"}, "cannot be built as config.json says"),
    ("config.json", {"is_causal": 0.5}, "LlamaForCausalLM cannot run as"),
    ("generation_config.json", {"pad_token_id": []}, "generation_config.json is not valid"),
    ("generation_config.json", {"dtype": 1}, "generation_config.json is not valid"),
    ("model.safetensors.index.json", {"metadata": 3}, "`metadata` is 3"),
    ("adapter_config.json", {"r": 4}, "takes it for an adapter"),
    ("tokenizer_config.json", {"unk_token": ""}, "tokenizer_config.json has the `unk_token` ''"),
]


@pytest.mark.parametrize(("name", "values", "reason"), HOSTILE)
def test_a_hostile_value_is_one_clear_error(stock, tmp_path, name, values, reason):
    path = stock / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    with pytest.raises(ValueError, match=reason):
        convert(stock, tmp_path / "tidar")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"])
def test_an_empty_special_token_that_is_not_the_unknown_one_is_the_same_as_none(stock, tmp_path, name):
    path = stock / "tokenizer_config.json"
    for target, value in (("empty", ""), ("none", None)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        convert(stock, tmp_path / target, verify=False)
    empty, none = (json.loads((tmp_path / target / "config.json").read_text()) for target in ("empty", "none"))
    assert empty == none


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_of_the_shortest_texts_is_proved_with_them(tmp_path, family):
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    for longest in (2, 3, 5):
        save_tiny_stock(tmp_path / f"stock-{longest}", family, **{name: longest})
        convert(tmp_path / f"stock-{longest}", tmp_path / f"tidar-{longest}", draft_length=4)
        model = TiDARForCausalLM.from_pretrained(tmp_path / f"tidar-{longest}").eval()
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"stock-{longest}").eval()
        given = {"inputs": torch.tensor([[5]]), "max_new_tokens": longest - 1, "do_sample": False}
        assert model.generate(**given, num_branches="all").tolist() == expected.generate(**given).tolist()
    save_tiny_stock(tmp_path / "stock-1", family, **{name: 1})
    with pytest.raises(ValueError, match="must allow texts of 2 tokens"):
        convert(tmp_path / "stock-1", tmp_path / "tidar-1", draft_length=4)
    assert not (tmp_path / "tidar-1").exists()


@pytest.mark.parametrize("value", [1, "x", [1], {"block_attention": "causal"}, None])
def test_a_stock_generation_config_says_nothing_about_drafts(stock, tmp_path, value):
    path = stock / "generation_config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"tidar_config": value}))
    convert(stock, tmp_path / "tidar", verify=False)
    assert "block_attention" not in (tmp_path / "tidar" / "README.md").read_text()


def test_a_folder_without_a_tokenizer_is_said(stock, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("wavedraft.conversion.checkpoint_files.logger.warning", said.append)
    convert(stock, tmp_path / "with", verify=False)
    assert not said
    for path in [*stock.glob("tokenizer*"), *stock.glob("chat_template*"), *stock.glob("special_tokens*")]:
        path.unlink()
    convert(stock, tmp_path / "without", verify=False)
    assert "has no tokenizer" in said[0]


def one_shard(stock: Path) -> Path:
    return sorted(stock.glob("*.safetensors"))[1]


def truncate_shard(stock: Path) -> None:
    os.truncate(one_shard(stock), one_shard(stock).stat().st_size - 1)


def grow_shard(stock: Path) -> None:
    with one_shard(stock).open("ab") as file:
        file.write(b"x")


def cut_into_header(stock: Path) -> None:
    os.truncate(one_shard(stock), 20)


def empty_shard(stock: Path) -> None:
    os.truncate(one_shard(stock), 0)


def remove_shard(stock: Path) -> None:
    one_shard(stock).unlink()


def point_outside(stock: Path) -> None:
    shutil.copy(one_shard(stock), stock.parent / "secret.safetensors")
    index = json.loads((stock / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        if name == one_shard(stock).name:
            index["weight_map"][key] = "../secret.safetensors"
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))


def promise_too_much(stock: Path) -> None:
    index = json.loads((stock / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = one_shard(stock).name
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(stock: Path) -> None:
    (stock / "model.safetensors.index.json").write_text("{")


def drop_tensor(stock: Path) -> None:
    tensors = load_file(one_shard(stock))
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, one_shard(stock), {"format": "pt"})
    index = json.loads((stock / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))


def add_tensor(stock: Path) -> None:
    tensors = {**load_file(one_shard(stock)), "model.layers.0.self_attn.surprise": torch.ones(3)}
    save_file(tensors, one_shard(stock), {"format": "pt"})


def more_layers(stock: Path) -> None:
    edit_json(stock / "config.json", num_hidden_layers=3)


def endless_layers(stock: Path) -> None:
    edit_json(stock / "config.json", num_hidden_layers=10**9)


def other_width(stock: Path) -> None:
    edit_json(stock / "config.json", intermediate_size=44)


def wrong_type(stock: Path) -> None:
    edit_json(stock / "config.json", hidden_size="wide")


def unknown_type(stock: Path) -> None:
    edit_json(stock / "config.json", model_type="llamma")


def no_json(stock: Path) -> None:
    (stock / "config.json").write_text("hidden_size: 32")


def no_config(stock: Path) -> None:
    (stock / "config.json").unlink()


def quantized(stock: Path) -> None:
    edit_json(stock / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def infinite_weight(stock: Path) -> None:
    shard = next(path for path in sorted(stock.glob("*.safetensors")) if "lm_head.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["lm_head.weight"][3, 3] = torch.inf
    save_file(tensors, shard, {"format": "pt"})


def no_weights(stock: Path) -> None:
    for path in [*stock.glob("*.safetensors"), stock / "model.safetensors.index.json"]:
        path.unlink()


def pickled(stock: Path) -> None:
    no_weights(stock)
    torch.save({}, stock / "pytorch_model.bin")


DAMAGES = {
    truncate_shard: "cut short",
    grow_shard: "overwritten",
    cut_into_header: "not a complete safetensors file",
    empty_shard: "not a complete safetensors file",
    remove_shard: "lacks the shard",
    point_outside: "not the name of a safetensors file",
    promise_too_much: "index.json lists",
    break_index: "not an index",
    drop_tensor: "missing keys",
    add_tensor: "surprise",
    more_layers: "missing keys",
    endless_layers: "have only",
    other_width: "mismatched keys",
    wrong_type: "not a valid config",
    unknown_type: "'llamma'",
    no_json: "not a JSON",
    no_config: "not a checkpoint folder",
    quantized: "quantized",
    infinite_weight: "not finite",
    no_weights: "no weights to convert",
    pickled: "save_pretrained",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_source_is_refused_and_nothing_is_left_behind(stock, tmp_path, damage):
    damage(stock)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        convert(stock, tmp_path / "tidar")
    assert digests(tmp_path) == before


def test_any_broken_header_is_a_value_error(tmp_path):
    save_file({"a": torch.zeros(3, 2), "b": torch.ones(4)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    generator = torch.Generator().manual_seed(0)
    num_refused = 0
    for _ in range(500):
        place, byte = torch.randint(length, (), generator=generator), torch.randint(256, (), generator=generator)
        bad = bytearray(good)
        bad[int(place)] = int(byte)
        (tmp_path / "bad.safetensors").write_bytes(bad)
        try:
            read_header(tmp_path / "bad.safetensors")
        except ValueError:
            num_refused += 1
    assert num_refused > 300


# -- config keys


def test_code_and_foreign_keys_of_a_source_are_left_behind(stock, tmp_path):
    (stock / "modeling_evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w').write('ran')\n")
    edit_json(
        stock / "config.json",
        auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
        someones_note="hello",
        rope_parameters=None,
        rope_theta=5000.0,
        torch_dtype="float32",
    )
    edit_json(stock / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]})
    convert(stock, tmp_path / "tidar")
    values = json.loads((tmp_path / "tidar" / "config.json").read_text())
    assert not {"attn_implementation", "_attn_implementation", "someones_note"} & set(values)
    assert "evil" not in json.dumps(values)
    assert values["rope_theta"] == 5000.0, "an old spelling that fills a field of the config stays"
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").config.rope_parameters["rope_theta"] == 5000.0
    assert "auto_map" not in json.loads((tmp_path / "tidar" / "tokenizer_config.json").read_text())
    assert not (tmp_path / "tidar" / "modeling_evil.py").exists() and not (tmp_path / "evil").exists()


def test_a_mask_reads_the_row_that_text_uses_least():
    def choose(vocab_size, zero_rows=(), end_ids=(2,), **changes):
        special = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<tool>", 4: "<spare>"}
        values = {
            "get_vocab": lambda: {f"w{n}": n for n in range(50)},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "unk_token_id": 0,
            "chat_template": "{{ '<tool>' }}",
            "added_tokens_decoder": {n: SimpleNamespace(content=c, special=True) for n, c in special.items()},
        }
        tokenizer = SimpleNamespace(**{**values, **changes})
        return mask_embedding_id(tokenizer, vocab_size, list(end_ids), lambda row: row in zero_rows)[0]

    assert choose(64) == 50, "the first row no token has"
    assert choose(64, zero_rows={50, 51}) == 52, "a zero row would leave an adapter nothing to act on"
    assert choose(50) == 4, "the last special token that the chat template does not use"
    assert choose(50, end_ids=[4]) == 0, "never one that ends a text while there is another"
    assert choose(50, chat_template="<tool><spare>", unk_token_id=None, added_tokens_decoder={}) == 1
    assert choose(50, zero_rows=set(range(50))) == 4
    assert mask_embedding_id(None, 50, [], lambda row: False)[0] == 49


# -- whole or absent

SLOW_CONVERT = """
    import importlib, sys, time
    from wavedraft.conversion import convert
    module = importlib.import_module("wavedraft.conversion.checkpoint_files")
    copy = module.copy_shard
    def slow_copy(*args):
        copy(*args)
        print("copied", flush=True)
        time.sleep(60)
    module.copy_shard = slow_copy
    convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("has_old_target", [False, True])
def test_a_killed_conversion_leaves_the_target_absent_or_whole(stock, tmp_path, has_old_target):
    before = digests(stock)
    if has_old_target:
        convert(stock, tmp_path / "tidar", draft_length=3)
    old = digests(tmp_path / "tidar")
    code = textwrap.dedent(SLOW_CONVERT)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(stock), str(tmp_path / "tidar")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "copied\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert digests(stock) == before and digests(tmp_path / "tidar") == old
    assert any(path.name.startswith(".tidar.") for path in tmp_path.iterdir())

    convert(stock, tmp_path / "tidar", overwrite=True)
    assert TiDARForCausalLM.from_pretrained(tmp_path / "tidar").tidar_config.draft_length == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock", "tidar"]


def test_a_target_set_aside_when_the_kill_came_is_put_back(stock, tmp_path):
    convert(stock, tmp_path / "tidar", draft_length=3)
    whole = digests(tmp_path / "tidar")
    workplace = tmp_path / ".tidar.wavedraft-killed"
    workplace.mkdir()
    (tmp_path / "tidar").rename(workplace / "old")
    with pytest.raises(ValueError, match="--overwrite"):
        convert(stock, tmp_path / "tidar")
    assert digests(tmp_path / "tidar") == whole and not workplace.exists()


def test_a_full_disk_is_noticed_before_anything_is_copied(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="GB free"):
        convert(stock, tmp_path / "tidar")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_a_head_that_does_more_than_its_config_says_is_refused(stock, tmp_path, monkeypatch):
    from wavedraft.conversion import proof

    monkeypatch.setattr(proof, "lm_head_logits", lambda model, states: model.lm_head(states) * 2)
    with pytest.raises(ValueError, match="changes the output of its lm_head"):
        convert(stock, tmp_path / "tidar")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


# -- scale

EIGHT_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def write_sparse_llama(folder: Path, num_shards: int = 4) -> int:
    """An 8B-shaped bfloat16 checkpoint of holes; returns its size in bytes, all shards together."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**EIGHT_BILLION, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    names, weight_map = list(shapes), {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        header, end = {}, 0
        for name in names[shard::num_shards]:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = file_name
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_eight_billion_parameters_take_seconds_and_less_memory_than_a_shard(tmp_path):
    num_bytes = write_sparse_llama(tmp_path / "stock")
    assert num_bytes > 16e9
    code = "import sys, resource, wavedraft\n"
    code += "result = wavedraft.convert(sys.argv[1], sys.argv[2])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, result.proof.num_layers)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "stock"), str(tmp_path / "tidar")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    peak, num_layers = map(int, done.stdout.split())
    assert peak < num_bytes / 4 and num_layers == 2
    assert seconds < 120, "a busy machine included"
    written = sum(path.stat().st_blocks * 512 for path in (tmp_path / "tidar").iterdir())
    assert written < 50e6, "holes stay holes"


# -- where sources come from


def test_a_hub_id_is_read_from_the_cache_when_offline(stock, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for path in stock.iterdir():  # the cache's own layout: blobs, and links to them
        (repo / "blobs" / path.name).write_bytes(path.read_bytes())
        (repo / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert convert("someone/tiny", tmp_path / "tidar").proof.max_abs_difference == 0.0
    assert not any(path.is_symlink() for path in (tmp_path / "tidar").iterdir())
    with pytest.raises(ValueError, match="There is no local folder someone/else"):
        convert("someone/else", tmp_path / "other")


def test_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(ValueError, match="not a Hub id"):
        convert(tmp_path / "nowhere" / "at" / "all", tmp_path / "tidar")


def write_tiny_gguf(path: Path, pre: str = "smollm") -> None:
    import gguf

    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randn(*shape, generator=generator).mul(0.2).numpy()

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare>", *letters, "12"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", weight(len(tokens), 32))
    writer.add_tensor("output_norm.weight", weight(32) + 1)
    for name, shape in {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (48, 32),
        "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }.items():
        writer.add_tensor(f"blk.0.{name}.weight", weight(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_model_that_transformers_reads_from_gguf_drafts_its_own_text(tmp_path, is_ours):
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    ids = torch.tensor([[5, 9, 30, 12], [7, 8, 44, 6]])
    way = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafting = way | {"draft_length": 4, "mask_embedding_id": 3, "num_branches": "all"}
    decode = functools.partial(generation_tidar.generate, model=stock) if is_ours else stock.generate
    found = decode(ids, **drafting, **({} if is_ours else {"custom_generate": tidar}))
    assert found.tolist() == stock.generate(ids, **way).tolist()


def test_a_gguf_file_becomes_a_checkpoint_whose_tokenizer_keeps_digits_apart(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "download").mkdir()
    write_tiny_gguf(tmp_path / "download" / "tiny.gguf")
    result = convert(tmp_path / "download", tmp_path / "tidar")
    assert result.proof.max_abs_difference == 0.0 and result.tidar_config.mask_embedding_id == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "tidar"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tidar")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12")["input_ids"]) == ["a", "Ġ", "1", "2"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar")
    assert stock.dtype == torch.float32 and stock.config.tie_word_embeddings
    assert stock.generation_config.eos_token_id == 2

    write_tiny_gguf(tmp_path / "download" / "other.gguf", pre="poro-chat")
    with pytest.raises(ValueError, match="poro-chat"):
        convert(tmp_path / "download" / "other.gguf", tmp_path / "other")
    with pytest.raises(ValueError, match="2 GGUF files"):
        convert(tmp_path / "download", tmp_path / "other")
    (tmp_path / "download" / "other.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ValueError, match="could not be read as GGUF"):
        convert(tmp_path / "download" / "other.gguf", tmp_path / "other")
