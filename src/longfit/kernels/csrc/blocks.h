// One block of values: its absmax, and its values scaled by it (numerics/blockwise.py states the rule).
#pragma once

#include "floats.h"

namespace {

// Magnitudes order like their bits, and every NaN lies above infinity: an integer maximum finds both the absmax and what spoils it.
inline float absmax_of(const float* x, int64_t count) {
    int32_t top = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff);
        top = magnitude > top ? magnitude : top;
    }
    return float_of(static_cast<uint32_t>(top));
}
template <class T> inline float absmax_of(const T* x, int64_t count) {  // bf16, fp16
    uint16_t top = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t magnitude = x[i].bits & 0x7fff;
        top = magnitude > top ? magnitude : top;
    }
    T result{top};
    return widen(result);
}

// False where a NaN or an infinity was among the values: the block is lost as a whole.
inline bool finite(float absmax) { return bits_of(absmax) < 0x7f800000; }

constexpr uint32_t kNaN = 0x7fc00000;

inline float reciprocal_of(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

}  // namespace
