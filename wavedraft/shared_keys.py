"""Does a recurrent-depth model share keys across its recurrences? What reads a cache of the last keys needs that.

With a cache of every recurrence, a token at recurrence i reads the keys that earlier tokens had at recurrence i, as in
training. With the last keys alone, it reads those of full depth at each of its recurrences. `adaptive` and the samplers
of diffusion forcing have only these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .generation.recurrent.freezing import latent_difference
from .generation.recurrent.options_recurrent import LATEST_ONLY, POLICIES
from .modeling_recurrent import RecurrentDepthLM

EXACT_POLICIES = ("autoregressive", "exact", "self-speculative")  # they keep every recurrence's keys
ENOUGH = 0.95  # share of equal next tokens from which the last keys serve


@dataclass(frozen=True)
class SharedKeys:
    """What reading the last keys of earlier tokens changes at full depth.

    Attributes:
        num_tokens: next tokens compared. The first of each text is not: a prompt is read by all its tokens at once.
        num_same: of them, those that are the same with the last keys, each after the tokens of plain decoding.
        movement: what a prompt's states change in their last recurrence, relative to their size; mean of all tokens.
        reinjects_input: whether the model allows diffusion forcing at all.
    """

    num_tokens: int
    num_same: int
    movement: float
    reinjects_input: bool

    @property
    def share(self) -> float:
        """Share of equal next tokens; 1 if none was compared."""
        return self.num_same / self.num_tokens if self.num_tokens else 1.0

    @property
    def is_shared(self) -> bool:
        """Whether policies that read the last keys are safe to use."""
        return self.share >= ENOUGH

    @property
    def readers(self) -> list[str]:
        """The policies of this model that read the last keys."""
        others = [policy for policy in POLICIES if policy not in EXACT_POLICIES]
        return others if self.reinjects_input else [policy for policy in others if policy == "adaptive"]

    @property
    def safe_policies(self) -> list[str]:
        """The policies that can be used on this model."""
        return [*EXACT_POLICIES, *(self.readers if self.is_shared else [])]


def measure_shared_keys(
    model: RecurrentDepthLM, prompts: list[torch.Tensor], texts: list[list[int]], plain: dict[str, Any]
) -> SharedKeys:
    """Writes each text of plain decoding again with the last keys alone, and compares its likeliest next tokens.

    Args:
        prompts: ids [P] of each.
        texts: new ids of each, by plain decoding.
        plain: keywords of `generate` that made it decode plainly.
    """
    num_tokens, num_same, movement = 0, 0, []
    for prompt_ids, text in zip(prompts, texts, strict=True):
        ids = prompt_ids[None].to(model.device)
        movement.append(movement_of(model, ids, plain))
        if len(text) < 2:
            continue
        output: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **plain | {"kv_cache": LATEST_ONLY, "do_sample": False, "max_new_tokens": len(text)},
            prefix_allowed_tokens_fn=forced(text, len(prompt_ids)),
            return_dict_in_generate=True,
            output_logits=True,
        )
        likeliest = torch.cat(output.logits).argmax(dim=-1).tolist()  # before the text was forced
        num_same += sum(mine == other for mine, other in zip(likeliest[1:], text[1:], strict=True))
        num_tokens += len(text) - 1
    return SharedKeys(num_tokens, num_same, sum(movement) / len(movement), model.reinjects_input)


def forced(text: list[int], start: int) -> Callable[[int, torch.Tensor], list[int]]:
    """What lets `generate` write nothing but `text` after `start` tokens."""
    return lambda row, so_far: [text[len(so_far) - start]]


@torch.no_grad()
def movement_of(model: RecurrentDepthLM, ids: torch.Tensor, plain: dict[str, Any]) -> float:
    """How far the states of a prompt [1, P] move in their last recurrence at full depth, relative to their size."""
    stored = {name: getattr(model.generation_config, name, None) for name in ("num_recurrences", "init_scale")}
    given = {name: plain.get(name, value) for name, value in stored.items()}
    chosen = {name: value for name, value in given.items() if value is not None}
    states = model(ids, output_hidden_states=True, **chosen).hidden_states
    return latent_difference(states[-1], states[-2]).mean().item()
