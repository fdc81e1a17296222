// Sixteen bf16 at a time, widened to fp32 and rounded back; and the exponential of sixteen fp32.
//
// Include only from translation units compiled for AVX-512 BF16: everything here has internal linkage.
#pragma once

#include "floats.h"

namespace {

constexpr int64_t kLanes = 16;

// The lanes of elements at .. at + 15 that lie below `count`.
inline __mmask16 lanes_below(int64_t at, int64_t count) { return count - at >= kLanes ? 0xffff : __mmask16((1u << (count - at)) - 1); }

// Lanes outside the mask read as zeros.
inline __m512 load_lanes(const bf16* x, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}

inline void store_lanes(bf16* x, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(x, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

// Through bf16 and back.
inline __m512 rounded(__m512 values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values)), 16));
}

// e^x to about one unit in the last place: x = n ln 2 + r, and a polynomial for |r| <= ln 2 / 2. Infinities and NaN come out right.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.f), _mm512_min_ps(_mm512_set1_ps(200.f), x));  // of a NaN, the second operand is the result
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);  // to the nearest
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);  // ln 2 in two parts: n times the first is exact
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682030941723e-6f), r);
    __m512 p = _mm512_set1_ps(1.f / 5040);
    constexpr float kCoefficients[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (const float coefficient : kCoefficients) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, n);
}

}  // namespace
