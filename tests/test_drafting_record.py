"""`--record` of `wavedraft bench` and `wavedraft audit`: what is written is what was measured, whole or not at all."""

import json
import sys

import pytest
from peft import get_peft_model

from helpers_recurrent import random_model
from helpers_stock import save_tiny_stock
from helpers_tidar import tiny_tidar
from helpers_tokenizers import save_tokenizer
from wavedraft import TiDARForCausalLM, convert
from wavedraft.cli import main
from wavedraft.commands.drafting_record import check_recordable, write_whole
from wavedraft.modeling_tidar.modeling_tidar import acceptance_of
from wavedraft.training import gated_adapter_config

ROWS = [{"prompt": "w1 w2 w3", "kind": "a"}, {"prompt": "w4", "kind": "b"}, {"prompt": "w9 w8", "kind": "a"}]
VERBS = {
    "bench": ["--batch-sizes", 1, "--num-branches", 1, "--repeats", 1, "--only", "no drafts"],
    "audit": ["--batch-size", 2, "--draft-length", 2],
}


@pytest.fixture
def folders(tmp_path):
    """A TiDAR checkpoint, an adapter of it, and a file of prompts."""
    save_tiny_stock(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock", num_words=61)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    adapted = tiny_tidar("llama")
    get_peft_model(adapted, gated_adapter_config(adapted, rank=4)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run_verb(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wavedraft", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
        sys.exit(0)
    return caught.value.code or 0


@pytest.mark.parametrize(("verb", "has_adapter"), [("bench", True), ("bench", False), ("audit", True)])
def test_record_writes_how_often_drafts_stand_and_keeps_the_other_keys(folders, monkeypatch, capsys, verb, has_adapter):
    path = folders / ("adapter" if has_adapter else "tidar") / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.5, "draft_acceptance": {"chances": []}}))
    names = sorted(one.name for one in path.parent.iterdir())
    options = ["--prompts", folders / "prompts.jsonl", "--max-new-tokens", 6, "--record", *VERBS[verb]]
    options += ["--adapter", folders / "adapter"] * has_adapter
    code = run_verb(monkeypatch, verb, folders / "tidar", *options)
    err = capsys.readouterr().err
    assert code == 0 and "has the record of 3 prompts" in err, err
    found = json.loads(path.read_text())
    assert found["temperature"] == 0.5 and sorted(found) == ["draft_acceptance", "temperature"]
    record = found["draft_acceptance"]
    assert len(record["chances"]) == 3 and record["num_prompts"] == 3 and record["kinds"] == {"a": 2, "b": 1}
    assert sorted(one.name for one in path.parent.iterdir()) == names
    model = TiDARForCausalLM.from_pretrained(folders / "tidar", dtype="float32")
    if has_adapter:
        model.load_adapter(folders / "adapter")
    assert acceptance_of(model) == record


def test_a_record_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "generation_config.json"
    path.write_text("{}")

    def broken(*paths):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "something else")
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


def test_a_record_needs_a_tidar_model_a_folder_and_a_dictionary(folders):
    with pytest.raises(ValueError, match="some/adapter is none here"):
        check_recordable(str(folders / "tidar"), "some/adapter")
    (folders / "adapter" / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a JSON dictionary"):
        check_recordable(str(folders / "tidar"), str(folders / "adapter"))
    random_model(0).save_pretrained(folders / "recurrent")
    with pytest.raises(ValueError, match="--record is for TiDAR checkpoints"):
        check_recordable(str(folders / "recurrent"), None)
