"""The script that times llama.cpp: its GGUF files hold the same weights, and its turns and figures are right."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import beside_llama_cpp
from beside_llama_cpp import AR, LlamaCpp, Text, figures_of, markdown, measured, requantized

ROOT = Path(__file__).parents[1]
NODE_MODULES = ROOT / "build" / "llama_cpp"


@pytest.fixture
def source(tmp_path):
    """A GGUF file of a matrix, a vector, and fields of several types."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_rope_freq_base(100_000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_token_list(["<s>", "Ġword", "ä"])
    writer.add_token_types([3, 1, 1])
    writer.add_add_bos_token(False)
    matrix = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("kind", "tolerance"), [("BF16", 1 / 256), ("Q8_0", 1 / 100), ("Q4_0", 1 / 7)])
def test_a_file_of_another_type_holds_the_same_weights_and_words(source, tmp_path, kind, tolerance):
    import gguf

    made = gguf.GGUFReader(requantized(source, tmp_path / f"{kind}.gguf", kind))
    original = gguf.GGUFReader(source)
    assert [one.name for one in made.tensors] == [one.name for one in original.tensors]
    for one, other in zip(made.tensors, original.tensors, strict=True):
        assert one.tensor_type.name == (kind if len(one.shape) > 1 else "F32")
        new, old = (torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in (one, other))
        assert (new - old).abs().max() <= tolerance * old.abs().max()
    assert made.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    for name in set(original.fields) - {"general.file_type"}:
        assert made.fields[name].contents() == original.fields[name].contents(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["tiny.gguf", f"{kind}.gguf"])


def test_every_way_has_its_turn_at_a_prompt_before_the_next_and_is_compared_with_plain_decoding():
    seen = []

    def way(name, seconds):
        def write(ids, num_new):
            seen.append((name, len(ids)))
            return Text([7 if name == AR or len(ids) > 3 else 8] * num_new, 1.0, 1.0 + seconds * len(ids), 0.0)

        return write

    ways = {AR: way(AR, 2.0), "default": way("default", 1.0), "llama.cpp Q8_0": way("llama.cpp Q8_0", 0.5)}
    prompts = [torch.ones(length) for length in (3, 4, 5, 6, 7)]
    texts = measured(ways, prompts, 3, repeats=2)
    rounds = [seen[start : start + 3] for start in range(3, len(seen), 3)]  # the first three warm up
    assert len(rounds) == 10 and all(len({length for _, length in of_round}) == 1 for of_round in rounds)
    assert {of_round[0][0] for of_round in rounds} == set(ways)
    plain, ours, theirs = figures_of(texts, num_threads=1)
    assert plain["num_equal"] == 5 and ours["num_equal"] == theirs["num_equal"] == 4 and theirs["bits"] == 8
    assert ours["speed_up"]["mean"] == pytest.approx(2) and theirs["speed_up"]["low"] == pytest.approx(4)
    about = dict.fromkeys(("command", "model", "device", "num_threads", "torch", "llama_cpp", "date"), "x")
    about |= {"num_prompts": 5, "repeats": 2, "max_new_tokens": 3}
    page = markdown({"about": about, "lines": [plain, ours, theirs]})
    assert "| llama.cpp Q8_0 | 8 | 1.000 | 1250.0 | 1 | 4.00 (4.00-4.00) | 4/5 |" in page and "BUSY" not in page


@pytest.mark.skipif(
    not (NODE_MODULES / "node_modules").is_dir() or shutil.which("node") is None,
    reason="node-llama-cpp is not here: `make beside-llama-cpp` fetches it",
)
def test_llama_cpp_writes_as_many_tokens_as_it_is_asked_for_and_forgets_the_last_prompt():
    source = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not source.is_file():
        pytest.skip("the model is not here: `make demo` fetches it")
    worker = LlamaCpp(NODE_MODULES, source, num_threads=1, context_size=64)
    try:
        first, again = (worker(torch.tensor([1, 504, 260, 321]), 5) for _ in range(2))
    finally:
        worker.close()
    assert first.new_ids == again.new_ids and len(first.new_ids) == 5
    assert 0 < first.first_token_seconds < first.seconds


def test_without_llama_cpp_the_script_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["beside_llama_cpp.py", "model", "--gguf", "file", "--llama-cpp", str(tmp_path)])
    with pytest.raises(SystemExit):
        beside_llama_cpp.main()
    assert "Run `make beside-llama-cpp`, which fetches it" in " ".join(capsys.readouterr().err.split())
