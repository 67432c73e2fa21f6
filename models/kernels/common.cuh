// What every kernel needs: the stored number types, 16-byte loads, and sums over a warp and a block.
//
// A kernel compiles for the device with nvcc and, with SCONCE_EMULATE, for the host with any C++ compiler, where
// emulate.h runs a block's threads in turn: indexing, masks and reductions are tested without a GPU.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef SCONCE_EMULATE
#include "emulate.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define REGISTER(name)
#endif

constexpr unsigned ALL = 0xffffffffu;
/// A score or maximum below all others, yet finite: a difference of two of them is no NaN.
constexpr float LOWEST = -1e30f;
/// No slot: the token or the row is padding, and nothing of it is stored.
constexpr unsigned NO_SLOT = 0xffffffffu;
/// Set in a token that the step before chose; the rest is its row there.
constexpr unsigned CARRIED = 0x80000000u;

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

#ifndef SCONCE_EMULATE
__device__ inline float to_float(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ inline float to_float(f16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
__device__ inline void store(bf16 &to, float f) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(f)); }
__device__ inline void store(f16 &to, float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(f)); }
#endif
__device__ inline float to_float(float v) { return v; }
__device__ inline void store(float &to, float f) { to = f; }

/// What `T` keeps of a float.
template <class T> __device__ inline T round_to(float f) {
    T t;
    store(t, f);
    return t;
}

/// `N` values that are loaded and stored at once; their address is a multiple of their size.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
    T at[N];
};
/// How many values 16 bytes hold.
template <class T> constexpr int WIDE = 16 / (int)sizeof(T);

__device__ inline float warp_sum(float v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL, v, offset);
    return v;
}

/// The sum over a block of whole warps, known to all its threads. `scratch` holds 32 floats.
__device__ inline float block_sum(float v, float *scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.f);
}

/// Keys that each split of a sequence takes, so that `splits` of them cover `keys`. A short sequence uses fewer splits.
__device__ inline int keys_per_split(int keys, int splits) {
    int share = (keys + splits - 1) / splits;
    return share < 128 ? 128 : (share + 31) / 32 * 32;
}
