"""What model cards say: one text for each kind of repository."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class CardKind(NamedTuple):
    """What the cards of one kind of repository say.

    Attributes:
        text: of what the snippets load, and the card's head.
        differs: why a text may differ from plain decoding's, for the table of what was measured.
        library: by which the Hub loads it.
    """

    tags: list[str]
    text: Callable[[str, dict[str, Any]], str]
    differs: str
    library: str = "transformers"


def tidar_text(name: str, known: dict[str, Any]) -> str:
    return f"""# {short(name)}

{base_of(known)} that thinks ahead: a TiDAR checkpoint
([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)). One forward of the network verifies the last draft
autoregressively and writes the next one by diffusion, so that the text is the one plain decoding writes, in fewer
forwards. Nothing but `transformers` is needed.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")

inputs = tokenizer("The sky is blue because", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)

print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(output.num_forwards, "forwards after the prompt's")
```

`draft_length` (0 decodes plainly) and `seed` may be given to `generate` or stand in `generation_config.json`. Without
`trust_remote_code` the repository is the plain stock model. That one drafts too, if told to:
`stock_model.generate(**inputs, custom_generate="{name}", trust_remote_code=True)`.
{trust_of(known)}{masks_of(known)}"""


def trust_of(known: dict[str, Any]) -> str:
    """What is said where generation_config.json lets masks decide with the model itself."""
    if (trust := known.get("trust")) in (None, 1):
        return ""
    return (
        f"\n`generation_config.json` has a `trust` of {trust}: the model's own logits count for that much of each\n"
        "token, and those of the masks for the rest. The text is not the one plain decoding writes.\n"
        "`generate(trust=1)` writes that one.\n"
    )


def masks_of(known: dict[str, Any]) -> str:
    """What is said of blocks of masks that are not the paper's."""
    is_causal = known.get("block_attention") == "causal"
    return "\nA mask of a block sees only the masks before it (`block_attention: causal`).\n" if is_causal else ""


def adapter_text(name: str, known: dict[str, Any]) -> str:
    base = known.get("base_model", "BASE_MODEL")
    head = f', "draft_head": "{name}"' if known["has_draft_head"] else ""
    return f"""# {short(name)}

A gated draft adapter for {base}: a PEFT aLoRA that acts at mask positions only. Tokens of the text pass through the
base model's own weights, and drafts of the next tokens come with each forward (TiDAR,
[arXiv 2511.08923](https://arxiv.org/abs/2511.08923)). Nothing but `transformers` and `peft` is needed.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
model.load_adapter("{name}")
tokenizer = AutoTokenizer.from_pretrained("{base}")

inputs = tokenizer("The sky is blue because", return_tensors="pt", return_token_type_ids=False)
options = {{"custom_generate": "{name}", "trust_remote_code": True{head}}}
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True, **options)

print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(output.num_forwards, "forwards after the prompt's")
```
{trust_of(known)}{masks_of(known)}"""


def recurrent_text(name: str, known: dict[str, Any]) -> str:
    return f"""# {short(name)}

{base_of(known)} of recurrent depth ([arXiv 2502.05171](https://arxiv.org/abs/2502.05171)), with the decoders that
refine several tokens at once ([arXiv 2510.14961](https://arxiv.org/abs/2510.14961)). Nothing but `transformers` is
needed.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")

inputs = tokenizer("The sky is blue because", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64, policy="exact", init_scale=0)

print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`policy="exact"` writes the text of full depth from a wavefront; `policy="autoregressive"` decodes one token after the
other; `preset="diffusion-forcing-r4"` is the sampler of the paper, where the model's core sees its tokens at every
recurrence: faster, and not the same text.
"""


def base_of(known: dict[str, Any]) -> str:
    base = known.get("base_model")
    return f"[{base}](https://huggingface.co/{base})" if base else "A language model"


def short(name: str) -> str:
    return Path(name).name


ROUNDING = (
    "Where a text differs, a near-tie went the other way: a forward of several tokens rounds differently from\n"
    "a forward of one, above all in half precision. The weights that write the text are the same,\n"
    "and in float32 so are the texts."
)
NOT_EXACT = "Diffusion forcing is not exact: it freezes a token when its state has come to rest."
DRAFTING_TAGS = ["custom_generate", "parallel-decoding", "speculative-decoding"]
KINDS = {
    "tidar": CardKind(["tidar", *DRAFTING_TAGS], tidar_text, ROUNDING),
    "adapter": CardKind(["tidar", "alora", *DRAFTING_TAGS], adapter_text, ROUNDING, library="peft"),
    "recurrent": CardKind(["recurrent-depth", "parallel-decoding"], recurrent_text, NOT_EXACT),
}
