// Root-mean-square norm (Zhang and Sennrich, 2019) of rows, as Llama and its kin round it, and its gradient.
//
// A row stays in the first-level cache from its sum of squares to its result; nothing is held in float32 but one number a row, and the
// weight's gradient. Tensors are dense float32, bf16 or fp16; what the plain module rounds to their type on the way is rounded here too.
#include "../common/parallel.h"
#include "../common/vec.h"

namespace {

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds

template <class Work> void for_rows(int64_t rows, int64_t columns, int threads, const Work& work) {
    parallel_for(rows, kTask / (columns + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) work(row);
    });
}

template <class T> void forward_row(const T* x, const T* weight, float eps, int64_t columns, T* out, float* inverse_rms) {
    Vec squares[2] = {broadcast(0.f), broadcast(0.f)};
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
        for (int i = 0; i < 2; ++i) {
            const Vec value = load(x + c + i * kLanes);
            squares[i] = fma(value, value, squares[i]);
        }
    for (; c < columns; c += kLanes) {
        const Vec value = load_part(x + c, columns - c);
        squares[0] = fma(value, value, squares[0]);
    }
    const float mean = sum_of(squares[0] + squares[1]) / float(columns);
    *inverse_rms = 1.f / __builtin_sqrtf(mean + eps);
    const Vec factor = broadcast(*inverse_rms);
    const auto norm = [&](Vec value, Vec w) { return w * rounded<T>(value * factor); };
    for (c = 0; c + kLanes <= columns; c += kLanes) store(out + c, norm(load(x + c), load(weight + c)));
    if (c < columns) store_part(out + c, columns - c, norm(load_part(x + c, columns - c), load_part(weight + c, columns - c)));
}

// With h = rounded(w dy) and n = rounded(x / rms):  dx = h / rms - x sum(h x) / (columns rms^3);  weight_sums += dy n, unless it is null.
template <class T>
void backward_row(const T* grad, const T* x, const T* weight, float inverse_rms, int64_t columns, T* grad_x, float* weight_sums) {
    const Vec factor = broadcast(inverse_rms);
    Vec products = broadcast(0.f);
    for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t left = columns - c;
        const Vec dy = load_part(grad + c, left), value = load_part(x + c, left);
        products = fma(rounded<T>(dy * load_part(weight + c, left)), value, products);
        if (weight_sums) store_part(weight_sums + c, left, fma(dy, rounded<T>(value * factor), load_part(weight_sums + c, left)));
    }
    const Vec back = broadcast(-sum_of(products) * inverse_rms * inverse_rms * inverse_rms / float(columns));
    for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t left = columns - c;
        const Vec h = rounded<T>(load_part(grad + c, left) * load_part(weight + c, left));
        store_part(grad_x + c, left, fma(h, factor, load_part(x + c, left) * back));
    }
}

}  // namespace

// out = w * rounded(x / rms(x)) of each row [columns];  inverse_rms fp32 [rows].
LONGFIT_EXPORT void KERNEL(longfit_rms_norm_forward)(const void* x, const void* weight, float eps, int64_t rows, int64_t columns, void* out,
                                                     float* inverse_rms, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        for_rows(rows, columns, threads, [&](int64_t row) {
            forward_row(static_cast<const T*>(x) + row * columns, static_cast<const T*>(weight), eps, columns,
                        static_cast<T*>(out) + row * columns, inverse_rms + row);
        });
    });
}

// The weight's gradient, unless it is null, comes as sums over `summed_rows` rows each: fp32 [ceil(rows / summed_rows), columns]. Each sum
// belongs to rows that are the same for any number of threads, and so are its bits.
LONGFIT_EXPORT void KERNEL(longfit_rms_norm_backward)(const void* grad_out, const void* x, const void* weight, const float* inverse_rms,
                                                      int64_t rows, int64_t columns, void* grad_x, float* grad_weight, int64_t summed_rows,
                                                      int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto work = [&](int64_t row, float* sums) {
            backward_row(static_cast<const T*>(grad_out) + row * columns, static_cast<const T*>(x) + row * columns,
                         static_cast<const T*>(weight), inverse_rms[row], columns, static_cast<T*>(grad_x) + row * columns, sums);
        };
        if (!grad_weight) {
            for_rows(rows, columns, threads, [&](int64_t row) { work(row, nullptr); });
            return;
        }
        const int64_t groups = (rows + summed_rows - 1) / summed_rows;
        parallel_for(groups, kTask / (summed_rows * columns + 1) + 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t group = begin; group < end; ++group) {
                float* sums = grad_weight + group * columns;
                for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
                for (int64_t row = group * summed_rows; row < rows && row < (group + 1) * summed_rows; ++row) work(row, sums);
            }
        });
    });
}
