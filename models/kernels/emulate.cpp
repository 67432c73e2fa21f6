// emulate REQUEST ANSWER: runs one launch of one kernel on the host. A request is little-endian words: the name's length
// and the name; the grid's three sizes, the block's, the bytes of dynamic shared memory; the number of arguments; each
// argument's kind (see Argument) and its word, or its length in bytes and those. The answer is the buffers afterwards.
#define SCONCE_EMULATE
#include "common.cuh"

#include <sys/mman.h>
#include <unistd.h>

float to_float(bf16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
void store(bf16 &to, float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    // To the nearest, a tie to the even one; a NaN stays one.
    to.bits = f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
float to_float(f16 v) {
    _Float16 half;
    memcpy(&half, &v.bits, 2);
    return (float)half;
}
void store(f16 &to, float f) {
    _Float16 half = (_Float16)f;
    memcpy(&to.bits, &half, 2);
}

namespace elementwise {
#include "elementwise.cu"
#undef INSTANCES
}
namespace rope {
#include "rope.cu"
#undef INSTANCES
}
namespace attention_decode {
#include "attention_decode.cu"
#undef INSTANCE
#undef INSTANCES
}
namespace attention_prefill {
#include "attention_prefill.cu"
#undef INSTANCE
#undef INSTANCES
}
namespace sample {
#include "sample.cu"
}

/// Memory of `size` bytes, rounded up to the alignment of a wide load, that ends where nothing may be touched.
static unsigned char *guarded(size_t size) {
    size_t page = sysconf(_SC_PAGESIZE), used = (size + 15) / 16 * 16, pages = (used + page - 1) / page;
    auto *memory = (unsigned char *)mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + pages * page, page, PROT_NONE)) exit(3);
    return memory + pages * page - used;
}

static FILE *request;
static uint32_t word() {
    uint32_t w;
    if (fread(&w, 4, 1, request) != 1) exit(3);
    return w;
}

int main(int, char **argv) {
    request = fopen(argv[1], "rb");
    std::string name(word(), ' ');
    if (fread(name.data(), 1, name.size(), request) != name.size()) exit(3);
    gridDim = {word(), word(), word()};
    blockDim = {word(), 1, 1};
    size_t shared_bytes = word();
    std::vector<Argument> arguments(word());
    for (auto &argument : arguments) {
        argument = {(Argument::Kind)word(), 0, nullptr};
        if (argument.kind != Argument::NOTHING) argument.scalar = word();
        if (argument.kind != Argument::BUFFER) continue;
        argument.buffer = guarded(argument.scalar);
        if (fread(argument.buffer, 1, argument.scalar, request) != argument.scalar) exit(3);
    }
    auto kernel = Registered::all().find(name);
    if (kernel == Registered::all().end()) {
        fprintf(stderr, "there is no kernel %s\n", name.c_str());
        return 1;
    }
    emulated.body = [&] { kernel->second(arguments); };
    emulated.shared = guarded(shared_bytes);
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                // What is read before it was written is no number.
                memset(emulated.shared, 0xff, shared_bytes);
                run_block(blockDim.x);
            }
    FILE *answer = fopen(argv[2], "wb");
    for (auto &argument : arguments)
        if (argument.kind == Argument::BUFFER) fwrite(argument.buffer, 1, argument.scalar, answer);
    return fclose(answer);
}
