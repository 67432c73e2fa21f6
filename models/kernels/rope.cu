// Rotary position embedding fused with what stands around it: the projection's bias and the head's norm before it, and
// the write of keys and values into the paged pool after it.
#include "common.cuh"

/// Pairs of a head that one lane holds, at most: heads have at most 256 dimensions.
constexpr int PAIRS = 4;

/// qkv `[tokens, heads + 2 kv_heads, dim]`: queries are rotated in place; keys are rotated and, as values are, stored in
/// slot slots[t] of pools `[slots, kv_heads, dim]`. Dimension i is paired with i + dim/2, as in Hugging Face's models.
/// `bias` (`[heads + 2 kv_heads, dim]`) and the norms' weights (`[dim]`) may be null. One warp a head.
/// Grid: tokens, then as many blocks of four warps as cover the heads.
template <class T>
__device__ void rope_store(T *qkv, const float *bias, const float *query_norm, const float *key_norm,
                           const float *cosines, const float *sines, const unsigned *slots, T *keys, T *values,
                           int heads, int kv_heads, int dim, float eps) {
    int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, half = dim / 2;
    int all = heads + 2 * kv_heads, token = blockIdx.x;
    if (head >= all) return;
    unsigned slot = slots[token];
    bool query = head < heads, value = head >= heads + kv_heads;
    T *row = qkv + ((size_t)token * all + head) * dim;

    float low[PAIRS], high[PAIRS], squares = 0.f;
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        low[p] = high[p] = 0.f;
        if (i >= half) continue;
        low[p] = to_float(row[i]) + (bias ? bias[head * dim + i] : 0.f);
        high[p] = to_float(row[half + i]) + (bias ? bias[head * dim + half + i] : 0.f);
        squares += low[p] * low[p] + high[p] * high[p];
    }
    const float *norm = query ? query_norm : value ? nullptr : key_norm;
    float scale = 1.f;
    if (norm) scale = 1.f / sqrtf(warp_sum(squares) / dim + eps);
    if (!query && slot == NO_SLOT) return;

    T *to = row;
    if (!query) to = (value ? values : keys) + ((size_t)slot * kv_heads + (head - heads) % kv_heads) * dim;
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        if (i >= half) continue;
        float a = low[p], b = high[p];
        if (norm) a *= scale * norm[i], b *= scale * norm[half + i];
        if (value) {
            store(to[i], a), store(to[half + i], b);
            continue;
        }
        float c = cosines[(size_t)token * half + i], s = sines[(size_t)token * half + i];
        store(to[i], a * c - b * s);
        store(to[half + i], b * c + a * s);
    }
}

#define INSTANCES(T)                                                                                                   \
    KERNEL(128)                                                                                                        \
    rope_store_##T(T *qkv, const float *bias, const float *query_norm, const float *key_norm, const float *cosines,    \
                   const float *sines, const unsigned *slots, T *keys, T *values, int heads, int kv_heads, int dim,    \
                   float eps) {                                                                                        \
        rope_store(qkv, bias, query_norm, key_norm, cosines, sines, slots, keys, values, heads, kv_heads, dim, eps);   \
    }                                                                                                                  \
    REGISTER(rope_store_##T)
INSTANCES(float)
INSTANCES(bf16)
INSTANCES(f16)
