// Working memory of a thread, kept from call to call: fresh pages would cost more than most calls.
#include "../longfit.h"

#include <stdlib.h>

namespace {

struct Scratch {
    void* memory = nullptr;
    int64_t size = 0;
    ~Scratch() { free(memory); }
};

thread_local Scratch scratch;

}  // namespace

extern "C" void* longfit_scratch(int64_t num_bytes) {
    if (num_bytes > scratch.size) {
        free(scratch.memory);
        scratch.size = (num_bytes + 63) / 64 * 64;
        scratch.memory = aligned_alloc(64, static_cast<size_t>(scratch.size));
        if (!scratch.memory) abort();  // less than a MiB: nothing else would work either
    }
    return scratch.memory;
}
