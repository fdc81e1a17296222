// The nearest level of a codebook: how many thresholds lie strictly below a value, mapped back to the order of the codes.
//
// A threshold is the fp32 midpoint of neighbouring levels. A value exactly on it belongs to the lower level. The rule clamps values to
// [-1, 1] first; here the thresholds outside are moved to infinity instead, which is the same and costs nothing per value. (A value
// scaled by its absmax can exceed 1 by one rounding.)
#pragma once

#include "../common/floats.h"

#if defined(LONGFIT_AVX512)
#include <immintrin.h>
#endif

namespace {

// Thresholds ascending, and the code of every rank. `count` levels, at most 256.
struct Ranking {
    int count;
    bool ascending;  // a code is its rank
    float thresholds[256];
    uint8_t code_of_rank[256];

    Ranking(const float* codebook, int count) : count(count), ascending(true) {
        for (int i = 0; i < count; ++i) {  // insertion sort: stable, and codebooks are nearly sorted
            int at = i;
            for (; at > 0 && codebook[code_of_rank[at - 1]] > codebook[i]; --at) code_of_rank[at] = code_of_rank[at - 1];
            code_of_rank[at] = static_cast<uint8_t>(i);
            ascending = ascending && at == i;
        }
        for (int i = 0; i + 1 < count; ++i) {
            const float middle = (codebook[code_of_rank[i]] + codebook[code_of_rank[i + 1]]) / 2;
            thresholds[i] = middle >= 1 ? float_of(0x7f800000) : middle < -1 ? float_of(0xff800000) : middle;
        }
    }
    uint8_t highest() const { return code_of_rank[count - 1]; }
};

// Ranks among many levels in about one cycle and a half per value. A float's upper bits (sign, exponent, some of the mantissa) name a
// bucket that holds at most one threshold; the bucket knows the rank at its lower end and that threshold. For the 8-bit dynamic maps 6 or
// 7 bits of mantissa do, and the two tables stay in the first-level cache. A codebook with closer levels is searched by halving.
class NearestTable {
  public:
    explicit NearestTable(const float* codebook, int count) : ranking(codebook, count) {
        for (shift = 18; shift >= 15; --shift)
            if (build()) return;
        shift = 0;
    }
    uint8_t highest() const { return ranking.highest(); }

    // out[i] = code of the level nearest to values[i] * factor; count <= kChunk, no NaN among them.
    static constexpr int kChunk = 256;
    template <class T> void codes(const T* values, float factor, int count, uint8_t* out) const {
        float scaled[kChunk];
        for (int i = 0; i < count; ++i) scaled[i] = widen(values[i]) * factor;
        if (shift) look_up(scaled, count, out);
        else search(scaled, count, out);
        if (!ranking.ascending)
            for (int i = 0; i < count; ++i) out[i] = ranking.code_of_rank[out[i]];
    }

  private:
    static constexpr int kBuckets = 4096;  // a sign's share of the table
    static constexpr int32_t kOne = 0x3f800000, kNever = 0x7fffffff;

    // Floats as integers of the same order.
    static int32_t order(float x) {
        const int32_t bits = static_cast<int32_t>(bits_of(x));
        return bits ^ ((bits >> 31) & 0x7fffffff);
    }

    bool build() {
        const int last = ranking.count - 1;  // thresholds
        int32_t smallest = kOne;             // magnitude of a threshold other than 0
        for (int i = 0; i < last; ++i) {
            const int32_t magnitude = static_cast<int32_t>(bits_of(ranking.thresholds[i]) & 0x7fffffff);
            if (magnitude && magnitude < smallest) smallest = magnitude;
        }
        first = smallest >> shift;  // the bucket of everything below `smallest`, too
        const int buckets = (kOne >> shift) - first + 1;
        if (buckets > kBuckets) return false;
        int rank = 0;
        for (int b = buckets - 1; b >= 0; --b)  // negative values: ascending is from the largest magnitude down
            if (!fill(kBuckets + b, ~(int32_t((first + b + 1) << shift) - 1), b ? ~((first + b) << shift) : -1, rank)) return false;
        for (int b = 0; b < buckets; ++b)
            if (!fill(b, b ? (first + b) << shift : 0, int32_t((first + b + 1) << shift) - 1, rank)) return false;
        return true;
    }
    // The bucket of the ordered floats lowest .. highest; `rank` counts the thresholds below it, then those below its end.
    bool fill(int bucket, int32_t lowest, int32_t highest, int& rank) {
        const int last = ranking.count - 1;
        while (rank < last && threshold(rank) < lowest) ++rank;
        rank_of[bucket] = static_cast<uint8_t>(rank);
        edge[bucket] = kNever;
        if (rank < last && threshold(rank) <= highest) edge[bucket] = threshold(rank++);
        return rank >= last || threshold(rank) > highest;
    }
    int32_t threshold(int i) const { return ranking.thresholds[i] == 0 ? 0 : order(ranking.thresholds[i]); }

    // Two loops on purpose: the first becomes vector code; a gather in the second would be slower than scalar loads.
    void look_up(const float* scaled, int count, uint8_t* out) const {
        int32_t ordered[kChunk], bucket[kChunk];
        for (int i = 0; i < count; ++i) {
            const int32_t bits = static_cast<int32_t>(bits_of(scaled[i]));
            int32_t number = (bits & 0x7fffffff) < kOne ? (bits & 0x7fffffff) >> shift : kOne >> shift;
            number = number < first ? first : number;
            ordered[i] = bits ^ ((bits >> 31) & 0x7fffffff);
            bucket[i] = number - first + ((bits >> 31) & kBuckets);
        }
        for (int i = 0; i < count; ++i) {
            int32_t b = bucket[i];
            asm("" : "+r"(b));  // keeps the compiler from a gather
            out[i] = static_cast<uint8_t>(rank_of[b] + (ordered[i] > edge[b]));
        }
    }
    void search(const float* scaled, int count, uint8_t* out) const {
        for (int i = 0; i < count; ++i) {
            int low = 0, high = ranking.count - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (scaled[i] > ranking.thresholds[middle]) low = middle + 1;
                else high = middle;
            }
            out[i] = static_cast<uint8_t>(low);
        }
    }

    Ranking ranking;
    int shift = 0;
    int32_t first = 0;
    int32_t edge[2 * kBuckets];
    uint8_t rank_of[2 * kBuckets];
};

}  // namespace
