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
                for (int64_t j = 0; j < rows; ++j) dequantize_run<T, false>(w, plain, row + j, column, depth, piece + j * kDepth);
                for (int64_t j = rows; j < kRows; ++j) memset(piece + j * kDepth, 0, depth * sizeof(T));
                for (int64_t m = 0; m < num_rows; ++m) dot4(piece, kDepth, x + m * in_features + column, depth, sums[m]);
            }
            for (int64_t m = 0; m < num_rows; ++m)
                for (int64_t j = 0; j < rows; ++j) y[m * out_features + row + j] = narrow<T>(sums[m][j]);
        }
    });
}

}  // namespace

// x [num_rows, in_features] and y [num_rows, out_features] are dense, num_rows at most 16.
LONGFIT_EXPORT void KERNEL(longfit_linear_4bit)(const longfit_weight4* w, int64_t out_features, int64_t in_features, const void* x,
                                                int64_t num_rows, void* y, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        few_rows(*w, out_features, in_features, static_cast<const T*>(x), num_rows, static_cast<T*>(y), threads);
    });
}
