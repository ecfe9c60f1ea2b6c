"""Grammar packages as their users call them with transformers: a fresh processor for each call of `generate`."""

import functools
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import LogitsProcessor, PreTrainedTokenizerFast, tokenization_utils_base

CHARACTERS = '{}[]":,Ġ.-' + "abcdefghijklmnopqrstuvwxyz0123456789"
END = 60
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-m]{2,6}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REASON = "needs the package {}: install wavedraft's extra `grammar`"


@functools.cache
def json_tokenizer() -> PreTrainedTokenizerFast:
    """61 ids: the characters of JSON, further letters, padding (0) and an end token (60)."""
    tokens = ["<pad>", *CHARACTERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"][:END]
    vocabulary = {token: number for number, token in enumerate([*tokens, "</s>"])}
    assert len(vocabulary) == END + 1
    inner = Tokenizer(BPE(vocabulary, merges=[]))
    inner.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def xgrammar_json() -> dict[str, Any]:
    xgrammar = pytest.importorskip("xgrammar", reason=REASON.format("xgrammar"))
    hf = pytest.importorskip("xgrammar.contrib.hf", reason=REASON.format("xgrammar"))
    info = xgrammar.TokenizerInfo.from_huggingface(json_tokenizer(), vocab_size=END + 1, stop_token_ids=[END])
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    return {"logits_processor": [hf.LogitsProcessor(grammar)]}


def llguidance_json() -> dict[str, Any]:
    """llguidance has no processor of its own: one matcher a row, which is told each token once, as its guide does."""
    llguidance = pytest.importorskip("llguidance", reason=REASON.format("llguidance"))
    from llguidance import hf
    from llguidance import numpy as bits

    tokenizer = hf.from_tokenizer(json_tokenizer(), n_vocab=END + 1, eos_token=END)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})

    class Guided(LogitsProcessor):
        def __init__(self) -> None:
            self.matchers: list[Any] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.matchers:
                for matcher, ids in zip(self.matchers, input_ids, strict=True):
                    if not matcher.is_stopped():
                        matcher.consume_token(int(ids[-1]))
            else:
                self.matchers = [llguidance.LLMatcher(tokenizer, grammar) for _ in input_ids]
            masks = bits.allocate_token_bitmask(len(input_ids), END + 1)
            for row, matcher in enumerate(self.matchers):
                if not matcher.is_stopped():
                    bits.fill_next_token_bitmask(matcher, masks, row)
            allowed = scores.detach().clone().numpy()
            bits.apply_token_bitmask_inplace(allowed, masks)
            return torch.from_numpy(allowed)

    return {"logits_processor": [Guided()]}


def outlines_json(backend: str, needs: str) -> dict[str, Any]:
    """One of outlines' backends, as its `Transformers` model hands it to `generate`."""
    pytest.importorskip("outlines", reason=REASON.format("outlines"))
    pytest.importorskip(needs, reason=REASON.format(needs))
    from outlines import backends
    from outlines.models.transformers import Transformers, TransformerTokenizer

    model = object.__new__(Transformers)
    model.tensor_library_name = "torch"
    model.model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=END + 1))
    model.hf_tokenizer, model.tokenizer = json_tokenizer(), TransformerTokenizer(json_tokenizer())
    processor = backends.get_json_schema_logits_processor(backend, model, json.dumps(SCHEMA))
    return {"logits_processor": [processor]}


def format_enforcer_json() -> dict[str, Any]:
    pytest.importorskip("lmformatenforcer", reason=REASON.format("lm-format-enforcer"))
    # It imports a module that transformers 5 has renamed.
    sys.modules.setdefault("transformers.tokenization_utils", tokenization_utils_base)
    from lmformatenforcer import JsonSchemaParser
    from lmformatenforcer.integrations.transformers import build_transformers_prefix_allowed_tokens_fn

    allowed = build_transformers_prefix_allowed_tokens_fn(json_tokenizer(), JsonSchemaParser(SCHEMA))
    return {"prefix_allowed_tokens_fn": allowed}


GRAMMARS: dict[str, Callable[[], dict[str, Any]]] = {
    "xgrammar": xgrammar_json,
    "llguidance": llguidance_json,
    "outlines, outlines_core": functools.partial(outlines_json, "outlines_core", "outlines_core"),
    "outlines, llguidance": functools.partial(outlines_json, "llguidance", "llguidance"),
    "outlines, xgrammar": functools.partial(outlines_json, "xgrammar", "xgrammar"),
    "lm-format-enforcer": format_enforcer_json,
}


def assert_allowed(make: Callable[[], dict[str, Any]], prompt_ids: torch.Tensor, text_ids: list[int]) -> None:
    """Shows a fresh matcher a text, token by token: it forbids none of them up to the end token."""
    (asked,) = make().values()
    ids = prompt_ids[None]
    for token in text_ids:
        if isinstance(asked, list):
            allowed = asked[0](ids, torch.zeros(1, END + 1))[0, token] == 0
        else:
            allowed = token in asked(0, ids[0])
        assert allowed, (json_tokenizer().decode(text_ids), token)
        if token == END:
            return
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
