// One warp's 16 x 8 x 16 matrix product on tensor cores, and the loads that arrange its operands (PTX ISA: mma.m16n8k16,
// ldmatrix). A lane of the product holds rows lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next one.
#pragma once
#include "common.cuh"

#ifndef SCONCE_EMULATE
/// c += a b: a is 16 x 16, b 16 x 8, sums in float32.
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// Four 8 x 8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8. A lane gets two
/// neighbours of row lane/4 of each, or of the transpose.
__device__ inline void load_matrices(unsigned (&to)[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ inline void load_transposed(unsigned (&to)[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
/// Copies 16 bytes into shared memory without a stop at a register; see `copies_done`.
__device__ inline void copy_wide(void *to, const void *from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ inline void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until all but the last `open` groups of this thread's copies are there; a barrier must follow.
template <int open> __device__ inline void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory"); }
#else
template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
    Exchange mine = {{a[0], a[1], a[2], a[3], b0, b1}};
    int lane = threadIdx.x % 32;
    exchange(mine, [&](const Exchange *warp) {
        auto half = [](uint64_t pair, int which) { return to_float(T{(unsigned short)(pair >> 16 * which)}); };
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                // Which of four registers: the row's half in bit 0, the depth's in bit 1.
                uint64_t left = warp[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
                uint64_t right = warp[column * 4 + k % 8 / 2].words[4 + k / 8];
                c[i] += half(left, k % 2) * half(right, k % 2);
            }
        }
        return 0;
    });
}
inline void load_any(unsigned (&to)[4], const void *row, bool transposed) {
    Exchange mine = {{(uint64_t)row}};
    int lane = threadIdx.x % 32;
    exchange(mine, [&](const Exchange *warp) {
        for (int matrix = 0; matrix < 4; matrix++) {
            auto element = [&](int r, int c) {
                return (unsigned)((const unsigned short *)warp[matrix * 8 + r].words[0])[c];
            };
            int r = lane / 4, c = lane % 4 * 2;
            to[matrix] = transposed ? element(c, r) | element(c + 1, r) << 16 : element(r, c) | element(r, c + 1) << 16;
        }
        return 0;
    });
}
inline void load_matrices(unsigned (&to)[4], const void *row) { load_any(to, row, false); }
inline void load_transposed(unsigned (&to)[4], const void *row) { load_any(to, row, true); }
inline void copy_wide(void *to, const void *from) { memcpy(to, from, 16); }
inline void copies_begun() {}
template <int open> void copies_done() {}
#endif

/// Two values as one register holds them, the first in the lower half.
template <class T> __device__ inline unsigned pair(float low, float high) {
    return (unsigned)round_to<T>(low).bits | (unsigned)round_to<T>(high).bits << 16;
}
