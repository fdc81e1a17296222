// Attention of a tile of queries over the keys before it: the C ABI (kernels/cpu/attention.py calls it).
//
// One rule describes every pattern longfit trains with (exact, shifted groups, sliding windows, packed documents): query token i of
// head class c sees exactly the keys  first_key[c][b][i - start] .. i,  and first_key never decreases along the tile. So a block of
// keys is skipped, used whole, or masked by two comparisons per score.
//
// Numbers: bf16 operands, fp32 products and sums; P and dS are rounded to bf16 before the products that consume them, as
// FlashAttention does on tensor cores. The log-sum-exp is natural and fp32.
#pragma once

#include "../longfit.h"

// A tensor [batch, head, token, head_dim]; strides in elements, head_dim has stride 1.
struct longfit_attention_view {
    void* data;
    int64_t batch, head, token;
};

struct longfit_attention_tile {
    int64_t batch, query_heads, kv_heads, queries, keys, head_dim;
    int64_t classes;             // class c is the query heads head_bounds[c] .. head_bounds[c + 1] - 1
    int64_t start;               // the tile is the tokens [start, start + queries); k and v hold the tokens [0, keys)
    const int32_t* first_key;    // [classes, batch, queries]
    const int64_t* head_bounds;  // [classes + 1]
    int32_t* out_of_memory;      // set to 1 where work could not be done; the outputs are then of no use
    float scaling;               // scores are scaling * (q . k); any sign
    int32_t threads;
};

// q, k, v, out bf16; lse fp32 [batch, query_heads, queries].
LONGFIT_EXPORT void KERNEL(longfit_attention_forward)(const longfit_attention_tile* tile, const longfit_attention_view* q,
                                                          const longfit_attention_view* k, const longfit_attention_view* v,
                                                          const longfit_attention_view* out, float* lse);

// grad_out, q, k, v, out, grad_q bf16; grad_k, grad_v fp32, added to; lse as the forward gave it.
LONGFIT_EXPORT void KERNEL(longfit_attention_backward)(
    const longfit_attention_tile* tile, const longfit_attention_view* grad_out, const longfit_attention_view* q,
    const longfit_attention_view* k, const longfit_attention_view* v, const longfit_attention_view* out, const float* lse,
    const longfit_attention_view* grad_q, const longfit_attention_view* grad_k, const longfit_attention_view* grad_v);
