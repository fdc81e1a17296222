// Cross-entropy of rows of logits and its gradient, which takes their place. Logits are dense float32, bf16 or fp16.
//
// Three passes over a row, which the second-level cache holds for vocabularies of up to some 300,000 words in 16 bits: its maximum, the
// sum of its exponentials, and the exponentials again on the way to the gradient. Taking them twice costs less than keeping them in float32.
#include "../common/parallel.h"
#include "../common/vec.h"

#include <math.h>

namespace {

template <class T> float largest_of(const T* x, int64_t count) {
    Vec largest[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    int64_t at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes)
        for (int i = 0; i < 2; ++i) largest[i] = larger(largest[i], load(x + at + i * kLanes));
    float most = largest_of(larger(largest[0], largest[1]));
    for (; at < count; ++at) most = most > widen(x[at]) ? most : widen(x[at]);
    return most;
}

template <class T> float sum_of_exponentials(const T* x, int64_t count, Vec largest) {
    Vec sums[2] = {broadcast(0.f), broadcast(0.f)};
    int64_t at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes)
        for (int i = 0; i < 2; ++i) sums[i] = sums[i] + exponential(load(x + at + i * kLanes) - largest);
    float rest = 0;
    for (; at < count; at += kLanes) {
        float lanes[kLanes];
        store(lanes, exponential(load_part(x + at, count - at) - largest));
        for (int64_t i = 0; i < kLanes && at + i < count; ++i) rest += lanes[i];
    }
    return sum_of(sums[0] + sums[1]) + rest;
}

template <class T> float differentiate_row(T* x, int64_t label, float factor, int64_t words) {
    const float largest = largest_of(x, words), chosen = widen(x[label]);
    const Vec shift = broadcast(largest);
    const float sum = sum_of_exponentials(x, words, shift);
    const Vec scale = broadcast(factor / sum);
    int64_t at = 0;
    for (; at + kLanes <= words; at += kLanes) store(x + at, exponential(load(x + at) - shift) * scale);
    if (at < words) store_part(x + at, words - at, exponential(load_part(x + at, words - at) - shift) * scale);
    // Not -expm1(label - log-sum-exp): of a label of probability nearly 1 the gradient is the difference that it has in the softmax, too.
    x[label] = narrow<T>((expf(chosen - largest) / sum - 1.f) * factor);
    return largest + logf(sum) - chosen;
}

}  // namespace

// Logits [rows, words] become the gradient of the sum of their cross-entropies times `factor`:  (softmax - onehot(label)) factor.
// Labels lie in [0, words); losses fp32 [rows], without the factor.
LONGFIT_EXPORT void KERNEL(longfit_cross_entropy)(void* logits, const int64_t* labels, float factor, int64_t rows, int64_t words,
                                                  float* losses, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                losses[row] = differentiate_row(static_cast<T*>(logits) + row * words, labels[row], factor, words);
        });
    });
}
