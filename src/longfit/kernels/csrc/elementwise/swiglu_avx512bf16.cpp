// The gated product silu(gate) * up of bf16 (Shazeer, GLU Variants Improve Transformer, 2020), and its gradient.
#include "elementwise.h"
#include "../common/lanes_bf16.h"
#include "../common/parallel.h"

namespace {

constexpr int64_t kTask = 1 << 10;  // vectors: some microseconds

inline __m512 one_plus_exp_minus(__m512 x) { return _mm512_add_ps(_mm512_set1_ps(1.f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))); }

template <class Work> void for_lanes(int64_t count, int threads, const Work& work) {
    parallel_for((count + kLanes - 1) / kLanes, kTask, threads, [&](int64_t begin, int64_t end) {
        for (int64_t vector = begin; vector < end; ++vector) work(vector * kLanes, lanes_below(vector * kLanes, count));
    });
}

}  // namespace

void longfit_swiglu_forward_avx512_bf16(const void* gate, const void* up, int64_t count, void* out, int threads) {
    for_lanes(count, threads, [&](int64_t at, __mmask16 lanes) {
        const __m512 g = load_lanes(static_cast<const bf16*>(gate) + at, lanes), u = load_lanes(static_cast<const bf16*>(up) + at, lanes);
        const __m512 silu = rounded(_mm512_div_ps(g, one_plus_exp_minus(g)));
        store_lanes(static_cast<bf16*>(out) + at, lanes, _mm512_mul_ps(silu, u));
    });
}

// With s = sigmoid(g):  du = dy bf16(g s),  dg = bf16(dy u) s (1 + g (1 - s)).
void longfit_swiglu_backward_avx512_bf16(const void* grad_out, const void* gate, const void* up, int64_t count, void* grad_gate, void* grad_up,
                                         int threads) {
    for_lanes(count, threads, [&](int64_t at, __mmask16 lanes) {
        const __m512 one = _mm512_set1_ps(1.f);
        const __m512 g = load_lanes(static_cast<const bf16*>(gate) + at, lanes), u = load_lanes(static_cast<const bf16*>(up) + at, lanes);
        const __m512 grad = load_lanes(static_cast<const bf16*>(grad_out) + at, lanes);
        const __m512 denominator = one_plus_exp_minus(g), sigmoid = _mm512_div_ps(one, denominator);
        const __m512 silu = rounded(_mm512_div_ps(g, denominator));
        store_lanes(static_cast<bf16*>(grad_up) + at, lanes, _mm512_mul_ps(grad, silu));
        const __m512 slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(g, _mm512_sub_ps(one, sigmoid), one));
        store_lanes(static_cast<bf16*>(grad_gate) + at, lanes, _mm512_mul_ps(rounded(_mm512_mul_ps(grad, u)), slope));
    });
}
