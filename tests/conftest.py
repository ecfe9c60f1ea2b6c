"""Shared fixtures, and one thread per process, so parallel tests do not compete for cores."""

import json
import os

# Processes that a test starts keep to one thread too. The compiler works in this process: workers would import torch.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import pytest
import torch

from helpers_tidar import tiny_tidar
from helpers_tokenizers import WORDS, word_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    """A tokenizer of `WORDS`, with a chat template."""
    return word_tokenizer()


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A tiny drafting checkpoint and a text it can learn by heart."""
    folder = tmp_path / "model"
    tiny_tidar(vocab_size=len(WORDS), draft_length=4, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    answer = "sat on a mat and slept all day on the mat and slept on a cat"
    rows = [{"prompt": "the " * n + "cat", "answer": answer} for n in range(8)]  # so that blocks start everywhere
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, data
