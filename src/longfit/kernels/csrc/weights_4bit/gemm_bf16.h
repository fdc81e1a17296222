// The one matrix product of bf16 kernels: C[M, N] (+)= A[M, K] B[K, N] with bf16 operands and fp32 sums, and the two shuffles that
// make B.
//
// vdpbf16ps multiplies two neighbouring bf16 along K at once, so both operands hold K in pairs:
//   A  row-major [M][K]: one broadcast of 32 bits is a pair of K for one row; rows at any stride, nothing to pack;
//   B  [K / 2][N][2]: one vector is a pair of K for 16 columns.
// Six rows by four vectors of columns are held in 24 of the 32 registers: ten loads feed 24 products, and the
// processor retires about one load and one product a cycle. Where there is AMX, gemm() is that of ../common/gemm_amx.h.
//
// Include only from translation units compiled for AVX-512 BF16: everything here has internal linkage.
#pragma once

#include "../common/floats.h"

namespace {

constexpr int kVector = 16;         // fp32 lanes of a register
constexpr int64_t kTileRows = 6;    // register tile
constexpr int64_t kTileVectors = 4;

inline __m512bh broadcast_pair(const bf16* pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

// Transposes a 16 x 16 matrix of 32-bit elements held in 16 registers.
inline void transpose16(__m512i x[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
    // x[4 * i + r]: 128-bit lane l holds column 4 * l + r of rows 4 * i .. 4 * i + 3
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const __m512i low01 = _mm512_shuffle_i32x4(x[r], x[4 + r], 0x44), high01 = _mm512_shuffle_i32x4(x[r], x[4 + r], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0xee);
        y[r] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        y[4 + r] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        y[8 + r] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        y[12 + r] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Interleaves 32 elements of two rows: first[0] = a0 b0 .. a15 b15, second = a16 b16 .. a31 b31.
inline void interleave(__m512i a, __m512i b, __m512i& first, __m512i& second) {
    alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i index = _mm512_load_si512(kFirst);
    first = _mm512_permutex2var_epi16(a, index, b);
    second = _mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b);
}

}  // namespace

#if defined(LONGFIT_AMX)

#include "../common/gemm_amx.h"

#else

namespace {

constexpr int64_t kScoreRows = 24;  // of C that should still be in the first-level cache when the next operation reads them
constexpr int64_t kRowStep = 2;     // of A, so that none are computed by half: keys come in pairs
constexpr int64_t kDepthStep = 16;

struct Tiles {  // gemm() needs no registers but those of vectors
    Tiles() {}
    ~Tiles() {}
};

template <int Rows, int Vectors, bool Add>
inline void gemm_tile(int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c, int64_t ldc) {
    __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j)
            sum[i][j] = Add ? _mm512_loadu_ps(c + i * ldc + j * kVector) : _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[Vectors];
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j)
            columns[j] = (__m512bh)_mm512_loadu_si512(b + p * ldb + j * 2 * kVector);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            const __m512bh row = broadcast_pair(a + i * lda + 2 * p);
#pragma GCC unroll 8
            for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(c + i * ldc + j * kVector, sum[i][j]);
}

template <int Vectors, bool Add>
inline void gemm_panel(int64_t rows, int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                       int64_t ldc) {
    for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * lda, c += kTileRows * ldc)
        gemm_tile<kTileRows, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
    switch (rows) {
        case 5: return gemm_tile<5, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
        case 4: return gemm_tile<4, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
        case 3: return gemm_tile<3, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
        case 2: return gemm_tile<2, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
        case 1: return gemm_tile<1, Vectors, Add>(pairs, a, lda, b, ldb, c, ldc);
    }
}

// rows = M, vectors = N / 16, pairs = K / 2; lda, ldb (of a pair of K) and ldc in elements.
template <bool Add>
inline void gemm(int64_t rows, int64_t vectors, int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t ldb,
                         float* c, int64_t ldc) {
    // One panel of B (at most 64 columns) stays in the first-level cache while all rows pass.
    for (; vectors > 0; vectors -= kTileVectors, b += kTileVectors * 2 * kVector, c += kTileVectors * kVector) {
        switch (vectors < kTileVectors ? vectors : kTileVectors) {
            case 4: gemm_panel<4, Add>(rows, pairs, a, lda, b, ldb, c, ldc); break;
            case 3: gemm_panel<3, Add>(rows, pairs, a, lda, b, ldb, c, ldc); break;
            case 2: gemm_panel<2, Add>(rows, pairs, a, lda, b, ldb, c, ldc); break;
            case 1: gemm_panel<1, Add>(rows, pairs, a, lda, b, ldb, c, ldc); break;
        }
    }
}

}  // namespace

#endif
