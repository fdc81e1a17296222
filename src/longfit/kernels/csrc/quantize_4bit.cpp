// Weight -> packed 4-bit codes and fp32 absmax (QLoRA, section 2 and 3; the rule is in numerics/blockwise.py).
#include "blocks.h"
#include "nearest.h"
#include "parallel.h"

namespace {

#if defined(LONGFIT_AVX512)

inline __m512 load16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load16(const bf16* x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline __m512 load16(const fp16* x, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x)); }

// Where the thresholds lie further apart than 1/15, as in NF4, [-1, 1] is cut into 31 buckets with at most one threshold each: the bucket
// knows how many thresholds lie below it, and one comparison does the rest. Otherwise (FP4) four halvings find the rank. Both read their
// tables from registers.
class Quantizer {
  public:
    explicit Quantizer(const Ranking& ranking) {
        alignas(64) float t[16], edge[32];
        alignas(64) int32_t code[16], below[32] = {};
        for (float& e : edge) e = float_of(0x7f800000);
        for (int i = 0; i < 16; ++i) {
            t[i] = ranking.thresholds[i < 15 ? i : 14];
            code[i] = ranking.code_of_rank[i];
        }
        for (int i = 0; i < 15; ++i) {
            const bool inside = t[i] >= -1 && t[i] <= 1;
            const int own = inside ? bucket_of(t[i]) : t[i] < 0 ? -16 : 16;
            for (int bucket = own + 1; bucket < 16; ++bucket) ++below[bucket & 31];
            if (!inside) continue;
            in_buckets = in_buckets && edge[own & 31] > 1;
            edge[own & 31] = t[i];
        }
        edge_low = _mm512_load_ps(edge), edge_high = _mm512_load_ps(edge + 16);
        below_low = _mm512_load_si512(below), below_high = _mm512_load_si512(below + 16);
        first = _mm512_load_ps(t);
        second = _mm512_castsi512_ps(_mm512_permutexvar_epi32(  // second[i] = t[i + 1]
            _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15), _mm512_castps_si512(first)));
        t3 = _mm512_set1_ps(t[3]), t7 = _mm512_set1_ps(t[7]), t11 = _mm512_set1_ps(t[11]);
        codes = _mm512_load_si512(code);
    }
    // Values scaled by `factor` -> bytes of two codes; the lanes beyond an odd count read as 0.
    template <class T> void pack(const T* x, __m512 factor, int64_t count, uint8_t* out) const {
        if (in_buckets) pack_ranked<true>(x, factor, count, out);
        else pack_ranked<false>(x, factor, count, out);
    }

  private:
    // 15.25 x rounded to a whole number, which the last bits of the sum hold; a table of 32 looks at the last 5.
    static constexpr float kBuckets = 15.25f, kRound = 12582912.0f;  // 1.5 * 2^23
    static int bucket_of(float x) { return static_cast<int>(__builtin_fmaf(x, kBuckets, kRound) - kRound); }

    __m512i bucketed_rank(__m512 s) const {
        const __m512i bucket = _mm512_castps_si512(_mm512_fmadd_ps(s, _mm512_set1_ps(kBuckets), _mm512_set1_ps(kRound)));
        const __mmask16 above = _mm512_cmp_ps_mask(s, _mm512_permutex2var_ps(edge_low, bucket, edge_high), _CMP_GT_OQ);
        const __m512i rank = _mm512_permutex2var_epi32(below_low, bucket, below_high);
        return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
    }
    __m512i halved_rank(__m512 s) const {
        const __mmask16 m8 = _mm512_cmp_ps_mask(s, t7, _CMP_GT_OQ);
        const __mmask16 m4 = _mm512_cmp_ps_mask(s, _mm512_mask_mov_ps(t3, m8, t11), _CMP_GT_OQ);
        __m512i rank = _mm512_maskz_set1_epi32(m8, 8);
        rank = _mm512_mask_add_epi32(rank, m4, rank, _mm512_set1_epi32(4));
        const __mmask16 m2 = _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(rank, second), _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, m2, rank, _mm512_set1_epi32(2));
        const __mmask16 m1 = _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(rank, first), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(rank, m1, rank, _mm512_set1_epi32(1));
    }
    template <bool buckets> __m128i pairs(__m512 x, __m512 factor) const {
        const __m512 s = _mm512_mul_ps(x, factor);
        const __m512i code = _mm512_permutexvar_epi32(buckets ? bucketed_rank(s) : halved_rank(s), codes);
        return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32)));
    }
    template <bool buckets, class T> void pack_ranked(const T* x, __m512 factor, int64_t count, uint8_t* out) const {
        for (; count >= 16; count -= 16, x += 16, out += 8)
            _mm_storel_epi64(reinterpret_cast<__m128i*>(out), pairs<buckets>(load16(x, 0xffff), factor));
        if (count > 0) {
            const __m128i tail = pairs<buckets>(load16(x, static_cast<__mmask16>((1u << count) - 1)), factor);
            _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1), tail);
        }
    }

    bool in_buckets = true;
    __m512 edge_low, edge_high, first, second, t3, t7, t11;
    __m512i below_low, below_high, codes;
};

#else

// Counts the thresholds below each value; written for the compiler to turn into vector code.
class Quantizer {
  public:
    explicit Quantizer(const Ranking& ranking) : ascending(ranking.ascending) {
        for (int i = 0; i < 15; ++i) t[i] = ranking.thresholds[i];
        for (int i = 0; i < 16; ++i) code_of_rank[i] = ranking.code_of_rank[i];
    }
    template <class T> void pack(const T* x, float factor, int64_t count, uint8_t* out) const {
        for (; count >= kChunk; count -= kChunk, x += kChunk, out += kChunk / 2) chunk(x, factor, out);
        if (count > 0) {
            T rest[kChunk] = {};
            uint8_t bytes[kChunk / 2];
            memcpy(rest, x, count * sizeof(T));
            chunk(rest, factor, bytes);
            memcpy(out, bytes, (count + 1) / 2);
        }
    }

  private:
    static constexpr int kChunk = 32;

    template <class T> void chunk(const T* x, float factor, uint8_t* out) const {
        float s[kChunk];
        int32_t rank[kChunk];
        for (int i = 0; i < kChunk; ++i) s[i] = widen(x[i]) * factor;
        for (int i = 0; i < kChunk; ++i) rank[i] = s[i] > t[0];
        for (int j = 1; j < 15; ++j)
            for (int i = 0; i < kChunk; ++i) rank[i] += s[i] > t[j];
        if (!ascending)
            for (int i = 0; i < kChunk; ++i) rank[i] = code_of_rank[rank[i]];
        for (int i = 0; i < kChunk / 2; ++i) out[i] = static_cast<uint8_t>(rank[2 * i] << 4 | rank[2 * i + 1]);
    }

    bool ascending;
    float t[15];
    uint8_t code_of_rank[16];
};

#endif

template <class T> void quantize_block(const Quantizer& quantizer, uint8_t highest, const T* x, int64_t count, uint8_t* packed, float* absmax) {
    const float top = absmax_of(x, count);
    if (!finite(top)) {
        *absmax = float_of(kNaN);
        memset(packed, highest << 4 | highest, (count + 1) / 2);
        return;
    }
    *absmax = top;
#if defined(LONGFIT_AVX512)
    quantizer.pack(x, _mm512_set1_ps(reciprocal_of(top)), count, packed);
#else
    quantizer.pack(x, reciprocal_of(top), count, packed);
#endif
}

}  // namespace

// packed: (numel + 1) / 2 bytes; an odd numel leaves the code of level 0 in the last nibble. block_size is even.
LONGFIT_EXPORT void KERNEL(longfit_quantize_4bit)(const void* values, int64_t numel, int dtype, const float* codebook, int64_t block_size,
                                                  uint8_t* packed, float* absmax, int threads) {
    const Ranking ranking(codebook, 16);
    const Quantizer quantizer(ranking);
    const uint8_t highest = ranking.highest();
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const T* x = static_cast<const T*>(values);
        const int64_t blocks = (numel + block_size - 1) / block_size;
        parallel_for(blocks, 16383 / block_size + 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t start = block * block_size;
                const int64_t count = numel - start < block_size ? numel - start : block_size;
                quantize_block(quantizer, highest, x + start, count, packed + start / 2, absmax + block);
            }
        });
        if (numel % 2) {
            uint8_t zero = 0;
            while (zero < 15 && ranking.thresholds[zero] < 0) ++zero;
            packed[numel / 2] = static_cast<uint8_t>((packed[numel / 2] & 0xf0) | ranking.code_of_rank[zero]);
        }
    });
}
