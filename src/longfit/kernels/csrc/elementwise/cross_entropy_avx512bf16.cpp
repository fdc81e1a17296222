// Cross-entropy of rows of logits and its gradient, which takes their place.
//
// Three passes over a row, which the second-level cache holds for vocabularies of up to some 300,000 words: its maximum, the sum of its
// exponentials, and the exponentials again on the way to the gradient. Taking them twice costs less than keeping them in fp32.
#include "elementwise.h"
#include "../common/lanes_bf16.h"
#include "../common/parallel.h"

#include <math.h>

namespace {

float largest_of(const bf16* x, int64_t count) {
    __m512 largest[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    int64_t at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
        largest[0] = _mm512_max_ps(largest[0], load_lanes(x + at, 0xffff));
        largest[1] = _mm512_max_ps(largest[1], load_lanes(x + at + kLanes, 0xffff));
    }
    for (; at < count; at += kLanes) {
        const __mmask16 lanes = lanes_below(at, count);
        largest[0] = _mm512_mask_max_ps(largest[0], lanes, largest[0], load_lanes(x + at, lanes));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
}

float sum_of_exponentials(const bf16* x, int64_t count, __m512 largest) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
        sums[0] = _mm512_add_ps(sums[0], exponential(_mm512_sub_ps(load_lanes(x + at, 0xffff), largest)));
        sums[1] = _mm512_add_ps(sums[1], exponential(_mm512_sub_ps(load_lanes(x + at + kLanes, 0xffff), largest)));
    }
    for (; at < count; at += kLanes) {
        const __mmask16 lanes = lanes_below(at, count);
        sums[0] = _mm512_mask_add_ps(sums[0], lanes, sums[0], exponential(_mm512_sub_ps(load_lanes(x + at, lanes), largest)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

}  // namespace

void longfit_cross_entropy_avx512_bf16(void* logits, const int64_t* labels, float factor, int64_t rows, int64_t words, float* losses,
                                       int threads) {
    parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            bf16* x = static_cast<bf16*>(logits) + row * words;
            const float largest = largest_of(x, words), label = widen(x[labels[row]]);
            const __m512 shift = _mm512_set1_ps(largest);
            const float sum = sum_of_exponentials(x, words, shift);
            const __m512 scale = _mm512_set1_ps(factor / sum);
            for (int64_t at = 0; at < words; at += kLanes) {
                const __mmask16 lanes = lanes_below(at, words);
                const __m512 values = exponential(_mm512_sub_ps(load_lanes(x + at, lanes), shift));
                store_lanes(x + at, lanes, _mm512_mul_ps(values, scale));
            }
            // Not -expm1(label - log-sum-exp): a label of probability 1 has the gradient 0 either way, in bf16.
            x[labels[row]] = narrow<bf16>((expf(label - largest) / sum - 1.f) * factor);
            losses[row] = largest + logf(sum) - label;
        }
    });
}
