// Rows in and out: embedding lookup, rotary angles, residual add with RMSNorm, SiLU times up.
#include "common.cuh"

/// x[t] = table[tokens[t]]: `[tokens, hidden]` in float32, from `[vocabulary, hidden]`. A token that the step before failed
/// to choose counts as 0: what comes of it is thrown away. Grid: tokens.
template <class T>
__device__ void embed(const T *table, const unsigned *tokens, const unsigned *sampled, float *x, int hidden,
                      int vocabulary) {
    unsigned token = tokens[blockIdx.x];
    if (token & CARRIED) token = sampled[token & ~CARRIED];
    if (token >= (unsigned)vocabulary) token = 0;
    const T *from = table + (size_t)token * hidden;
    float *to = x + (size_t)blockIdx.x * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = to_float(from[i]);
}

/// Cosines and sines of a step's positions, each `[tokens, half]`. Grid: tokens.
KERNEL(128) angles(const unsigned *positions, const float *inverse, float *cosines, float *sines, int half) {
    float position = (float)positions[blockIdx.x];
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float angle = position * inverse[i];
        size_t at = (size_t)blockIdx.x * half + i;
        cosines[at] = cosf(angle);
        sines[at] = sinf(angle);
    }
}
REGISTER(angles)

/// x += delta, then out = RMSNorm(x) (Zhang and Sennrich 2019): x `[tokens, hidden]` in float32, the others in T.
/// With `rows`, block b reads row rows[b] and writes row b of `out`, and x stays as it was: the gather of the rows whose
/// logits are wanted. `delta` may be null. Grid: rows of `out`; shared memory: hidden floats.
template <class T>
__device__ void residual_norm(float *x, const T *delta, const unsigned *rows, const float *weight, T *out, int hidden,
                              float eps) {
    DYNAMIC_SHARED(shared);
    float *row = (float *)shared;
    __shared__ float scratch[32];
    size_t from = (size_t)(rows ? rows[blockIdx.x] : blockIdx.x) * hidden;
    float squares = 0.f;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float v = x[from + i];
        if (delta) v += to_float(delta[from + i]);
        if (delta && !rows) x[from + i] = v;
        row[i] = v;
        squares += v * v;
    }
    float scale = 1.f / sqrtf(block_sum(squares, scratch) / hidden + eps);
    T *to = out + (size_t)blockIdx.x * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) store(to[i], row[i] * scale * weight[i]);
}

/// out = silu(gate) * up: `[tokens, inner]` from `[tokens, 2 inner]`, gate first. `inner` is a multiple of 16 bytes.
/// Grid: tokens, then as many blocks as cover `inner`.
template <class T> __device__ void silu_mul(const T *gate_up, T *out, int inner) {
    constexpr int N = WIDE<T>;
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (i >= inner) return;
    const T *gate = gate_up + (size_t)blockIdx.x * 2 * inner + i;
    auto g = *(const Pack<T, N> *)gate, u = *(const Pack<T, N> *)(gate + inner);
    Pack<T, N> result;
    for (int j = 0; j < N; j++) {
        float v = to_float(g.at[j]);
        store(result.at[j], v / (1.f + expf(-v)) * to_float(u.at[j]));
    }
    *(Pack<T, N> *)(out + (size_t)blockIdx.x * inner + i) = result;
}

#define INSTANCES(T)                                                                                                   \
    KERNEL(256)                                                                                                        \
    embed_##T(const T *table, const unsigned *tokens, const unsigned *sampled, float *x, int hidden,                   \
              int vocabulary) {                                                                                        \
        embed(table, tokens, sampled, x, hidden, vocabulary);                                                          \
    }                                                                                                                  \
    KERNEL(256)                                                                                                        \
    residual_norm_##T(float *x, const T *delta, const unsigned *rows, const float *weight, T *out, int hidden,         \
                      float eps) {                                                                                     \
        residual_norm(x, delta, rows, weight, out, hidden, eps);                                                       \
    }                                                                                                                  \
    KERNEL(256) silu_mul_##T(const T *gate_up, T *out, int inner) { silu_mul(gate_up, out, inner); }                  \
    REGISTER(embed_##T) REGISTER(residual_norm_##T) REGISTER(silu_mul_##T)
INSTANCES(float)
INSTANCES(bf16)
INSTANCES(f16)
