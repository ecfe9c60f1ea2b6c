"""Pushing to a Hub: one commit or none, and the pushed model decodes without wavedraft installed."""

import json
import re

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers_family import tiny_model, write_folder
from helpers_hub_server import TOKEN, HubServer
from helpers_stock import digests, save_tiny_stock
from helpers_tokenizers import save_tokenizer
from helpers_without_wavedraft import run_alone
from wavedraft import TiDARForCausalLM, convert, push
from wavedraft.cli import main
from wavedraft.hub.model_card import is_replaceable, metadata_of, write_card
from wavedraft.training import gated_adapter_config

FIGURES = {
    "about": {
        "date": "2026-11-22",
        "device": "cpu",
        "dtype": "float32",
        "max_new_tokens": 64,
        "model": "/home/me/secret",
    },
    "figures": {"all": {"prompts": 2, "tokens": 126, "forwards": 71, "tokens_per_forward": 1.7746, "identical": 1.0}},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server on loopback in the Hub's place. Uploads go by LFS: the server does not speak Xet."""
    server = HubServer()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between its retries
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def tidar(tmp_path_factory):
    """A converted folder whose source has a licence in its card."""
    folder = tmp_path_factory.mktemp("push")
    save_tiny_stock(folder / "stock")
    save_tokenizer(folder / "stock", num_words=61)
    (folder / "stock" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\n# The base\n")
    convert(folder / "stock", folder / "tidar", draft_length=4)
    return folder / "tidar"


@pytest.fixture(scope="module")
def adapter(tidar):
    """A gated adapter as PEFT saves it, with the card PEFT makes."""
    torch.manual_seed(0)
    model = TiDARForCausalLM.from_pretrained(tidar)
    folder = tidar.parent / "adapter"
    get_peft_model(model, gated_adapter_config(model, rank=4, init_lora_weights=False)).save_pretrained(folder)
    return folder


def commits(server, repo_id, branch="main"):
    """How many commits a branch has after the one every new repository begins with."""
    return len(server.repositories[repo_id].branches[branch]) - 1


BACK = """
    import contextlib, io, re
    from transformers import AutoTokenizer, LlamaForCausalLM
    from peft import PeftModel

    ids = torch.tensor([arguments["ids"]])
    options = {"max_new_tokens": 12, "do_sample": False}

    def written(model, **given):
        output = model.generate(ids, **options, return_dict_in_generate=True, **given)
        assert output.num_forwards <= 11
        return output.sequences[0].tolist()

    model = AutoModelForCausalLM.from_pretrained("me/thinker", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.me.thinker"), type(model)
    pinned = AutoModelForCausalLM.from_pretrained("me/thinker", trust_remote_code=True, revision=arguments["first"])
    assert pinned.generation_config.draft_length == 2 and model.generation_config.draft_length == 3
    assert arguments["first"] in type(pinned).__module__

    stock = LlamaForCausalLM.from_pretrained("me/stock")
    by_path = {"custom_generate": "me/thinker", "trust_remote_code": True}
    gated = {"custom_generate": "me/adapter", "trust_remote_code": True}
    answer = {
        "plain": stock.generate(ids, **options)[0].tolist(),
        "class": written(model),
        "pinned": written(pinned),
        "custom": written(stock, **by_path, draft_length=3, mask_embedding_id=arguments["row"]),
        "custom pinned": written(stock, **by_path, draft_length=3, mask_embedding_id=3, revision=arguments["first"]),
    }
    stock.load_adapter("me/adapter")
    answer["load_adapter"] = written(stock, **gated)
    wrapped = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/stock"), "me/adapter")
    answer["PeftModel"] = written(wrapped, **gated)

    model.push_to_hub("me/again", token=arguments["token"])
    answer["again"] = written(AutoModelForCausalLM.from_pretrained("me/again", trust_remote_code=True))
    for name in ("thinker", "adapter"):
        snippet = re.search("```python\\n(.*?)```", arguments["cards"][name], re.DOTALL)[1]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {})
        assert "forwards after the prompt's" in printed.getvalue()
"""


def test_what_was_pushed_comes_back_and_decodes_the_same_without_wavedraft(hub, tidar, adapter, tmp_path):
    before = digests(tidar.parent)
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    model = TiDARForCausalLM.from_pretrained(tidar)
    model.generation_config.draft_length = 2
    model.push_to_hub("me/thinker", token=TOKEN)
    first = hub.repositories["me/thinker"].branches["main"][-1]
    copied = tmp_path / "copied"
    model.generation_config.draft_length = 3
    model.save_pretrained(copied)
    push(copied, "me/thinker", token=TOKEN, base_model="me/stock", figures=tmp_path / "figures.json")
    push(adapter, "me/adapter", token=TOKEN, base_model="me/stock")
    hub.repositories["me/stock"] = type(hub.repositories["me/thinker"])()
    hub.repositories["me/stock"].add_commit(
        "main", {p.name: p.read_bytes() for p in (tidar.parent / "stock").iterdir()}
    )

    assert commits(hub, "me/thinker") == 2 and commits(hub, "me/adapter") == 1
    assert digests(tidar.parent) == before
    files = hub.files("me/thinker")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "modeling_tidar.py" in files and "custom_generate/generate.py" in files
    assert not any(name.endswith((".bin", ".pt", "report.json")) for name in files)
    cards = {name: hub.files(f"me/{name}")["README.md"].decode() for name in ("thinker", "adapter")}
    (tmp_path / "README.md").write_text(cards["thinker"])
    head = metadata_of(tmp_path / "README.md")
    assert head["base_model"] == "me/stock" and head["license"] == "apache-2.0" and head["language"] == "en"
    assert {"tidar", "custom_generate"} <= set(head["tags"]) and head["pipeline_tag"] == "text-generation"
    assert "| all | 126 | 71 | 1.77 | 100% | float32 |" in cards["thinker"] and "secret" not in cards["thinker"]
    assert "Nothing was measured" in cards["adapter"] and "More Information Needed" not in cards["adapter"]
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == "me/stock"

    arguments = {"ids": [5, 17, 40, 8], "first": first, "cards": cards, "row": 3, "token": TOKEN}
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    answer = run_alone(BACK, arguments, tmp_path, **environment)
    expected = model.generate(torch.tensor([arguments["ids"]]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert answer == dict.fromkeys(answer, expected)

    again = hub.files("me/again")
    assert set(again) == set(files) and commits(hub, "me/again") == 1
    for name in set(files) - {"README.md", "config.json", "generation_config.json"}:
        assert again[name] == files[name], name
    assert json.loads(again["config.json"]) == json.loads(files["config.json"])
    (tmp_path / "README.md").write_bytes(again["README.md"])
    assert metadata_of(tmp_path / "README.md") == head


def test_a_refused_token_publishes_nothing_and_says_so(hub, tidar, monkeypatch, capsys):
    with pytest.raises(PermissionError, match=r"refused the token for me/thinker \(HTTP 401\)"):
        push(tidar, "me/thinker", token="hf_may_not")
    with pytest.raises(PermissionError, match="refused the token"):
        TiDARForCausalLM.from_pretrained(tidar).push_to_hub("me/thinker", token="hf_may_not")
    monkeypatch.setattr("sys.argv", ["wavedraft", "push", str(tidar), "me/thinker", "--token", "hf_may_not"])
    with pytest.raises(SystemExit) as caught:
        main()
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and sum(line.startswith("wavedraft: ") for line in errors) == 1
    assert not hub.repositories and not hub.blobs


def test_a_dropped_connection_is_tried_again_then_told_and_a_second_push_goes_on(hub, tidar):
    before = digests(tidar)
    hub.drop = ("PUT /lfs/", 2)
    push(tidar, "me/thinker", token=TOKEN)  # huggingface_hub tries again itself
    assert commits(hub, "me/thinker") == 1

    hub.drop = ("PUT /lfs/", 99)
    hub.blobs.clear()
    with pytest.raises(ConnectionError, match="broke off while me/other was uploaded"):
        push(tidar, "me/other", token=TOKEN)
    assert commits(hub, "me/other") == 0 and set(hub.files("me/other")) == {".gitattributes"}
    hub.drop = ("POST /api/models/me/other/commit/", 1)
    with pytest.raises(ConnectionError, match="Run the same again"):
        push(tidar, "me/other", token=TOKEN)
    assert commits(hub, "me/other") == 0 and hub.blobs

    hub.requests.clear()
    push(tidar, "me/other", token=TOKEN)
    assert commits(hub, "me/other") == 1 and not any(request.startswith("PUT") for request in hub.requests)
    assert hub.files("me/other")["model.safetensors"] == (tidar / "model.safetensors").read_bytes()
    assert digests(tidar) == before
    push(tidar, "me/other", token=TOKEN)
    assert commits(hub, "me/other") == 1, "nothing new, so no empty commit"


def test_a_card_names_the_dtype_of_its_figures_and_says_why_texts_differ(tmp_path):
    row = {"tokens": 10, "forwards": 5, "tokens_per_forward": 2.0}
    for identical, dtype, says_why in [(1.0, "float32", False), (0.5, "bfloat16", True), (0.0, "float16", True)]:
        figures = {"about": {"dtype": dtype}, "figures": {"all": {**row, "identical": identical}}}
        write_card(tmp_path, "adapter", "me/adapter", figures=figures, base_model="me/stock")
        card = (tmp_path / "README.md").read_text()
        assert f"| all | 10 | 5 | 2.00 | {identical:.0%} | {dtype} |" in card
        assert ("rounds differently" in card) == says_why and "bit for bit" not in card
    write_card(tmp_path, "recurrent", "me/deep", figures={"after": {**row, "identical": 0.5}})
    card = (tmp_path / "README.md").read_text()
    assert "50% | not recorded |" in card and "Diffusion forcing is not exact" in card


def test_a_card_a_user_wrote_stays_here_and_there(hub, tidar, tmp_path):
    push(tidar, "me/thinker", token=TOKEN)
    repository = hub.repositories["me/thinker"]
    theirs = b"---\nlicense: mit\n---\n\n# My words\n"
    repository.add_commit("main", {**hub.files("me/thinker"), "README.md": theirs})
    TiDARForCausalLM.from_pretrained(tidar).push_to_hub("me/thinker", token=TOKEN)
    assert hub.files("me/thinker")["README.md"] == theirs

    model = TiDARForCausalLM.from_pretrained(tidar)
    model.save_pretrained(tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    assert is_replaceable(card.read_text())
    card.write_text(card.read_text() + "\nIt likes to talk about the weather.\n")
    written = card.read_bytes()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", token=TOKEN, private=True)
    assert card.read_bytes() == written == hub.files("me/mine")["README.md"]
    assert hub.repositories["me/mine"].private and commits(hub, "me/mine") == 1


def test_shards_of_an_older_upload_go_and_branches_and_pull_requests_work(hub, tidar, monkeypatch, capsys):
    model = TiDARForCausalLM.from_pretrained(tidar)
    model.push_to_hub("me/thinker", token=TOKEN, max_shard_size="20KB")
    assert sum(name.startswith("model-000") for name in hub.files("me/thinker")) > 1
    push(tidar, "me/thinker", token=TOKEN, revision="whole")
    assert not [name for name in hub.files("me/thinker", "whole") if re.match(r"model-000|.*index", name)]
    assert sum(name.startswith("model-000") for name in hub.files("me/thinker")) > 1
    arguments = ["--token", TOKEN, "--create-pr", "--license", "mit", "--include", "config.*"]
    monkeypatch.setattr("sys.argv", ["wavedraft", "push", str(tidar), "me/thinker", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code and capsys.readouterr().out.strip() == f"{hub.url}/me/thinker/discussions/1"
    assert commits(hub, "me/thinker") == 1 and b"license: mit" in hub.files("me/thinker", "refs/pr/1")["README.md"]
    branches = set(hub.repositories["me/thinker"].branches)
    opened = push(tidar, "me/thinker", token=TOKEN, revision="whole", create_pr=True, license="mit")
    assert opened.pr_url.endswith("/discussions/2")
    with pytest.raises(ConnectionError, match="nowhere"):
        push(tidar, "me/thinker", token=TOKEN, revision="nowhere", create_pr=True)
    assert set(hub.repositories["me/thinker"].branches) == branches | {"refs/pr/2"}


def test_a_recurrent_model_is_pushed_with_its_code_from_a_folder_as_released(hub, tmp_path):
    write_folder(tmp_path, "llama")
    before = digests(tmp_path)
    push(tmp_path, "me/recurrent", token=TOKEN, license="apache-2.0")
    assert digests(tmp_path) == before
    tiny_model("llama").push_to_hub("me/saved", token=TOKEN, tags="mine")
    files, saved = hub.files("me/recurrent"), hub.files("me/saved")
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map == json.loads(saved["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_recurrent.RecurrentDepthForCausalLM"
    code = {name: text for name, text in files.items() if name.endswith(".py")}
    assert len(code) > 10 and code == {name: text for name, text in saved.items() if name.endswith(".py")}
    assert b"recurrent-depth" in files["README.md"] and b"- mine" in saved["README.md"]


def test_an_adapter_saved_and_pushed_from_a_drafting_model_drafts_on_a_stock_one(hub, tidar, adapter, tmp_path):
    model = TiDARForCausalLM.from_pretrained(tidar)
    model.load_adapter(str(adapter))
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("me/adapter", token=TOKEN)
    options = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert options.items() >= {"draft_length": 4, "mask_embedding_id": model.tidar_config.mask_embedding_id}.items()
    assert not (tmp_path / "saved" / "config.json").exists()
    assert set(hub.files("me/adapter")) - {".gitattributes"} == {
        path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*") if path.is_file()
    }
    assert b"A gated draft adapter" in hub.files("me/adapter")["README.md"]

    stock = AutoModelForCausalLM.from_pretrained(tidar.parent / "stock")
    stock.load_adapter(str(tmp_path / "saved"))
    ids = torch.tensor([[5, 17, 40, 8]])
    way = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "draft_copies": False}
    expected = model.generate(ids, **way)
    found = stock.generate(ids, **way, custom_generate=str(tmp_path / "saved"), trust_remote_code=True)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist(), "drafts come from the adapter"
    with pytest.raises(ValueError, match="between 1 and 4"):
        stock.generate(ids, draft_length=5, custom_generate=str(tmp_path / "saved"), trust_remote_code=True)


def test_what_cannot_be_published_is_refused(hub, tidar, adapter, tmp_path):
    for folder, options, message in [
        (tmp_path / "nothing", {}, "is not a folder"),
        (tidar.parent / "stock", {}, "Convert it first"),
        (adapter, {}, "--base-model"),
    ]:
        with pytest.raises(ValueError, match=message):
            push(folder, "me/thinker", token=TOKEN, **options)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not gated"):
        push(plain, "me/thinker", token=TOKEN)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tidar / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no safetensors"):
        push(tmp_path / "pickled", "me/thinker", token=TOKEN)
    assert not hub.repositories
    with pytest.raises(ValueError, match='"license" must be one of'):
        push(tidar, "me/thinker", token=TOKEN, license="nonsense")
    assert commits(hub, "me/thinker") == 0
