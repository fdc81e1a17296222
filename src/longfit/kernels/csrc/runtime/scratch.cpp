// Working memory of a thread, kept from call to call: fresh pages would cost more than most calls.
#include "../longfit.h"

#include <stdlib.h>

namespace {

#if defined(_WIN32)  // whose C library has no aligned_alloc, and frees such memory by another name
void* allocate(int64_t num_bytes) { return _aligned_malloc(static_cast<size_t>(num_bytes), 64); }
void release(void* memory) { _aligned_free(memory); }
#else
void* allocate(int64_t num_bytes) { return aligned_alloc(64, static_cast<size_t>(num_bytes)); }
void release(void* memory) { free(memory); }
#endif

struct Scratch {
    void* memory = nullptr;
    int64_t size = 0;
    ~Scratch() { release(memory); }
};

thread_local Scratch scratch;

}  // namespace

extern "C" void* longfit_scratch(int64_t num_bytes) {
    if (num_bytes > scratch.size) {
        release(scratch.memory);
        scratch.size = (num_bytes + 63) / 64 * 64;
        scratch.memory = allocate(scratch.size);
        if (!scratch.memory) abort();  // less than a MiB: nothing else would work either
    }
    return scratch.memory;
}

// Memory at a 64-byte boundary, a multiple of 64 bytes, or null; and its return.
extern "C" void* longfit_allocate(int64_t num_bytes) { return allocate((num_bytes + 63) / 64 * 64); }
extern "C" void longfit_release(void* memory) { release(memory); }
