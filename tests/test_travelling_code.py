"""A converted folder stands alone: where wavedraft cannot be imported it drafts, saves itself, and is stock as well."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tiny_stock import save_tiny_stock
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation.travelling_code import flat_sources

WITHOUT_WAVEDRAFT = """
    import json, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("wavedraft", "modeling_tidar", "generation", "conversion"):
                raise ImportError(f"{name} is blocked in this test")

    sys.meta_path.insert(0, Blocked())
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder, saved = sys.argv[1], sys.argv[2]
    ids = torch.tensor([json.loads(sys.argv[3])])

    def written(model):
        output = model.generate(ids, max_new_tokens=12, return_dict_in_generate=True)
        assert output.num_forwards <= 11
        return output.sequences[0].tolist()

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    stock = AutoModelForCausalLM.from_pretrained(saved)
    assert type(stock).__module__.startswith("transformers."), type(stock)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)
    assert not any(name.split(".")[0] == "wavedraft" for name in sys.modules)
    print(json.dumps([type(model).__name__, written(model), written(again)]))
"""


@pytest.mark.parametrize("family", ["qwen3", "gpt-neox", "qwen3-moe"])
def test_a_converted_folder_drafts_the_same_text_without_wavedraft(family, tmp_path):
    config = save_tiny_stock(tmp_path / "stock", family)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=3)
    ids = torch.randint(1, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").generate(ids, max_new_tokens=12)[0].tolist()

    arguments = [str(tmp_path / "tidar"), str(tmp_path / "saved"), json.dumps(ids[0].tolist())]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_WAVEDRAFT), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    name, first, again = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("TiDAR") and first == again == expected

    code = {path.name: path.read_text() for path in (tmp_path / "tidar").glob("*.py")}
    assert code == {path.name: path.read_text() for path in (tmp_path / "saved").glob("*.py")}
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("tidar", "saved"))
    for key in ("auto_map", "architectures", "tidar_config", "model_type"):
        assert new[key] == old[key]


def test_what_travels_is_the_packages_own_source_with_its_imports_flattened(tmp_path):
    import wavedraft.modeling_tidar.modeling_tidar as module

    sources = flat_sources(Path(module.__file__))
    assert {"modeling_tidar.py", "decode_tidar.py", "configuration_tidar.py"} <= set(sources)
    for name, text in sources.items():
        assert "from .." not in text and "import wavedraft" not in text and "from wavedraft" not in text, name
