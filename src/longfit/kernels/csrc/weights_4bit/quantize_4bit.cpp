// Weight -> packed 4-bit codes and fp32 absmax (QLoRA, section 2 and 3; the rule is in numerics/blockwise.py).
#include "../common/blocks.h"
#include "../optim/nearest.h"
#include "../common/parallel.h"

namespace {

template <bool> struct Bool {};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(LONGFIT_AVX512)

// 64 values in the order that packing wants: even and odd values of the first 32, even and odd values of the last 32. Lanes beyond `count`
// are 0.
inline void load64(const bf16* x, int64_t count, __m512 out[4]) {
    const uint64_t lanes = count >= 64 ? ~0ull : (1ull << count) - 1;
    for (int i = 0; i < 2; ++i) {
        const __m512i pairs = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes >> (32 * i)), x + 32 * i);
        out[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        out[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
}
inline __m512 load16(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
inline __m512 load16(const fp16* x, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x)); }
template <class T> inline void load64(const T* x, int64_t count, __m512 out[4]) {  // fp32, fp16
    const uint64_t lanes = count >= 64 ? ~0ull : (1ull << count) - 1;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int i = 0; i < 2; ++i) {
        const __m512 low = load16(x + 32 * i, static_cast<__mmask16>(lanes >> (32 * i)));
        const __m512 high = load16(x + 32 * i + 16, static_cast<__mmask16>(lanes >> (32 * i + 16)));
        out[2 * i] = _mm512_permutex2var_ps(low, even, high);
        out[2 * i + 1] = _mm512_permutex2var_ps(low, odd, high);
    }
}

// Finds "places" of values, one byte each, and what code stands for a place.
//
// Where the thresholds lie further apart than 1/15, as in NF4, [-1, 1] is cut into 31 buckets with at most one threshold each, and a place
// is a bucket and whether the value lies above its threshold. Otherwise (FP4) four halvings find the rank, which is the place. All tables
// are in registers.
class Quantizer {
  public:
    explicit Quantizer(const Ranking& ranking) {
        alignas(64) float t[16], edge[32];
        alignas(64) uint8_t code[64] = {};
        for (float& e : edge) e = float_of(0x7f800000);
        for (int i = 0; i < 16; ++i) t[i] = ranking.thresholds[i < 15 ? i : 14];
        for (int i = 0; i < 15; ++i) {
            if (t[i] < -1 || t[i] > 1) continue;  // moved to infinity
            float& own = edge[bucket_of(t[i]) & 31];
            in_buckets = in_buckets && own > 1;
            own = t[i];
        }
        if (in_buckets) {
            int rank = 0;
            while (rank < 15 && t[rank] < -1) ++rank;
            for (int bucket = -15; bucket < 16; ++bucket) {
                code[bucket & 63] = ranking.code_of_rank[rank];
                rank += edge[bucket & 31] <= 1;
                code[(bucket & 63) ^ kAbove] = ranking.code_of_rank[rank];
            }
        } else {
            memcpy(code, ranking.code_of_rank, 16);
        }
        edge_low = _mm512_load_ps(edge), edge_high = _mm512_load_ps(edge + 16);
        first = _mm512_load_ps(t);
        second = _mm512_castsi512_ps(_mm512_permutexvar_epi32(  // second[i] = t[i + 1]
            _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15), _mm512_castps_si512(first)));
        t3 = _mm512_set1_ps(t[3]), t7 = _mm512_set1_ps(t[7]), t11 = _mm512_set1_ps(t[11]);
        codes = _mm512_load_si512(code);
    }
    // Calls work(Bool<...>{}) with what tells pack() how to search, so that the loop over the blocks is compiled for either.
    template <class Work> void with_search(const Work& work) const {
        if (in_buckets) work(Bool<true>{});
        else work(Bool<false>{});
    }
    // Values scaled by `factor` -> bytes of two codes; the half of a byte beyond an odd count is that of a 0.
    template <bool buckets, class T> void pack(Bool<buckets>, const T* x, float factor, int64_t count, uint8_t* out) const {
        const __m512 factors = _mm512_set1_ps(factor);
        for (; count >= 64; count -= 64, x += 64, out += 32) pack64<buckets>(x, factors, 64, out);
        if (count > 0) pack64<buckets>(x, factors, count, out);
    }

  private:
    // 15.25 x rounded to a whole number, -15 to 15, which the last bits of the sum hold: a table of 32 looks at the last 5. Of the last 6,
    // kAbove then flips the first, and no two places are the same.
    static constexpr float kBuckets = 15.25f, kRound = 12582912.0f;  // 1.5 * 2^23
    static constexpr int kAbove = 32;
    static int bucket_of(float x) { return static_cast<int>(__builtin_fmaf(x, kBuckets, kRound) - kRound); }

    __m512i bucketed_place(__m512 s) const {
        const __m512i bucket = _mm512_castps_si512(_mm512_fmadd_ps(s, _mm512_set1_ps(kBuckets), _mm512_set1_ps(kRound)));
        const __mmask16 above = _mm512_cmp_ps_mask(s, _mm512_permutex2var_ps(edge_low, bucket, edge_high), _CMP_GT_OQ);
        return _mm512_mask_xor_epi32(bucket, above, bucket, _mm512_set1_epi32(kAbove));
    }
    __m512i halved_place(__m512 s) const {
        const __mmask16 m8 = _mm512_cmp_ps_mask(s, t7, _CMP_GT_OQ);
        const __mmask16 m4 = _mm512_cmp_ps_mask(s, _mm512_mask_mov_ps(t3, m8, t11), _CMP_GT_OQ);
        __m512i rank = _mm512_maskz_set1_epi32(m8, 8);
        rank = _mm512_mask_add_epi32(rank, m4, rank, _mm512_set1_epi32(4));
        const __mmask16 m2 = _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(rank, second), _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, m2, rank, _mm512_set1_epi32(2));
        const __mmask16 m1 = _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(rank, first), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(rank, m1, rank, _mm512_set1_epi32(1));
    }
    // The last 6 bits of each byte -> codes.
    __m512i look_up(__m512i places) const {
#if defined(LONGFIT_AVX512_BF16)
        return _mm512_permutexvar_epi8(places, codes);
#else
        const __m512i quarter = _mm512_and_si512(_mm512_srli_epi16(places, 4), _mm512_set1_epi8(3));
        const __m512i place = _mm512_and_si512(places, _mm512_set1_epi8(15));  // bit 7 would make it 0
        __m512i found = _mm512_setzero_si512();
        const __m512i tables[4] = {_mm512_shuffle_i32x4(codes, codes, 0x00), _mm512_shuffle_i32x4(codes, codes, 0x55),
                                   _mm512_shuffle_i32x4(codes, codes, 0xaa), _mm512_shuffle_i32x4(codes, codes, 0xff)};
        for (int i = 0; i < 4; ++i)
            found = _mm512_mask_shuffle_epi8(found, _mm512_cmpeq_epi8_mask(quarter, _mm512_set1_epi8(static_cast<char>(i))), tables[i], place);
        return found;
#endif
    }
    // A dword gathers the places of four values, one byte each: of an even and an odd value, twice. They become codes, then two bytes.
    template <bool buckets, class T> inline void pack64(const T* x, __m512 factor, int64_t count, uint8_t* out) const {
        __m512 value[4];
        __m512i place[4];
        load64(x, count, value);
        for (int i = 0; i < 4; ++i) {
            const __m512 s = _mm512_mul_ps(value[i], factor);
            place[i] = buckets ? bucketed_place(s) : halved_place(s);
        }
        __m512i places = _mm512_mask_blend_epi8(0x2222222222222222, place[0], _mm512_slli_epi32(place[1], 8));
        places = _mm512_mask_blend_epi8(0x4444444444444444, places, _mm512_slli_epi32(place[2], 16));
        places = _mm512_mask_blend_epi8(0x8888888888888888, places, _mm512_slli_epi32(place[3], 24));
        const __m512i bytes = _mm512_maddubs_epi16(look_up(places), _mm512_set1_epi16(0x0110));  // 16 even + odd
#if defined(LONGFIT_AVX512_BF16)
        alignas(64) static const uint8_t first_and_third[64] = {0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                                2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62};
        const __m256i all = _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_load_si512(first_and_third), bytes));
#else
        const __m128i first_half = _mm512_cvtepi32_epi8(bytes), last_half = _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 16));
        const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(first_half), last_half, 1);
#endif
        if (count >= 64) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), all);
        else _mm256_mask_storeu_epi8(out, static_cast<__mmask32>((1ull << ((count + 1) / 2)) - 1), all);
    }

    bool in_buckets = true;
    __m512 edge_low, edge_high, first, second, t3, t7, t11;
    __m512i codes;
};

#else

// Counts the thresholds below each value; written for the compiler to turn into vector code.
class Quantizer {
  public:
    explicit Quantizer(const Ranking& ranking) : ascending(ranking.ascending) {
        for (int i = 0; i < 15; ++i) t[i] = ranking.thresholds[i];
        for (int i = 0; i < 16; ++i) code_of_rank[i] = ranking.code_of_rank[i];
    }
    template <class Work> void with_search(const Work& work) const { work(Bool<false>{}); }
    template <class T> void pack(Bool<false>, const T* x, float factor, int64_t count, uint8_t* out) const {
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

// Up to kGroup blocks, of which the last may be short.
template <class Search, class T>
inline void quantize_group(const Quantizer& quantizer, Search search, uint8_t highest, const T* x, int64_t numel, int64_t block_size,
                           uint8_t* packed, float* absmax) {
    float factor[kGroup];
    const int64_t blocks = (numel + block_size - 1) / block_size;
    if (numel == kGroup * block_size) absmax_of_group(x, block_size, absmax);
    else for (int64_t i = 0; i < blocks; ++i) absmax[i] = absmax_of(x + i * block_size, least(block_size, numel - i * block_size));
    for (int64_t i = 0; i < blocks; ++i) factor[i] = reciprocal_of(absmax[i]);
    for (int64_t i = 0; i < blocks; ++i, x += block_size, packed += block_size / 2, numel -= block_size) {
        const int64_t count = least(block_size, numel);
        if (finite(absmax[i])) {
            if (count == 64) quantizer.pack(search, x, factor[i], 64, packed);  // the usual size, without a loop
            else quantizer.pack(search, x, factor[i], count, packed);
        } else {
            absmax[i] = float_of(kNaN);
            memset(packed, highest << 4 | highest, (count + 1) / 2);
        }
    }
}

}  // namespace

// packed: (numel + 1) / 2 bytes; an odd numel leaves the code of level 0 in the last nibble. block_size is a multiple of 32.
LONGFIT_EXPORT void KERNEL(longfit_quantize_4bit)(const void* values, int64_t numel, int dtype, const float* codebook, int64_t block_size,
                                                  uint8_t* packed, float* absmax, int threads) {
    const Ranking ranking(codebook, 16);
    const Quantizer quantizer(ranking);
    const uint8_t highest = ranking.highest();
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const T* x = static_cast<const T*>(values);
        const int64_t group = kGroup * block_size;
        parallel_for((numel + group - 1) / group, 16383 / group + 1, threads, [&](int64_t begin, int64_t end) {
            const Quantizer own = quantizer;  // its tables stay in registers
            own.with_search([&](auto search) {
                for (int64_t start = begin * group; start < least(end * group, numel); start += group)
                    quantize_group(own, search, highest, x + start, least(group, numel - start), block_size, packed + start / 2,
                                   absmax + start / block_size);
            });
        });
        if (numel % 2) {
            uint8_t zero = 0;
            while (zero < 15 && ranking.thresholds[zero] < 0) ++zero;
            packed[numel / 2] = static_cast<uint8_t>((packed[numel / 2] & 0xf0) | ranking.code_of_rank[zero]);
        }
    });
}
