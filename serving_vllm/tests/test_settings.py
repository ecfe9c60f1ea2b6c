"""What is read from an adapter's folder, and what is refused before an engine starts."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import wavedraft_vllm
from helpers_tiny import CHANNELS, DRAFT_LENGTH, LAYERS, VOCAB
from wavedraft_vllm.settings import DraftSettings


@pytest.fixture
def adapter(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "adapter")


def config_of(**given):
    sizes = {"hidden_size": CHANNELS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    return SimpleNamespace(**sizes | given)


def settings(folder, config=None, model="tiny", **given):
    return DraftSettings.of({"adapter": str(folder)} | given, config or config_of(), model)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_folder_says_how_to_draft(adapter):
    found = settings(adapter)
    assert (found.draft_length, found.mask_embedding_id, found.excluded_id) == (DRAFT_LENGTH, 16, None)
    assert found.keep == 0.02 and found.draft_head.endswith("draft_head.safetensors")
    assert (found.max_batch, found.num_extra, found.num_masks, found.longest_draft) == (32, 7, 4, 3)
    assert DraftSettings.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_the_user_gives_goes_before(adapter):
    found = settings(adapter, draft_length=3, keep=0.5, max_batch=4)
    assert (found.draft_length, found.keep, found.max_batch) == (3, 0.5, 4)
    assert settings(adapter, draft_length=2).num_masks == 3, "four tokens a step, of which one is decided"


def test_a_mask_token_of_the_vocabulary_is_never_written(adapter):
    change(adapter / "adapter_config.json", alora_invocation_tokens=[7])
    change(adapter / "generation_config.json", mask_embedding_id=7)
    assert settings(adapter).excluded_id == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_length": 5}, "`draft_length` must be an integer from 2 to 4"),
        ({"draft_length": 1}, "serve the model without this plugin"),
        ({"draft_length": True}, "is True"),
        ({"keep": 1.0}, "`keep` must be a number from 0 to below 1"),
        ({"max_batch": -1}, "`max_batch` must be an integer of 0 or more"),
        ({"max_batches": 1}, "unknown fields"),
        ({"adapter": "no/such/folder"}, "neither a folder nor a repository in reach"),
    ],
)
def test_a_bad_option_is_refused(adapter, given, message):
    with pytest.raises(ValueError, match=message):
        settings(adapter, **given)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 2 * CHANNELS}, {"num_hidden_layers": LAYERS - 1}, {"num_hidden_layers": LAYERS + 1}]
)
def test_an_adapter_of_another_base_is_refused(adapter, sizes):
    with pytest.raises(ValueError, match="taught on another model"):
        settings(adapter, config_of(**sizes))


def test_an_adapter_of_some_layers_says_so(adapter):
    change(adapter / "adapter_config.json", layers_to_transform=[0, 1])
    assert settings(adapter, config_of(num_hidden_layers=LAYERS + 1)).adapter == str(adapter)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("adapter_config.json", {"alora_invocation_tokens": None}, "names no mask token"),
        ("adapter_config.json", {"use_dora": True}, "`use_dora`"),
        ("adapter_config.json", {"r": None}, "must have numbers as `r` and `lora_alpha`"),
        ("generation_config.json", {"mask_embedding_id": VOCAB}, "must be a number and read a row"),
        ("generation_config.json", {"draft_length": None}, "`draft_length` of .* must be an integer"),
        ("generation_config.json", {"block_attention": "sideways"}, "'bidirectional' or 'causal'"),
    ],
)
def test_a_folder_that_cannot_draft_is_refused(adapter, file, values, message):
    change(adapter / file, **values)
    with pytest.raises(ValueError, match=message):
        settings(adapter)


def test_an_adapter_says_itself_how_its_blocks_were_taught(adapter):
    """Also beside a checkpoint of the other kind: what it loses here is said by this."""
    causal = config_of(tidar_config={"block_attention": "causal"})
    assert settings(adapter, causal).block_attention == "bidirectional"
    change(adapter / "generation_config.json", block_attention="causal")
    assert settings(adapter, causal).block_attention == settings(adapter).block_attention == "causal"


def test_the_check_before_vllm_starts(folders, adapter):
    """What `wavedraft serve` runs: silent, or one line."""

    def check(**given):
        words = [sys.executable, "-m", "wavedraft_vllm", str(folders[0]), json.dumps({"adapter": str(adapter)} | given)]
        return subprocess.run(words, capture_output=True, text=True)

    allowed = check()
    assert (allowed.returncode, allowed.stdout) == (0, "")
    refused = check(draft_length=5)
    assert refused.returncode == 1 and "must be an integer from 2 to 4" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_damaged_files_are_refused(adapter):
    (adapter / "draft_head.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="no safetensors file"):
        settings(adapter)
    save_file({"output_weight": torch.zeros(3, 2)}, adapter / "draft_head.safetensors")
    with pytest.raises(ValueError, match="taught with this model"):
        settings(adapter)
    (adapter / "draft_head.safetensors").unlink()
    assert settings(adapter).draft_head is None
    (adapter / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        settings(adapter)


def test_a_checkpoint_that_was_taught_itself_needs_no_adapter(tmp_path):
    taught = {"draft_length": 6, "mask_token_id": VOCAB, "mask_embedding_id": 3, "block_attention": "causal"}
    found = DraftSettings.of({}, config_of(tidar_config=taught), str(tmp_path))
    assert (found.draft_length, found.adapter, found.draft_head) == (6, None, None)
    assert found.block_attention == "causal"
    with pytest.raises(ValueError, match="Name an adapter"):
        DraftSettings.of({}, config_of(), str(tmp_path))
    options = {"draft_acceptance": {"chances": [0.0, 0.0], "num_prompts": 0}}
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="was never taught to draft"):
        DraftSettings.of({}, config_of(tidar_config=taught), str(tmp_path))


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0"])
def test_a_vllm_that_was_not_tested_is_refused(monkeypatch, version):
    import vllm

    wavedraft_vllm.check_vllm_version()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ValueError, match=r"is tested with vLLM from 0\.32 and before 0\.33"):
        wavedraft_vllm.check_vllm_version()


def test_the_adapter_is_read_whole(folders):
    """The tiny adapter changes every linear layer: a family's test would otherwise prove less than it says."""
    assert len(load_file(folders[1] / "adapter_model.safetensors")) == LAYERS * 7 * 2
