"""Our C++ for bfloat16 on a CPU that has no products of it: of packed weights, attention, means of norms."""

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

// Attention as PyTorch's with AVX2 for one query over all slots up to the last it sees, to the bit. Scores are four
// sums, channel d in sum d % 4; exponentials have two sums of eight lanes in a block of 512 slots, and those of slots
// behind the last whole eight are added one by one; weights are rounded to bfloat16; values are added four slots at a
// time, those behind the last whole four from behind. A tile has 16 slots, which are two runs of 8; tiles that no query
// sees are left out, as they would add zeros.
typedef int32_t places __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t flags __attribute__((vector_size(8)));
#ifndef __has_builtin  // GCC before 10
#define __has_builtin(name) 0
#endif
#if __has_builtin(__builtin_shufflevector)
#define PICK(of, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(of, a, b, ...) __builtin_shuffle(a, b, (of){__VA_ARGS__})
#endif
static const int64_t slots_a_block = 512;

static numbers either(places is_first, numbers first, numbers second) {
    return (numbers)(((places)first & is_first) | ((places)second & ~is_first));
}

// of vectors that hold the four sums of slot p and of slot p + 4, each: all eight totals in order
static numbers totals_of(const numbers *four_sums) {
    numbers twos[2];
    for (int i = 0; i < 2; i++)
        twos[i] = PICK(places, four_sums[2 * i], four_sums[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13)
                + PICK(places, four_sums[2 * i], four_sums[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return PICK(places, twos[0], twos[1], 0, 2, 8, 10, 4, 6, 12, 14)
         + PICK(places, twos[0], twos[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

static float total_of(numbers lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

static __attribute__((noinline)) numbers in_powers_of_two(numbers x) {  // apart: no sum may swallow this rounding
    return x * 1.44269502f;
}

// e^x of what is not above 0, as PyTorch's fexp_u20: between powers of two a line, which a polynomial bends
static numbers exponential(numbers x) {
    const float smallest = -87.3365479f;
    const numbers turns = in_powers_of_two(either(x < smallest, numbers{} + smallest, x));
    numbers below = (turns + 12582912.f) - 12582912.f;
    below -= either(below > turns, numbers{} + 1.f, numbers{});
    const numbers rest = turns - below;
    numbers bend = rest * -0.079204240219773236f + -0.22433836478672356f;
    bend = rest * bend + 0.30354260500649682f;
    bend = rest * bend + 0.00010703434948458272f;
    const numbers bits = (turns - bend) * 8388608.f + 1065353216.f;
    return either(x == x, (numbers)(__builtin_convertvector(bits, places) & ~(x < smallest)), x);
}

static numbers rounded(numbers x) {  // to bfloat16, and kept in float32
    const words bits = (words)x;
    return (numbers)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

static void widen(const uint16_t *row, int64_t D, numbers *wide) {  // even and odd channels of a run of 16
    for (int64_t d = 0; d < D / 16; d++) {
        words pairs;
        memcpy(&pairs, row + 16 * d, sizeof pairs);
        wide[2 * d] = (numbers)(pairs << 16);
        wide[2 * d + 1] = (numbers)(pairs & 0xffff0000);
    }
}

static halves side_by_side(const uint16_t *one, const uint16_t *other) {  // 8 each
#if __has_builtin(__builtin_shufflevector)
    typedef uint16_t eight __attribute__((vector_size(16), aligned(2), may_alias));
    const eight first = *(const eight *)one, second = *(const eight *)other;
    return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    halves both;
    memcpy(&both, one, 16);
    memcpy((char *)&both + 16, other, 16);
    return both;
#endif
}

// four channels of one slot and the same of another, D / 4 times, at every `step`-th place
static void widen_two(const uint16_t *one, const uint16_t *other, int64_t D, int64_t step, numbers *wide) {
    for (int64_t d = 0; d < D / 8; d++) {
        const halves both = side_by_side(one + 8 * d, other + 8 * d);
        wide[2 * d * step] = (numbers)PICK(
            halves, halves{}, both, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
        wide[(2 * d + 1) * step] = (numbers)PICK(
            halves, halves{}, both, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

struct Slots {  // keys or values [B, H, S, D], or queries, and how far its axes but the last go in one step
    const uint16_t *numbers;
    int64_t b, h, s;
};

// y [B, Q, H, D] of queries [B, H, Q, D], keys and values [B, G, S, D], each for H / G heads, and mask [B, Q, S]; zeros
// for a query that sees nothing. D is a multiple of 16.
static void attend(
    Slots x, Slots keys, Slots values, const bool *mask, int64_t mask_b, int64_t mask_q, uint16_t *y,
    int64_t B, int64_t H, int64_t G, int64_t Q, int64_t S, int64_t D, float scale
) {
    const int64_t num_rows = H / G * Q, num_chunks = (num_rows + 11) / 12, num_tiles = (S + 15) / 16;
    const int64_t W = D / 8, V = (W + 7) / 8 * 8;  // vectors of a key, and of a value, filled up with anything
    const int num_threads = std::max<int64_t>(
        1, std::min<int64_t>(at::get_num_threads(), 2 * B * H * Q * S * D / products_a_thread));
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < B * G * num_chunks; task++) {
        const int64_t b = task / num_chunks / G, g = task / num_chunks % G, chunk = task % num_chunks;
        const int64_t from = num_rows * chunk / num_chunks, R = num_rows * (chunk + 1) / num_chunks - from;
        const bool *const of_rows = mask + b * mask_b;
        std::vector<int64_t> seen, lengths(Q, 0);  // tiles; slots up to the last that a query sees
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            bool is_seen = false;
            for (int64_t q = 0; q < Q; q++)
                for (int64_t s = std::min(S, 16 * (tile + 1)) - 1; s >= 16 * tile; s--)
                    if (of_rows[q * mask_q + s]) {
                        lengths[q] = s + 1;
                        is_seen = true;
                        break;
                    }
            if (is_seen) seen.push_back(tile);
        }
        const int64_t num_seen = seen.size();
        std::vector<numbers> memory(R * 2 * W + 16 * V + R * 2 * num_seen + R * V);
        numbers *queries = memory.data(), *wide = queries + R * 2 * W, *scores = wide + 16 * V;
        numbers *found = scores + R * 2 * num_seen;
        for (int64_t r = 0; r < R; r++) {
            const int64_t h = g * (H / G) + (from + r) / Q, q = (from + r) % Q;
            const uint16_t *const row = x.numbers + b * x.b + h * x.h + q * x.s;
            widen_two(row, row, D, 1, queries + r * 2 * W);
        }
        for (int64_t i = 0; i < num_seen; i++) {
            const int64_t first = seen[i] * 16, last = std::min<int64_t>(16, S - first);
            const uint16_t *const of_tile = keys.numbers + b * keys.b + g * keys.h;
            for (int64_t s = 0; s < 16; s += s % 4 == 3 ? 5 : 1) {
                const auto key = [&](int64_t s) { return of_tile + (first + std::min(s, last - 1)) * keys.s; };
                widen_two(key(s), key(s + 4), D, 8, wide + s / 8 * 4 + s % 4);
            }
            for (int64_t r = 0; r < R; r++) {
                numbers sums[8] = {};
                for (int64_t w = 0; w < 2 * W; w++)
#pragma GCC unroll 8
                    for (int64_t s = 0; s < 8; s++) sums[s] += queries[r * 2 * W + w] * wide[w * 8 + s];
                for (int half = 0; half < 2; half++) {
                    flags row = {};
                    const int64_t num = std::min<int64_t>(8, last - 8 * half);
                    if (num > 0) memcpy(&row, of_rows + (from + r) % Q * mask_q + first + 8 * half, num);
                    const places is_seen = __builtin_convertvector(row, places) != 0;
                    const numbers score = totals_of(sums + 4 * half) * scale;
                    scores[(r * num_seen + i) * 2 + half] = either(is_seen, score, numbers{} - INFINITY);
                }
            }
        }
        std::vector<float> totals(R, 0), mosts(R, -INFINITY);
        for (int64_t i = 0, end; i < num_seen; i = end) {  // blocks
            for (end = i + 1; end < num_seen && seen[end] * 16 / slots_a_block == seen[i] * 16 / slots_a_block;) end++;
            for (int64_t r = 0; r < R; r++) {
                numbers *const row = scores + r * num_seen * 2;
                numbers most_of_lanes = numbers{} + mosts[r], sums[2] = {};
                for (int64_t run = 2 * i; run < 2 * end; run++)
                    most_of_lanes = either(row[run] > most_of_lanes, row[run], most_of_lanes);
                float most = most_of_lanes[0], of_rest[8];
                for (int s = 1; s < 8; s++) most = std::max(most, most_of_lanes[s]);
                const float level = most == -INFINITY ? 0 : most;  // it has seen nothing yet
                int num_rest = 0;
                for (int64_t run = 2 * i; run < 2 * end; run++) {
                    const int64_t num = lengths[(from + r) % Q] - seen[run / 2] * 16 - run % 2 * 8;
                    numbers weights = row[run] - level;
                    if (num >= 8) {
                        weights = exponential(weights);
                        sums[run % 2] += weights;
                    } else
                        for (int s = 0; s < 8; s++) {
                            weights[s] = s < num ? expf(weights[s]) : 0;
                            if (s < num) of_rest[num_rest++] = weights[s];
                        }
                    row[run] = rounded(weights);
                }
                float total = total_of(sums[0] + sums[1]);
                for (int s = 0; s < num_rest; s++) total += of_rest[s];
                const float factor = expf(mosts[r] - level);
                totals[r] = fmaf(factor, totals[r], total);
                mosts[r] = most;
                if (i)
                    for (int64_t w = 0; w < V; w++) found[r * V + w] *= factor;
            }
            for (int64_t tile = i; tile < end; tile++) {
                const int64_t first = seen[tile] * 16, last = std::min<int64_t>(16, S - first);
                for (int64_t s = 0; s < last; s++)
                    widen(values.numbers + b * values.b + g * values.h + (first + s) * values.s, D, wide + s * V);
                for (int64_t r = 0; r < R; r++) {
                    const int64_t num = std::min(last, lengths[(from + r) % Q] - first);
                    float weights[16];
                    memcpy(weights, scores + (r * num_seen + tile) * 2, sizeof weights);
                    for (int64_t w = 0; w < V; w += 8) {
                        numbers sums[8];
                        memcpy(sums, found + r * V + w, sizeof sums);
                        int64_t s = 0;
                        for (; s + 4 <= num; s += 4) {
                            const numbers *const four = wide + s * V + w;
#pragma GCC unroll 8
                            for (int v = 0; v < 8; v++)
                                sums[v] += (four[v] * weights[s] + four[2 * V + v] * weights[s + 2])
                                         + (four[V + v] * weights[s + 1] + four[3 * V + v] * weights[s + 3]);
                        }
                        for (int64_t rest = num - 1; rest >= s; rest--)
                            for (int v = 0; v < 8; v++) sums[v] += wide[rest * V + w + v] * weights[rest];
                        memcpy(found + r * V + w, sums, sizeof sums);
                    }
                }
            }
        }
        for (int64_t r = 0; r < R; r++) {
            const int64_t h = g * (H / G) + (from + r) / Q, q = (from + r) % Q;
            const float factor = 1 / (totals[r] == 0 ? 1 : totals[r]);
            for (int64_t d = 0; d < D; d++)
                y[((b * Q + q) * H + h) * D + d] = rounded(found[r * V + d / 16 * 2 + d % 2][d % 16 / 2] * factor);
        }
    }
}

// means of the last axis of x [N, D], summed up as PyTorch does: eight lanes of four sums each, which are emptied into
// the next of four levels when they have taken in so many vectors
extern "C" void mean_of_channels(const float *x, float *means, int64_t N, int64_t D) {
    const int64_t num_turns = D / 32;
    int bits = 4;
    while (1LL << 4 * bits < num_turns) bits++;
    for (int64_t n = 0; n < N; n++, x += D) {
        numbers sums[4][4] = {}, next;
        for (int64_t turn = 1; turn <= num_turns; turn++) {
            for (int i = 0; i < 4; i++) {
                memcpy(&next, x + 32 * (turn - 1) + 8 * i, sizeof next);
                sums[0][i] += next;
            }
            for (int level = 1; level < 4 && !(turn & ((1LL << level * bits) - 1)); level++)
                for (int i = 0; i < 4; i++) {
                    sums[level][i] += sums[level - 1][i];
                    sums[level - 1][i] = numbers{};
                }
        }
        for (int level = 1; level < 4; level++)
            for (int i = 0; i < 4; i++) sums[0][i] += sums[level][i];
        int64_t d = 32 * num_turns;
        for (; d + 8 <= D; d += 8) {
            memcpy(&next, x + d, sizeof next);
            sums[0][0] += next;
        }
        const numbers lanes = sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3];
        float total = 0;
        for (; d < D; d++) total += x[d];
        for (int lane = 0; lane < 8; lane++) total += lanes[lane];
        means[n] = total / D;
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
extern "C" int32_t aoti_torch_dtype_float32();
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

extern "C" int aoti_torch_cpu_mean_of_channels(Tensor x, Tensor *result) {
    int64_t num_axes, *sizes, *strides, sizes_of_result[8], strides_of_result[8], num_rows = 1;
    aoti_torch_get_dim(x, &num_axes);
    aoti_torch_get_sizes(x, &sizes);
    aoti_torch_get_strides(x, &strides);
    if (num_axes > 8 || (strides[num_axes - 1] != 1 && sizes[num_axes - 1] > 1)) return 1;
    for (int64_t axis = num_axes - 1; axis >= 0; axis--) {
        sizes_of_result[axis] = axis == num_axes - 1 ? 1 : sizes[axis];
        strides_of_result[axis] = num_rows;
        num_rows *= sizes_of_result[axis];
    }
    if (aoti_torch_empty_strided(num_axes, sizes_of_result, strides_of_result, aoti_torch_dtype_float32(),
                                 aoti_torch_device_type_cpu(), 0, result)) return 1;
    float *const means = static_cast<float *>(numbers_of(*result));
    for (int64_t row = 0; row < num_rows; row++) {
        const float *numbers = static_cast<float *>(numbers_of(x));
        for (int64_t axis = 0; axis < num_axes - 1; axis++)
            numbers += row / strides_of_result[axis] % sizes[axis] * strides[axis];
        mean_of_channels(numbers, means + row, 1, sizes[num_axes - 1]);
    }
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
