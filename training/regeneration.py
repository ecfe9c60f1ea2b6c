"""Answers written by the base model itself, as training data for drafts.

An answered row has the columns of its prompt, and adds `"answer"`, `"finished"` (the answer ended with EOS, not at the
length limit) and `"num_tokens"` (new tokens, with EOS).

B sequences, T tokens.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from tqdm.auto import tqdm

from .chat_template import prompt_text
from .position_table import check_fit
from .row_forms import Row, row_of

BATCHES_SORTED_TOGETHER = 5  # enough for even lengths, few enough that a run stopped early has every kind


def regenerate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Row | Mapping[str, Any]],
    output_path: str | Path,
    *,
    max_new_tokens: int = 192,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    max_answer_tokens: int | None = None,
    has_progress_bar: bool = True,
) -> int:
    """Answers `prompts` with `model` and appends a JSON row for each to `output_path`.

    A stopped run continues when called again with the same arguments, and ends with the same file. Batches depend only
    on `prompts`, and each has its own seed. An incomplete batch is computed again, and only its missing rows are added.
    An incomplete last line is dropped. Repeated prompts are answered once.

    Args:
        tokenizer: if it has a chat template, this is applied to the prompts.
        prompts: rows of `read_prompts`, or mappings such as `{"prompt": ...}` in a form of `row_of`.
        temperature: 0 is greedy.
        max_answer_tokens: the run ends after the batch in which the file reaches this number of tokens.

    Returns:
        The number of tokens in the file.

    Raises:
        ValueError: a length, a batch size or a temperature is out of range, `output_path` holds other rows, or a prompt
            cannot be written.
    """
    check_regeneration(max_new_tokens, batch_size, temperature)
    rows = [row if isinstance(row, Row) else row_of(row, f"Prompt {n}") for n, row in enumerate(prompts, start=1)]
    rows = list({key_of(row.prompt_columns()): row for row in map(Row.prompt, rows)}.values())
    output_path = Path(output_path)
    answered = answers_in(output_path)
    if missing := [row for row in rows if key_of(row.prompt_columns()) not in answered]:
        check_prompts(missing, tokenizer, model.config, max_new_tokens)
    drop_torn_line(output_path)
    num_tokens = sum(answered.values())

    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    with (
        output_path.open("ab") as file,
        tqdm(total=len(rows), initial=len(rows) - len(missing), unit="prompt", disable=not has_progress_bar) as bar,
    ):
        for number, batch in enumerate(batches_of(rows, batch_size)):
            if max_answer_tokens is not None and num_tokens >= max_answer_tokens:
                break
            missing = [row for row in batch if key_of(row.prompt_columns()) not in answered]
            if not missing:
                continue
            answers = answer_batch(model, tokenizer, batch, seed=seed + number, **generation)
            num_tokens += append_answers(file, batch, answers, answered)
            bar.update(len(missing))
            bar.set_postfix(tokens=num_tokens)
    return num_tokens


def check_regeneration(max_new_tokens: int, batch_size: int, temperature: float) -> None:
    """Raises ValueError if an argument is out of range."""
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"`max_new_tokens` and `batch_size` must be at least 1, but are {max_new_tokens} and {batch_size}."
        )
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 (greedy) or more, but is {temperature}.")


def check_prompts(rows: Sequence[Row], tokenizer: Any, config: Any, max_new_tokens: int) -> None:
    """Raises ValueError if a prompt cannot be written, by the chat template or without it, or if its text may become
    longer than the model's position table."""
    texts = [prompt_text(row, tokenizer)[0] for row in rows]
    check_fit(
        config,
        ((row, len(tokenizer(text)["input_ids"])) for row, text in zip(rows, texts, strict=True)),
        max_new_tokens,
    )


def key_of(columns: dict[str, Any]) -> str:
    """What two rows share if they ask the same."""
    return json.dumps([columns.get(name) for name in ("prompt", "tools", "chat_template_kwargs")], sort_keys=True)


def answers_in(path: Path) -> dict[str, int]:
    """The numbers of tokens of the answers that a file holds, by `key_of` their prompts.

    Raises:
        ValueError: the file has a row of another form.
    """
    answered = {}
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line)
            answered[key_of(row)] = int(row["num_tokens"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{path}, line {number} is no answer of an earlier run, which has `prompt` and `num_tokens`. Choose "
                "another file to write, or delete this one."
            ) from None
    return answered


def append_answers(
    file: IO[bytes], batch: Sequence[Row], answers: list[dict[str, Any]], answered: dict[str, int]
) -> int:
    """Writes the rows of a batch that are not in `answered`, and adds them there. Returns their number of tokens."""
    num_tokens = 0
    for row, answer in zip(batch, answers, strict=True):
        columns = row.prompt_columns()
        if key_of(columns) in answered:
            continue
        file.write((json.dumps({**columns, **answer}, ensure_ascii=False) + "\n").encode())
        file.flush()
        answered[key_of(columns)] = answer["num_tokens"]
        num_tokens += answer["num_tokens"]
    os.fsync(file.fileno())
    return num_tokens


def batches_of(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batches of similar prompts. Every few batches, prompts are sorted by kind, then by length."""
    window = batch_size * BATCHES_SORTED_TOGETHER
    for start in range(0, len(rows), window):
        alike = sorted(rows[start : start + window], key=lambda row: (row.kind or "", num_letters(row)))
        for first in range(0, len(alike), batch_size):
            yield alike[first : first + batch_size]


def num_letters(row: Row) -> int:
    return sum(len(message.get("content") or "") for message in row.messages)


@torch.inference_mode()
def answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Row], *, max_new_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """The answers to a batch of left-padded prompts, decoded together."""
    texts = [prompt_text(row, tokenizer)[0] for row in prompts]
    has_special_tokens = tokenizer.chat_template is None  # a chat template writes them
    prompt_ids = [tokenizer(text, add_special_tokens=has_special_tokens)["input_ids"] for text in texts]
    eos_token_ids = eos_ids_of(model, tokenizer)
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = min(eos_token_ids, default=0)
    longest = max(map(len, prompt_ids))
    paddings = [longest - len(ids) for ids in prompt_ids]
    padded_ids = [[pad_token_id] * number + ids for number, ids in zip(paddings, prompt_ids, strict=True)]
    input_ids = torch.tensor(padded_ids, device=model.device)  # (B, T)
    attention_mask = torch.tensor([[0] * number + [1] * (longest - number) for number in paddings])  # (B, T)

    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output_ids = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_ids or None,
            pad_token_id=pad_token_id,
            **sampling,
        )  # (B, T + new)

    answers = []
    for answer_ids in output_ids[:, input_ids.shape[1] :].tolist():
        end = next((place for place, token_id in enumerate(answer_ids) if token_id in eos_token_ids), None)
        kept_ids = answer_ids if end is None else answer_ids[:end]
        answers.append(
            {
                "answer": tokenizer.decode(kept_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                "finished": end is not None,
                "num_tokens": len(kept_ids) + (end is not None),
            }
        )
    return answers


def eos_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """All end tokens, from the generation config, or else from the tokenizer; none if neither has one."""
    eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None:
        return []
    return list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]


def drop_torn_line(path: Path) -> None:
    """Cuts off everything after the last newline: an incomplete row of a killed run."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)


def cut_at_loop(text: str, *, ngram_length: int = 8, max_repeats: int = 6) -> str:
    """`text` up to the start of its first loop, or all of `text` without a loop.

    A loop is a sequence of `ngram_length` words (or runs of punctuation) that occurs more than `max_repeats` times.
    The cut is before the second occurrence.
    """
    words = list(re.finditer(r"\w+|[^\w\s]+", text))
    ngrams = [
        tuple(word.group() for word in words[start : start + ngram_length])
        for start in range(len(words) - ngram_length + 1)
    ]
    repeated = {ngram for ngram, count in Counter(ngrams).items() if count > max_repeats}
    seen = set()
    for start, ngram in enumerate(ngrams):
        if ngram in seen:
            return text[: words[start].start()].rstrip()
        if ngram in repeated:
            seen.add(ngram)
    return text


def usable_answer(answer: str, min_words: int = 16) -> str | None:
    """An answer, cut at its first loop; None if it is empty, or if fewer than `min_words` words remain of a loop."""
    kept = cut_at_loop(answer)
    is_cut = kept != answer
    return None if not kept.strip() or (is_cut and len(kept.split()) < min_words) else kept
