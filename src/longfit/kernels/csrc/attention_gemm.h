// The one matrix product under attention: C[M, N] (+)= A[M, K] B[K, N] with bf16 operands and fp32 sums.
//
// vdpbf16ps multiplies two neighbouring bf16 along K at once, so both operands hold K in pairs:
//   A  row-major [M][K]: one broadcast of 32 bits is a pair of K for one row; rows at any stride, nothing to pack;
//   B  [K / 2][N][2]: one vector is a pair of K for 16 columns.
// Six rows by four vectors of columns are held in 24 of the 32 registers: ten loads feed 24 products, and the
// processor retires about one load and one product a cycle.
//
// Include only from translation units compiled for AVX-512 BF16: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include <stdint.h>
#include <string.h>

namespace {

using bf16 = uint16_t;

constexpr int kVector = 16;         // fp32 lanes of a register
constexpr int64_t kTileRows = 6;    // register tile
constexpr int64_t kTileVectors = 4;

inline __m512bh broadcast_pair(const bf16* pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

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
