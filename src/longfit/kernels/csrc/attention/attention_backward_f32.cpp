// Attention backward in float32, from the log-sum-exp of the forward: one pass over (block of keys, queries), five products.
//
//     P^T = 2^(S^T - lse)     dV += P^T dO     dP^T = V dO^T     dS^T = P^T (dP^T - delta)     dK += dS^T Q     dQ^T += K^T dS^T
//
// with S^T = K Q^T recomputed, Q carrying the scaling and log2(e), and delta = rowsum(dO * O).  FlashAttention-2 (arXiv 2307.08691),
// algorithm 2. Tensors are float32, bf16 or fp16; all arithmetic is float32.
//
// Segments come one after the other, and in each runs of queries that stay in the cache while all keys pass. In a run, threads first pack Q
// and dO, then take blocks of keys one by one: a thread owns the dK and dV of its block. dQ is summed over the blocks in kSums buffers, in
// each in the order of its blocks: a thread waits until the block before has added its share of a panel. So the gradients have the same
// bits for any number of threads, and a slow core holds up one buffer.
#include "attention_f32.h"
#include "attention_turns.h"
#include "../common/parallel.h"

namespace {

constexpr int64_t kRunBytes = 2048 << 10;  // packed rows and dQ of a run
constexpr int64_t kPanels = kStrip / kColumns;

struct Backward {
    const longfit_attention_tile& tile;
    int dtype;
    const longfit_attention_view &grad_out, &q, &k, &v, &out;
    const float* lse;
    const longfit_attention_view &grad_q, &grad_k, &grad_v;
    int64_t padded;  // head_dim up to whole panels
    int64_t strips;  // of a run, all heads of a segment
};

// The queries [first, last) of all heads of a segment; a strip's number is  head of the segment * strips + (query - first) / kStrip.
struct Run {
    Segment segment;
    int64_t first, last, strips;  // strips of one head

    int64_t count() const { return segment.heads * strips; }
    int64_t head_of(int64_t strip) const { return segment.head + strip / strips; }
    int64_t query_of(int64_t strip) const { return first + strip % strips * kStrip; }
    int64_t queries_of(int64_t strip) const { return least(kStrip, last - query_of(strip)); }
};

inline Run run_from(const Backward& b, const Segment& segment, int64_t first) {
    const int64_t last = least(first + most(1, b.strips / segment.heads) * kStrip, b.tile.queries);
    return {segment, first, last, blocks_of(last - first, kStrip)};
}

// What the threads share of a run.
struct Packed {
    float *q_columns, *grad_columns;  // [strip][panel][width][kColumns]; q times scaling log2(e)
    float *q_rows, *grad_rows;        // [strip][panel of columns][kStrip][kColumns]
    float *lse, *delta;               // [strip][kStrip]; lse in powers of two
    float* grad_q;                    // [kSums][strip][panel][width][kColumns]
    int64_t* added;                   // [kSums][strip][panel]: blocks of keys that have added their share
};

int64_t packed_bytes(const Backward& b) {
    const int64_t rows = b.strips * kStrip, width = b.tile.head_dim;
    return 2 * Scratch::size<float>(rows * width) + 2 * Scratch::size<float>(rows * b.padded) + 2 * Scratch::size<float>(rows) +
           Scratch::size<float>(kSums * rows * width) + Scratch::size<int64_t>(kSums * b.strips * kPanels);
}

Packed take_packed(const Backward& b, Scratch& memory) {
    const int64_t rows = b.strips * kStrip, width = b.tile.head_dim;
    Packed p;
    p.q_columns = memory.take<float>(rows * width), p.grad_columns = memory.take<float>(rows * width);
    p.q_rows = memory.take<float>(rows * b.padded), p.grad_rows = memory.take<float>(rows * b.padded);
    p.lse = memory.take<float>(rows), p.delta = memory.take<float>(rows);
    p.grad_q = memory.take<float>(kSums * rows * width);
    p.added = memory.take<int64_t>(kSums * b.strips * kPanels);
    return p;
}

// rowsum(a * b) of one row.
float dot_row(const Rows& a, const Rows& b, int64_t row) {
    float sum = 0;
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const T *x = reinterpret_cast<const T*>(a.data) + row * a.stride, *y = reinterpret_cast<const T*>(b.data) + row * b.stride;
        Vec sums = broadcast(0.f);
        for (int64_t c = 0; c < a.width; c += kLanes) sums = fma(load_part(x + c, a.width - c), load_part(y + c, a.width - c), sums);
        sum = sum_of(sums);
    });
    return sum;
}

void pack_strip(const Backward& b, const Run& run, const Packed& packed, int64_t strip) {
    const int64_t head = run.head_of(strip), query = run.query_of(strip), count = run.queries_of(strip), width = b.tile.head_dim;
    const int64_t batch = run.segment.batch;
    for (int64_t panel = 0; panel < kPanels; ++panel) {
        const int64_t begin = panel * kColumns, rows = most(0, least(kColumns, count - begin));
        const int64_t at = (strip * kPanels + panel) * width * kColumns;
        pack_transposed(rows_of(b.q, b.dtype, batch, head, query + begin, rows, width), b.tile.scaling * kLog2E, packed.q_columns + at);
        pack_transposed(rows_of(b.grad_out, b.dtype, batch, head, query + begin, rows, width), 1.f, packed.grad_columns + at);
    }
    const Rows grad = rows_of(b.grad_out, b.dtype, batch, head, query, count, width);
    const Rows out = rows_of(b.out, b.dtype, batch, head, query, count, width);
    pack_panels(rows_of(b.q, b.dtype, batch, head, query, count, width), kStrip, packed.q_rows + strip * kStrip * b.padded);
    pack_panels(grad, kStrip, packed.grad_rows + strip * kStrip * b.padded);
    const float* lse = b.lse + (batch * b.tile.query_heads + head) * b.tile.queries + query;
    for (int64_t i = 0; i < kStrip; ++i) {
        packed.lse[strip * kStrip + i] = i < count ? lse[i] * kLog2E : 0;
        packed.delta[strip * kStrip + i] = i < count ? dot_row(grad, out, i) : 0;
    }
    for (int64_t sums = 0; sums < kSums; ++sums) {
        float* grad_q = packed.grad_q + (sums * b.strips + strip) * kStrip * width;
        for (int64_t i = 0; i < kStrip * width; ++i) grad_q[i] = 0;
        for (int64_t panel = 0; panel < kPanels; ++panel) packed.added[(sums * b.strips + strip) * kPanels + panel] = 0;
    }
}

// Adds up the buffers of dQ^T, applies the scaling, stores.
void store_grad_q(const Backward& b, const Run& run, const Packed& packed, int64_t strip) {
    const int64_t width = b.tile.head_dim, elements = kStrip * width, buffer = b.strips * elements;
    float* sum = packed.grad_q + strip * elements;
    for (int64_t i = 0; i < elements; i += kLanes) {
        Vec total = load(sum + i);
        for (int64_t other = 1; other < kSums; ++other) total = total + load(sum + other * buffer + i);
        store(sum + i, total);
    }
    float scaling[kColumns];
    for (float& factor : scaling) factor = b.tile.scaling;
    for (int64_t panel = 0; panel < kPanels; ++panel) {
        const int64_t begin = panel * kColumns, count = least(kColumns, run.queries_of(strip) - begin);
        if (count > 0)
            store_transposed(sum + begin * width, scaling, count, width, b.dtype, b.grad_q, run.segment.batch, run.head_of(strip),
                             run.query_of(strip) + begin);
    }
}

// P^T and dS^T of a panel from its scores and dP^T, all [keys][kColumns]: P^T as rows of a strip, dS^T as such and over dP^T.
void softmax_gradient(int64_t keys, const float* lse, const float* delta, const float* scores, float* grad_p, float* p, float* grad_s) {
    for (int64_t j = 0; j < kColumns; j += kLanes) {
        const Vec lane_lse = load(lse + j), lane_delta = load(delta + j);
        for (int64_t key = 0; key < keys; ++key) {
            const int64_t at = key * kColumns + j, row = key * kStrip + j;
            const Vec probability = exp2(load(scores + at) - lane_lse);
            const Vec gradient = probability * (load(grad_p + at) - lane_delta);
            store(p + row, probability), store(grad_s + row, gradient), store(grad_p + at, gradient);
        }
    }
}

// One thread's buffers, and the work on a block of keys.
class BackwardWorker {
  public:
    explicit BackwardWorker(const Backward& b) : b_(b), width_(b.tile.head_dim), memory_(bytes(b)) {
        if (memory_.failed()) return;
        k_ = memory_.take<float>(kKeyBlock * width_), v_ = memory_.take<float>(kKeyBlock * width_);
        grad_k_ = memory_.take<float>(kKeyBlock * b.padded), grad_v_ = memory_.take<float>(kKeyBlock * b.padded);
        scores_ = memory_.take<float>(kKeyBlock * kColumns), grad_p_ = memory_.take<float>(kKeyBlock * kColumns);
        p_ = memory_.take<float>(kKeyBlock * kStrip), grad_s_ = memory_.take<float>(kKeyBlock * kStrip);
    }

    bool failed() const { return memory_.failed(); }

    // Stored keys [low, low + count), block `number` of the run, against all its queries.
    void work(const Run& run, const Packed& packed, int64_t number, int64_t low, int64_t count) {
        const Segment& segment = run.segment;
        pack_rows(rows_of(b_.k, b_.dtype, segment.batch, segment.kv_head, low, count, width_), kKeyBlock, k_);
        pack_rows(rows_of(b_.v, b_.dtype, segment.batch, segment.kv_head, low, count, width_), kKeyBlock, v_);
        for (int64_t i = 0; i < kKeyBlock * b_.padded; ++i) grad_k_[i] = grad_v_[i] = 0;
        for (int64_t strip = 0; strip < run.count(); ++strip) add_strip(run, packed, number, strip, low, count);
        add_rows(grad_k_, b_.tile.scaling, count, b_.grad_k, segment, low);
        add_rows(grad_v_, 1.f, count, b_.grad_v, segment, low);
    }

  private:
    static int64_t bytes(const Backward& b) {
        return 2 * Scratch::size<float>(kKeyBlock * b.tile.head_dim) + 2 * Scratch::size<float>(kKeyBlock * b.padded) +
               2 * Scratch::size<float>(kKeyBlock * kColumns) + 2 * Scratch::size<float>(kKeyBlock * kStrip);
    }

    void add_strip(const Run& run, const Packed& packed, int64_t number, int64_t strip, int64_t low, int64_t count) {
        const int64_t query = run.query_of(strip), queries = run.queries_of(strip), elements = width_ * kColumns;
        const Seen seen = seen_of_block(b_.tile, run.segment, query, queries, low, count, 1);
        const float *k = k_ + seen.low * width_, *v = v_ + seen.low * width_;
        for (int64_t panel = 0; panel < kPanels; ++panel) {
            const int64_t index = strip * kPanels + panel, begin = panel * kColumns, lane = strip * kStrip + begin;
            float* grad_q = packed.grad_q + number % kSums * b_.strips * kStrip * width_ + index * elements;
            int64_t* added = packed.added + number % kSums * b_.strips * kPanels + index;
            if (seen.rows != 0 && begin < queries) {
                multiply<false, false>(seen.rows, kColumns, width_, k, width_, packed.q_columns + index * elements, scores_);
                multiply<false, false>(seen.rows, kColumns, width_, v, width_, packed.grad_columns + index * elements, grad_p_);
                if (seen.masked)
                    Seers(b_.tile, run.segment, query + begin, least(kColumns, queries - begin))
                        .mask(low + seen.low, seen.rows, scores_);
                softmax_gradient(seen.rows, packed.lse + lane, packed.delta + lane, scores_, grad_p_, p_ + begin, grad_s_ + begin);
            }
            take_turn(added, number / kSums, [&] {
                if (seen.rows != 0 && begin < queries) multiply<true, true>(width_, kColumns, seen.rows, k, width_, grad_p_, grad_q);
            });
        }
        if (seen.rows == 0) return;
        const int64_t depth = blocks_of(queries, kColumns) * kColumns;  // lanes past the tile: Q and dO are zeros there
        for (int64_t column = 0; column < width_; column += kColumns) {
            const float *q = packed.q_rows + strip * kStrip * b_.padded, *grad = packed.grad_rows + strip * kStrip * b_.padded;
            const int64_t from = column * kStrip, to = column * kKeyBlock + seen.low * kColumns;
            multiply<true, false>(seen.rows, width_ - column, depth, p_, kStrip, grad + from, grad_v_ + to);
            multiply<true, false>(seen.rows, width_ - column, depth, grad_s_, kStrip, q + from, grad_k_ + to);
        }
    }

    // From panels of columns [panel][kKeyBlock][kColumns].
    void add_rows(const float* panels, float factor, int64_t count, const longfit_attention_view& to, const Segment& segment, int64_t low) {
        float* sums = static_cast<float*>(to.data) + segment.batch * to.batch + segment.kv_head * to.head + low * to.token;
        for (int64_t r = 0; r < count; ++r)
            for (int64_t d = 0; d < width_; ++d)
                sums[r * to.token + d] += factor * panels[(d / kColumns * kKeyBlock + r) * kColumns + d % kColumns];
    }

    const Backward& b_;
    const int64_t width_;
    Scratch memory_;
    float *k_, *v_;              // [kKeyBlock][width]
    float *grad_k_, *grad_v_;    // [panel][kKeyBlock][kColumns], before the scaling
    float *scores_, *grad_p_;    // [kKeyBlock][kColumns]
    float *p_, *grad_s_;         // [kKeyBlock][kStrip]
};

void differentiate(const Backward& b, const Run& run, const Packed& packed) {
    const int threads = b.tile.threads;
    const Range keys = visible_keys(b.tile, run.segment, run.first, run.last);
    const int64_t begin = keys.low / kKeyBlock * kKeyBlock, blocks = blocks_of(keys.high - begin, kKeyBlock);
    parallel_for(run.count(), 1, threads, [&](int64_t from, int64_t to) {
        for (int64_t strip = from; strip < to; ++strip) pack_strip(b, run, packed, strip);
    });
    Queue tasks(blocks);
    parallel_for(least(threads, blocks), 1, threads, [&](int64_t, int64_t) {
        BackwardWorker worker(b);
        if (worker.failed()) return report_out_of_memory(b.tile);  // another thread takes the blocks, or nobody does
        for (int64_t number; tasks.take(number);) {
            const int64_t low = begin + number * kKeyBlock;
            worker.work(run, packed, number, low, least(kKeyBlock, b.tile.keys - low));
        }
    });
    parallel_for(run.count(), 1, threads, [&](int64_t from, int64_t to) {
        for (int64_t strip = from; strip < to; ++strip) store_grad_q(b, run, packed, strip);
    });
}

}  // namespace

LONGFIT_EXPORT void KERNEL(longfit_attention_backward_f32)(const longfit_attention_tile* tile, int dtype, const longfit_attention_view* grad_out,
                                                           const longfit_attention_view* q, const longfit_attention_view* k,
                                                           const longfit_attention_view* v, const longfit_attention_view* out,
                                                           const float* lse, const longfit_attention_view* grad_q,
                                                           const longfit_attention_view* grad_k, const longfit_attention_view* grad_v) {
    const int64_t padded = blocks_of(tile->head_dim, kColumns) * kColumns, group = tile->query_heads / tile->kv_heads;
    const int64_t strip_bytes = kStrip * int64_t(sizeof(float)) * (3 * tile->head_dim + 2 * padded);
    // Where sums begin anew must not depend on the threads; a run has at least a strip of every head of a segment.
    const int64_t strips = most(group, least(kRunBytes / strip_bytes, group * blocks_of(tile->queries, kStrip)));
    const Backward b{*tile, dtype, *grad_out, *q, *k, *v, *out, lse, *grad_q, *grad_k, *grad_v, padded, strips};
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
