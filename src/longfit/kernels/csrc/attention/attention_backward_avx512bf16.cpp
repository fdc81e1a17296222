// Attention backward, from the log-sum-exp of the forward: one pass over (block of keys, queries), five products.
//
//     P^T = exp(S^T - lse)     dV += P^T dO     dP^T = V dO^T     dS^T = P^T (dP^T - delta)     dK += dS^T Q     dQ^T += K^T dS^T
//
// with S^T = K Q^T recomputed and delta = rowsum(dO * O).  FlashAttention-2 (arXiv 2307.08691), algorithm 2.
//
// Segments come one after the other, and in each runs of queries that stay in the cache while all keys pass. In a run, threads first pack Q
// and dO, then take blocks of keys one by one: a thread owns the dK and dV of its block. dQ is summed over the blocks in kSums buffers, in
// each in the order of its blocks: a thread waits until the block before has added its share of a panel. So the gradients have the same
// bits for any number of threads, and a slow core holds up one buffer.
#include "attention_softmax.h"
#include "attention_turns.h"
#include "../common/parallel.h"

namespace {

constexpr int64_t kKeyBlock = 128;      // keys that are packed at once
constexpr int64_t kKeyGroup = kScoreRows;  // keys whose scores are still in the first-level cache when their gradient is taken
constexpr int64_t kStrip = 2 * kPanel;  // queries summed over at once for dK and dV
constexpr int64_t kRunBytes = 1280 << 10;  // packed rows and dQ of a run, most of a second-level cache: 512 queries of three heads of 64

struct Backward {
    const longfit_attention_tile& tile;
    const longfit_attention_view &grad_out, &q, &k, &v, &out;
    const float* lse;
    const longfit_attention_view &grad_q, &grad_k, &grad_v;
    int64_t width;     // head_dim padded to a multiple of kDepthStep
    int64_t run;       // panels of a run, all heads of a segment: what the cache holds, but at least a strip of every head
    int64_t capacity;  // as many, or fewer where the tile has no more
};

// The queries [first, last) of all heads of a segment; a panel's number is  head of the segment * panels + (query - first) / 64.
struct Run {
    Segment segment;
    int64_t first, last, panels;  // panels of one head

    int64_t head_of(int64_t panel) const { return segment.head + panel / panels; }
    int64_t query_of(int64_t panel) const { return first + panel % panels * kPanel; }
};

inline Run run_from(const Backward& b, const Segment& segment, int64_t first) {
    const int64_t strips = most(1, b.run / segment.heads / (kStrip / kPanel)), last = least(first + strips * kStrip, b.tile.queries);
    return {segment, first, last, blocks_of(last - first, kPanel)};
}

// What the threads share of a run.
struct Packed {
    bf16 *q_columns, *grad_columns;  // [panel][width / 2][64][2]
    bf16 *q_pairs, *grad_pairs;      // [panel][32][width][2]
    float *lse, *delta;              // [panel][64]; lse in powers of two
    float* grad_q;                   // [kSums][panel][width][64]
    int64_t* added;                  // [kSums][panel]: blocks of keys that have added their share
};

int64_t packed_bytes(const Backward& b) {
    const int64_t elements = b.capacity * kPanel * b.width;
    return 4 * Scratch::size<bf16>(elements) + 2 * Scratch::size<float>(b.capacity * kPanel) +
           Scratch::size<float>(kSums * elements) + Scratch::size<int64_t>(kSums * b.capacity);
}

Packed take_packed(const Backward& b, Scratch& memory) {
    const int64_t rows = b.capacity * kPanel, elements = rows * b.width;
    Packed p;
    p.q_columns = memory.take<bf16>(elements), p.grad_columns = memory.take<bf16>(elements);
    p.q_pairs = memory.take<bf16>(elements), p.grad_pairs = memory.take<bf16>(elements);
    p.lse = memory.take<float>(rows), p.delta = memory.take<float>(rows);
    p.grad_q = memory.take<float>(kSums * elements), p.added = memory.take<int64_t>(kSums * b.capacity);
    return p;
}

inline __m512 widen(__m512i bf16s) { return _mm512_castsi512_ps(bf16s); }

// rowsum(a * b) of one row; bf16 pairs are split into their even and odd elements.
float dot_row(const Rows& a, const Rows& b, int64_t row) {
    const __m512i odd = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < a.width; c += 32) {
        const __m512i x = a.load32(row, c), y = b.load32(row, c);
        sum = _mm512_fmadd_ps(widen(_mm512_slli_epi32(x, 16)), widen(_mm512_slli_epi32(y, 16)), sum);
        sum = _mm512_fmadd_ps(widen(_mm512_and_si512(x, odd)), widen(_mm512_and_si512(y, odd)), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

void pack_panel(const Backward& b, const Run& run, const Packed& packed, int64_t panel) {
    const Segment& segment = run.segment;
    const int64_t head = run.head_of(panel), query = run.query_of(panel), count = least(kPanel, run.last - query);
    const int64_t at = panel * kPanel * b.width;
    const Rows q = rows_of(b.q, segment.batch, head, query, count, b.tile.head_dim);
    const Rows grad = rows_of(b.grad_out, segment.batch, head, query, count, b.tile.head_dim);
    const Rows out = rows_of(b.out, segment.batch, head, query, count, b.tile.head_dim);
    pack_transposed(q, kPanel, b.width, packed.q_columns + at);
    pack_transposed(grad, kPanel, b.width, packed.grad_columns + at);
    pack_pairs(q, kPanel, b.width, packed.q_pairs + at);
    pack_pairs(grad, kPanel, b.width, packed.grad_pairs + at);
    const float* lse = b.lse + (segment.batch * b.tile.query_heads + head) * b.tile.queries + query;
    for (int64_t sum = 0; sum < kSums; ++sum) {
        const int64_t number = sum * b.capacity + panel;
        packed.added[number] = 0;
        memset(packed.grad_q + number * kPanel * b.width, 0, sizeof(float) * kPanel * b.width);
    }
    for (int64_t i = 0; i < kPanel; ++i) {
        packed.lse[panel * kPanel + i] = i < count ? lse[i] * kLog2E : 0;
        packed.delta[panel * kPanel + i] = i < count ? dot_row(grad, out, i) : 0;
    }
}

// Adds up the buffers of dQ^T, applies the scaling, stores bf16.
void store_grad_q(const Backward& b, const Run& run, const Packed& packed, int64_t panel) {
    const Segment& segment = run.segment;
    const int64_t head = run.head_of(panel), query = run.query_of(panel), count = least(kPanel, run.last - query);
    const int64_t elements = kPanel * b.width, buffer = b.capacity * elements;
    float* sum = packed.grad_q + panel * elements;
    static_assert(kSums == 4, "the buffers are added up here");
    for (int64_t i = 0; i < elements; ++i) sum[i] = (sum[i] + sum[buffer + i]) + (sum[2 * buffer + i] + sum[3 * buffer + i]);
    alignas(64) float scaling[kPanel];
    for (float& factor : scaling) factor = b.tile.scaling;
    store_transposed(sum, scaling, count, b.tile.head_dim,
                     static_cast<bf16*>(b.grad_q.data) + segment.batch * b.grad_q.batch + head * b.grad_q.head + query * b.grad_q.token,
                     b.grad_q.token);
}

// P^T and dS^T of a panel from its scores and dP^T, all [keys][64]: both as rows of a strip, dS^T in pairs of keys too.
void softmax_gradient(int64_t keys, float factor, const float* lse, const float* delta, const float* scores, const float* grad_p, bf16* p,
                      bf16* grad_s, bf16* grad_s_pairs) {
    const __m512 scale = _mm512_set1_ps(factor);
    __m512 minus_lse[kPanelVectors], lane_delta[kPanelVectors];
    for (int j = 0; j < kPanelVectors; ++j) {
        minus_lse[j] = minus(_mm512_load_ps(lse + j * kVector));
        lane_delta[j] = _mm512_load_ps(delta + j * kVector);
    }
    for (int64_t key = 0; key < keys; key += 2)
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) {
            const int64_t at = key * kPanel + j * kVector, row = key * kStrip + j * kVector;
            const __m512 pa = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + at), scale, minus_lse[j]));
            const __m512 pb = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + at + kPanel), scale, minus_lse[j]));
            const __m512 sa = _mm512_mul_ps(pa, _mm512_sub_ps(_mm512_load_ps(grad_p + at), lane_delta[j]));
            const __m512 sb = _mm512_mul_ps(pb, _mm512_sub_ps(_mm512_load_ps(grad_p + at + kPanel), lane_delta[j]));
            const __m512i p2 = to_bf16(pa, pb), s2 = to_bf16(sa, sb);
            _mm256_store_si256(reinterpret_cast<__m256i*>(p + row), _mm512_castsi512_si256(p2));
            _mm256_store_si256(reinterpret_cast<__m256i*>(p + row + kStrip), _mm512_extracti64x4_epi64(p2, 1));
            _mm256_store_si256(reinterpret_cast<__m256i*>(grad_s + row), _mm512_castsi512_si256(s2));
            _mm256_store_si256(reinterpret_cast<__m256i*>(grad_s + row + kStrip), _mm512_extracti64x4_epi64(s2, 1));
            _mm512_store_si512(grad_s_pairs + key * kPanel + j * 2 * kVector, pairs_of_rows(s2));
        }
}

// One thread's buffers, and the work on a block of keys.
class BackwardWorker {
  public:
    explicit BackwardWorker(const Backward& b) : b_(b), memory_(bytes(b)) {
        if (memory_.failed()) return;
        const int64_t block = kKeyBlock * b.width;
        k_ = memory_.take<bf16>(block), v_ = memory_.take<bf16>(block), k_columns_ = memory_.take<bf16>(block);
        grad_k_ = memory_.take<float>(block), grad_v_ = memory_.take<float>(block);
        scores_ = memory_.take<float>(kKeyGroup * kPanel), grad_p_ = memory_.take<float>(kKeyGroup * kPanel);
        p_ = memory_.take<bf16>(kKeyBlock * kStrip), grad_s_ = memory_.take<bf16>(kKeyBlock * kStrip);
        grad_s_pairs_ = memory_.take<bf16>(kKeyBlock * kPanel);
    }

    bool failed() const { return memory_.failed(); }

    // Block `number` of keys, [low, low + count), against all queries of the run.
    void work(const Run& run, const Packed& packed, int64_t number, int64_t low, int64_t count) {
        const Segment& segment = run.segment;
        const Rows k = rows_of(b_.k, segment.batch, segment.kv_head, low, count, b_.tile.head_dim);
        pack_rows(k, kKeyBlock, b_.width, k_);
        pack_columns(k, kKeyBlock, b_.width, k_columns_);
        pack_rows(rows_of(b_.v, segment.batch, segment.kv_head, low, count, b_.tile.head_dim), kKeyBlock, b_.width, v_);
        for (int64_t i = 0; i < kKeyBlock * b_.width; ++i) grad_k_[i] = grad_v_[i] = 0;
        for (int64_t head = 0; head < segment.heads; ++head)
            for (int64_t panel = 0; panel < run.panels; panel += kStrip / kPanel)
                add_strip(run, packed, number, low, count, head * run.panels + panel, least(kStrip / kPanel, run.panels - panel));
        add_rows(grad_k_, b_.tile.scaling, count, b_.grad_k, segment, low);
        add_rows(grad_v_, 1.f, count, b_.grad_v, segment, low);
    }

  private:
    static int64_t bytes(const Backward& b) {
        return 3 * Scratch::size<bf16>(kKeyBlock * b.width) + 2 * Scratch::size<float>(kKeyBlock * b.width) +
               2 * Scratch::size<float>(kKeyGroup * kPanel) + 2 * Scratch::size<bf16>(kKeyBlock * kStrip) +
               Scratch::size<bf16>(kKeyBlock * kPanel);
    }

    // Two neighbouring panels of a head (one at the end), so that dK and dV are loaded and stored half as often.
    void add_strip(const Run& run, const Packed& packed, int64_t number, int64_t low, int64_t count, int64_t first, int64_t panels) {
        const Segment& segment = run.segment;
        const int64_t query = run.query_of(first), queries = least(panels * kPanel, run.last - query);
        const Seen seen = seen_of_block(b_.tile, segment, query, queries, low, count, kRowStep);
        const int64_t sum = number % kSums * b_.capacity + first, turn = number / kSums;
        if (seen.rows == 0) {
            for (int64_t i = 0; i < panels; ++i) take_turn(packed.added + sum + i, turn, [] {});
            return;
        }
        const int64_t width = b_.width, elements = kPanel * width, here = seen.low * width;
        const float factor = copysignf(score_scale(b_.tile) * kLog2E, b_.tile.scaling), hidden = copysignf(INFINITY, -factor);
        for (int64_t i = 0; i < panels; ++i) {
            const int64_t panel = first + i, at = i * kPanel;
            const bf16 *q = packed.q_columns + panel * elements, *grad = packed.grad_columns + panel * elements;
            const float *lse = packed.lse + panel * kPanel, *delta = packed.delta + panel * kPanel;
            const Lanes lanes(b_.tile, segment, query + at, least(kPanel, queries - at));
            for (int64_t row = 0; row < seen.rows; row += kKeyGroup) {
                const int64_t rows = least(kKeyGroup, seen.rows - row), key = here + row * width, to = row * kStrip + at;
                gemm<false>(rows, kPanelVectors, width / 2, k_ + key, width, q, 2 * kPanel, scores_, kPanel);
                gemm<false>(rows, kPanelVectors, width / 2, v_ + key, width, grad, 2 * kPanel, grad_p_, kPanel);
                if (seen.masked) lanes.mask(low + seen.low + row, rows, hidden, scores_);
                softmax_gradient(rows, factor, lse, delta, scores_, grad_p_, p_ + to, grad_s_ + to, grad_s_pairs_ + row * kPanel);
            }
            take_turn(packed.added + sum + i, turn, [&] {
                gemm<true>(width, kPanelVectors, seen.rows / 2, k_columns_ + seen.low, kKeyBlock, grad_s_pairs_, 2 * kPanel,
                           packed.grad_q + (sum + i) * elements, kPanel);
            });
        }
        const int64_t pairs = panels * kPanel / 2;
        gemm<true>(seen.rows, width / kVector, pairs, p_, kStrip, packed.grad_pairs + first * elements, 2 * width, grad_v_ + here, width);
        gemm<true>(seen.rows, width / kVector, pairs, grad_s_, kStrip, packed.q_pairs + first * elements, 2 * width, grad_k_ + here, width);
    }

    void add_rows(const float* rows, float factor, int64_t count, const longfit_attention_view& to, const Segment& segment, int64_t low) {
        float* sums = static_cast<float*>(to.data) + segment.batch * to.batch + segment.kv_head * to.head + low * to.token;
        for (int64_t r = 0; r < count; ++r)
            for (int64_t d = 0; d < b_.tile.head_dim; ++d) sums[r * to.token + d] += factor * rows[r * b_.width + d];
    }

    const Backward& b_;
    const Tiles tiles_;
    Scratch memory_;
    bf16 *k_, *v_, *k_columns_;  // [128][width] twice, [width][128]
    float *grad_k_, *grad_v_;    // [128][width], before the scaling
    float *scores_, *grad_p_;    // [kKeyGroup][64]
    bf16 *p_, *grad_s_;          // [128][128]
    bf16* grad_s_pairs_;         // [64][64][2]
};

void differentiate(const Backward& b, const Run& run, const Packed& packed) {
    const int64_t panels = run.segment.heads * run.panels;
    const int threads = b.tile.threads;
    const Range keys = visible_keys(b.tile, run.segment, run.first, run.last);
    parallel_for(panels, 1, threads, [&](int64_t from, int64_t to) {
        for (int64_t panel = from; panel < to; ++panel) pack_panel(b, run, packed, panel);
    });
    const int64_t blocks = blocks_of(keys.high - keys.low, kKeyBlock);
    Queue tasks(blocks);
    parallel_for(least(threads, blocks), 1, threads, [&](int64_t, int64_t) {
        BackwardWorker worker(b);
        if (worker.failed()) return report_out_of_memory(b.tile);  // another thread takes the blocks, or nobody does
        for (int64_t number; tasks.take(number);) {
            const int64_t low = keys.low + number * kKeyBlock;
            worker.work(run, packed, number, low, least(kKeyBlock, keys.high - low));
        }
    });
    parallel_for(panels, 1, threads, [&](int64_t from, int64_t to) {
        for (int64_t panel = from; panel < to; ++panel) store_grad_q(b, run, packed, panel);
    });
}

}  // namespace

void KERNEL(longfit_attention_backward)(const longfit_attention_tile* tile, const longfit_attention_view* grad_out,
                                            const longfit_attention_view* q, const longfit_attention_view* k,
                                            const longfit_attention_view* v, const longfit_attention_view* out, const float* lse,
                                            const longfit_attention_view* grad_q, const longfit_attention_view* grad_k,
                                            const longfit_attention_view* grad_v) {
    const int64_t width = blocks_of(tile->head_dim, kDepthStep) * kDepthStep, group = tile->query_heads / tile->kv_heads;
    const int64_t panel_bytes = kPanel * width * int64_t(4 * sizeof(bf16) + sizeof(float));
    const int64_t run = most(group * kStrip / kPanel, kRunBytes / panel_bytes), capacity = least(group * blocks_of(tile->queries, kPanel), run);
    const Backward b{*tile, *grad_out, *q, *k, *v, *out, lse, *grad_q, *grad_k, *grad_v, width, run, capacity};
    Scratch memory(packed_bytes(b));
    if (memory.failed()) return report_out_of_memory(*tile);
    const Packed packed = take_packed(b, memory);
    for (int64_t number = 0; number < num_segments(*tile); ++number) {
        const Segment segment = segment_at(*tile, number);
        if (segment.heads == 0) continue;
        for (int64_t first = 0; first < tile->queries;) {
            const Run next = run_from(b, segment, first);
            differentiate(b, next, packed);
            first = next.last;
        }
    }
}
