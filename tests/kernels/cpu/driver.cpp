// Runs one kernel on numbers from standard input and writes its results to standard output, so that a library for another processor can
// be tested under an emulator (test_neon.py). All numbers come and go as the bytes of their arrays.
#include "../../../src/longfit/kernels/csrc/attention/attention.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

LONGFIT_EXPORT void KERNEL(longfit_attention_forward_f32)(const longfit_attention_tile*, int, const longfit_attention_view*,
                                                          const longfit_attention_view*, const longfit_attention_view*,
                                                          const longfit_attention_view*, float*);
LONGFIT_EXPORT void KERNEL(longfit_attention_backward_f32)(const longfit_attention_tile*, int, const longfit_attention_view*,
                                                           const longfit_attention_view*, const longfit_attention_view*,
                                                           const longfit_attention_view*, const longfit_attention_view*, const float*,
                                                           const longfit_attention_view*, const longfit_attention_view*,
                                                           const longfit_attention_view*);
LONGFIT_EXPORT void KERNEL(longfit_rms_norm_forward)(const void*, const void*, float, int64_t, int64_t, void*, float*, int, int);
LONGFIT_EXPORT void KERNEL(longfit_rms_norm_backward)(const void*, const void*, const void*, const float*, int64_t, int64_t, void*, float*,
                                                      int64_t, int, int);
LONGFIT_EXPORT void KERNEL(longfit_swiglu_forward)(const void*, const void*, int64_t, void*, int, int);
LONGFIT_EXPORT void KERNEL(longfit_swiglu_backward)(const void*, const void*, const void*, int64_t, void*, void*, int, int);
LONGFIT_EXPORT void KERNEL(longfit_cross_entropy)(void*, const int64_t*, float, int64_t, int64_t, float*, int, int);
LONGFIT_EXPORT void KERNEL(longfit_dequantize_4bit)(const longfit_weight4*, int64_t, int64_t, int64_t, int64_t, void*, int64_t, int, int);
LONGFIT_EXPORT void KERNEL(longfit_linear_4bit)(const longfit_weight4*, int64_t, int64_t, const void*, int64_t, void*, int, int);

namespace {

// So many bytes of standard input, or zeros, in memory that lives as long as the program.
template <class T> T* memory(int64_t count, bool given) {
    T* here = static_cast<T*>(calloc(size_t(count) + 1, sizeof(T)));
    if (given && fread(here, sizeof(T), size_t(count), stdin) != size_t(count)) exit(3);
    return here;
}
template <class T> T* given(int64_t count) { return memory<T>(count, true); }
template <class T> T* room(int64_t count) { return memory<T>(count, false); }
void answer(const void* numbers, int64_t num_bytes) { fwrite(numbers, 1, size_t(num_bytes), stdout); }

// Sizes: dtype, threads, batch, query_heads, kv_heads, queries, keys, head_dim, classes, start; scaling; head_bounds;
// first_key; q, k, v, grad_out [B, H, t, D] dense  ->  out, lse, grad_q, grad_k, grad_v.
void attention() {
    const int64_t* size = given<int64_t>(10);
    const float scaling = *given<float>(1);
    const int dtype = int(size[0]), bytes = dtype == LONGFIT_FP32 ? 4 : 2;
    const int64_t *bounds = given<int64_t>(size[8] + 1), batch = size[2], heads = size[3], kv = size[4], t = size[5], n = size[6], d = size[7];
    const int32_t* first_key = given<int32_t>(size[8] * batch * t);
    int32_t out_of_memory = 0;
    const longfit_attention_tile tile{batch, heads, kv, t, n, d, size[8], size[9], first_key, bounds, &out_of_memory, scaling, int32_t(size[1])};
    const int64_t queries = batch * heads * t * d, keys = batch * kv * n * d;
    const auto view = [d](void* data, int64_t heads, int64_t tokens) { return longfit_attention_view{data, heads * tokens * d, tokens * d, d}; };
    const auto q = view(given<char>(queries * bytes), heads, t), k = view(given<char>(keys * bytes), kv, n);
    const auto v = view(given<char>(keys * bytes), kv, n), grad_out = view(given<char>(queries * bytes), heads, t);
    const auto out = view(room<char>(queries * bytes), heads, t), grad_q = view(room<char>(queries * bytes), heads, t);
    const auto grad_k = view(room<float>(keys), kv, n), grad_v = view(room<float>(keys), kv, n);
    float* lse = room<float>(batch * heads * t);
    KERNEL(longfit_attention_forward_f32)(&tile, dtype, &q, &k, &v, &out, lse);
    KERNEL(longfit_attention_backward_f32)(&tile, dtype, &grad_out, &q, &k, &v, &out, lse, &grad_q, &grad_k, &grad_v);
    if (out_of_memory) exit(4);
    answer(out.data, queries * bytes), answer(lse, batch * heads * t * 4), answer(grad_q.data, queries * bytes);
    answer(grad_k.data, keys * 4), answer(grad_v.data, keys * 4);
}

// Sizes: dtype, rows, columns; x, weight, grad [rows, columns]; labels [rows]  ->  norm, its grad_x, grad_weight; gated product of x and
// grad, its two gradients for a gradient of x; losses of x, its gradient.
void elementwise() {
    const int64_t *size = given<int64_t>(3), rows = size[1], columns = size[2], count = rows * columns;
    const int dtype = int(size[0]), bytes = dtype == LONGFIT_FP32 ? 4 : 2;
    char *x = given<char>(count * bytes), *weight = given<char>(columns * bytes), *grad = given<char>(count * bytes);
    const int64_t* labels = given<int64_t>(rows);
    char *out = room<char>(count * bytes), *other = room<char>(count * bytes);
    float *per_row = room<float>(rows), *grad_weight = room<float>(columns);
    KERNEL(longfit_rms_norm_forward)(x, weight, 1e-5f, rows, columns, out, per_row, dtype, 2);
    answer(out, count * bytes);
    KERNEL(longfit_rms_norm_backward)(grad, x, weight, per_row, rows, columns, out, grad_weight, rows, dtype, 2);
    answer(out, count * bytes), answer(grad_weight, columns * 4);
    KERNEL(longfit_swiglu_forward)(x, grad, count, out, dtype, 2);
    answer(out, count * bytes);
    KERNEL(longfit_swiglu_backward)(x, x, grad, count, out, other, dtype, 2);
    answer(out, count * bytes), answer(other, count * bytes);
    KERNEL(longfit_cross_entropy)(x, labels, 0.25f, rows, columns, per_row, dtype, 2);
    answer(per_row, rows * 4), answer(x, count * bytes);
}

// Sizes: dtype, rows of x, out_features, in_features, block_size; codebook; absmax; codes; x  ->  the weight; x times it, transposed.
void weights_4bit() {
    const int64_t *size = given<int64_t>(5), rows = size[1], out = size[2], in = size[3], bytes = size[0] == LONGFIT_FP32 ? 4 : 2;
    longfit_weight4 w;
    memset(&w, 0, sizeof w);
    w.codebook = given<float>(16), w.block_size = size[4], w.element_stride = in;
    w.scales = given<uint8_t>((out * in + size[4] - 1) / size[4] * 4), w.codes = given<uint8_t>((out * in + 1) / 2);
    const char* x = given<char>(rows * in * bytes);
    char *dense = room<char>(out * in * bytes), *y = room<char>(rows * out * bytes);
    KERNEL(longfit_dequantize_4bit)(&w, 0, out, 0, in, dense, in, int(size[0]), 2);
    KERNEL(longfit_linear_4bit)(&w, out, in, x, rows, y, int(size[0]), 2);
    answer(dense, out * in * bytes), answer(y, rows * out * bytes);
}

}  // namespace

int main(int count, char** arguments) {
    const char* work = count == 2 ? arguments[1] : "";
    if (!strcmp(work, "attention")) attention();
    else if (!strcmp(work, "elementwise")) elementwise();
    else if (!strcmp(work, "weights_4bit")) weights_4bit();
    else return 2;
    return 0;
}
