"""Let a stock model answer a file of prompts, in bf16: the text a draft is trained on. A second run goes on.

python benchmarks/write_answers.py SmolLM2-135M-Instruct benchmarks/prompts_train.jsonl self_written_train.jsonl
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from wavedraft.training.regenerate import read_rows, regenerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("output")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-answer-tokens", type=int, default=None)
    arguments = parser.parse_args()
    regenerate(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval(),
        AutoTokenizer.from_pretrained(arguments.model),
        read_rows(arguments.prompts),
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_answer_tokens=arguments.max_answer_tokens,
    )


if __name__ == "__main__":
    main()
