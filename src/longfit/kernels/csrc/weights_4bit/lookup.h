// Codes of one block -> values, by table lookup in registers.
//
// A value is (level * absmax) rounded to the output type. Rounding commutes with the lookup, so the 16 products are rounded once per
// block and every weight after that costs a permute: bit-equal to the reference and far cheaper than a multiplication per weight.
// Levels<T> is that table in the layout which the instruction set's permute wants. step() looks up kStep values, tail() fewer.
#pragma once

#include "../common/floats.h"

#if defined(LONGFIT_AVX2)
#include <immintrin.h>
#elif defined(LONGFIT_NEON)
#include <arm_neon.h>
#endif

namespace {

// Any instruction set: the table as an array. The vector forms below keep it beside theirs only where a tail needs it.
template <class T> inline void scale_levels(const float* codebook, float absmax, T* table) {
    for (int i = 0; i < 16; ++i) table[i] = narrow<T>(codebook[i] * absmax);
}

template <class T> inline void expand_scalar(const uint8_t* packed, int64_t pairs, const T* table, T* out) {
    for (int64_t i = 0; i < pairs; ++i) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
}

#if defined(LONGFIT_AVX512)

inline __m512i round_to_bf16_bits(__m512 x) {  // the result is the upper half of each lane; x is no NaN
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}

// 16-bit types: the 16 values twice in one register, so that bit 4 of a lookup index does not matter and no mask is needed.
template <class T> struct Levels {
    __m512i table;

    // `plain`: no product is a NaN, nor subnormal; see plain_scales.
    Levels(const float* codebook, float absmax, bool plain) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(absmax));
        table = plain ? pack_plain(scaled, T{}) : pack(scaled, T{});
    }
#if defined(LONGFIT_AVX512_BF16)
    static __m512i pack_plain(__m512 x, bf16) {  // the instruction takes subnormals for 0, else it rounds as we do
        return (__m512i)_mm512_cvtne2ps_pbh(x, x);
    }
#else
    static __m512i pack_plain(__m512 x, bf16) { return pack(x, bf16{}); }
#endif
    static __m512i pack_plain(__m512 x, fp16) { return pack(x, fp16{}); }
    static __m512i pack(__m512 x, bf16) {
        alignas(64) static const uint16_t upper_halves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                              1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i rounded = _mm512_mask_mov_epi32(round_to_bf16_bits(x), nan, _mm512_set1_epi32(0x7fc00000));
        return _mm512_permutexvar_epi16(_mm512_load_si512(upper_halves), rounded);
    }
    static __m512i pack(__m512 x, fp16) {
        return _mm512_broadcast_i64x4(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    template <bool stream> static void store(T* out, __m512i x) {
        if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), x);
        else _mm512_storeu_si512(out, x);
    }

    // 32 bytes -> 64 values: every byte twice, the even copy shifted down by a nibble.
    void lookup(__m256i bytes, __m512i& first, __m512i& second) const {
        const __m512i shifts = _mm512_set1_epi32(4);
#if defined(LONGFIT_AVX512_BF16)
        alignas(64) static const uint8_t twice[128] = {
            0,  0,  0,  0,  1,  1,  1,  1,  2,  2,  2,  2,  3,  3,  3,  3,  4,  4,  4,  4,  5,  5,  5,  5,  6,  6,  6,  6,  7,  7,  7,  7,
            8,  8,  8,  8,  9,  9,  9,  9,  10, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15,
            16, 16, 16, 16, 17, 17, 17, 17, 18, 18, 18, 18, 19, 19, 19, 19, 20, 20, 20, 20, 21, 21, 21, 21, 22, 22, 22, 22, 23, 23, 23, 23,
            24, 24, 24, 24, 25, 25, 25, 25, 26, 26, 26, 26, 27, 27, 27, 27, 28, 28, 28, 28, 29, 29, 29, 29, 30, 30, 30, 30, 31, 31, 31, 31};
        const __m512i all = _mm512_castsi256_si512(bytes);
        const __m512i lower = _mm512_permutexvar_epi8(_mm512_load_si512(twice), all);
        const __m512i upper = _mm512_permutexvar_epi8(_mm512_load_si512(twice + 64), all);
#else
        const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
        const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
        const __m512i lower = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
        const __m512i upper = _mm512_or_si512(high, _mm512_slli_epi32(high, 16));
#endif
        first = _mm512_permutexvar_epi16(_mm512_srlv_epi16(lower, shifts), table);
        second = _mm512_permutexvar_epi16(_mm512_srlv_epi16(upper, shifts), table);
    }
    static constexpr int64_t kStep = 64;
    template <bool stream> void step(const uint8_t* packed, T* out) const {
        __m512i first, second;
        lookup(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), first, second);
        store<stream>(out, first);
        store<stream>(out + 32, second);
    }
    void tail(const uint8_t* packed, int64_t pairs, T* out) const {
        __m512i first, second;
        lookup(_mm256_maskz_loadu_epi8((1u << pairs) - 1, packed), first, second);
        const uint64_t values = (1ull << (2 * pairs)) - 1;
        _mm512_mask_storeu_epi16(out, static_cast<__mmask32>(values), first);
        _mm512_mask_storeu_epi16(out + 32, static_cast<__mmask32>(values >> 32), second);
    }
};

template <> struct Levels<float> {
    __m512 table;

    Levels(const float* codebook, float absmax, bool) : table(_mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(absmax))) {}

    template <bool stream> static void store(float* out, __m512 x) {
        if (stream) _mm512_stream_ps(out, x);
        else _mm512_storeu_ps(out, x);
    }
    void lookup(__m128i bytes, __m512& first, __m512& second) const {  // 16 bytes -> 32 values
        const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i dwords = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, order));
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, 4), table);
        const __m512 low = _mm512_permutexvar_ps(dwords, table);
        first = _mm512_unpacklo_ps(high, low);
        second = _mm512_unpackhi_ps(high, low);
    }
    static constexpr int64_t kStep = 32;
    template <bool stream> void step(const uint8_t* packed, float* out) const {
        __m512 first, second;
        lookup(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), first, second);
        store<stream>(out, first);
        store<stream>(out + 16, second);
    }
    void tail(const uint8_t* packed, int64_t pairs, float* out) const {
        __m512 first, second;
        lookup(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << pairs) - 1), packed), first, second);
        const uint32_t values = (1u << (2 * pairs)) - 1;
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>(values), first);
        _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(values >> 16), second);
    }
};

#elif defined(LONGFIT_AVX2)

// 16-bit types: the low and the high bytes of the 16 values as two byte tables for pshufb.
template <class T> struct Levels {
    T values[16];
    __m256i low_bytes, high_bytes;

    Levels(const float* codebook, float absmax, bool) {
        scale_levels(codebook, absmax, values);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(words, 8);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
        low_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        high_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x11);
    }
    static constexpr int64_t kStep = 32;
    template <bool stream> void step(const uint8_t* packed, T* out) const {
        const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const __m256i both = _mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8));
        const __m256i codes = _mm256_permute4x64_epi64(_mm256_and_si256(both, _mm256_set1_epi8(15)), 0xd8);
        const __m256i low = _mm256_shuffle_epi8(low_bytes, codes), high = _mm256_shuffle_epi8(high_bytes, codes);
        const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
        auto* at = reinterpret_cast<__m256i*>(out);
        if (stream) {
            _mm256_stream_si256(at, first);
            _mm256_stream_si256(at + 1, second);
        } else {
            _mm256_storeu_si256(at, first);
            _mm256_storeu_si256(at + 1, second);
        }
    }
    void tail(const uint8_t* packed, int64_t pairs, T* out) const { expand_scalar(packed, pairs, values, out); }
};

template <> struct Levels<float> {
    float values[16];

    Levels(const float* codebook, float absmax, bool) { scale_levels(codebook, absmax, values); }
    static constexpr int64_t kStep = 8;
    __m256 lookup(const uint8_t* packed) const {  // 4 bytes -> 8 values
        const __m256 below8 = _mm256_loadu_ps(values), from8 = _mm256_loadu_ps(values + 8);
        int32_t bytes;
        memcpy(&bytes, packed, 4);
        const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 becomes the sign, which blendv reads
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below8, codes), _mm256_permutevar8x32_ps(from8, codes), upper);
    }
    template <bool stream> void step(const uint8_t* packed, float* out) const {
        const __m256 x = lookup(packed);
        if (stream) _mm256_stream_ps(out, x);
        else _mm256_storeu_ps(out, x);
    }
    void tail(const uint8_t* packed, int64_t pairs, float* out) const { expand_scalar(packed, pairs, values, out); }
};

#elif defined(LONGFIT_NEON)

// The bytes of the 16 values as 2 or 4 byte tables; st2 and st4 put the looked-up bytes back together.
template <class T> struct Levels {
    T values[16];

    Levels(const float* codebook, float absmax, bool) { scale_levels(codebook, absmax, values); }
    static constexpr int64_t kStep = 32;
    template <bool stream> void step(const uint8_t* packed, T* out) const {
        const uint8x16_t bytes = vld1q_u8(packed), high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(15));
        const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
        auto* at = reinterpret_cast<uint8_t*>(out);
        for (int i = 0; i < 2; ++i) {
            if constexpr (sizeof(T) == 2) {
                const uint8x16x2_t table = vld2q_u8(reinterpret_cast<const uint8_t*>(values));
                vst2q_u8(at + 32 * i, (uint8x16x2_t){{vqtbl1q_u8(table.val[0], codes[i]), vqtbl1q_u8(table.val[1], codes[i])}});
            } else {
                const uint8x16x4_t table = vld4q_u8(reinterpret_cast<const uint8_t*>(values));
                vst4q_u8(at + 64 * i, (uint8x16x4_t){{vqtbl1q_u8(table.val[0], codes[i]), vqtbl1q_u8(table.val[1], codes[i]),
                                                      vqtbl1q_u8(table.val[2], codes[i]), vqtbl1q_u8(table.val[3], codes[i])}});
            }
        }
    }
    void tail(const uint8_t* packed, int64_t pairs, T* out) const { expand_scalar(packed, pairs, values, out); }
};

#else

template <class T> struct Levels {
    T values[16];

    Levels(const float* codebook, float absmax, bool) { scale_levels(codebook, absmax, values); }
    static constexpr int64_t kStep = 32;
    template <bool stream> void step(const uint8_t* packed, T* out) const { expand_scalar(packed, kStep / 2, values, out); }
    void tail(const uint8_t* packed, int64_t pairs, T* out) const { expand_scalar(packed, pairs, values, out); }
};

#endif

}  // namespace
