"""What teaching a checkpoint to draft takes on this machine, measured on a few steps, and what it may bring."""

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .adapters import load_model, with_adapter
from .chat_template import prompt_ids
from .regeneration import answer_batch
from .row_forms import Row
from .training_arguments import FinetuneArguments

SHIPPED_PROMPTS = Path(__file__).with_name("prompts_train.jsonl")
ROUNDS = 3  # times each answer is taught, as for the shipped adapter
EVALUATED_TOKENS = 3 * 128  # of a held-out prompt: before the head, after it, and plainly
EVALUATION_SHARE = 0.1  # of the time, at most
FEWEST_HELD_OUT, MOST_HELD_OUT = 5, 100
TIMED_STEPS = 3
TIMED_TOKENS = 16
# Taught tokens and tokens per forward of SmolLM2-135M-Instruct on held-out prompts, by its adapter's README.
SEEN = ((75_000, 1.55), (1_000_000, 2.2), (8_000_000, 2.7))


@dataclass(frozen=True)
class Costs:
    """What the parts take on this machine.

    Attributes:
        answer_seconds: of a token, where prompts are answered in batches.
        plain_seconds: of a token, where one prompt is answered.
        step_seconds, head_seconds: of a training step of the masks, and of the head.
        peak_bytes: most memory of this process, or of the GPU.
        trained_bytes: of what is trained, in float32.
    """

    answer_seconds: float
    plain_seconds: float
    step_seconds: float
    head_seconds: float
    peak_bytes: int
    trained_bytes: int


@dataclass(frozen=True)
class Course:
    """How much is taught.

    Attributes:
        num_steps, num_head_steps: training steps of the masks, and of the head.
        num_answers: prompts that the model answers.
        num_held_out: prompts that are decoded before and after, and never taught.
    """

    num_steps: int
    num_head_steps: int
    num_answers: int
    num_held_out: int

    @classmethod
    def of_steps(cls, num_steps: int, batch_size: int, num_prompts: int, costs: Costs, num_tokens: int) -> "Course":
        """A course of some steps. The head takes half as many; evaluations take a tenth of the time.

        Args:
            num_prompts: that there are, the held-out ones included.
            num_tokens: of an answer, at most.
        """
        num_answers = min(-(-num_steps * batch_size // ROUNDS), num_prompts - FEWEST_HELD_OUT)
        course = cls(num_steps, max(1, num_steps // 2), max(num_answers, 1), 0)
        share = EVALUATION_SHARE / (1 - EVALUATION_SHARE) * course.seconds(costs, num_tokens)
        num_held_out = int(share / (EVALUATED_TOKENS * costs.plain_seconds))
        most = min(MOST_HELD_OUT, num_prompts - course.num_answers)
        return replace(course, num_held_out=max(min(num_held_out, most), FEWEST_HELD_OUT))

    @classmethod
    def of_hours(cls, hours: float, batch_size: int, num_prompts: int, costs: Costs, num_tokens: int) -> "Course":
        """The longest course of at most so many hours; of one step where none is so short."""
        of_step = costs.step_seconds + costs.head_seconds / 2 + batch_size / ROUNDS * num_tokens * costs.answer_seconds
        least = FEWEST_HELD_OUT * EVALUATED_TOKENS * costs.plain_seconds
        num_steps = int((3600 * hours - max(3600 * hours * EVALUATION_SHARE, least)) / of_step)
        return cls.of_steps(max(num_steps, 1), batch_size, num_prompts, costs, num_tokens)

    def seconds(self, costs: Costs, num_tokens: int) -> float:
        """What the course takes, if every answer has `num_tokens` tokens."""
        answers = self.num_answers * num_tokens * costs.answer_seconds
        steps = self.num_steps * costs.step_seconds + self.num_head_steps * costs.head_seconds
        return answers + steps + self.num_held_out * EVALUATED_TOKENS * costs.plain_seconds


def likely_tokens_per_forward(num_taught: int) -> float:
    """Tokens per forward after so many taught tokens, between the points of `SEEN`, and within them."""
    if num_taught <= SEEN[0][0]:
        return 1 + (SEEN[0][1] - 1) * num_taught / SEEN[0][0]
    for (fewer, lower), (more, higher) in pairwise(SEEN):
        if num_taught <= more:
            return lower + (higher - lower) * log(num_taught / fewer) / log(more / fewer)
    return SEEN[-1][1]


def hold_out(rows: Sequence[Row], num_held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to teach, and rows taken evenly from all, which are never taught."""
    places = {round((i + 0.5) * len(rows) / num_held_out) for i in range(num_held_out)}
    places = {min(place, len(rows) - 1) for place in places}
    return [r for i, r in enumerate(rows) if i not in places], [r for i, r in enumerate(rows) if i in places]


def measure_costs(
    masks: FinetuneArguments, head: FinetuneArguments, tokenizer: Any, rows: Sequence[Row], answer_batch_size: int
) -> Costs:
    """Answers a few prompts, and takes a few training steps, whose results are thrown away.

    Args:
        masks, head: the options of the runs to come.
        answer_batch_size: prompts that are answered at a time.
    """
    dtype = torch.bfloat16 if masks.bf16 else torch.float32
    answering = AutoModelForCausalLM.from_pretrained(masks.model_path, dtype=dtype).to(masks.device).eval()
    prompts = [rows[i % len(rows)].prompt() for i in range(answer_batch_size)]
    plain_seconds = seconds_of_token(partial(answer, answering, tokenizer, prompts[:1]))
    answer_seconds = seconds_of_token(partial(answer, answering, tokenizer, prompts)) / len(prompts)
    del answering  # the memory is for training
    longest = max(len(prompt_ids(row, tokenizer)) for row in prompts)
    step_seconds, trained_bytes = seconds_of_step(masks, min(masks.max_length, 2 * longest))
    head_seconds, _ = seconds_of_step(head, min(masks.max_length, 2 * longest))
    return Costs(answer_seconds, plain_seconds, step_seconds, head_seconds, peak_bytes(masks.device), trained_bytes)


def answer(model: Any, tokenizer: Any, prompts: Sequence[Row], num_tokens: int) -> None:
    model.generation_config.min_new_tokens = num_tokens
    answer_batch(model, tokenizer, prompts, max_new_tokens=num_tokens, temperature=0.0, seed=0)


def seconds_of_token(write: Callable[[int], None]) -> float:
    """Seconds of one more token, by texts of two lengths: reading the prompt is in both."""
    write(1)  # what only a first call pays
    times = []
    for num in (1, 1 + TIMED_TOKENS):
        start = time.perf_counter()
        write(num)
        times.append(time.perf_counter() - start)
    return max(times[1] - times[0], 1e-6) / TIMED_TOKENS


def seconds_of_step(arguments: FinetuneArguments, length: int) -> tuple[float, int]:
    """Seconds of a training step on rows of `length` tokens, after a first one, and bytes of what it trains."""
    model = load_model(arguments).to(arguments.device)
    model.has_objective = True  # of every step below
    trained = with_adapter(model, arguments).train()
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)
    ids = torch.randint(0, trained.config.vocab_size, (arguments.batch_size, length), device=arguments.device)
    objective = replace(arguments.objective, first_token=0)
    half = torch.autocast(arguments.device.type, torch.bfloat16) if arguments.bf16 else nullcontext()
    for step in range(1 + TIMED_STEPS):
        if step == 1:
            start = time.perf_counter()
        with half:
            loss = trained(input_ids=ids, labels=ids, objective=objective).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # the device is done
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    return seconds, 4 * sum(weight.numel() for weight in weights)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def as_dict(costs: Costs, course: Course) -> dict[str, Any]:
    """Both, for a file."""
    return {"costs": asdict(costs), "course": asdict(course)}
