// Paged causal attention for chunks of a prompt on tensor cores: tiles of queries against tiles of keys with an online
// softmax, nothing of which leaves the chip (FlashAttention-2, Dao 2023). The heads of a group are rows of one tile, so
// that keys and values are read once for all of them.
#include "tensor_core.cuh"

constexpr int WARPS = 4;
/// Rows of a tile of queries: 16 a warp. Row r of a span is head r % group of its query r / group.
constexpr int ROWS = 16 * WARPS;

template <int D> struct Tile {
    static constexpr int KEYS = D <= 128 ? 64 : 32;
    /// Rows lie an odd multiple of 16 bytes apart, so that eight of them are in different banks and are read at once.
    static constexpr int STRIDE = D + 8;
    static_assert(D % 16 == 0, "depths and columns are taken sixteen at a time");
    /// Two tiles of keys and of values: one is computed with while the next comes.
    static constexpr int BYTES = 2 * (ROWS + 4 * KEYS) * STRIDE;
};

/// Begins to copy the keys and values from `first` on, `KEYS` of them; those from `end` on are zeros.
template <class T, int D>
__device__ inline void load_tile(T *key_tile, T *value_tile, const T *keys, const T *values, const unsigned *table,
                                 int first, int end, int shift, int kv_heads, int kv_head) {
    using S = Tile<D>;
    for (int i = threadIdx.x; i < S::KEYS * (D / 8); i += 32 * WARPS) {
        int row = i / (D / 8), column = i % (D / 8) * 8, key = first + row, to = row * S::STRIDE + column;
        if (key < end) {
            size_t slot = ((size_t)table[key >> shift] << shift) + (key & ((1 << shift) - 1));
            size_t from = (slot * kv_heads + kv_head) * D + column;
            copy_wide(key_tile + to, keys + from);
            copy_wide(value_tile + to, values + from);
        } else {
            *(Pack<T, 8> *)(key_tile + to) = *(Pack<T, 8> *)(value_tile + to) = Pack<T, 8>{};
        }
    }
    copies_begun();
}

/// Tile b: queries of the span whose first row in `queries` (`[.., stride]`, heads first) is firsts[b], whose first
/// position is positions[b], which has lens[b] tokens and the blocks from tables[starts[b]] on; the tile begins at row
/// offsets[b] of the span's rows. A query sees the keys up to its own, or the last `window` of them where that is not 0.
/// Pools: `[blocks, 2^shift, kv_heads, D]`; out: `[.., heads, D]`. Grid: tiles, kv_heads; shared memory: Tile::BYTES.
template <class T, int D>
__device__ void prefill(const T *queries, int stride, const T *keys, const T *values, const unsigned *firsts,
                        const unsigned *positions, const unsigned *lens, const unsigned *starts,
                        const unsigned *offsets, const unsigned *tables, T *out, int heads, int kv_heads, int shift,
                        int window, float scale) {
    using S = Tile<D>;
    DYNAMIC_SHARED(shared);
    T *query_tile = (T *)shared, *tiles = query_tile + ROWS * S::STRIDE;
    int tile = blockIdx.x, kv_head = blockIdx.y, group = heads / kv_heads;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (int)firsts[tile], position = (int)positions[tile], offset = (int)offsets[tile];
    int rows = (int)lens[tile] * group;
    const unsigned *table = tables + starts[tile];

    // Keys from the first that the tile's first query sees to the last that its last query sees.
    int begin = window ? max(0, position + offset / group + 1 - window) / S::KEYS * S::KEYS : 0;
    int end = position + (min(offset + ROWS, rows) - 1) / group + 1;
    auto key_tile = [&](int which) { return tiles + 2 * which * S::KEYS * S::STRIDE; };
    auto value_tile = [&](int which) { return key_tile(which) + S::KEYS * S::STRIDE; };
    load_tile<T, D>(key_tile(0), value_tile(0), keys, values, table, begin, end, shift, kv_heads, kv_head);

    for (int i = threadIdx.x; i < ROWS * (D / 8); i += 32 * WARPS) {
        int row = i / (D / 8), column = i % (D / 8) * 8, at = offset + row;
        Pack<T, 8> pack = {};
        if (at < rows) {
            int head = kv_head * group + at % group;
            pack = *(const Pack<T, 8> *)(queries + (size_t)(first + at / group) * stride + head * D + column);
        }
        *(Pack<T, 8> *)(query_tile + row * S::STRIDE + column) = pack;
    }

    // Each lane's two rows: their positions, softmaxes and sums.
    int at[2], highest_key[2];
    float high[2] = {LOWEST, LOWEST}, total[2] = {0.f, 0.f}, sum[D / 8][4] = {};
    for (int h = 0; h < 2; h++) {
        at[h] = offset + warp * 16 + lane / 4 + 8 * h;
        highest_key[h] = position + at[h] / group;
    }
    scale *= 1.4426950408889634f;

    for (int base = begin, which = 0; base < end; base += S::KEYS, which ^= 1) {
        bool more = base + S::KEYS < end;
        if (more)
            load_tile<T, D>(key_tile(which ^ 1), value_tile(which ^ 1), keys, values, table, base + S::KEYS, end, shift,
                            kv_heads, kv_head);
        if (more) copies_done<1>();
        else copies_done<0>();
        __syncthreads();

        // Scores: 16 rows by KEYS. The four matrices of a load are a tile of queries, or two tiles of keys.
        float score[S::KEYS / 8][4] = {};
#pragma unroll
        for (int depth = 0; depth < D; depth += 16) {
            unsigned a[4];
            load_matrices(a, query_tile + (warp * 16 + lane % 16) * S::STRIDE + depth + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < S::KEYS / 8; n += 2) {
                unsigned b[4];
                int row = n * 8 + lane / 16 * 8 + lane % 8, column = depth + lane / 8 % 2 * 8;
                load_matrices(b, key_tile(which) + row * S::STRIDE + column);
                multiply_add(score[n], a, b[0], b[1], T());
                multiply_add(score[n + 1], a, b[2], b[3], T());
            }
        }

        float higher[2] = {high[0], high[1]};
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = base + n * 8 + lane % 4 * 2 + i % 2, seen = highest_key[i / 2];
                bool masked = key > seen || (window && key + window <= seen);
                score[n][i] = masked ? -INFINITY : score[n][i] * scale;
                higher[i / 2] = fmaxf(higher[i / 2], score[n][i]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // The four lanes of a row.
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(ALL, higher[h], 1));
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(ALL, higher[h], 2));
            float keep = exp2f(high[h] - higher[h]);
            high[h] = higher[h];
            total[h] *= keep;
#pragma unroll
            for (int n = 0; n < D / 8; n++) sum[n][2 * h] *= keep, sum[n][2 * h + 1] *= keep;
        }
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = exp2f(score[n][i] - high[i / 2]);
                total[i / 2] += score[n][i];
            }
        }

        // Sums: the weights are the left operand as they lie; values are read transposed.
#pragma unroll
        for (int k = 0; k < S::KEYS / 16; k++) {
            const float *left = score[2 * k], *right = score[2 * k + 1];
            unsigned a[4] = {pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]),
                             pair<T>(right[2], right[3])};
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                unsigned b[4];
                int row = k * 16 + lane % 16, column = n * 8 + lane / 16 * 8;
                load_transposed(b, value_tile(which) + row * S::STRIDE + column);
                multiply_add(sum[n], a, b[0], b[1], T());
                multiply_add(sum[n + 1], a, b[2], b[3], T());
            }
        }
        // The next round writes over this tile.
        __syncthreads();
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(ALL, total[h], 1);
        total[h] += __shfl_xor_sync(ALL, total[h], 2);
        if (at[h] >= rows) continue;
        int head = kv_head * group + at[h] % group;
        T *to = out + ((size_t)(first + at[h] / group) * heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            store(to[n * 8], sum[n][2 * h] / total[h]);
            store(to[n * 8 + 1], sum[n][2 * h + 1] / total[h]);
        }
    }
}

#define INSTANCE(T, D)                                                                                                 \
    KERNEL(128)                                                                                                        \
    attention_prefill_##T##_##D(const T *queries, int stride, const T *keys, const T *values, const unsigned *firsts,  \
                                const unsigned *positions, const unsigned *lens, const unsigned *starts,               \
                                const unsigned *offsets, const unsigned *tables, T *out, int heads, int kv_heads,      \
                                int shift, int window, float scale) {                                                  \
        prefill<T, D>(queries, stride, keys, values, firsts, positions, lens, starts, offsets, tables, out, heads,     \
                      kv_heads, shift, window, scale);                                                                 \
    }                                                                                                                  \
    REGISTER(attention_prefill_##T##_##D)
#define INSTANCES(D) INSTANCE(bf16, D) INSTANCE(f16, D)
INSTANCES(64)
INSTANCES(80)
INSTANCES(96)
INSTANCES(112)
INSTANCES(128)
INSTANCES(160)
INSTANCES(192)
INSTANCES(224)
INSTANCES(256)
