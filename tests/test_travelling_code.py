"""A converted folder works without wavedraft: it drafts, saves itself, and loads as a stock checkpoint."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import torch
from packaging import version
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from helpers_family import tiny_model
from helpers_marks import slow_but
from helpers_stock import save_tiny_stock
from helpers_tidar import random_prompts, tiny_tidar
from helpers_without_wavedraft import run_alone
from wavedraft import DraftObjective, TiDARForCausalLM, convert
from wavedraft.generation import tidar as tidar_decode
from wavedraft.hub.custom_generate import one_file
from wavedraft.hub.travelling_code import FEW_LINES, flat_sources
from wavedraft.training import gated_adapter_config

WITHOUT_WAVEDRAFT = """
    ids = torch.tensor([arguments["ids"]])

    def written(model):
        output = model.generate(ids, max_new_tokens=12, num_branches=2, return_dict_in_generate=True)
        assert output.num_forwards <= 11
        return output.sequences[0].tolist()

    model = AutoModelForCausalLM.from_pretrained("tidar", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    model.save_pretrained("saved")
    again = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
    stock = AutoModelForCausalLM.from_pretrained("saved")
    assert type(stock).__module__.startswith("transformers."), type(stock)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)
    answer = [type(model).__name__, written(model), written(again)]
"""


@pytest.mark.parametrize("family", slow_but({"qwen3"}, ("qwen3", "gpt-neox", "qwen3-moe")))
def test_a_converted_folder_drafts_the_same_text_without_wavedraft(family, tmp_path):
    config = save_tiny_stock(tmp_path / "stock", family)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=3)
    ids = torch.randint(1, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").generate(ids, max_new_tokens=12)[0].tolist()

    name, first, again = run_alone(WITHOUT_WAVEDRAFT, {"ids": ids[0].tolist()}, tmp_path)
    assert name.startswith("TiDAR") and first == again == expected

    code = {path.name: path.read_text() for path in (tmp_path / "tidar").glob("*.py")}
    assert code == {path.name: path.read_text() for path in (tmp_path / "saved").glob("*.py")}
    generate = Path("custom_generate", "generate.py")
    assert (tmp_path / "tidar" / generate).read_text() == (tmp_path / "saved" / generate).read_text()
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("tidar", "saved"))
    for key in ("auto_map", "architectures", "tidar_config", "model_type"):
        assert new[key] == old[key]


def lay_in_cache(cache: Path, repo_id: str, snapshots: dict[str, Path]) -> None:
    """The layout of the Hub's cache, by hand; the last snapshot is `main`."""
    repository = cache / "hub" / f"models--{repo_id.replace('/', '--')}"
    for sha, folder in snapshots.items():
        shutil.copytree(folder, repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)


OFFLINE = """
    import glob, os, shutil
    from transformers import LlamaForCausalLM

    ids = torch.tensor(arguments["ids"])
    mask = (ids != 0).long()

    def written(model, **options):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, **options)
        assert output.num_forwards <= 11
        return output.sequences.tolist()

    def load(name, **options):
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
        assert type(model).__name__ == "TiDARLlamaForCausalLM" and type(model).__module__.startswith("transformers_mod")
        return model

    main, pinned = load("me/thinker"), load("me/thinker", revision=arguments["pinned"])
    assert main.tidar_config.draft_length == 4 and pinned.tidar_config.draft_length == 2
    stock = AutoModelForCausalLM.from_pretrained("me/thinker")
    assert type(stock) is LlamaForCausalLM
    replaced = LlamaForCausalLM.from_pretrained("tidar", trust_remote_code=True)  # its generate is the repository's
    answer = {
        "snapshot": written(main),
        "pinned": written(pinned),
        "by position": main.generate(ids, None, attention_mask=mask, max_new_tokens=12).tolist(),
        "custom": written(stock, custom_generate="me/thinker", trust_remote_code=True),
        "custom folder": written(stock, custom_generate="tidar", trust_remote_code=True, draft_length=3),
        "replaced": written(replaced),
        "plain": stock.generate(ids, attention_mask=mask, max_new_tokens=12).tolist(),
    }

    class Kept:
        def __init__(self):
            self.ids = []
        def put(self, value):
            self.ids += value.flatten().tolist()
        def end(self):
            self.ended = True

    row, streamer = ids[:1], Kept()
    given = {"custom_generate": "tidar", "trust_remote_code": True, "streamer": streamer, "max_new_tokens": 12}
    assert stock.generate(row, **given)[0].tolist() == streamer.ids and streamer.ended

    # Every travelling file that is missing or broken is loud.
    def fails(break_it, *attempts):
        shutil.rmtree("broken", ignore_errors=True)
        shutil.copytree("tidar", "broken")
        break_it()
        for attempt in attempts:
            try:
                attempt()
            except Exception:
                continue
            raise AssertionError(f"{attempt} did not fail")

    shutil.copytree("tidar", "broken")
    custom = lambda: stock.generate(ids, custom_generate="broken", trust_remote_code=True)
    load("broken"), custom()  # nothing is broken yet
    files = sorted(glob.glob("*.py", root_dir="tidar"))
    assert len(files) > 10
    for name in files:
        fails(lambda: os.remove(f"broken/{name}"), lambda: load("broken"))
    for name in ("modeling_tidar.py", "decode_tidar.py"):
        fails(lambda: open(f"broken/{name}", "a").write("def broken(:"), lambda: load("broken"))
    broken = lambda: open("broken/custom_generate/generate.py", "a").write("import not_there")
    fails(broken, custom, lambda: LlamaForCausalLM.from_pretrained("broken", trust_remote_code=True))
    fails(lambda: os.remove("broken/custom_generate/generate.py"), custom)
    for options in ({"draft_length": 9}, {"draft_length": -1}, {"mask_embedding_id": 1000}, {"seed": -2}):
        for model, given in ((main, {}), (stock, {"custom_generate": "tidar", "trust_remote_code": True})):
            try:
                model.generate(ids, attention_mask=mask, max_new_tokens=4, **options, **given)
            except ValueError as error:
                assert next(iter(options)) in str(error)
            else:
                raise AssertionError(options)
"""


def test_offline_snapshots_pinned_revisions_and_all_ways_in_give_the_same_text(tmp_path):
    main, pinned = "a" * 40, "b" * 40
    for draft_length, folder in ((4, "tidar"), (2, "older")):
        tiny_tidar("llama", draft_length=draft_length).save_pretrained(tmp_path / folder)
    lay_in_cache(tmp_path / "hf", "me/thinker", {pinned: tmp_path / "older", main: tmp_path / "tidar"})
    ids = random_prompts(3, 8)
    ids[1, :3] = 0
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar")
    expected = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=12).tolist()

    answer = run_alone(OFFLINE, {"ids": ids.tolist(), "pinned": pinned}, tmp_path, HF_HUB_OFFLINE="1")
    assert answer == dict.fromkeys(answer, expected)


def test_a_pinned_revision_keeps_what_stood_beside_its_weights(tmp_path, monkeypatch):
    main, pinned = "a" * 40, "b" * 40
    for folder, licence in (("tidar", "of main"), ("older", "of the pinned revision")):
        tiny_tidar().save_pretrained(tmp_path / folder)
        (tmp_path / folder / "LICENSE").write_text(licence)
    lay_in_cache(tmp_path / "hf", "me/thinker", {pinned: tmp_path / "older", main: tmp_path / "tidar"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, licence in ((pinned, "of the pinned revision"), (None, "of main")):
        model = TiDARForCausalLM.from_pretrained("me/thinker", revision=revision)
        model.save_pretrained(tmp_path / licence)
        assert (tmp_path / licence / "LICENSE").read_text() == licence


RECURRENT = """
    ids = torch.tensor([arguments["ids"]])
    answer = {}
    for kind in arguments["kinds"]:
        model = AutoModelForCausalLM.from_pretrained(kind, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        model.save_pretrained(f"{kind}-again")
        again = AutoModelForCausalLM.from_pretrained(f"{kind}-again", trust_remote_code=True)
        for name, loaded in ((kind, model), (f"{kind}-again", again)):
            answer[name] = {
                policy: loaded.generate(ids, max_new_tokens=8, init_scale=0.0, policy=policy)[0].tolist()
                for policy in ("autoregressive", "exact")
            }
"""


def test_recurrent_models_travel_too(tmp_path):
    kinds, ids, expected = ["llama", "ouro"], [5, 9, 3], {}
    for kind in kinds:
        model = tiny_model(kind)
        model.save_pretrained(tmp_path / kind)
        text = {
            policy: model.generate(torch.tensor([ids]), max_new_tokens=8, init_scale=0.0, policy=policy)[0].tolist()
            for policy in ("autoregressive", "exact")
        }
        expected |= {kind: text, f"{kind}-again": text}
    assert "recurrent-depth" in (tmp_path / "llama" / "README.md").read_text()

    assert run_alone(RECURRENT, {"kinds": kinds, "ids": ids}, tmp_path) == expected
    for kind in kinds:
        code = {path.name: path.read_text() for path in (tmp_path / kind).glob("*.py")}
        assert code == {path.name: path.read_text() for path in (tmp_path / f"{kind}-again").glob("*.py")}
        old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in (kind, f"{kind}-again"))
        assert new["auto_map"] == old["auto_map"] and "AutoConfig" in old["auto_map"]


def test_beside_an_installed_wavedraft_the_checkpoints_own_code_runs_if_trusted(tmp_path):
    model = tiny_tidar("llama", draft_length=3)
    model.save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "recurrent")
    ids = random_prompts(2, 7)
    expected = model.generate(ids, max_new_tokens=10).tolist()
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted).__module__.startswith("transformers_modules") and "generate" not in vars(trusted)
    assert trusted.generate(ids, max_new_tokens=10).tolist() == expected
    losses = [one(ids, labels=ids, objective=DraftObjective()).loss for one in (model, trusted)]
    assert losses[0] == losses[1] and losses[1].requires_grad  # the objective does not travel, and teaches its code too
    installed = AutoModelForCausalLM.from_pretrained(tmp_path / "recurrent")
    assert type(installed).__module__ == "wavedraft.modeling_recurrent.modeling_recurrent"

    # One stock model, decoded by the package and by the repository in turn: each puts its own gate in.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = TiDARForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(0)
    get_peft_model(adapted, gated_adapter_config(adapted, rank=4, init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    stock.load_adapter(str(tmp_path / "adapter"))
    by_path = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    counts = []
    for way in ({"custom_generate": tidar_decode}, by_path, {"custom_generate": tidar_decode}):
        output = stock.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **way)
        assert output.sequences.tolist() == expected
        counts.append(output.accepted_lengths.tolist())
    assert counts[0] == counts[1] == counts[2]


OTHER_VERSION = """
import json, sys
import torch
import wavedraft
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
assert wavedraft.__version__ == "99.0" and wavedraft.__file__.startswith(sys.argv[1]), wavedraft.__file__
ids = torch.tensor([[5, 9, 3, 17]])
model = AutoModelForCausalLM.from_pretrained("tidar", trust_remote_code=True)
recurrent = AutoModelForCausalLM.from_pretrained("recurrent", trust_remote_code=True)
told = None
try:
    wavedraft.TiDARForCausalLM.from_pretrained("tidar").generate(ids, max_new_tokens=2)
except RuntimeError as error:
    told = str(error)
exact = recurrent.generate(ids, max_new_tokens=8, init_scale=0.0, policy="exact")
print(json.dumps([told, model.generate(ids, max_new_tokens=10)[0].tolist(), exact[0].tolist()]))
"""


def test_another_installed_version_does_not_touch_a_trusted_checkpoint(tmp_path):
    site = tmp_path / "site" / "wavedraft"
    site.mkdir(parents=True)
    for part in ("wavedraft", "modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion", "training"):
        module = importlib.import_module("wavedraft" if part == "wavedraft" else f"wavedraft.{part}")
        folder = Path(module.__file__).parent
        for path in folder.rglob("*.py"):
            copy = Path(site, "" if part == "wavedraft" else part, path.relative_to(folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (site / "__init__.py").write_text((site / "__init__.py").read_text() + '\n__version__ = "99.0"\n')
    decode = site / "generation" / "drafting" / "decode_tidar.py"
    later = '\n\ndef decode_tidar(*args, **kwargs):\n    raise RuntimeError("another version decodes")\n'
    decode.write_text(decode.read_text() + later)
    model, recurrent = tiny_tidar("llama", draft_length=3), tiny_model("llama")
    model.save_pretrained(tmp_path / "tidar")
    recurrent.save_pretrained(tmp_path / "recurrent")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", OTHER_VERSION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 9, 3, 17]])
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "another version decodes",
        model.generate(ids, max_new_tokens=10)[0].tolist(),
        recurrent.generate(ids, max_new_tokens=8, init_scale=0.0, policy="exact")[0].tolist(),
    ]


def test_a_trusted_checkpoint_passes_on_the_files_it_came_with(tmp_path):
    model = tiny_tidar("llama", draft_length=3)
    model.save_pretrained(tmp_path / "tidar")
    generate = tmp_path / "tidar" / "custom_generate" / "generate.py"
    generate.write_text(generate.read_text() + "# its own\n")
    (tmp_path / "tidar" / "README.md").write_text("---\nlicense: mit\n---\n\nIt talks about the weather.\n")
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar", trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "again")
    for name in (*sorted(path.name for path in (tmp_path / "tidar").glob("*.py")), "README.md", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "tidar" / name).read_text(), name
    assert (tmp_path / "again" / "custom_generate" / "generate.py").read_text().endswith("# its own\n")


def test_a_trusted_checkpoint_writes_beside_an_adapter_how_a_stock_model_drafts_with_it(tmp_path, caplog):
    if version.parse(metadata.version("peft")) < version.parse(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers saves adapters with peft {MIN_PEFT_VERSION} or newer alone")
    model = tiny_tidar("llama", draft_length=3)
    model.save_pretrained(tmp_path / "tidar")
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar", trust_remote_code=True)
    torch.manual_seed(0)
    get_peft_model(model, gated_adapter_config(model, rank=4, init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    trusted.load_adapter(str(tmp_path / "adapter"))
    trusted.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "tidar")
    stock.load_adapter(str(tmp_path / "saved"))
    ids, way = random_prompts(2, 7), {"max_new_tokens": 10, "return_dict_in_generate": True}
    expected = trusted.generate(ids, **way)
    found = stock.generate(ids, **way, custom_generate=str(tmp_path / "saved"), trust_remote_code=True)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist()
    assert "taught={" in (tmp_path / "saved" / "custom_generate" / "generate.py").read_text()

    shutil.rmtree(tmp_path / "tidar" / "custom_generate")
    trusted.save_pretrained(tmp_path / "without")
    assert (tmp_path / "without" / "modeling_tidar.py").exists()
    assert "gets no custom_generate/" in caplog.text


def test_options_in_generation_config_json_survive_and_count_for_every_way_in(tmp_path):
    tiny_tidar("llama", draft_length=4).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    options = {"draft_length": 2, "seed": 5, "do_sample": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    ours, stock = TiDARForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids, by_path = random_prompts(2, 5), {"custom_generate": str(tmp_path), "trust_remote_code": True}
    outputs = [
        model.generate(ids, max_new_tokens=9, return_dict_in_generate=True, **given)
        for model, given in ((ours, {}), (trusted, {}), (stock, by_path), (stock, {"custom_generate": tidar_decode}))
    ]
    for output in outputs:
        assert output.accepted_lengths.shape == (2, 2)
        assert output.sequences.tolist() == outputs[0].sequences.tolist(), "the seed decides"
    for model in (ours, stock, trusted):
        model.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "generation_config.json").read_text()).items() >= options.items()
    stock.generation_config.draft_length = 7
    for way in (tidar_decode, str(tmp_path)):
        with pytest.raises(ValueError, match="between 1 and 4"):
            stock.generate(ids, custom_generate=way, trust_remote_code=True)


def test_what_travels_is_the_packages_own_source_with_its_imports_flattened():
    import wavedraft.modeling_tidar.modeling_tidar as module

    sources = flat_sources(Path(module.__file__))
    assert {"modeling_tidar.py", "decode_tidar.py", "configuration_tidar.py"} <= set(sources)
    for name, text in sources.items():
        assert "from .." not in text and "import wavedraft" not in text and "from wavedraft" not in text, name


def test_one_file_holds_every_part_once_and_refuses_two_meanings_of_a_name(tmp_path):
    import wavedraft.modeling_tidar.generation_tidar as module

    text = one_file(Path(module.__file__))
    assert text.count("def decode_tidar(") == text.count("class MaskGate") == text.count("\ndef generate(") == 1
    assert "from ." not in text
    compile(text, "generate.py", "exec")

    (tmp_path / "a.py").write_text(
        "from .b import helper\n\n\ndef main():\n    from .c import deep\n\n    return deep()\n"
    )
    (tmp_path / "b.py").write_text("import json\n\n\ndef helper():\n    return json\n")
    (tmp_path / "c.py").write_text("from .b import (\n    helper,\n)\n\n\ndef deep():\n    return helper()\n")
    namespace = {}
    exec(one_file(tmp_path / "a.py"), namespace)
    assert namespace["main"]() is json
    (tmp_path / "c.py").write_text("def helper():\n    return 2\n\n\ndef deep():\n    return helper()\n")
    with pytest.raises(ValueError, match="define `helper` differently"):
        one_file(tmp_path / "a.py")


def test_one_file_imports_others_once_at_its_top_and_leaves_out_what_nothing_uses(tmp_path):
    (tmp_path / "a.py").write_text(
        "from typing import TYPE_CHECKING\n\nimport torch.nn.functional as F\n\nfrom .b import kept\n\n"
        "if TYPE_CHECKING:\n    from pathlib import Path\n\n\n"
        'def generate() -> "Path":\n    import json\n\n    return kept(F, json)\n'
    )
    (tmp_path / "b.py").write_text(
        "import os\nfrom typing import Any, TypeVar\n\nimport torch.nn.functional as F\n\n\n"
        "def kept(*given: Any):\n    return F, *given\n\n\n"
        "# Nothing needs it.\ndef unused(given: TypeVar):\n    return also_unused(os)\n\n\n"
        "def also_unused(given):\n    return given\n\n\n"
        "class Counts:\n    def num(self):\n        return 1\n\n"
        "    # Nor this.\n    def unused_num(self):\n        return 2\n\n"
        "    def __len__(self):\n        return self.num()\n\n\n"
        "class Called(dict):\n    def by_others(self):\n        return Counts\n\n\n"
        "made = Called()\n"
    )
    text = one_file(tmp_path / "a.py")
    assert text.split("\n\n")[1:3] == [
        "from typing import Any, TYPE_CHECKING",
        "import torch.nn.functional as F",
    ], text
    assert "    from pathlib import Path" in text and "    import json" in text
    assert "unused" not in text and "needs it" not in text
    namespace = {}
    exec(text, namespace)
    assert namespace["generate"]()[0] is torch.nn.functional
    assert len(namespace["made"].by_others()()) == 1 and "Nor this" not in text
    assert "return 1\n\n    def __len__" in text, text

    (tmp_path / "b.py").write_text("import torch.fx as F\n\n\ndef kept(*given):\n    return F\n")
    with pytest.raises(ValueError, match="define `F` differently"):
        one_file(tmp_path / "a.py")


def test_of_the_flat_files_what_is_unused_and_the_docstrings_of_short_functions_stay_behind(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""A part."""\n\nfrom .b import Kept, short\n\n\n'
        'def generate():\n    """What a user reads. More of it."""\n    return short, Kept\n'
    )
    long = "".join(f"    given = given + {number}\n" for number in range(FEW_LINES + 1))
    (tmp_path / "b.py").write_text(
        'def short(given):\n    """It says the same."""\n    return long(given)\n\n\n'
        f'def long(given):\n    """Its first sentence. And another."""\n{long}    return given\n\n\n'
        '# Training uses it.\ndef unused():\n    """Nobody here."""\n    return 0\n\n\n'
        'class Kept:\n    """A class."""\n\n'
        '    def num(self):\n        """A method."""\n        return 0\n\n\n'
        'class Public(Kept):\n    """Of a user\'s."""\n\n'
        '    def num(self):\n        """Its help."""\n        return 1\n\n\n'
        "made = Kept().num, Public\n"
    )
    sources = flat_sources(tmp_path / "a.py")
    assert '"""What a user reads."""' in sources["a.py"], "the model's own file keeps its docstrings"
    text = sources["b.py"]
    assert "unused" not in text and "Training uses it" not in text
    assert "It says the same" not in text and "A method" not in text
    assert "def short(given):\n    return long(given)" in text and "def num(self):\n        return 0" in text
    assert '"""Its first sentence."""' in text and "And another" not in text
    assert all(kept in text for kept in ('"""A class."""', '"""Of a user\'s."""', '"""Its help."""'))
    compile(text, "b.py", "exec")


def test_one_file_leaves_out_types_that_say_nothing_and_keeps_the_fields_of_classes(tmp_path):
    (tmp_path / "a.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Any\n\n\n@dataclass\nclass Made:\n    part: Any\n\n\n"
        "def generate(given: Any, *rest: Any, num: int = 1) -> Any:\n    assert num\n    return Made(given)\n"
    )
    text = one_file(tmp_path / "a.py")
    assert "def generate(given, *rest, num: int = 1):\n" in text and "    part: Any\n" in text and "assert" not in text
    namespace = {}
    exec(text, namespace)
    assert namespace["generate"](3).part == 3
