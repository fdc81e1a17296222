// Dot products of four rows of W with one row of x, in float32, for the few-row matmul.
#pragma once

#include "../common/vec.h"

namespace {

// sums[j] += sum over k < count of w[j * stride + k] * x[k], for four rows j.
template <class T> inline void dot4(const T* w, int64_t stride, const T* x, int64_t count, float* sums) {
    Vec s0 = broadcast(0.f), s1 = s0, s2 = s0, s3 = s0;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Vec v = load(x + k);
        s0 = fma(load(w + k), v, s0);
        s1 = fma(load(w + stride + k), v, s1);
        s2 = fma(load(w + 2 * stride + k), v, s2);
        s3 = fma(load(w + 3 * stride + k), v, s3);
    }
    sums[0] += sum_of(s0), sums[1] += sum_of(s1), sums[2] += sum_of(s2), sums[3] += sum_of(s3);
    for (; k < count; ++k)
        for (int j = 0; j < 4; ++j) sums[j] += widen(w[j * stride + k]) * widen(x[k]);
}

#if defined(LONGFIT_AVX512_BF16)
// Two products a lane and instruction; it takes subnormal operands for 0, as every bf16 GEMM on these processors does.
template <> inline void dot4<bf16>(const bf16* w, int64_t stride, const bf16* x, int64_t count, float* sums) {
    auto load = [](const bf16* p, __mmask32 lanes) { return (__m512bh)_mm512_maskz_loadu_epi16(lanes, p); };
    __m512 s[8];
    for (__m512& sum : s) sum = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 64 <= count; k += 64) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(x + k), second = (__m512bh)_mm512_loadu_si512(x + k + 32);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            s[j] = _mm512_dpbf16_ps(s[j], (__m512bh)_mm512_loadu_si512(w + j * stride + k), first);
            s[4 + j] = _mm512_dpbf16_ps(s[4 + j], (__m512bh)_mm512_loadu_si512(w + j * stride + k + 32), second);
        }
    }
    for (; k < count; k += 32) {
        const int64_t left = count - k;
        const __mmask32 lanes = left >= 32 ? 0xffffffff : (1u << left) - 1;
        const __m512bh v = load(x + k, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) s[j] = _mm512_dpbf16_ps(s[j], load(w + j * stride + k, lanes), v);
    }
    for (int j = 0; j < 4; ++j) sums[j] += _mm512_reduce_add_ps(_mm512_add_ps(s[j], s[4 + j]));
}
#endif

}  // namespace
