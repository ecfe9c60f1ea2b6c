"""Grammar packages as their users call them with transformers: a fresh processor for each call of `generate`."""

import functools
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

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
    "outlines, outlines_core": functools.partial(outlines_json, "outlines_core", "outlines_core"),
    "outlines, llguidance": functools.partial(outlines_json, "llguidance", "llguidance"),
    "outlines, xgrammar": functools.partial(outlines_json, "xgrammar", "xgrammar"),
    "lm-format-enforcer": format_enforcer_json,
}
