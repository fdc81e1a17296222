// longfit_parallel for a lambda: parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) { ... }).
#pragma once

#include "../longfit.h"

namespace {

template <class Work>
void parallel_for(int64_t count, int64_t grain, int threads, const Work& work) {
    auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Work*>(context))(begin, end); };
    longfit_parallel(call, const_cast<Work*>(&work), count, grain, threads);
}

}  // namespace
