"""A stock model becomes a recurrent-depth one: at depth 1 it is the source, and training teaches it to recur."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from wavedraft import RecurrentDepthForCausalLM, convert
from wavedraft.cli import main
from wavedraft.training import finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import retrofit

SIZES = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
         "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 30, 31, 32, 33, 2]])


def stock(name):
    torch.manual_seed(0)
    if name == "tinyllama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)).eval()
    if name == "llama":
        config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3)
        return LlamaForCausalLM(config).eval()
    return Olmo2ForCausalLM(Olmo2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=False)).eval()


@pytest.fixture
def source(tmp_path, request, tokenizer):
    model = stock(request.param)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return model


forms = pytest.mark.parametrize("source", ["llama", "tinyllama", "olmo"], indirect=True)


@forms
@torch.no_grad()
def test_at_every_depth_it_begins_as_the_source(source, tmp_path):
    result = convert(tmp_path / "source", tmp_path / "ours", recurrent=(1, 3, 1))
    assert result.architecture == "RecurrentDepthForCausalLM" and result.tidar_config is None
    assert result.depth_one.share_same == 1.0 and result.depth_one.num_dropped == 0
    model = RecurrentDepthForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = source(IDS).logits
    for depth in (1, 2, 5):
        torch.testing.assert_close(model(IDS, num_recurrences=depth).logits, expected, atol=1e-4, rtol=1e-4)
    text = source.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    for policy in ("autoregressive", "exact", "diffusion-forcing"):
        assert model.generate(IDS[:1], max_new_tokens=8, do_sample=False, policy=policy).tolist() == text.tolist()


@forms
@torch.no_grad()
def test_layers_between_prelude_and_core_are_dropped(source, tmp_path):
    result = convert(tmp_path / "source", tmp_path / "ours", recurrent=(1, 2, 1))
    source.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(source.model.layers) if i != 1)
    model = RecurrentDepthForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = source(IDS, use_cache=False).logits
    torch.testing.assert_close(model(IDS, num_recurrences=1).logits, expected, atol=1e-4, rtol=1e-4)
    assert result.depth_one.num_dropped == 1 and result.depth_one.max_abs_difference > 0.01
    assert result.depth_one.perplexity > result.depth_one.source_perplexity


@forms
def test_training_heals_it_and_teaches_the_state(source, tmp_path):
    convert(tmp_path / "source", tmp_path / "ours", recurrent=(1, 2, 1), verify=False)
    rows = [{"text": "the cat sat on a mat and slept all day on the mat"}] * 4
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = finetune(tmp_path / "ours", tmp_path / "data.jsonl", tmp_path / "run", mode="full", max_steps=12,
                      batch_size=4, learning_rate=5e-3, eval_prompts_path=tmp_path / "data.jsonl", num_eval_prompts=1,
                      eval_steps=12)  # fmt: skip
    assert report["after"]["perplexity"] < report["before"]["perplexity"]
    model = RecurrentDepthForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert model.transformer["adapter"].weight[:, :32].abs().max() > 1e-4
    ids = IDS[:1] % 14
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert model.generate(ids, max_new_tokens=8, do_sample=False, policy="exact").tolist() == plain.tolist()


@pytest.mark.parametrize("source", ["tinyllama"], indirect=True)
def test_the_command_says_what_depth_one_is_worth(source, tmp_path, monkeypatch, capsys):
    command = ["wavedraft", "convert", str(tmp_path / "source"), str(tmp_path / "ours"), "--recurrent", "1,3,1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
        sys.exit(0)
    printed = capsys.readouterr()
    assert not caught.value.code and "100.0% of the likeliest next tokens the same" in printed.out
    assert "0 layers dropped" in printed.out and "teaches its core to recur" in printed.err


@pytest.mark.parametrize("source", ["tinyllama"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrent": (2, 3, 1)}, "a sum of at most 5"),
        ({"recurrent": (0, 3, 1)}, "three numbers from 1 up"),
        ({"recurrent": (1, 3, 1), "link": True}, "`link` must be left out"),
        ({"recurrent": (1, 3, 1), "draft_length": 4}, "`draft_length` must be left out"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_another_form_is_refused(tmp_path):
    Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="'qwen3' model: layers of llama, mistral, olmo2"):
        convert(tmp_path / "source", tmp_path / "ours", recurrent=(1, 3, 1))


@pytest.mark.parametrize("source", ["tinyllama"], indirect=True)
def test_the_benchmark_measures_heals_and_fills_its_page_and_goes_on_with_what_it_has(source, tmp_path, monkeypatch):
    answer = "sat on a mat and slept all day on the mat and slept on a cat and a mat on the cat"
    rows = [{"prompt": "the " * n + "cat", "answer": answer} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- retrofit -->\n<!-- end of retrofit -->\nafter\n")
    options = ["--layouts", "1,3,1@5e-3", "1,2,1@5e-3", "--minutes", 0.001, "--num-rows", 2, "--num-prompts", 2,
               "--dtype", "float32", "--max-new-tokens", 6, "--max-length", 64]  # fmt: skip
    places = ["--data", tmp_path / "rows.jsonl", "--folder", tmp_path / "run", "--page", page]
    monkeypatch.setattr(sys, "argv", ["retrofit.py", *map(str, [tmp_path / "source", *options, *places])])
    timed = retrofit.seconds_of_step
    monkeypatch.setattr(retrofit, "seconds_of_step", lambda *given: 0.01 if timed(*given) > 0 else None)
    retrofit.main()
    found = json.loads((tmp_path / "run" / "figures.json").read_text())
    healing = (tmp_path / "run" / "healing.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in healing] == rows[1:4] + rows[5:] and found["held out"] == 2
    perplexity = found["source"]["perplexity"]
    assert found["1,3,1 converted"]["perplexity"] == pytest.approx([perplexity] * 8, rel=1e-3)
    assert found["1,3,1 healing"]["steps"] == 6 and found["1,3,1 converted"]["same"] == [1.0] * 8
    assert found["1,2,1 converted"]["perplexity"] != pytest.approx([perplexity] * 8, rel=1e-3)
    for layout in ("1,3,1", "1,2,1"):
        assert found[f"{layout} healed"]["perplexity"][7] < found[f"{layout} converted"]["perplexity"][7]
        policies = found[f"{layout} policies"]
        assert policies["full depth"]["passes"] == 8 and policies["depth 2"]["per_forward"] == 4
        for name in ("full depth", "exact", "self-speculative"):
            assert policies[name]["texts"] == 2 and policies[name]["tokens"] == 1
    text = page.read_text()
    assert text.startswith("before\n<!-- retrofit -->\n`make retrofit`") and text.endswith("retrofit -->\nafter\n")
    assert re.search(r"\| 1,2,1, converted, 1 dropped \|( [\d.e+]+ \(\d+%\) \|){8}\n", text)
    for name in ("heal", "at_each_depth", "by_each_policy", "seconds_of_step", "read_answers"):
        monkeypatch.setattr(retrofit, name, lambda *given, **keywords: pytest.fail("it measures again"))
    page.write_text("<!-- retrofit -->\n<!-- end of retrofit -->")
    retrofit.main()
    assert page.read_text() in text
