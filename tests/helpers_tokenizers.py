"""Tiny tokenizers of words and of letters."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", "the", "cat", "sat", "on", "a", "mat", "and", "slept", "all", "day"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
LETTERS = "-" + string.ascii_letters + "01234567"


def word_tokenizer(unk_token: str = "<pad>"):
    """A tokenizer of `WORDS`, with a chat template."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)


def letter_tokenizer():
    """A tokenizer whose ids are letters."""
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    inner = Tokenizer(BPE(letters, merges=[], unk_token="-"))
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="-", unk_token="-")


class LetterTokenizer:
    """The part of a tokenizer that streamers need: id n is the letter 65 + n."""

    def decode(self, ids, **kwargs):
        ids = [ids] if isinstance(ids, int) else list(ids)
        return "".join(chr(65 + int(i)) + " " for i in ids)


def save_tokenizer(folder: Path, num_words: int = 50) -> None:
    words = ["<unk>", "<s>", "</s>", "<tool>", "<spare>", *(f"w{n}" for n in range(num_words - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<tool>", "<spare>"],
    )
    fast.chat_template = "{% for m in messages %}<tool>{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def byte_tokenizer(template):
    """Every byte a token, and the marks of a turn one each: any text can be written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer
