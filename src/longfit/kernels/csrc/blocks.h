// One block of values: its absmax, and its values scaled by it (numerics/blockwise.py states the rule).
#pragma once

#include "floats.h"

#if defined(LONGFIT_AVX512)
#include <immintrin.h>
#endif

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
#if defined(LONGFIT_AVX512)
    const __m512i sign_off = _mm512_set1_epi16(0x7fff);
    __m512i tops = _mm512_setzero_si512();
    for (; count >= 32; count -= 32, x += 32) tops = _mm512_max_epu16(tops, _mm512_and_si512(sign_off, _mm512_loadu_si512(x)));
    if (count > 0) {
        const __mmask32 lanes = (1u << count) - 1;
        tops = _mm512_max_epu16(tops, _mm512_and_si512(sign_off, _mm512_maskz_loadu_epi16(lanes, x)));
    }
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(tops), _mm512_extracti64x4_epi64(tops, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));  // the one horizontal search there is
    count = 0;
    top = static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
#endif
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
