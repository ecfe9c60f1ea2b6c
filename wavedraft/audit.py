"""Are the texts of parallel decoding those of plain decoding, and where they are not, how near a tie was it?

A forward of many tokens rounds differently from a forward of one, and so does a batch. How often plain decoding in a
batch differs from plain decoding alone is the noise floor: as many differences of parallel decoding say nothing.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .modeling_recurrent import RecurrentDepthLM
from .shared_keys import SharedKeys, measure_shared_keys


@dataclass(frozen=True)
class Mismatch:
    """The first token of a text that is not plain decoding's.

    Attributes:
        prompt: number of the prompt, from 0.
        position: new tokens before it.
        plain_id, other_id: None where that text had ended.
        margin: between the two best scores plain decoding chose from there; None where it had ended.
    """

    prompt: int
    position: int
    plain_id: int | None
    other_id: int | None
    margin: float | None


@dataclass(frozen=True)
class Comparison:
    """Texts beside those of plain decoding."""

    num_texts: int
    mismatches: list[Mismatch]

    @property
    def num_identical(self) -> int:
        return self.num_texts - len(self.mismatches)


@dataclass(frozen=True)
class Effort:
    """What decoding all prompts took, one at a time.

    Attributes:
        num_tie_forwards: forwards of one token that decided near-ties; not part of `num_forwards`.
        seconds: by the clock, prefills included.
    """

    num_forwards: int = 0
    num_tie_forwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ExactCost:
    """What `exact` costs and gives: each prompt is decoded with it and without it, one after the other.

    Attributes:
        without: texts without it, beside those of plain decoding.
    """

    effort: Effort
    effort_without: Effort
    without: Comparison


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        num_tokens: new tokens of plain decoding.
        parallel: parallel decoding, one prompt at a time.
        rebatched: plain decoding in left-padded batches, the noise floor.
        batch_size: prompts in such a batch.
        exact_cost: what an `exact` mode of parallel decoding costs; None without one.
        shared_keys: of a recurrent-depth model, whether it shares keys across its recurrences; None of others.
        trust: of parallel decoding. Below 1 its texts are not meant to be plain decoding's: a difference is no fault.
    """

    num_tokens: int
    parallel: Comparison
    rebatched: Comparison
    batch_size: int
    exact_cost: ExactCost | None = None
    shared_keys: SharedKeys | None = None
    trust: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("parallel", "rebatched"):
            values[name]["num_identical"] = getattr(self, name).num_identical
        if self.exact_cost is not None:
            values["exact_cost"]["without"]["num_identical"] = self.exact_cost.without.num_identical
        if self.shared_keys is not None:
            values["shared_keys"]["safe_policies"] = self.shared_keys.safe_policies
        return values


def audit(
    model: PreTrainedModel,
    prompts: list[torch.Tensor],
    *,
    plain: dict[str, Any],
    parallel: dict[str, Any],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_prompt: Callable[[], None] = lambda: None,
) -> Audit:
    """Decodes every prompt greedily three times: plainly, in parallel, and plainly in a batch.

    Where `parallel` asks for `exact`, every prompt is decoded a fourth time, in parallel without it. A recurrent-depth
    model writes each plain text once more, to see whether it shares keys across its recurrences.

    Args:
        prompts: ids [P] of each.
        plain, parallel: keywords of `generate` that make it decode plainly, and in parallel.
        batch_size: prompts in a batch of the noise floor, from 2 up.
        on_prompt: called when a prompt's first two texts are there.

    Raises:
        ValueError: there are fewer than two prompts to put in a batch, or `batch_size` is below 2.
    """
    _check_batches(prompts, batch_size)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    inexact = {name: value for name, value in parallel.items() if name not in ("exact", "tie_margin")}
    is_exact = bool(parallel.get("exact"))
    if is_exact:  # what a model tries once is not a cost of each text
        for keywords in (parallel, inexact):
            _generate(model, prompts[:1], {**options, **keywords, "max_new_tokens": 2})
    plain_texts, margins, parallel_texts, inexact_texts = [], [], [], []
    effort = effort_without = Effort()
    for prompt_ids in prompts:
        output = _generate(model, [prompt_ids], {**options, **plain, "output_scores": True})
        plain_texts += _new_ids(model, output, len(prompt_ids))
        margins.append(_margins(output))
        output, effort = _timed(model, prompt_ids, {**options, **parallel}, effort)
        parallel_texts += _new_ids(model, output, len(prompt_ids))
        if is_exact:
            output, effort_without = _timed(model, prompt_ids, {**options, **inexact}, effort_without)
            inexact_texts += _new_ids(model, output, len(prompt_ids))
        on_prompt()

    rebatched_texts = []
    for batch in _batches(prompts, batch_size):
        output = _generate(model, batch, {**options, **plain})
        rebatched_texts += _new_ids(model, output, max(map(len, batch)))
    keys = measure_shared_keys(model, prompts, plain_texts, plain) if isinstance(model, RecurrentDepthLM) else None
    return Audit(
        num_tokens=sum(map(len, plain_texts)),
        parallel=_compare(plain_texts, parallel_texts, margins),
        rebatched=_compare(plain_texts, rebatched_texts, margins),
        batch_size=batch_size,
        exact_cost=ExactCost(effort, effort_without, _compare(plain_texts, inexact_texts, margins))
        if is_exact
        else None,
        shared_keys=keys,
        trust=trust_of(model, parallel),
    )


def trust_of(model: PreTrainedModel, keywords: dict[str, Any]) -> float:
    """`trust` of a decode with these keywords of `generate`: theirs, or else that of generation_config.json."""
    given = (keywords.get("trust"), getattr(model.generation_config, "trust", None))
    return next((float(trust) for trust in given if trust is not None), 1.0)


def _check_batches(prompts: list[torch.Tensor], batch_size: int) -> None:
    if len(prompts) < 2:
        raise ValueError(f"There must be at least 2 prompts, to make a batch of, but there is {len(prompts)}.")
    if batch_size < 2:
        raise ValueError(f"`batch_size` must be at least 2 (one alone rounds as it does alone), but is {batch_size}.")


def _batches(prompts: list[torch.Tensor], batch_size: int) -> Iterable[list[torch.Tensor]]:
    """Batches of prompts in their order; a last one of a single prompt joins the batch before it."""
    starts = list(range(0, len(prompts), batch_size))
    if len(starts) > 1 and len(prompts) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(prompts)], strict=True):
        yield prompts[start:end]


def _generate(
    model: PreTrainedModel, prompts: list[torch.Tensor], options: dict[str, Any]
) -> GenerateDecoderOnlyOutput:
    """One call of `generate` for prompts padded on the left."""
    pad_token_id = model.generation_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = min(_end_ids(model), default=0)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros_like(ids)
    for row, prompt_ids in enumerate(prompts):
        ids[row, longest - len(prompt_ids) :] = prompt_ids
        attention_mask[row, longest - len(prompt_ids) :] = 1
    device = model.device
    return model.generate(
        ids.to(device), attention_mask=attention_mask.to(device), pad_token_id=pad_token_id, **options
    )


def _timed(
    model: PreTrainedModel, prompt_ids: torch.Tensor, options: dict[str, Any], so_far: Effort
) -> tuple[Any, Effort]:
    """One prompt's decode, and what all up to it took."""
    start = time.perf_counter()
    output: Any = _generate(model, [prompt_ids], options)
    seconds = time.perf_counter() - start
    num_forwards, num_tie_forwards = (getattr(output, name, None) or 0 for name in ("num_forwards", "num_tie_forwards"))
    return output, Effort(
        so_far.num_forwards + num_forwards, so_far.num_tie_forwards + num_tie_forwards, so_far.seconds + seconds
    )


def _end_ids(model: PreTrainedModel) -> set[int]:
    end_ids = model.generation_config.eos_token_id
    return set() if end_ids is None else set(end_ids if isinstance(end_ids, list) else [end_ids])


def _new_ids(model: PreTrainedModel, output: GenerateDecoderOnlyOutput, prompt_length: int) -> list[list[int]]:
    """Each row's new ids up to its end; what follows is padding."""
    end_ids, texts = _end_ids(model), []
    for row in output.sequences[:, prompt_length:].tolist():
        end = next((place for place, token_id in enumerate(row) if token_id in end_ids), len(row) - 1)
        texts.append(row[: end + 1])
    return texts


def _margins(output: GenerateDecoderOnlyOutput) -> list[float]:
    """Of each step of a single row, how far the best score is above the second."""
    best = torch.stack([scores[0].float() for scores in output.scores]).topk(2).values  # [N, 2]
    return (best[:, 0] - best[:, 1]).tolist()


def _compare(plain_texts: list[list[int]], texts: list[list[int]], margins: list[list[float]]) -> Comparison:
    mismatches = []
    for prompt, (plain_ids, ids) in enumerate(zip(plain_texts, texts, strict=True)):
        if plain_ids == ids:
            continue
        shared = min(len(plain_ids), len(ids))
        position = next((place for place in range(shared) if plain_ids[place] != ids[place]), shared)
        plain_id, other_id = (text[position] if position < len(text) else None for text in (plain_ids, ids))
        margin = None if plain_id is None else margins[prompt][position]
        mismatches.append(Mismatch(prompt, position, plain_id, other_id, margin))
    return Comparison(len(texts), mismatches)
