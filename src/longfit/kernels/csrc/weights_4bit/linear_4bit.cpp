// Y = X dq(W)^T for a few rows of X, as in generation: W is read once, in 4 bits, and each piece of it lives in the first-level cache
// for as long as the rows of X are multiplied with it. (More rows go to a GEMM; kernels/cpu/weights_4bit.py decides.)
#include "dot.h"
#include "../common/parallel.h"
#include "weight4.h"

namespace {

constexpr int64_t kRows = 4;       // rows of W at once: they share the loads of X
constexpr int64_t kDepth = 2048;   // of each: 16 KiB in 16 bits
constexpr int64_t kMostRows = 16;  // rows of X
constexpr int64_t kTask = 16384;   // weights: some microseconds
constexpr int64_t kAhead = 4096;   // bytes of codes from a prefetch to its use: 4096 x 4096 on AVX2 took 3.7 ms without and 2.2 with it

// The codes of a run of columns in one row, into the cache.
inline void prefetch(const longfit_weight4& w, int64_t row, int64_t column, int64_t count) {
    const uint8_t* codes = w.codes + row * w.code_stride + (row * w.element_stride + column) / 2;
    for (int64_t at = 0; at < count / 2; at += 64) __builtin_prefetch(codes + at);
}

template <class T>
void few_rows(const longfit_weight4& w, int64_t out_features, int64_t in_features, const T* x, int64_t num_rows, T* y, int threads) {
    const bool plain = plain_levels(w.codebook);
    const int64_t groups = (out_features + kRows - 1) / kRows;
    parallel_for(groups, (kTask - 1) / (kRows * in_features) + 1, threads, [&](int64_t begin, int64_t end) {
        alignas(64) T piece[kRows * kDepth];
        for (int64_t group = begin; group < end; ++group) {
            const int64_t row = group * kRows, rows = out_features - row < kRows ? out_features - row : kRows;
            float sums[kMostRows][kRows] = {};
            for (int64_t column = 0; column < in_features; column += kDepth) {
                const int64_t depth = in_features - column < kDepth ? in_features - column : kDepth;
                for (int64_t j = 0; j < rows; ++j) {
                    prefetch(w, row + kRows + j, column, depth);  // where the next group reads
                    dequantize_run<T, false>(w, plain, row + j, column, depth, piece + j * kDepth);
                }
                for (int64_t j = rows; j < kRows; ++j) memset(piece + j * kDepth, 0, depth * sizeof(T));
                int64_t m = 0;
                for (; m + 1 < num_rows; m += 2) dot4<2>(piece, kDepth, x + m * in_features + column, in_features, depth, sums + m);
                if (m < num_rows) dot4<1>(piece, kDepth, x + m * in_features + column, in_features, depth, sums + m);
            }
            for (int64_t m = 0; m < num_rows; ++m)
                for (int64_t j = 0; j < rows; ++j) y[m * out_features + row + j] = narrow<T>(sums[m][j]);
        }
    });
}

#if defined(LONGFIT_AVX2)

#if !defined(LONGFIT_AVX512)
// Eight levels at a time from two tables of eight: those of codes below 8, and in which bits those from 8 on differ.
struct LevelPairs {
    __m256 below8;
    __m256i change;

    LevelPairs(const float* codebook) : below8(_mm256_loadu_ps(codebook)) {
        change = _mm256_xor_si256(_mm256_castps_si256(below8), _mm256_castps_si256(_mm256_loadu_ps(codebook + 8)));
    }
    Vec lookup(const uint8_t* packed) const {  // 4 bytes -> 8 values
        int32_t bytes;
        memcpy(&bytes, packed, 4);
        const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
        const __m256i from8 = _mm256_srai_epi32(_mm256_slli_epi32(codes, 28), 31);
        const __m256i flips = _mm256_and_si256(_mm256_permutevar8x32_epi32(change, codes), from8);
        return (Vec)_mm256_xor_si256(_mm256_castps_si256(_mm256_permutevar8x32_ps(below8, codes)), flips);
    }
};
#endif

// The dot product of one block's levels with as many numbers, in two sums.
template <class Table> inline Vec dot_levels(const Table& levels, const uint8_t* codes, const float* x, int64_t count) {
    Vec sums[2] = {broadcast(0.f), broadcast(0.f)};
    for (int64_t at = 0; at < count; at += 2 * kLanes, codes += kLanes, x += 2 * kLanes) {
        Vec weights[2];
#if defined(LONGFIT_AVX512)
        __m512 first, second;
        levels.lookup(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), first, second);
        weights[0] = (Vec)first, weights[1] = (Vec)second;
#else
        weights[0] = levels.lookup(codes), weights[1] = levels.lookup(codes + kLanes / 2);
#endif
        for (int i = 0; i < 2; ++i) sums[i] = fma(weights[i], load(x + i * kLanes), sums[i]);
    }
    return sums[0] + sums[1];
}

// Whether every row of W begins with a block and ends with one.
inline bool rows_are_whole_blocks(const longfit_weight4& w, int64_t in_features) {
    return in_features % w.block_size == 0 && w.element_stride % w.block_size == 0;
}

// One row of x in float32: a weight goes from its code to its product in registers, and a block's sum meets its constant once.
void one_row(const longfit_weight4& w, int64_t out_features, int64_t in_features, const float* x, float* y, int threads) {
#if defined(LONGFIT_AVX512)
    const Levels<float> levels(w.codebook, 1.f, true);
#else
    const LevelPairs levels(w.codebook);
#endif
    parallel_for(out_features, (kTask - 1) / in_features + 1, threads, [&](int64_t begin, int64_t end) {
        float absmax[AbsmaxCursor::kGroup];
        for (int64_t row = begin; row < end; ++row) {
            const int64_t element = row * w.element_stride;
            const uint8_t* codes = w.codes + row * w.code_stride + element / 2;
            AbsmaxCursor constants(w, row, element >> log2_of(w.block_size));
            Vec sum = broadcast(0.f);
            for (int64_t column = 0; column < in_features;) {
                const int64_t left = (in_features - column) >> log2_of(w.block_size);
                const int64_t group = left < AbsmaxCursor::kGroup ? left : AbsmaxCursor::kGroup;
                constants.next(group, absmax);
                for (int64_t i = 0; i < group; ++i, column += w.block_size) {
                    __builtin_prefetch(codes + column / 2 + kAhead);
                    sum = fma(dot_levels(levels, codes + column / 2, x + column, w.block_size), broadcast(absmax[i]), sum);
                }
            }
            y[row] = sum_of(sum);
        }
    });
}

#endif

}  // namespace

// x [num_rows, in_features] and y [num_rows, out_features] are dense, num_rows at most 16.
LONGFIT_EXPORT void KERNEL(longfit_linear_4bit)(const longfit_weight4* w, int64_t out_features, int64_t in_features, const void* x,
                                                int64_t num_rows, void* y, int dtype, int threads) {
#if defined(LONGFIT_AVX2)
    if (dtype == LONGFIT_FP32 && num_rows == 1 && rows_are_whole_blocks(*w, in_features))
        return one_row(*w, out_features, in_features, static_cast<const float*>(x), static_cast<float*>(y), threads);
#endif
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        few_rows(*w, out_features, in_features, static_cast<const T*>(x), num_rows, static_cast<T*>(y), threads);
    });
}
