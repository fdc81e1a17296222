// Root-mean-square norm (Zhang and Sennrich, 2019) of rows of bf16, as Llama and its kin round it, and its gradient.
//
// A row stays in the first-level cache from its sum of squares to its result; nothing is held in fp32 but one number a row, and the
// weight's gradient.
#include "elementwise.h"
#include "../common/lanes_bf16.h"
#include "../common/parallel.h"

#include <algorithm>

namespace {

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds

template <class Work> void for_rows(int64_t rows, int64_t columns, int threads, const Work& work) {
    parallel_for(rows, kTask / (columns + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) work(row);
    });
}

}  // namespace

void longfit_rms_norm_forward_avx512_bf16(const void* x, const void* weight, float eps, int64_t rows, int64_t columns, void* out,
                                          float* inverse_rms, int threads) {
    const bf16* w = static_cast<const bf16*>(weight);
    for_rows(rows, columns, threads, [&](int64_t row) {
        const bf16* from = static_cast<const bf16*>(x) + row * columns;
        bf16* to = static_cast<bf16*>(out) + row * columns;
        __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t c = 0; c < columns; c += 2 * kLanes) {
            const __m512 a = load_lanes(from + c, lanes_below(c, columns));
            squares[0] = _mm512_fmadd_ps(a, a, squares[0]);
            if (c + kLanes >= columns) break;
            const __m512 b = load_lanes(from + c + kLanes, lanes_below(c + kLanes, columns));
            squares[1] = _mm512_fmadd_ps(b, b, squares[1]);
        }
        const float mean = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / float(columns);
        inverse_rms[row] = 1.f / __builtin_sqrtf(mean + eps);
        const __m512 factor = _mm512_set1_ps(inverse_rms[row]);
        for (int64_t c = 0; c < columns; c += kLanes) {
            const __mmask16 lanes = lanes_below(c, columns);
            const __m512 normed = rounded(_mm512_mul_ps(load_lanes(from + c, lanes), factor));
            store_lanes(to + c, lanes, _mm512_mul_ps(load_lanes(w + c, lanes), normed));
        }
    });
}

// With h = bf16(w dy) and n = bf16(x / rms):  dx = h / rms - x sum(h x) / (columns rms^3);  dw = sum over the rows of dy n.
void longfit_rms_norm_backward_avx512_bf16(const void* grad_out, const void* x, const void* weight, const float* inverse_rms, int64_t rows,
                                           int64_t columns, void* grad_x, float* grad_weight, int64_t summed_rows, int threads) {
    const bf16* w = static_cast<const bf16*>(weight);
    const auto row_backward = [&](int64_t row, float* weight_sums) {
        const bf16* from = static_cast<const bf16*>(x) + row * columns;
        const bf16* grad = static_cast<const bf16*>(grad_out) + row * columns;
        bf16* to = static_cast<bf16*>(grad_x) + row * columns;
        const float r = inverse_rms[row];
        const __m512 factor = _mm512_set1_ps(r);
        __m512 products = _mm512_setzero_ps();
        for (int64_t c = 0; c < columns; c += kLanes) {
            const __mmask16 lanes = lanes_below(c, columns);
            const __m512 dy = load_lanes(grad + c, lanes), value = load_lanes(from + c, lanes);
            products = _mm512_fmadd_ps(rounded(_mm512_mul_ps(dy, load_lanes(w + c, lanes))), value, products);
            if (!weight_sums) continue;
            const __m512 normed = rounded(_mm512_mul_ps(value, factor));
            _mm512_mask_storeu_ps(weight_sums + c, lanes, _mm512_fmadd_ps(dy, normed, _mm512_maskz_loadu_ps(lanes, weight_sums + c)));
        }
        const __m512 back = _mm512_set1_ps(-_mm512_reduce_add_ps(products) * r * r * r / float(columns));
        for (int64_t c = 0; c < columns; c += kLanes) {
            const __mmask16 lanes = lanes_below(c, columns);
            const __m512 h = rounded(_mm512_mul_ps(load_lanes(grad + c, lanes), load_lanes(w + c, lanes)));
            store_lanes(to + c, lanes, _mm512_fmadd_ps(h, factor, _mm512_mul_ps(load_lanes(from + c, lanes), back)));
        }
    };
    if (!grad_weight) {
        for_rows(rows, columns, threads, [&](int64_t row) { row_backward(row, nullptr); });
        return;
    }
    // Each sum belongs to rows that are the same for any number of threads, and so are its bits.
    const int64_t groups = (rows + summed_rows - 1) / summed_rows;
    parallel_for(groups, kTask / (summed_rows * columns + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            float* sums = grad_weight + group * columns;
            std::fill(sums, sums + columns, 0.f);
            const int64_t last = std::min(rows, (group + 1) * summed_rows);
            for (int64_t row = group * summed_rows; row < last; ++row) row_backward(row, sums);
        }
    });
}
