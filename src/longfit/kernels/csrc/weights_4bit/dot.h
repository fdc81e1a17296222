// Dot products of four rows of W with rows of x, in float32, for the few-row matmul.
#pragma once

#include "../common/vec.h"

namespace {

// sums[m][j] += sum over k < count of w[j * stride + k] * x[m * x_stride + k], for four rows j and Many rows m, which share the loads.
template <int Many, class T>
inline void dot4(const T* w, int64_t stride, const T* x, int64_t x_stride, int64_t count, float (*sums)[4]) {
    Vec sum[Many][4];
    for (int m = 0; m < Many; ++m)
        for (int j = 0; j < 4; ++j) sum[m][j] = broadcast(0.f);
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        Vec values[Many];
#pragma GCC unroll 2
        for (int m = 0; m < Many; ++m) values[m] = load(x + m * x_stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Vec row = load(w + j * stride + k);
#pragma GCC unroll 2
            for (int m = 0; m < Many; ++m) sum[m][j] = fma(row, values[m], sum[m][j]);
        }
    }
    for (int m = 0; m < Many; ++m)
        for (int j = 0; j < 4; ++j) {
            sums[m][j] += sum_of(sum[m][j]);
            for (int64_t rest = k; rest < count; ++rest) sums[m][j] += widen(w[j * stride + rest]) * widen(x[m * x_stride + rest]);
        }
}

#if defined(LONGFIT_AVX512_BF16)
// Two products a lane and instruction; it takes subnormal operands for 0, as every bf16 GEMM on these processors does.
template <> inline void dot4<1, bf16>(const bf16* w, int64_t stride, const bf16* x, int64_t, int64_t count, float (*sums)[4]) {
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
    for (int j = 0; j < 4; ++j) sums[0][j] += _mm512_reduce_add_ps(_mm512_add_ps(s[j], s[4 + j]));
}
#endif

}  // namespace
