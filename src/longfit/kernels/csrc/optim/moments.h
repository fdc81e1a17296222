// A block of 8-bit moments: decode both, and encode both with the corners that numerics/adamw.py settles.
#pragma once

#include "adamw.h"
#include "../common/blocks.h"

#if defined(LONGFIT_AVX512_BF16)
#include "moments_vbmi.h"
#else
#include "nearest.h"

namespace {

class MomentMaps {
  public:
    bool build(const float* signed_map, const float* unsigned_map) {
        memcpy(m_levels, signed_map, sizeof m_levels);
        memcpy(v_levels, unsigned_map, sizeof v_levels);
        nearest_m = NearestTable(signed_map, 256);
        nearest_v = NearestTable(unsigned_map, 256);
        return true;
    }

    void decode_m(const uint8_t* codes, int n, float absmax, float* out) const { decode(m_levels, codes, n, absmax, out); }
    void decode_v(const uint8_t* codes, int n, float absmax, float* out) const { decode(v_levels, codes, n, absmax, out); }
    void encode_m(const float* m, int n, float factor, uint8_t* codes) const { nearest_m.codes(m, factor, n, codes); }
    void encode_v(const float* v, int n, float factor, uint8_t* codes) const {
        nearest_v.codes(v, factor, n, codes);
        for (int i = 0; i < n; ++i) {
            const uint8_t least = v[i] > 0;
            codes[i] = codes[i] > least ? codes[i] : least;
        }
    }

  private:
    static void decode(const float* levels, const uint8_t* codes, int n, float absmax, float* out) {
        for (int i = 0; i < n; ++i) {
            uint32_t code = codes[i];
            asm("" : "+r"(code));  // keeps the compiler from a gather, which is slower
            out[i] = levels[code];
        }
        for (int i = 0; i < n; ++i) out[i] *= absmax;
    }

    float m_levels[256], v_levels[256];
    NearestTable nearest_m, nearest_v;
};

}  // namespace
#endif

namespace {

// A NaN or an infinity among the moments of a block: they become 0, an infinite v of a finite m the largest float.
inline void drop_non_finite(int n, float* m, float* v) {
    constexpr float kLargest = 3.402823466e38f;
    for (int i = 0; i < n; ++i) {
        const bool finite_m = (bits_of(m[i]) & 0x7f800000) != 0x7f800000;
        m[i] = finite_m ? m[i] : 0.f;
        v[i] = finite_m ? (v[i] < kLargest ? v[i] : kLargest) : 0.f;
    }
}

inline void encode_moments(const MomentMaps& maps, int n, float* m, float* v, uint8_t* m_codes, float* m_absmax, uint8_t* v_codes,
                           float* v_absmax) {
    float m_top = absmax_of(m, n), v_top = absmax_of(v, n);
    if (!finite(m_top) || !finite(v_top)) {
        drop_non_finite(n, m, v);
        m_top = absmax_of(m, n), v_top = absmax_of(v, n);
    }
    maps.encode_m(m, n, reciprocal_of(m_top), m_codes);
    maps.encode_v(v, n, reciprocal_of(v_top), v_codes);
    *m_absmax = m_top;
    *v_absmax = v_top;
}

}  // namespace
