"""`wavedraft generate` on a recurrent-depth checkpoint."""

import sys

import pytest
import torch

from helpers_recurrent import settling_model
from helpers_stock import save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import RecurrentDepthForCausalLM
from wavedraft.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recurrent")
    settling_model(21, vocab_size=61).save_pretrained(path / "model")
    save_tokenizer(path / "model", num_words=61)
    save_tiny_stock(path / "stock")
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `wavedraft generate ...` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wavedraft", "generate", *map(str, arguments), "--raw"])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def test_the_exact_policy_is_the_rule_and_its_text_plain_decodings(run, folder):
    code, out, _ = run(folder / "model", "w1 w2 w3", "w7", "--max-new-tokens", 9, "--compare")
    assert code == 0 and "identical: yes" in out
    model = RecurrentDepthForCausalLM.from_pretrained(folder / "model")
    num_passes = 0
    for words in ([6, 7, 8], [12]):  # w1 is id 6
        output = model.generate(torch.tensor([words]), max_new_tokens=9, policy="exact", return_dict_in_generate=True)
        ids = output.sequences[0, len(words) :].tolist()
        num_passes += output.num_core_passes
        assert " ".join(f"w{n - 5}" for n in ids if n >= 5) in out, "the text is streamed"
    *_, total, _ = out.splitlines()
    assert total.split()[:4] == ["all", "18", str(num_passes), f"{16 * 4 / num_passes:.2f}"]
    assert total.split()[5] == str(16 * 4), "plain decoding: four core passes a token"


def test_policies_presets_and_depths_are_taken(run, folder):
    options = ["w1 w2 w3", "--max-new-tokens", 6, "--compare"]
    for more in (
        ["--preset", "diffusion-forcing-r2"],
        ["--policy", "self-speculative", "--draft-length", 2, "--num-recurrences", 6],
        ["--policy", "autoregressive", "--temperature", 1.0, "--seed", 3],
    ):
        code, out, err = run(folder / "model", *options, *more)
        assert code == 0 and "core" in out and "passes" in out, err
    one, same, other = (run(folder / "model", *options[:3], "--temperature", 2.0, "--seed", s)[1] for s in (5, 5, 6))
    assert one.split("prompt")[0] == same.split("prompt")[0] != other.split("prompt")[0]


def test_a_mistake_is_one_line(run, folder):
    for arguments, message in [
        ([folder / "model", "w1", "--policy", "fastest"], "--policy must be one of"),
        ([folder / "model", "w1", "--preset", "best"], "--preset must be one of"),
        ([folder / "model", "w1", "--draft-length", 4], "`draft_length` has no effect with"),
        ([folder / "model", "w1", "--max-new-tokens", 500], "`config.block_size`"),
        ([folder / "model", "w1", "--adapter", "a"], "--adapter is for TiDAR"),
        ([folder / "stock", "w1", "--policy", "exact"], "is for recurrent-depth models"),
    ]:
        code, _, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("wavedraft: ")]
        assert code == 2 and len(lines) == 1 and message in lines[0], (arguments, err)
        assert "Traceback" not in err
