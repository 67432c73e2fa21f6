// Paged attention for one query row a sequence: split over the KV length and merged (flash-decoding, Dao et al. 2023),
// with an online softmax (Milakov and Gimelshein 2018) and key and value loads shared by the heads of a group.
//
// `LANES` neighbouring lanes read one key together and hold the same dimensions of the query, so that a score is a sum
// over few lanes; a warp works on several keys at once, and every group of lanes keeps a softmax of its own until the end.
#include "common.cuh"

constexpr int WARPS = 4;
/// Query heads that share a load. A larger group is cut.
constexpr int GROUP = 4;

template <class T, int D> struct Shape {
    static constexpr int LANES = D <= 112 ? 8 : D <= 224 ? 16 : 32;
    /// Dimensions that a lane holds, in `PACKS` packs of `N`.
    static constexpr int EACH = D / LANES;
    static constexpr int N = EACH % WIDE<T> == 0 ? WIDE<T> : EACH % 4 == 0 ? 4 : 2;
    static constexpr int PACKS = EACH / N;
    /// Keys that a warp reads at once, and rounds of them that are loaded before the first is used.
    static constexpr int KEYS = 32 / LANES;
    static constexpr int ROUNDS = sizeof(T) == 2 ? 4 : 2;
    /// Softmaxes that a block merges at its end.
    static constexpr int STATES = WARPS * KEYS;
    static_assert(D % LANES == 0 && EACH % N == 0, "a lane holds whole packs");
};

/// A lane's dimensions of one row of the pool.
template <class T, int D> struct Row {
    using S = Shape<T, D>;
    Pack<T, S::N> packs[S::PACKS];

    __device__ void load(const T *row, int lane) {
#pragma unroll
        for (int p = 0; p < S::PACKS; p++) packs[p] = *(const Pack<T, S::N> *)(row + (p * S::LANES + lane) * S::N);
    }
    __device__ float at(int i) const { return to_float(packs[i / S::N].at[i % S::N]); }
};

/// The dimension that element `i` of a lane stands for.
template <class T, int D> __device__ inline int dimension(int lane, int i) {
    using S = Shape<T, D>;
    return (i / S::N * S::LANES + lane) * S::N + i % S::N;
}

/// Item b attends with row rows[b] of `queries` (`[.., stride]`, heads first) to the keys 0..lengths[b] of the blocks
/// from tables[starts[b]] on, or the last `window` of them where that is not 0. Pools: `[blocks, 2^shift, kv_heads, D]`.
/// With one split, row rows[b] of `out` (`[.., heads, D]`) is written; with more, sums and (maximum, total) of each split,
/// `[items, heads, splits, D]` and `[items, heads, splits, 2]`, for `merge`. An item of length 0 is padding.
/// Grid: items, kv_heads times pieces of a group, splits.
template <class T, int D>
__device__ void decode(const T *queries, int stride, const T *keys, const T *values, const unsigned *rows,
                       const unsigned *lengths, const unsigned *starts, const unsigned *tables, T *out, float *sums,
                       float *totals, int heads, int kv_heads, int shift, int window, float scale) {
    using S = Shape<T, D>;
    __shared__ float state_sums[S::STATES][GROUP][D];
    __shared__ float state_max[S::STATES][GROUP], state_total[S::STATES][GROUP];
    int item = blockIdx.x, split = blockIdx.z, splits = gridDim.z;
    int group = heads / kv_heads, pieces = (group + GROUP - 1) / GROUP;
    int kv_head = blockIdx.y / pieces, first_head = kv_head * group + blockIdx.y % pieces * GROUP;
    int in_group = min(GROUP, (kv_head + 1) * group - first_head);
    int warp = threadIdx.x / 32, lane = threadIdx.x % S::LANES, sub = threadIdx.x % 32 / S::LANES;

    int length = (int)lengths[item], first = window && length > window ? length - window : 0;
    int per = keys_per_split(length - first, splits);
    int begin = first + split * per, end = min(length, begin + per);
    if (begin >= end) {
        if (splits == 1 && length == 0)
            for (int i = threadIdx.x; i < in_group * D; i += blockDim.x)
                store(out[((size_t)rows[item] * heads + first_head) * D + i], 0.f);
        return;
    }
    const unsigned *table = tables + starts[item];

    float query[GROUP][S::EACH], sum[GROUP][S::EACH], high[GROUP], total[GROUP];
    // Base-2 exponentials: the factor is folded into the query.
    scale *= 1.4426950408889634f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        high[g] = LOWEST, total[g] = 0.f;
        const T *q = queries + (size_t)rows[item] * stride + (size_t)(first_head + min(g, in_group - 1)) * D;
#pragma unroll
        for (int i = 0; i < S::EACH; i++) {
            query[g][i] = to_float(q[dimension<T, D>(lane, i)]) * scale;
            sum[g][i] = 0.f;
        }
    }

    constexpr int STEP = S::STATES;
    for (int base = begin; base < end; base += STEP * S::ROUNDS) {
        Row<T, D> k[S::ROUNDS], v[S::ROUNDS];
#pragma unroll
        for (int r = 0; r < S::ROUNDS; r++) {
            int key = min(base + r * STEP + warp * S::KEYS + sub, end - 1);
            size_t slot = ((size_t)table[key >> shift] << shift) + (key & ((1 << shift) - 1));
            size_t at = (slot * kv_heads + kv_head) * D;
            k[r].load(keys + at, lane);
            v[r].load(values + at, lane);
        }
#pragma unroll
        for (int r = 0; r < S::ROUNDS; r++) {
            bool there = base + r * STEP + warp * S::KEYS + sub < end;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float score = 0.f;
#pragma unroll
                for (int i = 0; i < S::EACH; i++) score += query[g][i] * k[r].at(i);
#pragma unroll
                for (int offset = S::LANES / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(ALL, score, offset);
                if (!there) continue;
                float higher = fmaxf(high[g], score);
                float keep = exp2f(high[g] - higher), weight = exp2f(score - higher);
                high[g] = higher;
                total[g] = total[g] * keep + weight;
#pragma unroll
                for (int i = 0; i < S::EACH; i++) sum[g][i] = sum[g][i] * keep + weight * v[r].at(i);
            }
        }
    }

    int state = warp * S::KEYS + sub;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (lane == 0) state_max[state][g] = high[g], state_total[state][g] = total[g];
#pragma unroll
        for (int i = 0; i < S::EACH; i++) state_sums[state][g][dimension<T, D>(lane, i)] = sum[g][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < in_group * D; i += blockDim.x) {
        int g = i / D, d = i % D;
        float highest = LOWEST, all = 0.f, value = 0.f;
        for (int s = 0; s < S::STATES; s++) highest = fmaxf(highest, state_max[s][g]);
        for (int s = 0; s < S::STATES; s++) {
            float factor = exp2f(state_max[s][g] - highest);
            all += state_total[s][g] * factor;
            value += state_sums[s][g][d] * factor;
        }
        if (splits == 1) {
            store(out[((size_t)rows[item] * heads + first_head + g) * D + d], value / all);
            continue;
        }
        size_t part = ((size_t)item * heads + first_head + g) * splits + split;
        sums[part * D + d] = value;
        if (d == 0) totals[part * 2] = highest, totals[part * 2 + 1] = all;
    }
}

/// Merges an item's splits into its row of `out`; see `decode`. Grid: items, heads.
template <class T, int D>
__device__ void merge(const float *sums, const float *totals, const unsigned *rows, const unsigned *lengths, T *out,
                      int splits, int window) {
    int item = blockIdx.x, head = blockIdx.y, heads = gridDim.y, length = (int)lengths[item];
    int keys = window && length > window ? window : length, per = keys_per_split(keys, splits);
    int used = (keys + per - 1) / per;
    size_t part = ((size_t)item * heads + head) * splits;
    float highest = LOWEST, all = 0.f;
    for (int s = 0; s < used; s++) highest = fmaxf(highest, totals[(part + s) * 2]);
    for (int s = 0; s < used; s++) all += totals[(part + s) * 2 + 1] * exp2f(totals[(part + s) * 2] - highest);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float value = 0.f;
        for (int s = 0; s < used; s++) value += sums[(part + s) * D + d] * exp2f(totals[(part + s) * 2] - highest);
        store(out[((size_t)rows[item] * heads + head) * D + d], used ? value / all : 0.f);
    }
}

#define INSTANCE(T, D)                                                                                                 \
    KERNEL(128)                                                                                                        \
    attention_decode_##T##_##D(const T *queries, int stride, const T *keys, const T *values, const unsigned *rows,     \
                               const unsigned *lengths, const unsigned *starts, const unsigned *tables, T *out,        \
                               float *sums, float *totals, int heads, int kv_heads, int shift, int window,             \
                               float scale) {                                                                          \
        decode<T, D>(queries, stride, keys, values, rows, lengths, starts, tables, out, sums, totals, heads, kv_heads, \
                     shift, window, scale);                                                                            \
    }                                                                                                                  \
    KERNEL(128)                                                                                                        \
    attention_merge_##T##_##D(const float *sums, const float *totals, const unsigned *rows, const unsigned *lengths,   \
                              T *out, int splits, int window) {                                                        \
        merge<T, D>(sums, totals, rows, lengths, out, splits, window);                                                 \
    }                                                                                                                  \
    REGISTER(attention_decode_##T##_##D) REGISTER(attention_merge_##T##_##D)
#define INSTANCES(D) INSTANCE(float, D) INSTANCE(bf16, D) INSTANCE(f16, D)
INSTANCES(64)
INSTANCES(80)
INSTANCES(96)
INSTANCES(112)
INSTANCES(128)
INSTANCES(160)
INSTANCES(192)
INSTANCES(224)
INSTANCES(256)
