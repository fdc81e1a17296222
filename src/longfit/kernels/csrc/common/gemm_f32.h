// The one matrix product of float32 kernels: C[M, N] (+)= A[M, K] B[K, N] for a panel of N columns, in registers.
//
// Six rows by a panel are held in registers while K passes: 12 of AVX2's 16 (6 x 16 numbers), 24 of the 32 of AVX-512 (6 x 64) and NEON
// (6 x 16). A step of K loads a row of the panel and broadcasts six numbers of A, so A lies where it lies: row-major, or transposed. The
// panel has to be packed (BLIS: Van Zee and van de Geijn, 2015). A sum goes up K one by one, and what it is added to comes last: a sum of
// sums, as over blocks of keys, errs less than one long sum.
#pragma once

#include "vec.h"

namespace {

constexpr int64_t kTileRows = 6;
#if defined(LONGFIT_AVX512) || defined(LONGFIT_NEON)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int64_t kColumns = kTileVectors * kLanes;  // of a panel: B [K][kColumns], C [M][kColumns]

template <int Rows, int Vectors, bool Add, bool Transposed>
inline void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, float* c) {
    Vec sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sum[i][j] = broadcast(0.f);
#pragma GCC unroll 4
    for (int64_t p = 0; p < depth; ++p) {
        Vec columns[Vectors];
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) columns[j] = load(b + p * kColumns + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            const Vec row = broadcast(Transposed ? a[p * a_stride + i] : a[i * a_stride + p]);
#pragma GCC unroll 8
            for (int j = 0; j < Vectors; ++j) sum[i][j] = fma(row, columns[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) {
            float* to = c + i * kColumns + j * kLanes;
            store(to, Add ? load(to) + sum[i][j] : sum[i][j]);
        }
}

template <int Vectors, bool Add, bool Transposed>
inline void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b, float* c) {
    const int64_t step = kTileRows * (Transposed ? 1 : a_stride);
    for (; rows >= kTileRows; rows -= kTileRows, a += step, c += kTileRows * kColumns)
        multiply_tile<kTileRows, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
    switch (rows) {
        case 5: return multiply_tile<5, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
        case 4: return multiply_tile<4, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
        case 3: return multiply_tile<3, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
        case 2: return multiply_tile<2, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
        case 1: return multiply_tile<1, Vectors, Add, Transposed>(depth, a, a_stride, b, c);
    }
}

// A is [rows][depth] with a_stride from row to row, or, transposed, [depth][rows]. Only the first `columns` of the panel are computed,
// rounded up to whole vectors.
template <bool Add, bool Transposed>
[[gnu::noinline]] void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b, float* c) {
    if (columns > (kTileVectors - 1) * kLanes) return multiply_panel<kTileVectors, Add, Transposed>(rows, depth, a, a_stride, b, c);
#if defined(LONGFIT_AVX512) || defined(LONGFIT_NEON)
    if (columns > 2 * kLanes) return multiply_panel<3, Add, Transposed>(rows, depth, a, a_stride, b, c);
    if (columns > kLanes) return multiply_panel<2, Add, Transposed>(rows, depth, a, a_stride, b, c);
#endif
    multiply_panel<1, Add, Transposed>(rows, depth, a, a_stride, b, c);
}

}  // namespace
