"""Tiny random TiDAR models, and slow, obvious twins of the fast paths."""

import torch
from peft import get_peft_model
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from wavedraft.generation.drafting.choice import Greedy, Sampled
from wavedraft.generation.drafting.draft_head import new_draft_head
from wavedraft.modeling_tidar import TiDARForCausalLM
from wavedraft.training import gated_adapter_config

VOCAB_SIZE = 61
# Large weights separate the two best tokens: with the default 0.02 every choice is a near-tie.
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 9}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 9}),
}


def tiny_tidar(family: str = "llama", draft_length: int = 4, seed: int = 0, **changes):
    """A drafting model with random weights, in float32 and evaluation mode. By default it decodes in the paper's form,
    with every branch and no copies, so that the forwards of a text are known."""
    torch.manual_seed(seed)
    config_class, extra = FAMILIES[family]
    config = config_class(**{**SHAPE, **extra, **changes})
    config.tidar_config = {
        "draft_length": draft_length,
        "mask_token_id": config.vocab_size,
        "mask_embedding_id": 3,
    }
    model = TiDARForCausalLM.from_config(config).eval()
    model.generation_config.num_branches, model.generation_config.draft_copies = "all", False
    return model


def with_random_head(model, rank=8, seed=0, size=1.0):
    """Adds a head that changes every draft."""
    torch.manual_seed(seed)
    head = new_draft_head(model, rank)
    with torch.no_grad():
        head.output_weight.normal_(std=size)
    head.requires_grad_(False)
    return model


def random_prompts(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """[B, P] ids of at least 1, since 0 is padding."""
    return torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_greedy_loop(model, prompt_ids: torch.Tensor, num_new: int, eos_token_ids: tuple[int, ...] = ()):
    """Greedy decoding of one row [P] by definition: no cache, no draft, no mask."""
    ids = prompt_ids
    for _ in range(num_new):
        next_id = model(ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, next_id[None]])
        if int(next_id) in eos_token_ids:
            break
    return ids


class CountedForwards:
    """Counts the network's calls with a hook, and records their widths."""

    def __init__(self, model):
        self.num_queries = []
        model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs, output):
        self.num_queries.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])


def script_drafts(monkeypatch, text, is_right, sureness=1.0, num_right=None):
    """Makes the masks of a single row predict `text` [P + N] always (or in `num_right` slots), or never."""
    for choice in (Greedy, Sampled):
        monkeypatch.setattr(choice, "draft", scripted(choice.draft, text, is_right, sureness, num_right))


def scripted(draft, text, is_right, sureness, num_right):
    def drafted(choice, decided, slots):
        logits = torch.full_like(slots.logits, -sureness)
        first = choice.scores.transcript.lengths[0] + int(decided.num_accepted[0])  # after the token just decided
        for slot in range(logits.shape[1]):
            right = int(text[min(first + slot, len(text) - 1)])
            stands = is_right and (num_right is None or slot < num_right)
            logits[0, slot, right if stands else (right + 1) % VOCAB_SIZE] = sureness
        return draft(choice, decided, slots._replace(logits=logits, chain=None))

    return drafted


def gated(model, rank=4):
    """Adds a gated adapter with random weights, so that it has an effect."""
    peft_model = get_peft_model(model, gated_adapter_config(model, rank))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft_model


def ragged():
    """Three left-padded prompts."""
    prompts = random_prompts(3, 7)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    return {"input_ids": prompts, "attention_mask": mask}
