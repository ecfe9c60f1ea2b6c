"""Random numbers as functions of a row's seed, a purpose and a position.

No generator advances. A row thus draws the same numbers in every batch, a restarted position has the same initial
state, plain decoding and a wavefront share initial states, and greedy decoding is deterministic.
A rows, n tokens, V vocabulary, E channels.
"""

import torch

# Purposes, each with its own stream.
STATE, STATE_NOISE, CHOICE, DRAFT, ACCEPTANCE, REPLACEMENT = range(6)

CUT = 3.0  # standard deviations at which initial states are truncated
SHARE_WITHIN_CUT = torch.erf(torch.tensor(CUT / 2**0.5, dtype=torch.float64)).item()
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(number: int) -> int:
    """A mixing bijection of 64-bit integers: the output function of SplitMix64."""
    mixed = number * GOLDEN & _ONES
    mixed = (mixed ^ mixed >> 30) * FIRST & _ONES
    mixed = (mixed ^ mixed >> 27) * SECOND & _ONES
    return mixed ^ mixed >> 31


def scramble_each(numbers: torch.Tensor) -> torch.Tensor:
    """`scramble` of each int64 of a tensor."""
    mixed = numbers * _signed(GOLDEN)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(FIRST)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(SECOND)
    return mixed ^ _shift_right(mixed, 31)


def hash_of(*keys: int) -> int:
    """The hash that `uniform_at` etc. take, of a seed, a purpose, a position and other keys of a draw."""
    hashed = 0
    for key in keys:
        hashed = scramble(hashed + key)
    return _signed(hashed)


def uniform_at(hashes: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] fp64 numbers in (0, 1) from int64 hashes [...]."""
    return _bits_at(hashes, width) * 2.0**-53 + 2.0**-54


def normal_at(hashes: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] fp32 numbers of the standard normal distribution truncated at `CUT`."""
    within = _bits_at(hashes, width) * (SHARE_WITHIN_CUT * 2.0**-52) + SHARE_WITHIN_CUT * (2.0**-53 - 1)
    return (within.erfinv() * 2**0.5).float()


def gumbel_at(hashes: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] fp32 Gumbel noise: the argmax of log-probabilities plus this noise is a sample."""
    return -(-uniform_at(hashes, width).log()).log().float()


def _bits_at(hashes: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] whole fp64 numbers below 2^53."""
    channels = torch.arange(width, device=hashes.device)
    return _shift_right(scramble_each(hashes[..., None] + channels), 11).double()


def state_hashes(seeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Hashes of initial states for [A] seeds and [A, T] positions: `hash_of(seed, STATE, position, 0)`."""
    rows = scramble_each(scramble_each(seeds) + STATE)
    return scramble_each(scramble_each(rows[:, None] + position_ids))


class Draws:
    """The random draws of one decode.

    Attributes:
        seeds: one per row still being written.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.seeds = seeds
        self.device = device

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places`."""
        self.seeds = [self.seeds[place] for place in places]

    def hashes(
        self, purpose: int, rows: list[int], positions: list[int], times: list[int] | None = None
    ) -> torch.Tensor:
        """[n] hashes of positions of rows; `times` distinguishes repeated draws for one purpose at a position."""
        keys = zip(rows, positions, times or [0] * len(rows), strict=True)
        hashed = [hash_of(self.seeds[row], purpose, position, time) for row, position, time in keys]
        return torch.tensor(hashed, dtype=torch.long, device=self.device)

    def uniform(
        self, purpose: int, rows: list[int], positions: list[int], times: list[int] | None = None
    ) -> torch.Tensor:
        """[n] fp64 numbers in (0, 1)."""
        return uniform_at(self.hashes(purpose, rows, positions, times), 1)[:, 0]

    def gumbel(self, rows: list[int], positions: list[int], vocab_size: int) -> torch.Tensor:
        """[n, V] noise for sampling the token after each position."""
        return gumbel_at(self.hashes(CHOICE, rows, positions), vocab_size)


_ONES = (1 << 64) - 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shift_right(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
