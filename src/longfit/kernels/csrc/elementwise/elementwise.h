// What a layer does per element between its products, each in one pass: the C ABI (kernels/cpu/elementwise.py calls it).
//
// All tensors are dense bf16 unless said otherwise. Every intermediate that the plain modules round to bf16 is rounded here too: results differ
// from theirs only where a float32 sum or exponential differs in its last bits and a rounding to bf16 falls on it.
#pragma once

#include "../longfit.h"

// out = w * bf16(x / rms(x)) of each row [columns];  inverse_rms fp32 [rows].  The weight's gradient, unless it is null, comes as sums over
// `summed_rows` rows each: fp32 [ceil(rows / summed_rows), columns].
LONGFIT_EXPORT void longfit_rms_norm_forward_avx512_bf16(const void* x, const void* weight, float eps, int64_t rows, int64_t columns, void* out,
                                                         float* inverse_rms, int threads);
LONGFIT_EXPORT void longfit_rms_norm_backward_avx512_bf16(const void* grad_out, const void* x, const void* weight, const float* inverse_rms,
                                                          int64_t rows, int64_t columns, void* grad_x, float* grad_weight,
                                                          int64_t summed_rows, int threads);

// out = silu(gate) * up.
LONGFIT_EXPORT void longfit_swiglu_forward_avx512_bf16(const void* gate, const void* up, int64_t count, void* out, int threads);
LONGFIT_EXPORT void longfit_swiglu_backward_avx512_bf16(const void* grad_out, const void* gate, const void* up, int64_t count, void* grad_gate,
                                                        void* grad_up, int threads);

// Logits [rows, words] become the gradient of the sum of their cross-entropies times `factor`:  (softmax - onehot(label)) factor.
// Labels lie in [0, words); losses fp32 [rows], without the factor.
LONGFIT_EXPORT void longfit_cross_entropy_avx512_bf16(void* logits, const int64_t* labels, float factor, int64_t rows, int64_t words,
                                                      float* losses, int threads);
