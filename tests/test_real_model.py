"""The real model of the demo: 20 real prompts, 64 new tokens each, against the untouched stock class in float32.

Needs the model that `make demo` downloads and converts; without that model these tests are skipped.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wavedraft import TiDARForCausalLM

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models" / "SmolLM2-135M-Instruct-TiDAR"
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct-gated"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no real checkpoint: run `make demo` first"),
]


@pytest.fixture(scope="module")
def prompts():
    """20 prompts of five kinds that the adapter never saw, left-padded to one batch."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "prompts_heldout.jsonl").open()]
    chosen = [row["prompt"] for row in rows[::5]]
    assert len(chosen) == 20
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in chosen
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def test_greedy_text_is_the_stock_models_and_takes_fewer_forwards(prompts):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    stock = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    expected = stock.generate(**prompts, max_new_tokens=64, do_sample=False)
    model = TiDARForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.load_adapter(str(ADAPTER))

    common = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**prompts, **common, num_branches="all")
    chosen = model.generate(**prompts, **common)

    torch.set_num_threads(threads)
    assert output.sequences.tolist() == chosen.sequences.tolist() == expected.tolist()
    assert output.tokens_per_forward.mean() > 1.6  # the shipped adapter: 1.87 on 25 prompts, see its README


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}])
def test_a_row_of_a_batch_of_sixteen_is_the_row_alone(prompts, sampling):
    model = TiDARForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.load_adapter(str(ADAPTER))
    ids, mask = prompts["input_ids"][:16], prompts["attention_mask"][:16]
    options, seeds = {"max_new_tokens": 16, **sampling}, [{"seed": 100 + 7 * row} for row in range(16)]
    assert len(set(mask.sum(dim=1).tolist())) > 5
    shared = {"seed": [one["seed"] for one in seeds]} if sampling["do_sample"] else {}

    together = model.generate(ids, attention_mask=mask, **options, **shared)[:, ids.shape[1] :]

    for row, own in enumerate(seeds):
        prompt = ids[row : row + 1, mask[row] == 1]
        alone = model.generate(prompt, **options, **(own if shared else {}))[0, prompt.shape[1] :].tolist()
        assert together[row, : len(alone)].tolist() == alone
        assert (together[row, len(alone) :] == model.generation_config.pad_token_id).all()
