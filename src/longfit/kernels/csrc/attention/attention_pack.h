// The four layouts in which bf16 matrices enter gemm(), made from rows at any stride and padded with zeros.
//
// A matrix X has rows (tokens) and columns (head_dim, padded to a multiple of 16).
//   pack_rows        A operand X    [rows][columns]                K runs over columns
//   pack_columns     A operand X^T  [columns][rows]                K runs over rows
//   pack_pairs       B operand X    [rows / 2][columns][2]         K runs over rows
//   pack_transposed  B operand X^T  [columns / 2][rows][2]         K runs over columns
//
// Include only from translation units compiled for AVX-512 BF16: everything here has internal linkage.
#pragma once

#include "attention_plan.h"
#include "../weights_4bit/gemm_bf16.h"

namespace {

struct Rows {  // rows of a bf16 tensor; those from `count` on read as zeros, so do columns from `width` on
    const bf16* data;
    int64_t stride, count, width;

    // Columns [column, column + 32) of one row.
    __m512i load32(int64_t row, int64_t column) const {
        if (row >= count || column >= width) return _mm512_setzero_si512();
        const int64_t left = width - column;
        const __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
        return _mm512_maskz_loadu_epi16(inside, data + row * stride + column);
    }
};

inline Rows rows_of(const longfit_attention_view& view, int64_t b, int64_t h, int64_t token, int64_t count, int64_t width) {
    return {static_cast<const bf16*>(view.data) + b * view.batch + h * view.head + token * view.token, view.token, count, width};
}

inline void pack_rows(const Rows& x, int64_t rows, int64_t columns, bf16* packed) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += 32) {
            const __mmask32 inside = columns - c >= 32 ? ~0u : 0xffffu;
            _mm512_mask_storeu_epi16(packed + r * columns + c, inside, x.load32(r, c));
        }
}

inline void pack_pairs(const Rows& x, int64_t rows, int64_t columns, bf16* packed) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += 32) {
            __m512i first, second;
            interleave(x.load32(r, c), x.load32(r + 1, c), first, second);
            bf16* to = packed + r * columns + 2 * c;
            _mm512_storeu_si512(to, first);
            if (columns - c >= 32) _mm512_storeu_si512(to + 32, second);
        }
}

// rows is a multiple of 16.
inline void pack_transposed(const Rows& x, int64_t rows, int64_t columns, bf16* packed) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 32) {
            __m512i block[16];
            for (int i = 0; i < 16; ++i) block[i] = x.load32(r + i, c);
            transpose16(block);
            const int64_t pairs = columns - c < 32 ? (columns - c) / 2 : 16;
            for (int64_t p = 0; p < pairs; ++p) _mm512_storeu_si512(packed + (c + 2 * p) * rows + 2 * r, block[p]);
        }
}

// rows is a multiple of 32.
inline void pack_columns(const Rows& x, int64_t rows, int64_t columns, bf16* packed) {
    for (int64_t r = 0; r < rows; r += 32)
        for (int64_t c = 0; c < columns; c += 32) {
            __m512i low[16], high[16];
            for (int i = 0; i < 16; ++i) interleave(x.load32(r + 2 * i, c), x.load32(r + 2 * i + 1, c), low[i], high[i]);
            transpose16(low);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + (c + i) * rows + r, low[i]);
            if (columns - c < 32) continue;
            transpose16(high);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + (c + 16 + i) * rows + r, high[i]);
        }
}

// The way back: rows [count][columns] in bf16 from fp32 [columns][64], each of the 64 times its factor.
inline void store_transposed(const float* x, const float* factors, int64_t count, int64_t columns, bf16* to, int64_t stride) {
    for (int64_t r = 0; r < count; r += 16) {
        const __m512 factor = _mm512_load_ps(factors + r);
        for (int64_t c = 0; c < columns; c += 16) {
            __m512i block[16];
            for (int i = 0; i < 16; ++i) block[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(x + (c + i) * kPanel + r), factor));
            transpose16(block);
            const __mmask16 inside = columns - c >= 16 ? 0xffff : __mmask16((1u << (columns - c)) - 1);
            for (int64_t i = 0; i < least(16, count - r); ++i)
                _mm256_mask_storeu_epi16(to + (r + i) * stride + c, inside, (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(block[i])));
        }
    }
}

}  // namespace
