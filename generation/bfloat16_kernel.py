"""The C++ of our products of bfloat16, built by the machine's compiler and called by Python and by compiled layers."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")

# Eight outputs fill a vector of float32 numbers; a word of a packed weight holds two outputs of one channel. The 64
# sums of an output are added up as in a tournament: part 0 and part 32, part 16 and part 48, then these two, and so on.
# B sequences of Q rows, D channels in, E out; M rows that an adapter acts on.
SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace at { int get_num_threads(); }  // PyTorch's
static const int64_t products_a_thread = 1 << 16;  // fewer multiplications are not worth waking a thread for

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
extern "C" void bfloat16_product(
    const uint16_t *x, const words *weight, const uint16_t *bias, uint16_t *y,
    int64_t B, int64_t Q, int64_t D, int64_t E,
    const words *down, const words *up, int64_t M, int64_t rank
) {
    const int64_t turns = (D + 63) / 64, num_blocks = (E + 15) / 16;
    const int64_t num_useful = B * Q * 64 * turns * 16 * num_blocks / products_a_thread;
    const int num_threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), num_useful));
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

// Attention in tiles of 16 slots; a vector holds 8 channels of one slot, the even or the odd ones of a run of 16.
typedef int32_t places __attribute__((vector_size(32)));
typedef int8_t flags __attribute__((vector_size(8)));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

static numbers either(places is_first, numbers first, numbers second) {
    return (numbers)(((places)first & is_first) | ((places)second & ~is_first));
}

static numbers sums_of(const numbers *rows) {  // [8] of 8 numbers each
    numbers pairs[4], fours[2];
    for (int i = 0; i < 4; i++)
        pairs[i] = PICK(rows[2 * i], rows[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14)
                 + PICK(rows[2 * i], rows[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        fours[i] = PICK(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13)
                 + PICK(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return PICK(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

static numbers exponential(numbers x) {  // of what is not above 0, to the last bit or two; 0 below -87
    const numbers turns = (x * 1.44269504f + 12582912.f) - 12582912.f;
    const numbers rest = x - turns * 0.693359375f + turns * 2.12194440e-4f;
    numbers power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.f;
    const words bits = (words)power + ((words)__builtin_convertvector(turns, places) << 23);
    return (numbers)(bits & ~(words)(x <= -87.f));
}

static void widen(const uint16_t *halves, int64_t D, numbers *wide) {
    for (int64_t d = 0; d < D / 16; d++) {
        words pairs;
        memcpy(&pairs, halves + 16 * d, sizeof pairs);
        wide[2 * d] = (numbers)(pairs << 16);
        wide[2 * d + 1] = (numbers)(pairs & 0xffff0000);
    }
}

struct Slots {  // keys or values [B, H, S, D], or queries, and how far its axes but the last go in one step
    const uint16_t *numbers;
    int64_t b, h, s;
};

// y [B, Q, H, D] of queries [B, H, Q, D], keys and values [B, G, S, D], each for H / G heads, and mask [B, Q, S]; zeros
// for a query that sees nothing. D is a multiple of 64. Tiles that no query sees are left out.
static void attend(
    Slots x, Slots keys, Slots values, const bool *mask, int64_t mask_b, int64_t mask_q, uint16_t *y,
    int64_t B, int64_t H, int64_t G, int64_t Q, int64_t S, int64_t D, float scale
) {
    const int64_t num_rows = H / G * Q, num_chunks = (num_rows + 11) / 12, num_tiles = (S + 15) / 16, W = D / 8;
    const int num_threads = std::max<int64_t>(
        1, std::min<int64_t>(at::get_num_threads(), 2 * B * H * Q * S * D / products_a_thread));
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < B * G * num_chunks; task++) {
        const int64_t b = task / num_chunks / G, g = task / num_chunks % G, chunk = task % num_chunks;
        const int64_t from = num_rows * chunk / num_chunks, R = num_rows * (chunk + 1) / num_chunks - from;
        std::vector<int64_t> seen;  // tiles
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            bool is_seen = false;
            for (int64_t q = 0; q < Q && !is_seen; q++) {
                const bool *row = mask + b * mask_b + q * mask_q + 16 * tile;
                is_seen = memchr(row, 1, std::min<int64_t>(16, S - 16 * tile)) != nullptr;
            }
            if (is_seen) seen.push_back(tile);
        }
        const int64_t num_seen = 2 * seen.size();  // vectors of 8 slots
        std::vector<numbers> memory(R * W + 16 * W + R * num_seen + R * W);
        numbers *queries = memory.data(), *wide = queries + R * W, *scores = wide + 16 * W;
        numbers *found = scores + R * num_seen;
        for (int64_t r = 0; r < R; r++) {
            const int64_t h = g * (H / G) + (from + r) / Q, q = (from + r) % Q;
            widen(x.numbers + b * x.b + h * x.h + q * x.s, D, queries + r * W);
        }
        for (int64_t half = 0; half < num_seen; half++) {
            const int64_t first = seen[half / 2] * 16 + half % 2 * 8, last = std::min<int64_t>(8, S - first);
            for (int64_t s = 0; s < 8; s++)
                if (s < last) widen(keys.numbers + b * keys.b + g * keys.h + (first + s) * keys.s, D, wide + s * W);
                else memset(wide + s * W, 0, W * sizeof(numbers));
            for (int64_t r = 0; r < R; r++) {
                numbers sums[8] = {};
                for (int64_t w = 0; w < W; w++)
#pragma GCC unroll 8
                    for (int64_t s = 0; s < 8; s++) sums[s] += queries[r * W + w] * wide[s * W + w];
                flags row = {};
                if (last > 0) memcpy(&row, mask + b * mask_b + (from + r) % Q * mask_q + first, last);
                const places is_seen = __builtin_convertvector(row, places) != 0;
                scores[r * num_seen + half] = either(is_seen, sums_of(sums) * scale, numbers{} - INFINITY);
            }
        }
        std::vector<float> totals(R);
        for (int64_t r = 0; r < R; r++) {
            numbers *row = scores + r * num_seen, sums[8] = {};
            numbers mosts = numbers{} - INFINITY;
            for (int64_t i = 0; i < num_seen; i++) mosts = either(row[i] > mosts, row[i], mosts);
            float most = mosts[0];
            for (int s = 1; s < 8; s++) most = std::max(most, mosts[s]);
            if (most == -INFINITY) most = 0;  // it sees nothing
            for (int64_t i = 0; i < num_seen; i++) {
                row[i] = exponential(row[i] - most);
                sums[0] += row[i];
            }
            totals[r] = sums_of(sums)[0];
        }
        for (int64_t i = 0; i < num_seen; i += 2) {
            const int64_t first = seen[i / 2] * 16, last = std::min<int64_t>(16, S - first);
            for (int64_t s = 0; s < last; s++)
                widen(values.numbers + b * values.b + g * values.h + (first + s) * values.s, D, wide + s * W);
            for (int64_t r = 0; r < R; r++)
                for (int64_t w = 0; w < W; w += 8) {
                    numbers sums[8];
                    memcpy(sums, found + r * W + w, sizeof sums);
                    for (int64_t s = 0; s < last; s++) {
                        const float weight = scores[r * num_seen + i + s / 8][s % 8];
#pragma GCC unroll 8
                        for (int v = 0; v < 8; v++) sums[v] += wide[s * W + w + v] * weight;
                    }
                    memcpy(found + r * W + w, sums, sizeof sums);
                }
        }
        for (int64_t r = 0; r < R; r++) {
            const int64_t h = g * (H / G) + (from + r) / Q, q = (from + r) % Q;
            const float factor = totals[r] > 0 || totals[r] != totals[r] ? 1 / totals[r] : 0;
            for (int64_t d = 0; d < D; d++)
                y[((b * Q + q) * H + h) * D + d] = rounded(found[r * W + d / 16 * 2 + d % 2][d % 16 / 2] * factor);
        }
    }
}

// How compiled layers call it, with no Python between: by the names that torch's compiler gives to operators, and with
// tensors in the form of PyTorch's C interface. What is packed of a tensor is known by where its numbers begin.
typedef void *Tensor;
extern "C" int aoti_torch_get_data_ptr(Tensor, void **);
extern "C" int aoti_torch_get_dim(Tensor, int64_t *);
extern "C" int aoti_torch_get_sizes(Tensor, int64_t **);
extern "C" int aoti_torch_get_strides(Tensor, int64_t **);
extern "C" int aoti_torch_empty_strided(
    int64_t num_axes, const int64_t *sizes, const int64_t *strides, int32_t, int32_t, int32_t, Tensor *);
extern "C" int aoti_torch_cpu__linear_pointwise(  // oneDNN's
    Tensor x, Tensor weight, Tensor *bias, const char *then, const double **, int64_t, const char **, Tensor *result
) __attribute__((weak));
extern "C" int32_t aoti_torch_dtype_bfloat16();
extern "C" int32_t aoti_torch_device_type_cpu();

struct Packed {
    const words *weight, *up;  // of an adapter: down and up
    int64_t num_outputs;       // of an adapter: the rank
    Tensor of_onednn;          // a weight in the order of oneDNN, in place of all this
};
static std::unordered_map<const void *, Packed> known;
static std::mutex of_known;

static void *numbers_of(Tensor tensor) {
    void *at = nullptr;
    if (tensor) aoti_torch_get_data_ptr(tensor, &at);
    return at;
}

static Packed packed_of(Tensor tensor) {
    if (!tensor) return {};
    const std::lock_guard<std::mutex> guard(of_known);
    const auto found = known.find(numbers_of(tensor));
    return found == known.end() ? Packed{} : found->second;
}

static int times(Tensor x, Tensor weight, Tensor *bias, Tensor down, int64_t num_masks, Tensor *result) {
    const Packed packed = packed_of(weight), adapter = packed_of(down);
    const char *algorithm = "";
    if (packed.of_onednn && aoti_torch_cpu__linear_pointwise)
        return aoti_torch_cpu__linear_pointwise(x, packed.of_onednn, bias, "none", nullptr, 0, &algorithm, result);
    int64_t num_axes, *sizes, *strides, sizes_of_result[8], strides_of_result[8], step = 1, step_of_result = 1;
    aoti_torch_get_dim(x, &num_axes);
    aoti_torch_get_sizes(x, &sizes);
    aoti_torch_get_strides(x, &strides);
    if (!packed.weight || (down && !adapter.weight) || num_axes > 8) return 1;
    for (int64_t axis = num_axes - 1; axis >= 0; axis--) {
        if (sizes[axis] > 1 && strides[axis] != step) return 1;
        sizes_of_result[axis] = axis == num_axes - 1 ? packed.num_outputs : sizes[axis];
        strides_of_result[axis] = step_of_result;
        step *= sizes[axis], step_of_result *= sizes_of_result[axis];
    }
    if (aoti_torch_empty_strided(num_axes, sizes_of_result, strides_of_result, aoti_torch_dtype_bfloat16(),
                                 aoti_torch_device_type_cpu(), 0, result)) return 1;
    const int64_t D = sizes[num_axes - 1], Q = down ? sizes[1] : step / D;
    bfloat16_product(
        static_cast<uint16_t *>(numbers_of(x)), packed.weight,
        static_cast<uint16_t *>(numbers_of(bias ? *bias : nullptr)), static_cast<uint16_t *>(numbers_of(*result)),
        step / D / Q, Q, D, packed.num_outputs, adapter.weight, adapter.up, num_masks, adapter.num_outputs
    );
    return 0;
}

// sizes: B, H, G, Q, S, D; strides: of x, keys and values but the last, of the mask's rows and queries
extern "C" void bfloat16_attention(
    const uint16_t *x, const uint16_t *keys, const uint16_t *values, const bool *mask, uint16_t *y,
    const int64_t *sizes, const int64_t *strides, float scale
) {
    attend(
        {x, strides[0], strides[1], strides[2]}, {keys, strides[3], strides[4], strides[5]},
        {values, strides[6], strides[7], strides[8]}, mask, strides[9], strides[10], y,
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale
    );
}

extern "C" int aoti_torch_cpu_bfloat16_attention(
    Tensor x, Tensor keys, Tensor values, Tensor mask, double scale, Tensor *result
) {
    int64_t *of_x, *of_keys, *all, strides[11];
    aoti_torch_get_sizes(x, &of_x);
    aoti_torch_get_sizes(keys, &of_keys);
    const Tensor tensors[] = {x, keys, values, mask};
    for (int i = 0; i < 4; i++) {
        aoti_torch_get_strides(tensors[i], &all);
        if (all[3] != 1) return 1;
        strides[3 * i] = all[0];
        if (i < 3) strides[3 * i + 1] = all[1];
        strides[i < 3 ? 3 * i + 2 : 10] = all[2];
    }
    const int64_t B = of_x[0], H = of_x[1], Q = of_x[2], D = of_x[3];
    const int64_t sizes[] = {B, H, of_keys[1], Q, of_keys[2], D};
    const int64_t of_y[] = {B, Q, H, D}, steps[] = {Q * H * D, H * D, D, 1};
    if (aoti_torch_empty_strided(4, of_y, steps, aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0, result))
        return 1;
    bfloat16_attention(
        static_cast<uint16_t *>(numbers_of(x)), static_cast<uint16_t *>(numbers_of(keys)),
        static_cast<uint16_t *>(numbers_of(values)), static_cast<bool *>(numbers_of(mask)),
        static_cast<uint16_t *>(numbers_of(*result)), sizes, strides, scale
    );
    return 0;
}

extern "C" void remember_packed(
    const void *tensor, const words *weight, const words *up, int64_t num_outputs, Tensor of_onednn
) {
    const std::lock_guard<std::mutex> guard(of_known);
    known[tensor] = {weight, up, num_outputs, of_onednn};
}

extern "C" int aoti_torch_cpu_packed_product(Tensor x, Tensor weight, Tensor *bias, Tensor *result) {
    return times(x, weight, bias, nullptr, 0, result);
}

extern "C" int aoti_torch_cpu_adapted_packed_product(
    Tensor x, Tensor weight, Tensor *bias, Tensor down, Tensor up, int64_t num_masks, Tensor *result
) {
    return times(x, weight, bias, down, num_masks, result);
}
"""

# Names that no other version of this code has: a process may hold the package's and a checkpoint's.
KERNEL_VERSION = hashlib.sha256(SOURCE.encode()).hexdigest()[:8]
KERNEL_NAMES = (
    "bfloat16_product",
    "remember_packed",
    "aoti_torch_cpu_packed_product",
    "aoti_torch_cpu_adapted_packed_product",
    "bfloat16_attention",
    "aoti_torch_cpu_bfloat16_attention",
)


class Kernel(NamedTuple):
    """What is called of the C++: its functions of these names."""

    bfloat16_product: Any
    bfloat16_attention: Any
    remember_packed: Any


@cache
def bfloat16_kernel() -> Kernel | str:
    """The compiled functions, or why there are none: built once in a process, by whichever copy of this code asks."""
    if sys.platform == "win32" or sys.byteorder != "little":
        return "ours are for little-endian machines that do not run Windows"
    in_process = ctypes.CDLL(None)
    if not hasattr(in_process, f"bfloat16_product_{KERNEL_VERSION}") and (why := build_kernel()):
        return why
    found = Kernel(*(getattr(in_process, f"{name}_{KERNEL_VERSION}") for name in Kernel._fields))
    address, number = ctypes.c_void_p, ctypes.c_int64
    found.bfloat16_product.argtypes = [address] * 4 + [number] * 4 + [address] * 2 + [number] * 2
    found.bfloat16_attention.argtypes = [address] * 7 + [ctypes.c_float]
    found.remember_packed.argtypes = [address] * 3 + [number, address]
    for function in found:
        function.restype = None
    return found


def build_kernel() -> str | None:
    """Builds the functions and makes them known to the whole process; or says why that failed. The compiler is the one
    that the environment variable `CXX` names, or the first there is of c++, g++ and clang++."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return f"ours need a C++ compiler, but none of {', '.join(COMPILERS)} is on the PATH; CXX can name another"
    names = [f"-D{name}={name}_{KERNEL_VERSION}" for name in KERNEL_NAMES]
    torchs = ["-L", str(Path(torch.__file__).with_name("lib")), "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(prefix="wavedraft-") as folder:
        source, library = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(SOURCE)
        command = [*compiler, *FLAGS, *names, str(source), "-o", str(library), *torchs]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            return f"building ours failed: `{shlex.join(command)}` said {said!r}"
    return None
