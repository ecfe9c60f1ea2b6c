"""The model cards of checkpoints that draft by masks, and of adapters that teach a stock model to."""

from typing import Any

from .model_card import CardKind, base_of, short


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
"""


def adapter_text(name: str, known: dict[str, Any]) -> str:
    base = known.get("base_model", "BASE_MODEL")
    head = f', "draft_head": "{name}"' if known["has_draft_head"] else ""
    return f"""# {short(name)}

A gated draft adapter for {base}: a PEFT aLoRA that acts at mask positions only, so that the model's own
text is bit for bit unchanged, and drafts of its next tokens come with each forward (TiDAR,
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
"""


DRAFTING_TAGS = ["custom_generate", "parallel-decoding", "speculative-decoding"]
TIDAR_CARD = CardKind(["tidar", *DRAFTING_TAGS], tidar_text)
ADAPTER_CARD = CardKind(["tidar", "alora", *DRAFTING_TAGS], adapter_text, library="peft")
