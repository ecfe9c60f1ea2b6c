"""Writes a GGUF file as a stock checkpoint: weights dequantized to float32, config, tokenizer and chat template."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .quiet_transformers import quiet_transformers

# A file names its pre-tokenizer, but transformers 5.23 builds GPT-2's ByteLevel for most byte-level vocabularies.
AS_GPT2 = {"gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais"}
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
WORDS = {
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "smaug-bpe"], LLAMA3_WORDS),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], QWEN2_WORDS),
}


def gguf_file_of(source: Path) -> Path | None:
    """The GGUF file of a path: the path itself, or the only one in a folder without config.json; else None."""
    if source.is_file():
        return source if source.suffix == ".gguf" else None
    if (source / "config.json").exists():
        return None
    files = sorted(source.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{source} has {len(files)} GGUF files ({', '.join(file.name for file in files)}). Name one of them."
        )
    return files[0] if files else None


def write_stock_checkpoint(file: Path, folder: Path) -> None:
    """Rewrites a GGUF file as safetensors, config, tokenizer and generation config.

    Raises:
        ValueError: transformers cannot read the file, or the model's pre-tokenizer cannot be rebuilt from it.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f"{file} is a GGUF file. Reading it needs the package gguf: pip install 'wavedraft[gguf]'."
        ) from None
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            metadata = gguf.GGUFReader(file).fields
    except Exception as error:  # on damaged files the reader raises errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} could not be read as GGUF: {reason}. Convert a safetensors checkpoint.") from error
    _restore_pre_tokenizer(tokenizer, metadata, file)

    # save_pretrained refuses a config with GGUF's `quantization_config`. The weights are plain float32 here.
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {**loaded.config.to_dict(), **special_ids, "dtype": "float32"}
    values.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config).from_dict(values))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special_ids)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _restore_pre_tokenizer(tokenizer: Any, metadata: dict[str, Any], file: Path) -> None:
    """Restores the model's own pre-tokenizer, which transformers loses when it reads a GGUF file."""

    def read(key: str) -> str | None:
        return metadata[key].contents() if key in metadata else None

    if read("tokenizer.ggml.model") != "gpt2":
        return  # SentencePiece vocabularies do not split into words first
    name = read("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitter: pre_tokenizers.PreTokenizer
    if name in AS_GPT2:
        splitter = byte_level
    elif name in DIGITS_APART:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name in WORDS:
        words = pre_tokenizers.Split(Regex(WORDS[name]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splitter = pre_tokenizers.Sequence([words, bytes_only])
    else:
        raise ValueError(
            f"{file} uses the pre-tokenizer {name!r} (`tokenizer.ggml.pre`), which cannot be rebuilt from the file. "
            f"Supported: {', '.join(sorted({*AS_GPT2, *DIGITS_APART, *WORDS}))}. Convert the safetensors checkpoint "
            "that the file was made from."
        )
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
