"""Rows of four thousand tokens teach, packed with short ones; by default they are cut."""

import json

import pytest

from helpers_stock import save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import convert
from wavedraft.training import finetune

LONG = 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    save_tiny_stock(folder / "stock", max_position_embeddings=2 * LONG, num_hidden_layers=1)
    save_tokenizer(folder / "stock", num_words=61)
    convert(folder / "stock", folder / "tidar", draft_length=4)
    return folder / "tidar"


@pytest.fixture
def data(tmp_path):
    """A question after a long context, with a short answer, and six short rows."""
    context = " ".join(f"w{number % 50}" for number in range(LONG - 60))
    rows = [{"prompt": context, "answer": " ".join(f"w{n}" for n in range(30))}]
    rows += [{"prompt": f"w{n} w{n + 1}", "answer": " ".join(f"w{n + m}" for m in range(9))} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_a_row_of_four_thousand_tokens_is_taken_whole(checkpoint, data, tmp_path):
    options = {"max_steps": 1, "batch_size": 1, "attn_implementation": "sdpa", "pack": True}
    report = finetune(checkpoint, data, tmp_path / "long", max_length=LONG + 128, **options)
    assert report["rows"] == 7 and report["sequences"] == 1
    assert report["labels"] >= 30 + 6 * 9
    short = finetune(checkpoint, data, tmp_path / "short", max_length=320, **options)
    assert short["rows"] == 6, "the answer after a long context is cut off with it"
