// The gated product silu(gate) * up (Shazeer, GLU Variants Improve Transformer, 2020), and its gradient.
//
// Tensors are dense float32, bf16 or fp16; what the plain modules round to their type on the way is rounded here too.
#include "../common/parallel.h"
#include "../common/vec.h"

namespace {

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds

inline Vec one_plus_exp_minus(Vec x) { return broadcast(1.f) + exponential(broadcast(0.f) - x); }

// work(at, count): a vector of elements, the last one perhaps in part.
template <class Work> void for_vectors(int64_t count, int threads, const Work& work) {
    parallel_for((count + kLanes - 1) / kLanes, kTask / kLanes, threads, [&](int64_t begin, int64_t end) {
        const int64_t whole = end * kLanes <= count ? end : end - 1;
        for (int64_t vector = begin; vector < whole; ++vector) work(vector * kLanes, int64_t(kLanes));
        if (whole < end) work(whole * kLanes, count - whole * kLanes);
    });
}

}  // namespace

LONGFIT_EXPORT void KERNEL(longfit_swiglu_forward)(const void* gate, const void* up, int64_t count, void* out, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        for_vectors(count, threads, [&](int64_t at, int64_t left) {
            const Vec g = load_part(static_cast<const T*>(gate) + at, left), u = load_part(static_cast<const T*>(up) + at, left);
            store_part(static_cast<T*>(out) + at, left, rounded<T>(g / one_plus_exp_minus(g)) * u);
        });
    });
}

// With s = sigmoid(g):  du = dy rounded(g s),  dg = rounded(dy u) s (1 + g (1 - s)).
LONGFIT_EXPORT void KERNEL(longfit_swiglu_backward)(const void* grad_out, const void* gate, const void* up, int64_t count, void* grad_gate,
                                                    void* grad_up, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        for_vectors(count, threads, [&](int64_t at, int64_t left) {
            const Vec one = broadcast(1.f), grad = load_part(static_cast<const T*>(grad_out) + at, left);
            const Vec g = load_part(static_cast<const T*>(gate) + at, left), u = load_part(static_cast<const T*>(up) + at, left);
            const Vec denominator = one_plus_exp_minus(g), sigmoid = one / denominator;
            store_part(static_cast<T*>(grad_up) + at, left, grad * rounded<T>(g / denominator));
            store_part(static_cast<T*>(grad_gate) + at, left, rounded<T>(grad * u) * (sigmoid * fma(g, one - sigmoid, one)));
        });
    });
}
