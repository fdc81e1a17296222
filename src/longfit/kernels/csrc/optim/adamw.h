// The AdamW step on runs of elements: the ABI, and the arithmetic of one element (numerics/adamw.py states every rule).
#pragma once

#include "../common/floats.h"

// `numel` consecutive elements of one parameter; they begin at a multiple of 256 of the parameter.
struct longfit_adamw_run {
    void* param;               // param_dtype
    const void* grad;          // grad_dtype
    void* exp_avg;             // fp32, or 8-bit codes where exp_avg_absmax is set
    void* exp_avg_sq;          // likewise
    float* exp_avg_absmax;     // one per 256 elements, or null
    float* exp_avg_sq_absmax;  // likewise
    float* master;             // fp32, or null: a bf16 parameter is then rounded stochastically
    const void* maps;          // what longfit_adamw_maps prepared, or null with fp32 moments
    int64_t numel;
    int64_t end_block;         // blocks of 256 elements of this run and all runs before it
    uint32_t rounding_key;
    uint32_t start;            // number of the first element, modulo 2^32
    int32_t param_dtype, grad_dtype;
    float decay, beta1, grad_weight, beta2, square_weight, step_size, root_scale, eps;
};

namespace {

constexpr int kAdamwBlock = 256;  // elements per absmax

// n consecutive elements in fp32, all operations rounded one by one.
inline void adamw_update(const longfit_adamw_run& s, int n, const float* __restrict grad, float* __restrict param,
                         float* __restrict exp_avg, float* __restrict exp_avg_sq) {
    const float decay = s.decay, beta1 = s.beta1, grad_weight = s.grad_weight, beta2 = s.beta2;
    const float square_weight = s.square_weight, step_size = s.step_size, root_scale = s.root_scale, eps = s.eps;
    for (int i = 0; i < n; ++i) {
        const float g = grad[i];
        const float m = beta1 * exp_avg[i] + grad_weight * g;
        const float v = beta2 * exp_avg_sq[i] + (square_weight * g) * g;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = decay * param[i] - (step_size * m) / (__builtin_sqrtf(v) * root_scale + eps);
    }
}

// Where the master no longer rounds to its parameter, the parameter was changed from outside, and wins.
template <class T> inline void refresh_master(int n, const T* __restrict param, float* __restrict master) {
    for (int i = 0; i < n; ++i) {
        const float here = widen(param[i]);
        master[i] = widen(narrow<T>(master[i])) == here ? master[i] : here;
    }
}

// bf16, up or down with probabilities that keep the mean; the bits are a hash of the element's number.
inline void round_stochastically(int n, const float* __restrict values, uint32_t key, uint32_t start, bf16* __restrict out) {
    for (int i = 0; i < n; ++i) {
        uint32_t h = (start + static_cast<uint32_t>(i)) ^ key;
        h = (h ^ (h >> 16)) * 0x7FEB352Du;
        h = (h ^ (h >> 15)) * 0x846CA68Bu;
        h ^= h >> 16;
        const uint32_t u = bits_of(values[i]);
        const bool finite = (u & 0x7f800000) != 0x7f800000;
        const uint32_t moved = (u + (h & 0xffff)) >> 16;
        out[i].bits = static_cast<uint16_t>(finite ? moved : narrow<bf16>(values[i]).bits);
    }
}

}  // namespace
