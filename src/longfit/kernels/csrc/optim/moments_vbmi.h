// The 8-bit maps in vector registers (AVX-512 VBMI): 64 codes at a time, with byte permutes where other instruction sets go to memory.
//
// Decode: a level is four bytes; each of the four is a table of 256 bytes, four registers, and a lookup of 64 codes in it is two permutes
// and a blend. Encode is a lookup, too. A map is piecewise linear (seven decades), so the rank of |x| is first guessed from a straight
// line over the bucket that its upper bits name (5 of exponent, 3 of mantissa: 256 buckets, three tables of bytes), never too high and
// at most one too low; then the threshold of the guessed rank is looked up like a level and compared. The constructor proves the guess
// for every bucket of the map it is given, so that a map for which it fails is refused, not rounded wrongly.
#pragma once

#include "../common/floats.h"

namespace {

constexpr int kLanes = 64;

// Byte tables of 256 entries, looked up 64 at a time.
struct ByteTable {
    alignas(64) uint8_t entry[256];

    __m512i look_up(__m512i index) const {
        const __m512i* t = reinterpret_cast<const __m512i*>(entry);
        const __m512i low = _mm512_permutex2var_epi8(t[0], index, t[1]), high = _mm512_permutex2var_epi8(t[2], index, t[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
};

// Swaps the two pairs of bits of a dword's number, 0..15: what four in-lane unpacks do to the order. Its own inverse.
inline __m512i interleave_order(__m512i codes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
}

// Sixteen lanes of each of four registers as one mask.
inline __mmask64 join(const __mmask16 part[4]) {
    return _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
}

// 256 dwords as four byte tables.
struct DwordTable {
    ByteTable byte[4];

    void set(int i, uint32_t value) {
        for (int b = 0; b < 4; ++b) byte[b].entry[i] = static_cast<uint8_t>(value >> (8 * b));
    }
    uint32_t get(int i) const {
        uint32_t value = 0;
        for (int b = 0; b < 4; ++b) value |= static_cast<uint32_t>(byte[b].entry[i]) << (8 * b);
        return value;
    }
    // `index` in interleave_order; the results in order.
    void look_up(__m512i index, __m512i out[4]) const {
        const __m512i b0 = byte[0].look_up(index), b1 = byte[1].look_up(index), b2 = byte[2].look_up(index), b3 = byte[3].look_up(index);
        const __m512i low_a = _mm512_unpacklo_epi8(b0, b1), low_b = _mm512_unpackhi_epi8(b0, b1);
        const __m512i high_a = _mm512_unpacklo_epi8(b2, b3), high_b = _mm512_unpackhi_epi8(b2, b3);
        out[0] = _mm512_unpacklo_epi16(low_a, high_a);
        out[1] = _mm512_unpackhi_epi16(low_a, high_a);
        out[2] = _mm512_unpacklo_epi16(low_b, high_b);
        out[3] = _mm512_unpackhi_epi16(low_b, high_b);
    }
};

// Ranks of magnitudes: how many of the thresholds, ascending and above 0, lie strictly below |x|. At most 255 thresholds, up to 1.
class MagnitudeRanks {
  public:
    // False where the guess cannot be proved.
    bool build(const float* thresholds, int count) {
        for (int i = 0; i < 256; ++i) limit.set(i, i < count ? bits_of(thresholds[i]) : 0x7fffffff);
        if (bits_of(thresholds[0]) < kSmallest) return false;
        for (int bucket = 0; bucket < 256; ++bucket)
            if (!fit(bucket, count)) return false;
        return true;
    }

    // The ranks of 64 magnitudes, given as the bits of floats in [0, 1]. `upwards` is added to the bits before they are compared with a
    // threshold: 1 where a value on the threshold belongs above it.
    __m512i look_up(const __m512i magnitude[4], const __m512i upwards[4]) const {
        __m512i place[4], bound[4];
        for (int j = 0; j < 4; ++j)
            place[j] = _mm512_slli_epi32(_mm512_max_epu32(magnitude[j], _mm512_set1_epi32(kSmallest)), 4);
        const __m512i a = _mm512_permutex2var_epi8(place[0], upper_bytes(), place[1]);
        const __m512i b = _mm512_permutex2var_epi8(place[2], upper_bytes(), place[3]);
        const __m512i bucket = _mm512_shuffle_i64x2(a, b, 0x44), along = _mm512_shuffle_i64x2(a, b, 0xee);

        const __m512i rise = slope.look_up(bucket), byte = _mm512_set1_epi16(0xff);
        const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(along, byte), _mm512_and_si512(rise, byte));
        const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(along, 8), _mm512_srli_epi16(rise, 8));
        const __m512i risen = _mm512_or_si512(_mm512_srli_epi16(even, 12), _mm512_slli_epi16(_mm512_srli_epi16(odd, 12), 8));
        const __m512i guess = _mm512_min_epu8(_mm512_add_epi8(base.look_up(bucket), risen), cap.look_up(bucket));

        limit.look_up(interleave_order(guess), bound);
        __mmask16 over[4];
        for (int j = 0; j < 4; ++j) over[j] = _mm512_cmpgt_epi32_mask(_mm512_add_epi32(magnitude[j], upwards[j]), bound[j]);
        const __mmask64 above = join(over);
        return _mm512_mask_add_epi8(guess, above, guess, _mm512_set1_epi8(1));
    }

  private:
    static constexpr uint32_t kSmallest = 104u << 23;  // 2^-23: five bits of exponent tell 2^-23 .. 1 apart

    // Of two registers of dwords: the 32 highest bytes, then the 32 second highest.
    static __m512i upper_bytes() {
        alignas(64) static const uint8_t index[64] = {
            3,  7,  11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63, 67, 71, 75, 79, 83, 87, 91, 95, 99, 103, 107, 111, 115, 119, 123, 127,
            2,  6,  10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74, 78, 82, 86, 90, 94, 98, 102, 106, 110, 114, 118, 122, 126};
        return _mm512_load_si512(index);
    }

    // Thresholds strictly below a magnitude.
    int rank(uint32_t bits, int count) const {
        int below = 0;
        for (int step = 128; step; step /= 2)
            if (below + step <= count && limit.get(below + step - 1) < bits) below += step;
        return below;
    }
    int guess(int bucket, int along) const {
        const int line = base.entry[bucket] + (along * slope.entry[bucket] >> 12);
        return line < cap.entry[bucket] ? line : cap.entry[bucket];
    }
    // Chooses the line of a bucket and proves it at both ends of each of its 256 steps.
    bool fit(int bucket, int count) {
        const uint32_t first = (96u << 23) + (static_cast<uint32_t>(bucket) << 20);  // the bits whose bits 20..27 are `bucket`
        const bool used = first >= kSmallest && first <= 0x3f800000;
        const int from = used ? rank(first, count) : 0, to = used ? rank(first + 0xfffff, count) : 0;
        base.entry[bucket] = static_cast<uint8_t>(from);
        for (int last = to; last >= from && last >= to - 1; --last)
            for (int rise = 0; rise < 256; ++rise) {
                cap.entry[bucket] = static_cast<uint8_t>(last);
                slope.entry[bucket] = static_cast<uint8_t>(rise);
                if (!used || proved(bucket, first, count)) return true;
            }
        return false;
    }
    bool proved(int bucket, uint32_t first, int count) const {
        for (int along = 0; along < 256; ++along) {
            const uint32_t low = first + (static_cast<uint32_t>(along) << 12);
            const int g = guess(bucket, along);
            // Two more than the bits: a value one rounding above 1, and the one that `upwards` adds.
            if (g > rank(low, count) || g + 1 < rank(low + 0xfff + 2, count)) return false;
            if (g >= 256) return false;
        }
        return true;
    }

    ByteTable base, slope, cap;
    DwordTable limit;
};

// Both maps: the moments of 64 elements at a time. `n` elements of a block; the buffers are a whole block long.
class MomentMaps {
  public:
    bool build(const float* signed_map, const float* unsigned_map) {
        constexpr int kZero = 127;  // the code of level 0 in the signed map, whose levels and thresholds are symmetric about it
        float m_thresholds[128], v_thresholds[255];
        for (int i = 0; i < 255; ++i) v_thresholds[i] = (unsigned_map[i] + unsigned_map[i + 1]) / 2;
        for (int i = 0; i < 128; ++i) m_thresholds[i] = (signed_map[kZero + i] + signed_map[kZero + i + 1]) / 2;
        for (int i = 0; i < 127; ++i)
            if ((signed_map[kZero - i] + signed_map[kZero - i - 1]) / 2 != -m_thresholds[i]) return false;
        for (int i = 0; i < 256; ++i) {
            m_levels.set(i, bits_of(signed_map[i]));
            v_levels.set(i, bits_of(unsigned_map[i]));
        }
        return m_ranks.build(m_thresholds, 128) && v_ranks.build(v_thresholds, 255);
    }

    void decode_m(const uint8_t* codes, int n, float absmax, float* out) const { decode(m_levels, codes, n, absmax, out); }
    void decode_v(const uint8_t* codes, int n, float absmax, float* out) const { decode(v_levels, codes, n, absmax, out); }

    void encode_m(const float* m, int n, float factor, uint8_t* codes) const {
        for (int i = 0; i < n; i += kLanes) {
            __m512i magnitude[4], negative_bit[4];
            __mmask16 minus[4];
            for (int j = 0; j < 4; ++j) {
                const __m512i bits = scaled(m + i + 16 * j, factor);
                magnitude[j] = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
                negative_bit[j] = _mm512_srli_epi32(bits, 31);
                minus[j] = _mm512_movepi32_mask(bits);
            }
            const __mmask64 negative = join(minus);
            const __m512i rank = m_ranks.look_up(magnitude, negative_bit), zero = _mm512_set1_epi8(127);
            store(_mm512_mask_subs_epu8(_mm512_add_epi8(zero, rank), negative, zero, rank), n - i, codes + i);
        }
    }
    void encode_v(const float* v, int n, float factor, uint8_t* codes) const {
        const __m512i none[4] = {};
        for (int i = 0; i < n; i += kLanes) {
            __m512i magnitude[4];
            for (int j = 0; j < 4; ++j) magnitude[j] = scaled(v + i + 16 * j, factor);
            __m512i rank = v_ranks.look_up(magnitude, none);
            if (_mm512_testn_epi8_mask(rank, rank)) rank = _mm512_max_epu8(rank, _mm512_maskz_set1_epi8(positive(v + i), 1));
            store(rank, n - i, codes + i);
        }
    }

  private:
    static __mmask64 first(int n) { return n < kLanes ? (1ull << n) - 1 : ~0ull; }

    static void decode(const DwordTable& levels, const uint8_t* codes, int n, float absmax, float* out) {
        const __m512 scale = _mm512_set1_ps(absmax);
        for (int i = 0; i < n; i += kLanes) {
            __m512i level[4];
            levels.look_up(interleave_order(_mm512_maskz_loadu_epi8(first(n - i), codes + i)), level);
            for (int j = 0; j < 4; ++j) _mm512_store_ps(out + i + 16 * j, _mm512_mul_ps(_mm512_castsi512_ps(level[j]), scale));
        }
    }
    static __m512i scaled(const float* x, float factor) {
        return _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(x), _mm512_set1_ps(factor)));
    }
    static __mmask64 positive(const float* v) {
        __mmask16 part[4];
        for (int j = 0; j < 4; ++j) {
            const __m512i bits = _mm512_load_si512(v + 16 * j);
            part[j] = _mm512_test_epi32_mask(bits, bits);
        }
        return join(part);
    }
    static void store(__m512i x, int n, uint8_t* codes) { _mm512_mask_storeu_epi8(codes, first(n), x); }

    DwordTable m_levels, v_levels;
    MagnitudeRanks m_ranks, v_ranks;
};

}  // namespace
