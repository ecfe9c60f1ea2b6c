"""Problems whose difficulty is depth: how often a map must be looked up before the answer is known.

The prompt of a problem shows a map f of 8 symbols, one token a pair (`cf` says f(c) = f), in random order.

* "walk": `... 3 c` asks for f^3(c), then f^3 of that, and so on: six tokens, each of which needs the one before it.
  f is a permutation of one cycle of 7 or 8 symbols.
* "roots": `... roots c a h b b e =` asks where each of six symbols ends when f is followed to a symbol that f maps to
  itself: six tokens that do not need each other. f is a forest of two trees.

A lookup is a hop. Walks of k = 1 to 6 hops a token are trained, roots up to 5 hops away. Test problems have maps that
training never shows (`is_held_out`). The level "harder" has longer ways than training: roots 6 hops away.
B problems, N pairs, Q queries, M answers.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SYMBOLS = "abcdefgh"
NUM_SYMBOLS = len(SYMBOLS)
NUM_ANSWERS = 6
MOST_HOPS = 6  # of a walk's step
TRAINED_HEIGHT = 5  # of a tree
TASKS = ("walk", "roots")
WORDS = [
    *SYMBOLS,
    *(first + second for first in SYMBOLS for second in SYMBOLS),
    *map(str, range(1, MOST_HOPS + 1)),
    "roots",
    "=",
    "<pad>",
]
PAIRS, STEPS = NUM_SYMBOLS, NUM_SYMBOLS + NUM_SYMBOLS**2
ROOTS, ANSWERS, PAD = STEPS + MOST_HOPS, STEPS + MOST_HOPS + 1, STEPS + MOST_HOPS + 2


@dataclass
class Problems:
    """Problems of one task.

    Attributes:
        prompt_ids: [B, P].
        maps: [B, N], f as the image of each symbol.
        starts: [B, M] the symbol each answer is looked up from; of a walk, the answer before it.
        hops: [B, M] lookups that an answer needs.
    """

    task: str
    prompt_ids: torch.Tensor
    maps: torch.Tensor
    starts: torch.Tensor
    hops: torch.Tensor

    def after(self, num_hops: torch.Tensor | int) -> torch.Tensor:
        """[B, M] where each answer's way is after `num_hops` lookups ([B, M] or one for all), or at its end."""
        here = self.starts
        allowed = torch.minimum(self.hops, torch.as_tensor(num_hops).expand_as(self.hops))
        for hop in range(int(allowed.max())):
            here = torch.where(hop < allowed, self.maps.gather(1, here), here)
        return here

    @property
    def answers(self) -> torch.Tensor:
        """[B, M]."""
        return self.after(NUM_SYMBOLS)

    def __len__(self) -> int:
        return len(self.maps)


def is_held_out(maps: torch.Tensor) -> torch.Tensor:
    """[B] whether maps [B, N] are of the tenth that only tests show, by a hash of their images."""
    weights = 13 ** torch.arange(NUM_SYMBOLS)
    return (maps * weights).sum(1) * 2654435761 % 2**32 // 2**16 % 10 == 0


def walks(num: int, generator: torch.Generator, least_hops: int | None = None, most_hops: int = MOST_HOPS) -> Problems:
    """Walks whose step has between `least_hops` and `most_hops` hops, evenly; by default from 1, more ones more often.

    Each problem's f is a cycle of 7 or 8 symbols; the symbol beside a cycle of 7 is mapped to itself.
    """
    order = torch.rand(num, NUM_SYMBOLS, generator=generator).argsort(1)
    length = torch.randint(NUM_SYMBOLS - 1, NUM_SYMBOLS + 1, (num, 1), generator=generator)
    place = torch.arange(NUM_SYMBOLS).expand(num, -1)
    following = torch.where(place < length - 1, place + 1, torch.where(place < length, 0, place))
    maps = torch.empty_like(order).scatter_(1, order, order.gather(1, following))
    if least_hops is None:
        hops = torch.randint(0, MOST_HOPS**2, (num, 1), generator=generator).float().sqrt().long() + 1
    else:
        hops = torch.randint(least_hops, MOST_HOPS + 1, (num, 1), generator=generator)
    starts = [order[:, :1]]
    for _ in range(NUM_ANSWERS - 1):
        here = starts[-1]
        for hop in range(MOST_HOPS):
            here = torch.where(hop < hops, maps.gather(1, here), here)
        starts.append(here)
    prompt_ids = torch.cat([shown(maps, generator), STEPS + hops - 1, starts[0]], dim=1)
    return Problems("walk", prompt_ids, maps, torch.cat(starts, dim=1), hops.expand(-1, NUM_ANSWERS))


def roots(num: int, generator: torch.Generator, height: int | None = None) -> Problems:
    """Forests of two trees. The higher one has `height`: by default 1 to `TRAINED_HEIGHT`, higher ones more often.

    A forest's queries are drawn evenly from its symbols, but for one, which is the highest.
    """
    if height is None:
        heights = torch.randint(0, TRAINED_HEIGHT**2, (num,), generator=generator).float().sqrt().long() + 1
    else:
        heights = torch.full((num,), height)
    order = torch.rand(num, NUM_SYMBOLS, generator=generator).argsort(1)
    # In this order: the two roots, a path of `heights` below the first, then symbols below any former one not too deep.
    parent = torch.zeros(num, NUM_SYMBOLS, dtype=torch.long)
    depth = torch.zeros(num, NUM_SYMBOLS, dtype=torch.long)
    parent[:, 1] = 1
    for place in range(2, NUM_SYMBOLS):
        is_path = place - 1 <= heights
        fits = (depth[:, :place] < heights[:, None]).float()
        chosen = torch.multinomial(fits, 1, generator=generator)[:, 0]
        on_path = torch.full_like(chosen, place - 1 if place > 2 else 0)
        parent[:, place] = torch.where(is_path, on_path, chosen)
        depth[:, place] = depth.gather(1, parent[:, place : place + 1])[:, 0] + 1
    maps = torch.empty_like(order).scatter_(1, order, order.gather(1, parent))
    queries = torch.randint(0, NUM_SYMBOLS, (num, NUM_ANSWERS), generator=generator)
    deepest = torch.randint(0, NUM_ANSWERS, (num, 1), generator=generator)
    queries.scatter_(1, deepest, depth.argmax(1, keepdim=True))
    starts, hops = order.gather(1, queries), depth.gather(1, queries)
    task, equals = torch.full((num, 1), ROOTS), torch.full((num, 1), ANSWERS)
    prompt_ids = torch.cat([shown(maps, generator), task, starts, equals], dim=1)
    return Problems("roots", prompt_ids, maps, starts, hops)


def shown(maps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, N] the pairs of maps [B, N], in random order."""
    symbols = torch.rand(maps.shape, generator=generator).argsort(1)
    return PAIRS + symbols * NUM_SYMBOLS + maps.gather(1, symbols)


def drawn(task: str, num: int, generator: torch.Generator, held_out: bool, **options: int) -> Problems:
    """Problems of a task, all with maps that are held out or all with others."""
    make = {"walk": walks, "roots": roots}[task]
    kept: list[Problems] = []
    while sum(map(len, kept)) < num:
        more = make(num, generator, **options)
        fits = is_held_out(more.maps) == held_out
        tensors = (more.prompt_ids, more.maps, more.starts, more.hops)
        kept.append(Problems(task, *(tensor[fits] for tensor in tensors)))
    parts = zip(*((some.prompt_ids, some.maps, some.starts, some.hops) for some in kept), strict=True)
    return Problems(task, *(torch.cat(tensors)[:num] for tensors in parts))


LEVELS: dict[str, tuple[str, dict[str, int]]] = {  # task and options of each set of test problems
    "walk": ("walk", {"least_hops": 2}),
    "roots": ("roots", {}),
    "roots, harder": ("roots", {"height": TRAINED_HEIGHT + 1}),
}


def test_problems(level: str, num: int, seed: int = 1) -> Problems:
    """Problems with held-out maps, the same for the same seed."""
    task, options = LEVELS[level]
    generator = torch.Generator().manual_seed(1_000_000_007 * (1 + list(LEVELS).index(level)) + seed)
    return drawn(task, num, generator, held_out=True, **options)


def task_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words apart by a space."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
