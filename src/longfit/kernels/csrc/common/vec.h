// A vector of float32 as wide as the instruction set has them, so that one source serves all: 16 lanes for AVX-512, 8 for AVX2, 4 for NEON
// and for any other processor. Numbers are stored as float32, bf16 or fp16, and widened and rounded between memory and register.
//
// Vec is a vector type of GCC and Clang: + - * / and comparisons work lane by lane. A product that is added is written
// fma(a, b, c) = a b + c, one rounding where the instruction exists and two where it does not (the build forbids contraction).
#pragma once

#include "floats.h"

namespace {

#if defined(LONGFIT_AVX512)
constexpr int kLanes = 16;
#elif defined(LONGFIT_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecWord __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));

inline Vec broadcast(float x) {
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_set1_ps(x);
#elif defined(LONGFIT_AVX2)
    return (Vec)_mm256_set1_ps(x);
#elif defined(LONGFIT_NEON)
    return (Vec)vdupq_n_f32(x);
#else
    return x - Vec{};  // exact for every x, -0 too
#endif
}
inline VecInt broadcast(int32_t x) { return x - VecInt{}; }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LONGFIT_AVX2)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(LONGFIT_NEON)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// a where the condition holds, else b; a NaN fulfils no comparison, so of larger and smaller it is the second operand that comes back.
inline Vec choose(VecInt condition, Vec a, Vec b) { return condition ? a : b; }
inline Vec larger(Vec a, Vec b) {
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(LONGFIT_AVX2)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}
inline Vec smaller(Vec a, Vec b) {
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(LONGFIT_AVX2)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return choose(a < b, a, b);
#endif
}

// Lane by lane in halves: the order of a sum is fixed.
inline float sum_of(Vec x) {
    float lanes[kLanes];
    memcpy(lanes, &x, sizeof x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
inline float largest_of(Vec x) {
    float lanes[kLanes];
    memcpy(lanes, &x, sizeof x);
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

// ------------------------------------------------------------------------------------------------ memory
inline Vec load(const float* x) { Vec v; memcpy(&v, x, sizeof v); return v; }
inline Vec load(const bf16* x) {
    VecHalf half;
    memcpy(&half, x, sizeof half);
    return (Vec)(__builtin_convertvector(half, VecWord) << 16);
}
inline Vec load(const fp16* x) {
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(LONGFIT_AVX2)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(LONGFIT_NEON)
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = widen(x[i]);
    return v;
#endif
}

// The bits of bf16 in the upper half of each lane, rounded to nearest even; the lower half is not cleared. AVX512-BF16's own instruction
// takes subnormals for 0, as every bf16 GEMM on these processors does.
#if defined(LONGFIT_AVX512_BF16)
inline VecHalf bf16_bits(Vec x) { return (VecHalf)_mm512_cvtneps_pbh((__m512)x); }
#else
inline VecHalf bf16_bits(Vec x) {
    const VecWord u = (VecWord)x;
    const VecWord rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const VecWord nan = (VecWord)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), VecHalf);
}
#endif

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }
inline void store(bf16* to, Vec x) { const VecHalf half = bf16_bits(x); memcpy(to, &half, sizeof half); }
inline void store(fp16* to, Vec x) {
#if defined(LONGFIT_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(LONGFIT_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(LONGFIT_NEON)
    vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = narrow<fp16>(x[i]);
#endif
}

// The first `count` lanes of a vector; the others read as zeros and are not written.
template <class T> inline Vec load_part(const T* x, int64_t count) {
    if (count >= kLanes) return load(x);
    T lanes[kLanes] = {};
    memcpy(lanes, x, size_t(count) * sizeof(T));
    return load(lanes);
}
template <class T> inline void store_part(T* to, int64_t count, Vec x) {
    if (count >= kLanes) return store(to, x);
    T lanes[kLanes];
    store(lanes, x);
    memcpy(to, lanes, size_t(count) * sizeof(T));
}

// Through the stored type and back.
template <class T> inline Vec rounded(Vec x) {
    T lanes[kLanes];
    store(lanes, x);
    return load(lanes);
}
template <> inline Vec rounded<float>(Vec x) { return x; }
template <> inline Vec rounded<bf16>(Vec x) { return (Vec)(__builtin_convertvector(bf16_bits(x), VecWord) << 16); }

// ------------------------------------------------------------------------------------------------ exponentials
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

// 2^x for x < 127.5, exactly 0 for x <= -127 and for -inf; NaN stays NaN. The polynomial errs by 1.6e-8 (least largest relative error,
// its value at 0 is 1) and its evaluation by one rounding of the result and 0.35 of one before: 1.1e-7 in all, where the result is normal.
inline Vec exp2(Vec x) {
    const Vec shift = broadcast(12582912.f + 127.f);  // 1.5 * 2^23 + 127: adding it leaves the exponent's bits in the low bits
    x = larger(broadcast(-127.f), x);
    const Vec shifted = x + shift, f = x - (shifted - shift);  // f in [-1/2, 1/2]
    Vec p = broadcast(0.00015353361959569156f);
    p = fma(p, f, broadcast(0.0013398875016719103f));
    p = fma(p, f, broadcast(0.00961843691766262f));
    p = fma(p, f, broadcast(0.055503323674201965f));
    p = fma(p, f, broadcast(0.24022647738456726f));
    p = fma(p, f, broadcast(0.6931471824645996f));
    p = fma(p, f, broadcast(1.f));
    return p * (Vec)((VecInt)shifted << 23);
}

// e^x to about one unit in the last place: x = n ln 2 + r, and a polynomial for |r| <= ln 2 / 2. Infinities and NaN come out right.
inline Vec exponential(Vec x) {
    x = larger(broadcast(-104.f), smaller(broadcast(90.f), x));  // 0 and infinity begin before
    const Vec shift = broadcast(12582912.f);
    const Vec shifted = fma(x, broadcast(kLog2E), shift), n = shifted - shift;  // n to the nearest
    Vec r = fma(n, broadcast(-0.693145751953125f), x);  // ln 2 in two parts: n times the first is exact
    r = fma(n, broadcast(-1.42860682030941723e-6f), r);
    Vec p = broadcast(1.f / 5040);
    const float coefficients[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (const float coefficient : coefficients) p = fma(p, r, broadcast(coefficient));
#if defined(LONGFIT_AVX512)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors, as n runs from -150 to 130 and the exponent of a float from -126 to 127.
    const VecInt exponent = (VecInt)shifted - (VecInt)shift, half = exponent >> 1, bias = broadcast(127);
    const VecInt other = exponent - half;
    return p * (Vec)((half + bias) << 23) * (Vec)((other + bias) << 23);
#endif
}

}  // namespace
