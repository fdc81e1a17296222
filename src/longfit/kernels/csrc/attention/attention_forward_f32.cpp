// Attention forward in float32: online softmax over blocks of keys, for a chunk of queries of one segment.
//
// Everything is held transposed, with queries in lanes:  S^T = K Q^T,  P^T = 2^(S^T - reference),  O^T += V^T P^T.
// Q carries the scaling and log2(e). The exponentials are taken relative to a score that was the maximum once and is kept until a score
// exceeds it 2^8-fold: that changes no relative error, and spares nearly every rescaling of O.
// FlashAttention-2 (arXiv 2307.08691), algorithm 1, with the roles of rows and columns exchanged. Tensors are float32, bf16 or fp16; all
// arithmetic, P included, is float32.
#include "attention_f32.h"
#include "../common/parallel.h"

namespace {

constexpr float kNothingSeen = -1e30f;       // the reference before the first key: finite, so that masked scores give 0 and not NaN
constexpr int64_t kChunkBytes = 512 << 10;  // Q and O of a chunk wait in half of a second-level cache of 1 MiB

struct Forward {
    const longfit_attention_tile& tile;
    int dtype;
    const longfit_attention_view &q, &k, &v, &out;
    float* lse;
    int64_t chunk;   // queries of a task
    int64_t panels;  // of a chunk, all heads of a segment
};

// kColumns queries of one head on their way through the keys.
struct Panel {
    int64_t head, query, count;
    float *q, *out;          // [width][kColumns]
    float *reference, *sum;  // [kColumns]: a score in powers of two, and the sum of exponentials relative to it
};

// One thread's buffers, and the work on a chunk.
class ForwardWorker {
  public:
    explicit ForwardWorker(const Forward& f) : f_(f), width_(f.tile.head_dim), memory_(bytes(f)) {
        if (memory_.failed()) return;
        k_ = memory_.take<float>(kKeyBlock * width_), v_ = memory_.take<float>(kKeyBlock * width_);
        scores_ = memory_.take<float>(kKeyBlock * kColumns);
        panels_ = memory_.take<Panel>(f.panels);
        for (int64_t i = 0; i < f.panels; ++i) {
            panels_[i].q = memory_.take<float>(kColumns * width_), panels_[i].out = memory_.take<float>(kColumns * width_);
            panels_[i].reference = memory_.take<float>(kColumns), panels_[i].sum = memory_.take<float>(kColumns);
        }
    }

    bool failed() const { return memory_.failed(); }

    void run(const Segment& segment, int64_t from, int64_t to) {
        if (segment.heads == 0) return;
        const int64_t used = begin(segment, from, to);
        const Range keys = visible_keys(f_.tile, segment, from, to);
        for (int64_t low = keys.low / kKeyBlock * kKeyBlock; low < keys.high; low += kKeyBlock) {
            const int64_t count = least(kKeyBlock, f_.tile.keys - low);
            pack_rows(rows_of(f_.k, f_.dtype, segment.batch, segment.kv_head, low, count, width_), kKeyBlock, k_);
            pack_rows(rows_of(f_.v, f_.dtype, segment.batch, segment.kv_head, low, count, width_), kKeyBlock, v_);
            for (int64_t i = 0; i < used; ++i) add_block(segment, panels_[i], low, count);
        }
        for (int64_t i = 0; i < used; ++i) finish(segment, panels_[i]);
    }

  private:
    static int64_t bytes(const Forward& f) {
        const int64_t width = f.tile.head_dim, panel = 2 * Scratch::size<float>(kColumns * width) + 2 * Scratch::size<float>(kColumns);
        return 2 * Scratch::size<float>(kKeyBlock * width) + Scratch::size<float>(kKeyBlock * kColumns) +
               Scratch::size<Panel>(f.panels) + f.panels * panel;
    }

    int64_t begin(const Segment& segment, int64_t from, int64_t to) {
        int64_t used = 0;
        for (int64_t head = segment.head; head < segment.head + segment.heads; ++head)
            for (int64_t query = from; query < to; query += kColumns) {
                Panel& panel = panels_[used++];
                panel.head = head, panel.query = query, panel.count = least(kColumns, to - query);
                pack_transposed(rows_of(f_.q, f_.dtype, segment.batch, head, query, panel.count, width_), f_.tile.scaling * kLog2E, panel.q);
                for (int64_t i = 0; i < kColumns * width_; ++i) panel.out[i] = 0;
                for (int64_t i = 0; i < kColumns; ++i) panel.reference[i] = kNothingSeen, panel.sum[i] = 0;
            }
        return used;
    }

    // Takes the packed block, keys low .. low + count, into one panel.
    void add_block(const Segment& segment, const Panel& panel, int64_t low, int64_t count) {
        const Seen seen = seen_of_block(f_.tile, segment, panel.query, panel.count, low, count, 1);
        if (seen.rows == 0) return;
        multiply<false, false>(seen.rows, kColumns, width_, k_ + seen.low * width_, width_, panel.q, scores_);
        if (seen.masked)
            Seers(f_.tile, segment, panel.query, panel.count).mask(low + seen.low, seen.rows, scores_);
        for (int64_t j = 0; j < kColumns; j += kLanes) {
            raise_reference(panel, j, seen.rows);
            exponentials(panel, j, seen.rows);
        }
        multiply<true, true>(width_, kColumns, seen.rows, v_ + seen.low * width_, width_, scores_, panel.out);
    }

    // Where a score exceeds its reference by more than 2^8, makes the maximum the reference and shrinks what was summed before.
    void raise_reference(const Panel& panel, int64_t lanes, int64_t keys) {
        const Vec reference = load(panel.reference + lanes);
        Vec top[2] = {reference, reference};  // two, as each maximum waits for the one before
        for (int64_t key = 0; key + 1 < keys; key += 2)
            for (int i = 0; i < 2; ++i) top[i] = larger(load(scores_ + (key + i) * kColumns + lanes), top[i]);
        if (keys % 2) top[0] = larger(load(scores_ + (keys - 1) * kColumns + lanes), top[0]);
        const Vec growth = larger(top[0], top[1]) - reference;
        if (!(largest_of(growth) > 8.f)) return;
        const Vec raised = choose(growth > 8.f, larger(top[0], top[1]), reference);  // not in other lanes: their bits are their own
        const Vec shrink = exp2(reference - raised);
        store(panel.reference + lanes, raised);
        store(panel.sum + lanes, load(panel.sum + lanes) * shrink);
        for (int64_t d = 0; d < width_; ++d) {
            float* out = panel.out + d * kColumns + lanes;
            store(out, load(out) * shrink);
        }
    }

    // P^T over S^T, and its sums.
    void exponentials(const Panel& panel, int64_t lanes, int64_t keys) {
        const Vec reference = load(panel.reference + lanes);
        Vec sum = load(panel.sum + lanes), other = broadcast(0.f);
        for (int64_t key = 0; key + 1 < keys; key += 2) {
            sum = sum + exponential(key, lanes, reference);
            other = other + exponential(key + 1, lanes, reference);
        }
        if (keys % 2) sum = sum + exponential(keys - 1, lanes, reference);
        store(panel.sum + lanes, sum + other);
    }

    Vec exponential(int64_t key, int64_t lanes, Vec reference) {
        float* score = scores_ + key * kColumns + lanes;
        const Vec p = exp2(load(score) - reference);
        store(score, p);
        return p;
    }

    void finish(const Segment& segment, const Panel& panel) {
        float* lse = f_.lse + (segment.batch * f_.tile.query_heads + panel.head) * f_.tile.queries + panel.query;
        for (int64_t i = 0; i < panel.count; ++i) lse[i] = panel.reference[i] * kLn2 + logf(panel.sum[i]);
        for (int64_t i = 0; i < kColumns; ++i) panel.sum[i] = 1.f / panel.sum[i];
        store_transposed(panel.out, panel.sum, panel.count, width_, f_.dtype, f_.out, segment.batch, panel.head, panel.query);
    }

    const Forward& f_;
    const int64_t width_;
    Scratch memory_;
    float *k_, *v_;  // [kKeyBlock][width]
    float* scores_;  // [kKeyBlock][kColumns]: S^T, then P^T
    Panel* panels_;
};

}  // namespace

LONGFIT_EXPORT void KERNEL(longfit_attention_forward_f32)(const longfit_attention_tile* tile, int dtype, const longfit_attention_view* q,
                                                          const longfit_attention_view* k, const longfit_attention_view* v,
                                                          const longfit_attention_view* out, float* lse) {
    const int64_t group = tile->query_heads / tile->kv_heads, bytes = 2 * int64_t(sizeof(float)) * tile->head_dim * group;
    // As many queries as the cache holds, unless that leaves too few tasks to keep the threads equally busy.
    const int64_t parts = num_segments(*tile), wanted = blocks_of(4 * tile->threads, parts);
    const int64_t panels = most(1, least(kChunkBytes / (bytes * kColumns), blocks_of(tile->queries, kColumns) / wanted));
    const int64_t chunk = panels * kColumns;
    const Forward f{*tile, dtype, *q, *k, *v, *out, lse, chunk, group * panels};

    const int64_t chunks = blocks_of(tile->queries, chunk);
    Queue tasks(chunks * parts);
    parallel_for(least(tile->threads, chunks * parts), 1, tile->threads, [&](int64_t, int64_t) {
        ForwardWorker worker(f);
        if (worker.failed()) return report_out_of_memory(*tile);
        for (int64_t task; tasks.take(task);) {
            const int64_t from = (chunks - 1 - task / parts) * chunk;  // last queries, which see most keys, first
            worker.run(segment_at(*tile, task % parts), from, least(from + chunk, tile->queries));
        }
    });
}
