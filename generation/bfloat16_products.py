"""Products of bfloat16 for a CPU that has none of its own: a weight is read once for several rows, not once for each.

PyTorch's own take 8 rows there one after another. These sum up in the same order, so that on a CPU with AVX2 they are
PyTorch's to the bit (of D channels, a multiple of 64; other D are filled up with zeros, and may round otherwise).
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
NUM_PARTS = 64  # sums that are kept apart for each output: channel d goes to part d % 64
PRODUCTS_A_THREAD = 2**16  # fewer multiplications are not worth waking a thread for

# Eight outputs fill a vector of float32 numbers; a word of a packed weight holds two outputs of one channel. The 64
# sums of an output are added up as in a tournament: part 0 and part 32, part 16 and part 48, then these two, and so on.
# B sequences of Q rows, D channels in, E out; M rows that an adapter acts on.
SOURCE = r"""
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float numbers __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32), aligned(4), may_alias));

static float widened(uint16_t half) {
    const uint32_t word = uint32_t(half) << 16;
    float number;
    memcpy(&number, &word, sizeof number);
    return number;
}

static uint16_t rounded(float number) {  // to the nearest, ties to even
    uint32_t word;
    memcpy(&word, &number, sizeof word);
    return number != number ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

// R rows of x against 16 outputs, in PARTS sums of `turns` channels each
template <int R, int PARTS>
static void sum(const float *x, const words *weight, int64_t turns, float *found) {
    numbers waiting[7][R][2];
    int round;
    for (int part = 0; part < PARTS; part++) {
        numbers sums[R][2] = {};
        for (int64_t d = part * turns; d < (part + 1) * turns; d++) {
            const numbers low = (numbers)(weight[d] << 16), high = (numbers)(weight[d] & 0xffff0000);
#pragma GCC unroll 5
            for (int r = 0; r < R; r++) {
                sums[r][0] += low * x[r * PARTS * turns + d];
                sums[r][1] += high * x[r * PARTS * turns + d];
            }
        }
        for (round = 0; part >> round & 1; round++)
#pragma GCC unroll 5
            for (int r = 0; r < R; r++) {
                sums[r][0] += waiting[round][r][0];
                sums[r][1] += waiting[round][r][1];
            }
        memcpy(waiting[round], sums, sizeof sums);
    }
    memcpy(found, waiting[round], sizeof waiting[round]);
}

template <int PARTS>
static void sum(int num_rows, const float *x, const words *weight, int64_t turns, float *found) {
    switch (num_rows) {
        case 1: return sum<1, PARTS>(x, weight, turns, found);
        case 2: return sum<2, PARTS>(x, weight, turns, found);
        case 3: return sum<3, PARTS>(x, weight, turns, found);
        case 4: return sum<4, PARTS>(x, weight, turns, found);
        default: return sum<5, PARTS>(x, weight, turns, found);
    }
}

// R rows, in groups of 5 at most and as alike as can be: for each its first row and their number
template <typename Then>
static void in_groups(int64_t R, Then then) {
    const int64_t num_groups = (R + 4) / 5;
    for (int64_t group = 0; group < num_groups; group++) {
        const int64_t from = R * group / num_groups, to = R * (group + 1) / num_groups;
        then(from, int(to - from));
    }
}

// y [B, Q, E] = x [B, Q, D] weight^T + bias [E], where there is one; and where there is an adapter, of `rank` channels,
// the last M of each Q rows get x down^T up^T besides
extern "C" void product(
    const uint16_t *x, const words *weight, const uint16_t *bias, uint16_t *y,
    int64_t B, int64_t Q, int64_t D, int64_t E,
    const words *down, const words *up, int64_t M, int64_t rank, int num_threads
) {
    const int64_t turns = (D + 63) / 64, num_blocks = (E + 15) / 16;
    float *ordered = static_cast<float *>(malloc((B * Q * 64 * turns + B * M * rank) * sizeof(float)));
    float *between = ordered + B * Q * 64 * turns;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        float found[5][16];
#pragma omp for
        for (int64_t row_part = 0; row_part < B * Q * 64; row_part++) {
            const int part = row_part % 64;
            int first = 0;
            for (int bit = 0; bit < 6; bit++) first |= (part >> bit & 1) << (5 - bit);
            for (int64_t turn = 0, d = first; turn < turns; turn++, d += 64)
                ordered[row_part * turns + turn] = d < D ? widened(x[row_part / 64 * D + d]) : 0;
        }
#pragma omp for
        for (int64_t block = -rank / 16; block < num_blocks; block++) {
            if (block < 0) {
                const int64_t e = (block + rank / 16) * 16;
                for (int64_t b = 0; b < B; b++)
                    in_groups(M, [&](int64_t m, int num_rows) {
                        const float *rows = ordered + (b * Q + Q - M + m) * 64 * turns;
                        sum<64>(num_rows, rows, down + e / 16 * 64 * turns, turns, found[0]);
                        for (int r = 0; r < num_rows; r++)
                            memcpy(between + (b * M + m + r) * rank + e, found[r], sizeof found[r]);
                    });
                continue;
            }
            const int64_t e = block * 16, last = E - e < 16 ? E - e : 16;
            in_groups(B * Q, [&](int64_t row, int num_rows) {
                sum<64>(num_rows, ordered + row * 64 * turns, weight + block * 64 * turns, turns, found[0]);
                for (int r = 0; r < num_rows; r++)
                    for (int lane = 0; lane < last; lane++) {
                        const float number = found[r][lane];
                        y[(row + r) * E + e + lane] = rounded(bias ? number + widened(bias[e + lane]) : number);
                    }
            });
        }
        if (rank) {
#pragma omp for
            for (int64_t block = 0; block < num_blocks; block++) {
                const int64_t e = block * 16, last = E - e < 16 ? E - e : 16;
                for (int64_t b = 0; b < B; b++)
                    in_groups(M, [&](int64_t m, int num_rows) {
                        sum<1>(num_rows, between + (b * M + m) * rank, up + block * rank, rank, found[0]);
                        for (int r = 0; r < num_rows; r++)
                            for (int lane = 0; lane < last; lane++) {
                                uint16_t &number = y[(b * Q + Q - M + m + r) * E + e + lane];
                                number = rounded(widened(number) + found[r][lane]);
                            }
                    });
            }
        }
    }
    free(ordered);
}
"""


@cache
def bfloat16_product() -> Callable[..., None] | str:
    """The compiled product, or why there is none. It is built once in a process, by the machine's C++ compiler: the one
    that the environment variable `CXX` names, or the first there is of c++, g++ and clang++."""
    if sys.byteorder != "little":
        return "ours are for little-endian machines"
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return f"ours need a C++ compiler, but none of {', '.join(COMPILERS)} is on the PATH; CXX can name another"
    with tempfile.TemporaryDirectory(prefix="wavedraft-") as folder:
        source, library = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(SOURCE)
        command = [*compiler, *FLAGS, str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            product = ctypes.CDLL(str(library)).product
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            return f"building ours failed: `{shlex.join(command)}` said {said!r}"
    address, number = ctypes.c_void_p, ctypes.c_int64
    product.argtypes = [address] * 4 + [number] * 4 + [address] * 2 + [number] * 2 + [ctypes.c_int]
    product.restype = None
    return product


def packed(matrix: torch.Tensor, num_parts: int) -> torch.Tensor:
    """A matrix [E, D] in bfloat16 as sums of P parts read it: [E / 16, P, D / P, 8, 2], filled up with zeros.

    The parts stand in the order of the tournament: the bits of a part's number are those of its place, reversed.
    """
    num_bits = num_parts.bit_length() - 1
    order = [int(f"{place:0{num_bits}b}"[::-1], 2) for place in range(num_parts)]
    rows, columns = matrix.shape
    filled = nn.functional.pad(matrix.detach().to(torch.bfloat16), (0, -columns % num_parts, 0, -rows % 16))
    parts = filled.view(-1, 2, 8, filled.shape[1] // num_parts, num_parts)[..., order]
    return parts.permute(0, 4, 3, 2, 1).contiguous()


class LowRank:
    """An adapter's matrices [D, r] and [r, E], as the product reads them; `addresses` are what it is handed."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor):
        self.rank = down.shape[1] + -down.shape[1] % 16
        self.down = packed(down.t(), NUM_PARTS)
        self.up = packed(nn.functional.pad(up, (0, 0, 0, self.rank - up.shape[0])).t(), 1)
        self.addresses = self.down.data_ptr(), self.up.data_ptr()


class WidenedWeight:
    """A copy of a bfloat16 weight [E, D] in the order the product reads it in."""

    def __init__(self, weight: torch.Tensor):
        self.num_outputs, self.num_channels = weight.shape
        self.packed = packed(weight, NUM_PARTS)
        self.address, self.num_numbers = self.packed.data_ptr(), self.packed.numel()
        self.product = bfloat16_product()

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., D] -> [..., E]; a row's result does not depend on the others."""
        return self._times(x, bias, 1, x.numel() // self.num_channels, (None, None), 0, 0)

    def adapted_times(
        self, x: torch.Tensor, bias: torch.Tensor | None, adapter: LowRank, num_masks: int
    ) -> torch.Tensor:
        """x [B, Q, D] -> [B, Q, E]; the adapter acts on the last `num_masks` of each Q rows."""
        batch_size, num_rows, _ = x.shape
        return self._times(x, bias, batch_size, num_rows, adapter.addresses, num_masks, adapter.rank)

    def _times(self, x, bias, batch_size, num_rows, adapter, num_masks, rank):  # type: ignore[no-untyped-def]
        result = torch.empty(*x.shape[:-1], self.num_outputs, dtype=torch.bfloat16)
        num_useful = batch_size * num_rows * self.num_numbers // PRODUCTS_A_THREAD
        num_threads = max(1, min(torch.get_num_threads(), num_useful))
        x = x.contiguous()
        addend = None if bias is None else bias.data_ptr()
        sizes = batch_size, num_rows, self.num_channels, self.num_outputs
        self.product(
            x.data_ptr(), self.address, addend, result.data_ptr(), *sizes, *adapter, num_masks, rank, num_threads
        )
        return result
