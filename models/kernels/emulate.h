// Runs a kernel's blocks on the host, one after the other, each thread a coroutine that hands over at a barrier, so that
// tests need no GPU. It shows wrong indices, masks and reductions. It does not show races between barriers, nor how a
// GPU rounds or how fast it is.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __shared__ static
#define KERNEL(threads) extern "C" void
#define DYNAMIC_SHARED(name) unsigned char *name = emulated.shared
#define REGISTER(name) static Registered registered_##name(#name, name);

struct Dimensions {
    unsigned x, y, z;
};
inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

struct bf16;
struct f16;
float to_float(bf16 v);
float to_float(f16 v);
void store(bf16 &to, float f);
void store(f16 &to, float f);

/// A barrier for those of a block or warp that have not ended.
struct Barrier {
    int alive = 0, arrived = 0;
    unsigned passed = 0;
    void wait();
    void leave();
};

struct Thread {
    ucontext_t context;
    std::vector<unsigned char> stack;
    bool ended = false;
};

/// What a lane gives to the other lanes of its warp.
struct Exchange {
    uint64_t words[8];
};

struct Emulated {
    unsigned char *shared = nullptr;
    std::vector<Thread> threads;
    ucontext_t scheduler;
    int current = 0;
    Barrier block, warps[32];
    Exchange lanes[1024];
    std::function<void()> body;
};
inline Emulated emulated;

inline void hand_over() { swapcontext(&emulated.threads[emulated.current].context, &emulated.scheduler); }
inline void Barrier::wait() {
    unsigned before = passed;
    if (++arrived == alive) {
        arrived = 0, passed++;
        return;
    }
    while (passed == before) hand_over();
}
inline void Barrier::leave() {
    if (--alive == arrived && alive > 0) arrived = 0, passed++;
}

inline Barrier &this_warp() { return emulated.warps[threadIdx.x / 32]; }
inline void __syncthreads() { emulated.block.wait(); }
inline void __syncwarp() { this_warp().wait(); }
/// Shows every lane's words to its warp, and calls `read` while they stand.
template <class Read> auto exchange(const Exchange &mine, Read read) {
    emulated.lanes[threadIdx.x] = mine;
    this_warp().wait();
    auto result = read(emulated.lanes + threadIdx.x / 32 * 32);
    this_warp().wait();
    return result;
}
template <class T> T from_lane(T v, unsigned lane) {
    Exchange mine = {};
    memcpy(mine.words, &v, sizeof(T));
    return exchange(mine, [&](const Exchange *warp) {
        T other;
        memcpy(&other, warp[lane % 32].words, sizeof(T));
        return other;
    });
}
template <class T> T __shfl_sync(unsigned, T v, int lane) { return from_lane(v, lane); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return from_lane(v, threadIdx.x ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, int by) {
    unsigned lane = threadIdx.x % 32;
    return from_lane(v, lane >= (unsigned)by ? lane - by : lane);
}
template <class T> T atomicAdd(T *to, T v) {
    T before = *to;
    *to += v;
    return before;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned atomicOr(unsigned *to, unsigned v) { return std::exchange(*to, *to | v); }

/// A launch's arguments as they came: a buffer, nothing, or four bytes.
struct Argument {
    enum Kind : uint32_t { SCALAR, BUFFER, NOTHING } kind;
    uint32_t scalar;
    unsigned char *buffer;
};
template <class T> T as(const Argument &argument) {
    if constexpr (std::is_pointer_v<T>) {
        return (T)argument.buffer;
    } else {
        T t;
        memcpy(&t, &argument.scalar, sizeof(T));
        return t;
    }
}

inline void run_thread() {
    emulated.body();
    emulated.block.leave();
    this_warp().leave();
    emulated.threads[emulated.current].ended = true;
    hand_over();
}

/// Runs one block to its end: each thread until its next barrier, in turn.
inline void run_block(unsigned threads) {
    emulated.block = {(int)threads, 0, 0};
    for (unsigned warp = 0; warp < 32; warp++)
        emulated.warps[warp] = {std::clamp((int)threads - (int)warp * 32, 0, 32), 0, 0};
    emulated.threads.resize(threads);
    for (auto &thread : emulated.threads) {
        thread.ended = false;
        thread.stack.resize(64 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, run_thread, 0);
    }
    for (unsigned left = threads; left > 0;) {
        for (unsigned t = 0; t < threads; t++) {
            if (emulated.threads[t].ended) continue;
            emulated.current = t, threadIdx = {t, 0, 0};
            swapcontext(&emulated.scheduler, &emulated.threads[t].context);
            left -= emulated.threads[t].ended;
        }
    }
}

/// Kernels by name, each as a function that takes its arguments as they came.
struct Registered {
    using Call = std::function<void(const std::vector<Argument> &)>;
    static std::map<std::string, Call> &all() {
        static std::map<std::string, Call> kernels;
        return kernels;
    }
    template <class... A> Registered(const char *name, void (*kernel)(A...)) {
        all()[name] = [kernel](const std::vector<Argument> &arguments) {
            if (arguments.size() != sizeof...(A)) {
                fprintf(stderr, "%zu arguments, the kernel takes %zu\n", arguments.size(), sizeof...(A));
                exit(1);
            }
            [&]<size_t... I>(std::index_sequence<I...>) { kernel(as<A>(arguments[I])...); }
            (std::index_sequence_for<A...>());
        };
    }
};
