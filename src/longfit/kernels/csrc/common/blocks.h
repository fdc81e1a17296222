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

constexpr int64_t kGroup = 16;  // blocks whose absmax is found together

#if defined(LONGFIT_AVX512)

inline __m512i larger(const float*, __m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
inline __m512i magnitude(const float* x) { return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff)); }
template <class T> inline __m512i larger(const T*, __m512i a, __m512i b) { return _mm512_max_epu16(a, b); }
template <class T> inline __m512i magnitude(const T* x) { return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi16(0x7fff)); }

// The largest magnitudes of 1, 2, 4, 8 or 16 blocks, each still in as many parts as there is room for. Two registers become one by laying
// the halves of one block beside the halves of the other: a fifth of the work of reducing a register at a time.
template <int blocks, class T> inline __m512i maxima(const T* x, int64_t block_size) {
    if constexpr (blocks == 1) {
        __m512i top = magnitude(x);
        for (int64_t i = 64 / sizeof(T); i < block_size; i += 64 / sizeof(T)) top = larger(x, top, magnitude(x + i));
        return top;
    } else {
        const __m512i a = maxima<blocks / 2>(x, block_size), b = maxima<blocks / 2>(x + blocks / 2 * block_size, block_size);
        if constexpr (blocks <= 4) return larger(x, _mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
        if constexpr (blocks == 8) return larger(x, _mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        const __m512 c = _mm512_castsi512_ps(a), d = _mm512_castsi512_ps(b);
        return larger(x, _mm512_castps_si512(_mm512_shuffle_ps(c, d, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(c, d, 0xdd)));
    }
}

inline __m512 widen_tops(const float*, __m512i tops) { return _mm512_castsi512_ps(tops); }
inline __m512i upper_words(__m512i tops) {  // of two words each
    return _mm512_and_si512(_mm512_max_epu16(tops, _mm512_slli_epi32(tops, 16)), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}
inline __m512 widen_tops(const bf16*, __m512i tops) { return _mm512_castsi512_ps(upper_words(tops)); }
inline __m512 widen_tops(const fp16*, __m512i tops) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(upper_words(tops), 16)));
}

// The absmax of each of kGroup whole blocks; block_size is a multiple of 32.
template <class T> inline void absmax_of_group(const T* x, int64_t block_size, float* absmax) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_ps(absmax, _mm512_permutexvar_ps(in_order, widen_tops(x, maxima<kGroup>(x, block_size))));
}

#else

template <class T> inline void absmax_of_group(const T* x, int64_t block_size, float* absmax) {
    for (int64_t i = 0; i < kGroup; ++i) absmax[i] = absmax_of(x + i * block_size, block_size);
}

#endif

// False where a NaN or an infinity was among the values: the block is lost as a whole.
inline bool finite(float absmax) { return bits_of(absmax) < 0x7f800000; }

constexpr uint32_t kNaN = 0x7fc00000;

inline float reciprocal_of(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

}  // namespace
