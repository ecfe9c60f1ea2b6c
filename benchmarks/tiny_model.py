"""A tiny checkpoint of random weights and its adapter: `DRY_RUN=1 benchmarks/gpu_quarter_hour.sh` uses them on a CPU.

python benchmarks/tiny_model.py build/gpu_work/dry
"""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wavedraft import TiDARForCausalLM, convert
from wavedraft.training import gated_adapter_config


def write_tokenizer(folder: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "<turn>", *(f"w{number}" for number in range(57))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<turn>"],
    )
    tokenizer.chat_template = "{% for one in messages %}<turn> {{ one['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def write_tidar(folder: Path) -> None:
    """A checkpoint that drafts four tokens, and an adapter of it without a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "stock")
    write_tokenizer(folder / "stock")
    convert(folder / "stock", folder / "tidar", draft_length=4)
    model = TiDARForCausalLM.from_pretrained(folder / "tidar", dtype=torch.float32)
    get_peft_model(model, gated_adapter_config(model, 4)).save_pretrained(folder / "adapter")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": ("chat", "code")[n % 2], "prompt": f"w{n} w{n + 3} w{2 * n}"} for n in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tidar(folder)


if __name__ == "__main__":
    main()
