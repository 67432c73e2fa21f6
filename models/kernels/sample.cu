// From rows of logits to tokens: penalties and biases, then the largest logit or a draw from what top-k, top-p and min-p
// leave of the softmax. Probabilities are summed as whole numbers (of 2^-40), so that a sum does not depend on its order
// and a seed gives the same token every time. What a sequence's tokens depend on besides logits, its random numbers and
// how often it had each token, lies in a slot, which is set once and then brought up to date by each choice.
#include "common.cuh"

typedef unsigned long long u64;
constexpr int THREADS = 1024;
constexpr unsigned INVALID = 0xffffffffu;

/// How one row's token is chosen; 40 bytes.
struct Draw {
    /// 0 takes the largest logit.
    float temperature;
    /// 0 is off.
    unsigned top_k;
    /// 1 is off.
    float top_p;
    /// 0 is off.
    float min_p;
    /// The slot that has the sequence's state, or `NO_SLOT`.
    unsigned slot;
    /// The row's biases, from `biases_begin` to before `biases_end`.
    unsigned biases_begin, biases_end;
    /// Logits of tokens in the prompt and of generated ones are divided by it where positive, else multiplied; 1 is off.
    float repetition;
    /// Are taken from logits of generated tokens, once and for each time; 0 is off.
    float presence, frequency;

    __device__ bool penalises() const {
        return slot != NO_SLOT && (repetition != 1.f || presence != 0.f || frequency != 0.f);
    }
};

/// What is added to a token's logit behind the penalties.
struct Bias {
    unsigned token;
    float bias;
};

/// A sequence's random numbers: those of `seed`, of which its next token takes the one at place `generated`. Beside it
/// lies, if the sequence has penalties, a row of `counts`: for each token of the vocabulary how often it was generated,
/// and `IN_PROMPT`.
struct Slot {
    u64 seed, generated;
};
constexpr unsigned IN_PROMPT = 0x80000000u;

/// What a slot is set to.
struct Set {
    unsigned slot, seed_low, seed_high, generated;
    /// Whether there are counts: those listed from `counts_begin` to before `counts_end`, and 0 for all other tokens.
    unsigned counted, counts_begin, counts_end;
};

/// One token's entry in a row of `counts`.
struct Count {
    unsigned token, count;
};

/// Sets slots, each listed once. Grid: settings.
KERNEL(1024)
set_slots(const Set *sets, const Count *listed, Slot *slots, unsigned *counts, int vocabulary) {
    Set set = sets[blockIdx.x];
    if (threadIdx.x == 0) slots[set.slot] = Slot{(u64)set.seed_high << 32 | set.seed_low, set.generated};
    if (!set.counted) return;
    unsigned *row = counts + (size_t)set.slot * vocabulary;
    for (int t = threadIdx.x; t < vocabulary; t += blockDim.x) row[t] = 0;
    __syncthreads();
    for (unsigned c = set.counts_begin + threadIdx.x; c < set.counts_end; c += blockDim.x)
        row[listed[c].token] = listed[c].count;
}
REGISTER(set_slots)

/// A logit under its token's count. Products are rounded, as on the host, and not fused with the sums.
__device__ inline float penalised(const Draw &draw, unsigned count, float v) {
    unsigned generated = count & ~IN_PROMPT;
    v = v > 0.f ? v / draw.repetition : __fmul_rn(v, draw.repetition);
    if (generated) v -= draw.presence + __fmul_rn(draw.frequency, (float)generated);
    return v;
}

/// Tokens that one block edits.
constexpr int SEGMENT = 8192;

/// Applies each row's penalties, by its slot's counts, and then its biases, of which none names a token twice.
/// Grid: rows, segments of the vocabulary.
KERNEL(256)
edit_logits(float *logits, const Draw *draws, const Bias *biases, const unsigned *counts, int vocabulary) {
    Draw draw = draws[blockIdx.x];
    float *row = logits + (size_t)blockIdx.x * vocabulary;
    unsigned begin = blockIdx.y * SEGMENT, end = min(begin + SEGMENT, (unsigned)vocabulary);
    if (draw.penalises()) {
        const unsigned *counted = counts + (size_t)draw.slot * vocabulary;
        for (unsigned t = begin + threadIdx.x; t < end; t += blockDim.x)
            if (counted[t]) row[t] = penalised(draw, counted[t], row[t]);
    }
    __syncthreads();
    for (unsigned b = draw.biases_begin + threadIdx.x; b < draw.biases_end; b += blockDim.x) {
        Bias bias = biases[b];
        if (begin <= bias.token && bias.token < end) row[bias.token] += bias.bias;
    }
}
REGISTER(edit_logits)

/// The random number, 0 to below 1, with which a slot's next token is drawn: SplitMix64 (Steele, Lea and Flood 2014), as
/// `src/random.rs` has it.
__device__ inline float point(Slot slot) {
    u64 z = slot.seed + (slot.generated + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return (float)(z >> 40) / 16777216.f;
}

__device__ inline u64 warp_add(u64 v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL, v, offset);
    return v;
}

/// What the threads of a block share while they choose.
struct Shared {
    u64 warps[32];
    u64 bins[2048];
    u64 target;
    unsigned prefix, token;
};

/// The sum of every thread's value, known to all.
__device__ inline u64 block_add(u64 v, Shared &shared) {
    __syncthreads();
    v = warp_add(v);
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_add(shared.warps[threadIdx.x % 32]);
}

/// The first token, in token order, with which the running sum of `weight(token)` passes `target`.
template <class Weight> __device__ unsigned in_token_order(int vocabulary, u64 target, Shared &shared, Weight weight) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int segment = (vocabulary + THREADS - 1) / THREADS * 32;
    int begin = min(warp * segment, vocabulary), end = min(begin + segment, vocabulary);
    u64 sum = 0;
    for (int t = begin + lane; t < end; t += 32) sum += weight(t);
    sum = warp_add(sum);
    __syncthreads();
    if (lane == 0) shared.warps[warp] = sum;
    if (threadIdx.x == 0) shared.token = INVALID;
    __syncthreads();
    u64 before = 0;
    for (int w = 0; w < warp; w++) before += shared.warps[w];
    if (before <= target && target < before + sum) {
        // This warp's segment has it.
        for (int base = begin; base < end; base += 32) {
            u64 up_to = base + lane < end ? weight(base + lane) : 0;
            for (int by = 1; by < 32; by *= 2) {
                u64 other = __shfl_up_sync(ALL, up_to, by);
                if (lane >= by) up_to += other;
            }
            u64 own = before + up_to, previous = __shfl_up_sync(ALL, own, 1);
            if (lane == 0) previous = before;
            if (previous <= target && target < own) shared.token = base + lane;
            before = __shfl_sync(ALL, own, 31);
            if (before > target) break;
        }
    }
    __syncthreads();
    return shared.token;
}

/// A place in the order of tokens, likeliest first, the lower token first on a tie.
struct Place {
    /// How much less likely than the likeliest: the difference of the scaled logits in units of 2^-27.
    unsigned key, token;
};

/// One row's tokens in that order.
struct Row {
    const float *logits;
    int vocabulary;
    float highest, temperature;

    /// Beyond 32 a token's share rounds to nothing, and it is in no order.
    __device__ unsigned key(int token) const {
        float less = (highest - logits[token]) / temperature;
        return less < 31.9f ? (unsigned)(less * 134217728.f) : INVALID;
    }
};

__device__ inline u64 mass(unsigned key) {
    return key == INVALID ? 0 : (u64)(expf(-(float)key / 134217728.f) * 1099511627776.f);
}

__device__ inline bool within(unsigned key, unsigned token, Place last) {
    return key < last.key || (key == last.key && key != INVALID && token <= last.token);
}

/// The first token, likeliest first and none behind `last`, with which the running sum of `weight(key)` passes `target`;
/// `last` if none does. A radix search by three digits of the key.
template <class Weight>
__device__ Place in_order(const Row &row, Place last, u64 target, Shared &shared, Weight weight) {
    unsigned prefix = 0;
    const int shifts[] = {21, 10, 0}, sizes[] = {2048, 2048, 1024};
#pragma unroll
    for (int round = 0; round < 3; round++) {
        int shift = shifts[round], size = sizes[round];
        __syncthreads();
        for (int i = threadIdx.x; i < 2048; i += THREADS) shared.bins[i] = 0;
        __syncthreads();
        for (int t = threadIdx.x; t < row.vocabulary; t += THREADS) {
            unsigned key = row.key(t);
            bool here = round == 0 || key >> shifts[round - 1] == prefix;
            if (here && within(key, t, last)) atomicAdd(&shared.bins[key >> shift & (size - 1)], weight(key));
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            int lane = threadIdx.x, each = size / 32;
            u64 up_to = 0;
            for (int i = 0; i < each; i++) up_to += shared.bins[lane * each + i];
            u64 own = up_to;
            for (int by = 1; by < 32; by *= 2) {
                u64 other = __shfl_up_sync(ALL, up_to, by);
                if (lane >= by) up_to += other;
            }
            u64 before = up_to - own;
            if (lane == 0) shared.prefix = INVALID;
            __syncwarp();
            if (before <= target && target < up_to) {
                int bin = lane * each;
                while (target - before >= shared.bins[bin]) before += shared.bins[bin++];
                shared.prefix = prefix << (round == 2 ? 10 : 11) | bin;
                shared.target = target - before;
            }
        }
        __syncthreads();
        if (shared.prefix == INVALID) return last;
        prefix = shared.prefix, target = shared.target;
    }
    // Tokens with this key weigh the same; the order among them is the tokens'.
    unsigned token = in_token_order(row.vocabulary, target / weight(prefix), shared, [&](int t) -> u64 {
        unsigned key = row.key(t);
        return key == prefix && within(key, t, last);
    });
    return Place{prefix, token};
}

/// The token of a row at `point` of the probability that its draw leaves. All threads know it.
__device__ unsigned drawn(const Row &row, const Draw &draw, float point, Shared &shared) {
    auto share = [](unsigned key) { return mass(key); };
    auto total_until = [&](Place last, float least) {
        u64 sum = 0;
        for (int t = threadIdx.x; t < row.vocabulary; t += THREADS) {
            unsigned key = row.key(t);
            u64 m = mass(key);
            if (within(key, t, last) && (float)m >= least * 1099511627776.f) sum += m;
        }
        return block_add(sum, shared);
    };

    Place last = {INVALID - 1, INVALID};
    bool cut = (draw.top_k > 0 && draw.top_k < (unsigned)row.vocabulary) || draw.top_p < 1.f || draw.min_p > 0.f;
    if (!cut) {
        u64 total = total_until(last, 0.f);
        return in_token_order(row.vocabulary, (u64)((double)point * (double)total), shared,
                              [&](int t) { return mass(row.key(t)); });
    }
    if (draw.top_k > 0) last = in_order(row, last, draw.top_k - 1, shared, [](unsigned) -> u64 { return 1; });
    if (draw.top_p < 1.f) {
        double kept = ceil((double)draw.top_p * (double)total_until(last, 0.f));
        last = in_order(row, last, kept >= 1. ? (u64)kept - 1 : 0, shared, share);
    }
    u64 total = total_until(last, draw.min_p);
    // Those that min-p drops are the least likely, behind whatever is drawn.
    return in_order(row, last, (u64)((double)point * (double)total), shared, share).token;
}

/// Chooses a token for each row of logits `[rows, vocabulary]`, or `INVALID` where a logit is not a finite number, and
/// counts it in the row's slot, from which the next step goes on. Grid: rows.
KERNEL(1024)
sample(const float *logits, const Draw *draws, Slot *slots, unsigned *counts, unsigned *tokens, int vocabulary) {
    __shared__ Shared shared;
    Draw draw = draws[blockIdx.x];
    Slot slot = draw.slot == NO_SLOT ? Slot{0, 0} : slots[draw.slot];
    Row row = {logits + (size_t)blockIdx.x * vocabulary, vocabulary, 0.f, draw.temperature};

    // The largest logit as a number that orders as floats do, the lower token above the higher one.
    u64 best = 0, bad = 0;
    for (int t = threadIdx.x; t < vocabulary; t += THREADS) {
        float v = row.logits[t] + 0.f;
        bad |= !(fabsf(v) < INFINITY);
        unsigned bits;
        memcpy(&bits, &v, 4);
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        u64 ordered = (u64)bits << 32 | (unsigned)~t;
        best = ordered > best ? ordered : best;
    }
    bad = block_add(bad, shared);
    for (int offset = 16; offset > 0; offset /= 2) {
        u64 other = __shfl_xor_sync(ALL, best, offset);
        best = other > best ? other : best;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int w = 0; w < 32; w++) best = shared.warps[w] > best ? shared.warps[w] : best;

    unsigned chosen = bad ? INVALID : ~(unsigned)best;
    if (!bad && draw.temperature != 0.f) {
        row.highest = row.logits[chosen];
        chosen = drawn(row, draw, point(slot), shared);
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = chosen;
        if (draw.slot != NO_SLOT) slots[draw.slot].generated = slot.generated + 1;
        if (draw.penalises() && chosen < (unsigned)vocabulary) counts[(size_t)draw.slot * vocabulary + chosen]++;
    }
}
REGISTER(sample)
