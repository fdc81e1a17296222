// float32 <-> bfloat16 and float16, rounded to nearest even as torch rounds, without the flush-to-zero of the AVX512-BF16 instruction.
#pragma once

#include "../longfit.h"

#include <string.h>
#if defined(LONGFIT_AVX2)
#include <immintrin.h>
#elif defined(LONGFIT_NEON)
#include <arm_neon.h>
#endif

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
inline float load_float(const uint8_t* p) { float x; memcpy(&x, p, 4); return x; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
#if defined(LONGFIT_AVX2)
    return _cvtsh_ss(x.bits);
#elif defined(LONGFIT_NEON)
    __fp16 h;
    memcpy(&h, &x.bits, 2);
    return h;
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);   // infinity, NaN
    if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));        // normal
    return float_of(sign | bits_of(float(magnitude) * 5.9604644775390625e-8f));                 // subnormal: exact, times 2^-24
#endif
}

template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fc0};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <> inline fp16 narrow<fp16>(float x) {
#if defined(LONGFIT_AVX2)
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(LONGFIT_NEON)
    const __fp16 h = __fp16(x);
    fp16 result;
    memcpy(&result.bits, &h, 2);
    return result;
#else
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
    if (magnitude < 0x38800000)                                      // subnormal: adding 0.5 rounds at 2^-24
        return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

// work(T{}) for the element type that `dtype` names.
template <class Work> void with_type(int dtype, const Work& work) {
    if (dtype == LONGFIT_BF16) work(bf16{});
    else if (dtype == LONGFIT_FP16) work(fp16{});
    else work(float{});
}

}  // namespace
