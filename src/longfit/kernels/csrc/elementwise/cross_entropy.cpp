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

// Terms that one lane adds up before they join the sum.
constexpr int64_t kRun = 16;

// The sum of a row's exponentials within a few roundings for any vocabulary: a lane of 1,536 plain additions, that of 49,152 words,
// loses a hundred times as much, always in the same direction where the likely word comes first. So lanes add up short runs, and what the
// addition of a run to the sum rounds away is kept beside it (Neumaier, with the larger one first as no term is negative).
class ExponentialSum {
public:
    void add(Vec run) {
        const Vec sum = sum_ + run, large = larger(sum_, run), small = smaller(sum_, run);
        lost_ = lost_ + (small - (sum - large));
        sum_ = sum;
    }
    double total() const {
        float sums[kLanes], losses[kLanes];
        store(sums, sum_);
        store(losses, lost_);
        double total = 0;
        for (int64_t i = 0; i < kLanes; ++i) total += (double)sums[i] + losses[i];
        return total;
    }

private:
    Vec sum_ = broadcast(0.f), lost_ = broadcast(0.f);
};

template <class T> double sum_of_exponentials(const T* x, int64_t count, Vec largest) {
    ExponentialSum sum;
    int64_t at = 0;
    for (; at + kRun * kLanes <= count; at += kRun * kLanes) {
        Vec runs[2] = {broadcast(0.f), broadcast(0.f)};
        for (int i = 0; i < kRun; i += 2)
            for (int j = 0; j < 2; ++j) runs[j] = runs[j] + exponential(load(x + at + (i + j) * kLanes) - largest);
        sum.add(runs[0] + runs[1]);
    }
    for (; at + kLanes <= count; at += kLanes) sum.add(exponential(load(x + at) - largest));
    double rest = 0;
    if (at < count) {
        float lanes[kLanes];
        store(lanes, exponential(load_part(x + at, count - at) - largest));
        for (int64_t i = 0; at + i < count; ++i) rest += lanes[i];
    }
    return sum.total() + rest;
}

template <class T> float differentiate_row(T* x, int64_t label, float factor, int64_t words) {
    const float largest = largest_of(x, words), chosen = widen(x[label]);
    const Vec shift = broadcast(largest);
    const double sum = sum_of_exponentials(x, words, shift);
    const Vec scale = broadcast((float)(factor / sum));
    int64_t at = 0;
    for (; at + kLanes <= words; at += kLanes) store(x + at, exponential(load(x + at) - shift) * scale);
    if (at < words) store_part(x + at, words - at, exponential(load_part(x + at, words - at) - shift) * scale);
    // Not -expm1(label - log-sum-exp): of a label of probability nearly 1 the gradient is the difference that it has in the softmax, too.
    x[label] = narrow<T>((float)((exp((double)chosen - largest) / sum - 1.) * factor));
    return (float)(log(sum) - ((double)chosen - largest));
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
