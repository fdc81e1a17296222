// Sums that several threads add to, always in the same order: each waits for its turn.
#pragma once

#include "../longfit.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <sched.h>
#endif

namespace {

constexpr int64_t kSums = 4;  // buffers of dQ: block n of keys adds to number n % kSums, as its turn n / kSums

// Adds the share of turn `turn` when the turns before have added theirs. Their threads run, as blocks are handed out in order.
template <class Add> inline void take_turn(int64_t* added, int64_t turn, const Add& add) {
    for (int tries = 0; __atomic_load_n(added, __ATOMIC_ACQUIRE) < turn; ++tries)
        if (tries >= 1000) {
#if defined(_WIN32)
            SwitchToThread();
#else
            sched_yield();
#endif
        }
    add();
    __atomic_store_n(added, turn + 1, __ATOMIC_RELEASE);
}

}  // namespace
