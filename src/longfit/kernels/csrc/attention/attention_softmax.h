// What stands between the two products: powers of two, masks, and the rounding of probabilities to bf16.
//
// A panel is 64 queries of one head; its scores are held transposed, [keys][64], one query per lane, so that the
// maximum, the sum and the masks need no work across lanes.
//
// Include only from translation units compiled for AVX-512 BF16: everything here has internal linkage.
#pragma once

#include "../weights_4bit/gemm_bf16.h"
#include "attention_pack.h"
#include "attention_plan.h"

#include <math.h>

namespace {

constexpr int kPanelVectors = kPanel / kVector;
constexpr float kLog2E = 1.44269504088896340736f;

// |scaling|, but not 0: a hidden score, minus infinity, must stay so when it is scaled.
inline float score_scale(const longfit_attention_tile& tile) {
    const float scale = fabsf(tile.scaling);
    return scale < 1e-30f ? 1e-30f : scale;
}

inline __m512 minus(__m512 x) { return _mm512_sub_ps(_mm512_setzero_ps(), x); }

// 2^x for x < 128; exactly 0 for x <= -127 and for -inf; NaN stays NaN. Largest relative error 1e-7 where the result is normal.
inline __m512 exp2(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    x = _mm512_max_ps(_mm512_set1_ps(-127.f), x);  // of a NaN, the second operand is the result
    const __m512 shifted = _mm512_add_ps(x, shift);
    const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift));  // [-1/2, 1/2]
    // Least largest relative error with p(0) = 1, so that a clamped x gives the bits of zero below.
    __m512 p = _mm512_set1_ps(0.001326472731307149f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009671512991189957f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550733581185341f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022242426872253f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931470036506653f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// The token numbers of the first and the last key that each query of a panel sees. Lanes past the tile repeat its last query: what they
// compute is finite and goes nowhere.
struct Lanes {
    alignas(64) int32_t first[kPanel], last[kPanel];

    Lanes(const longfit_attention_tile& tile, const Segment& segment, int64_t query, int64_t count) {
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t lane = query + least(i, count - 1);
            first[i] = segment.first_key[lane];
            last[i] = int32_t(tile.start + lane);
        }
    }

    // Overwrites with `hidden` what is not seen of the scores [keys][64]; row 0 belongs to the key with token number `key`.
    void mask(int64_t key, int64_t keys, float hidden, float* scores) const {
        for (int j = 0; j < kPanelVectors; ++j) {
            const __m512i low = _mm512_load_si512(first + j * kVector), high = _mm512_load_si512(last + j * kVector);
            for (int64_t row = 0; row < keys; ++row) {
                const __m512i here = _mm512_set1_epi32(int32_t(key + row));
                const __mmask16 unseen = _mm512_cmplt_epi32_mask(here, low) | _mm512_cmpgt_epi32_mask(here, high);
                _mm512_mask_store_ps(scores + row * kPanel + j * kVector, unseen, _mm512_set1_ps(hidden));
            }
        }
    }
};

// Rounds two rows of 16 to bf16: a0 .. a15 b0 .. b15.
inline __m512i to_bf16(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// Interleaves them for a B operand: a0 b0 .. a15 b15.
inline __m512i pairs_of_rows(__m512i rows) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rows);
}

}  // namespace
