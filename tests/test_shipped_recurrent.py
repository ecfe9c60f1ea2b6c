"""The shipped recurrent-depth model writes real text, so agreement does not depend on random weights."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM

FOLDER = Path(__file__).parents[1] / "checkpoints" / "austen-recurrent-6m"


@pytest.fixture(scope="module")
def shipped():
    model = RecurrentDepthForCausalLM.from_pretrained(FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    prompts = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return model, tokenizer, tokenizer(prompts[:3], padding=True, return_tensors="pt")


def test_every_wavefront_writes_the_full_depth_text_in_far_fewer_core_passes(shipped):
    model, _, inputs = shipped
    options = {"max_new_tokens": 20, "do_sample": False, "init_scale": 0.0, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    exact = model.generate(**inputs, policy="exact", **options)
    diffused = model.generate(**inputs, preset="diffusion-forcing-r4", **options)

    assert exact.sequences.tolist() == plain.sequences.tolist()
    assert exact.num_core_passes < plain.num_core_passes / 4
    assert (diffused.sequences == plain.sequences).float().mean() > 0.9
    assert diffused.num_core_passes < plain.num_core_passes / 4


def test_its_text_is_made_of_the_authors_words(shipped):
    model, tokenizer, inputs = shipped
    sequences = model.generate(**inputs, max_new_tokens=20, do_sample=False, init_scale=0.0, num_recurrences=8)
    new = " ".join(tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :]))
    common = {"the", "of", "and", "to", "a", "was", "in", "her", "had", "she", "it", "not", "be", "very", "been"}
    words = new.replace(",", " ").replace(".", " ").split()
    assert sum(word in common for word in words) > len(words) / 4


def test_its_weights_stay_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 25_000_000
