// Attention forward: online softmax over blocks of keys, for a chunk of queries of one segment.
//
// Everything is held transposed, with queries in lanes:  S^T = K Q^T,  P^T = exp(S^T - max),  O^T += V^T P^T.
// K and V are the row operands (V transposed once a block), and all heads of the segment pass over a packed block.
// The exponentials are taken relative to a score that was the maximum once and is kept until a score exceeds it 2^8-fold: that changes no
// relative error, and spares a pass over the scores and nearly every rescaling of O.
// FlashAttention-2 (arXiv 2307.08691), algorithm 1, with the roles of rows and columns exchanged.
#include "attention_softmax.h"
#include "../common/parallel.h"

namespace {

constexpr int64_t kKeyBlock = 128;      // keys that are packed at once
constexpr int64_t kKeyGroup = kScoreRows;  // keys whose scores are still in the first-level cache when their exponentials are taken
constexpr float kNothingSeen = -1e30f;  // the reference before the first key: finite, so that masked scores give 0 and not NaN

struct Forward {
    const longfit_attention_tile& tile;
    const longfit_attention_view &q, &k, &v, &out;
    float* lse;
    int64_t width;   // head_dim padded to a multiple of kDepthStep
    int64_t chunk;   // queries of a task
    int64_t panels;  // of a chunk, all heads of a segment
    float scale;     // of the scores; their sign is put into q
};

// 64 queries of one head on their way through the keys.
struct Panel {
    int64_t head, query, count;
    bf16* q;                 // [width / 2][64][2]
    float* out;              // [width][64]
    float *reference, *sum;  // [64]: a score, before the scale, and the sum of exponentials relative to it
};

// P^T in pairs of keys from scores [keys][64], relative to minus_reference; adds to the sums, widens the maxima. Not inlined: the
// caller's product would take the registers.
[[gnu::noinline]] void exponentials(int64_t keys, __m512 scale, const float* scores, const __m512* minus_reference, __m512* sums,
                                    __m512* maxima, bf16* p) {
    __m512 sum[kPanelVectors], max[kPanelVectors], shift[kPanelVectors];
    for (int j = 0; j < kPanelVectors; ++j) sum[j] = sums[j], max[j] = maxima[j], shift[j] = minus_reference[j];
    for (int64_t key = 0; key < keys; key += 2)
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) {
            const float* pair = scores + key * kPanel + j * kVector;
            const __m512 score_a = _mm512_load_ps(pair), score_b = _mm512_load_ps(pair + kPanel);
            max[j] = _mm512_max_ps(max[j], _mm512_max_ps(score_a, score_b));
            const __m512 a = exp2(_mm512_fmadd_ps(score_a, scale, shift[j])), b = exp2(_mm512_fmadd_ps(score_b, scale, shift[j]));
            sum[j] = _mm512_add_ps(sum[j], _mm512_add_ps(a, b));
            _mm512_store_si512(p + key * kPanel + j * 2 * kVector, pairs_of_rows(to_bf16(a, b)));
        }
    for (int j = 0; j < kPanelVectors; ++j) sums[j] = sum[j], maxima[j] = max[j];
}

// One thread's buffers, and the work on a chunk.
class ForwardWorker {
  public:
    explicit ForwardWorker(const Forward& f) : f_(f), memory_(bytes(f)) {
        if (memory_.failed()) return;
        k_ = memory_.take<bf16>(kKeyBlock * f.width);
        v_ = memory_.take<bf16>(kKeyBlock * f.width);
        scores_ = memory_.take<float>(kKeyBlock * kPanel);
        p_ = memory_.take<bf16>(kKeyBlock * kPanel);
        panels_ = memory_.take<Panel>(f.panels);
        for (int64_t i = 0; i < f.panels; ++i) {
            panels_[i].q = memory_.take<bf16>(kPanel * f.width);
            panels_[i].out = memory_.take<float>(kPanel * f.width);
            panels_[i].reference = memory_.take<float>(kPanel);
            panels_[i].sum = memory_.take<float>(kPanel);
        }
    }

    bool failed() const { return memory_.failed(); }

    void run(const Segment& segment, int64_t from, int64_t to) {
        if (segment.heads == 0) return;
        const int64_t used = begin(segment, from, to);
        const Range keys = visible_keys(f_.tile, segment, from, to);
        // Where blocks begin must not depend on the chunk, and so on the number of threads.
        for (int64_t low = keys.low / kKeyBlock * kKeyBlock; low < keys.high; low += kKeyBlock) {
            const int64_t count = least(kKeyBlock, keys.high - low);
            pack_rows(rows_of(f_.k, segment.batch, segment.kv_head, low, count, f_.tile.head_dim), kKeyBlock, f_.width, k_);
            pack_columns(rows_of(f_.v, segment.batch, segment.kv_head, low, count, f_.tile.head_dim), kKeyBlock, f_.width, v_);
            for (int64_t i = 0; i < used; ++i) add_block(segment, panels_[i], low, count);
        }
        for (int64_t i = 0; i < used; ++i) finish(segment, panels_[i]);
    }

  private:
    static int64_t bytes(const Forward& f) {
        const int64_t panel = Scratch::size<bf16>(kPanel * f.width) + Scratch::size<float>(kPanel * f.width) +
                              2 * Scratch::size<float>(kPanel);
        return 2 * Scratch::size<bf16>(kKeyBlock * f.width) + Scratch::size<float>(kKeyBlock * kPanel) +
               Scratch::size<bf16>(kKeyBlock * kPanel) + Scratch::size<Panel>(f.panels) + f.panels * panel;
    }

    int64_t begin(const Segment& segment, int64_t from, int64_t to) {
        int64_t used = 0;
        for (int64_t head = segment.head; head < segment.head + segment.heads; ++head)
            for (int64_t query = from; query < to; query += kPanel) {
                Panel& panel = panels_[used++];
                panel.head = head, panel.query = query, panel.count = least(kPanel, to - query);
                const Rows rows = rows_of(f_.q, segment.batch, head, query, panel.count, f_.tile.head_dim);
                pack_transposed(rows, kPanel, f_.width, panel.q);
                if (f_.tile.scaling < 0)
                    for (int64_t i = 0; i < kPanel * f_.width; ++i) panel.q[i].bits ^= 0x8000;
                for (int64_t i = 0; i < kPanel * f_.width; ++i) panel.out[i] = 0;
                for (int64_t i = 0; i < kPanel; ++i) panel.reference[i] = kNothingSeen, panel.sum[i] = 0;
            }
        return used;
    }

    // Takes the packed block, keys low .. low + count, into one panel.
    void add_block(const Segment& segment, const Panel& panel, int64_t low, int64_t count) {
        const Seen seen = seen_of_block(f_.tile, segment, panel.query, panel.count, low, count, kRowStep);
        if (seen.rows == 0) return;
        const Lanes lanes(f_.tile, segment, panel.query, panel.count);
        const __m512 scale = _mm512_set1_ps(f_.scale * kLog2E);
        __m512 max[kPanelVectors], minus_reference[kPanelVectors], sum[kPanelVectors];
        for (int j = 0; j < kPanelVectors; ++j) {
            max[j] = _mm512_load_ps(panel.reference + j * kVector);
            minus_reference[j] = minus(_mm512_mul_ps(max[j], scale));
            sum[j] = _mm512_load_ps(panel.sum + j * kVector);
        }
        for (int64_t row = 0; row < seen.rows; row += kKeyGroup) {
            const int64_t rows = least(kKeyGroup, seen.rows - row);
            float* scores = scores_ + row * kPanel;
            gemm<false>(rows, kPanelVectors, f_.width / 2, k_ + (seen.low + row) * f_.width, f_.width, panel.q, 2 * kPanel, scores, kPanel);
            if (seen.masked) lanes.mask(low + seen.low + row, rows, -INFINITY, scores);
            exponentials(rows, scale, scores, minus_reference, sum, max, p_ + row * kPanel);
        }
        if (raise_reference(panel, scale, max, minus_reference)) {  // then the block's exponentials are taken again
            for (int j = 0; j < kPanelVectors; ++j) sum[j] = _mm512_load_ps(panel.sum + j * kVector);
            exponentials(seen.rows, scale, scores_, minus_reference, sum, max, p_);
        }
        for (int j = 0; j < kPanelVectors; ++j) _mm512_store_ps(panel.sum + j * kVector, sum[j]);
        gemm<true>(f_.width, kPanelVectors, seen.rows / 2, v_ + seen.low, kKeyBlock, p_, 2 * kPanel, panel.out, kPanel);
    }

    // Where a score has outgrown its reference by more than 2^8, makes the maximum the reference and shrinks what was summed before.
    bool raise_reference(const Panel& panel, __m512 scale, const __m512* max, __m512* minus_reference) {
        bool raised = false;
        for (int j = 0; j < kPanelVectors; ++j) {
            const __m512 growth = _mm512_fmadd_ps(max[j], scale, minus_reference[j]);
            if (!_mm512_cmp_ps_mask(growth, _mm512_set1_ps(8.f), _CMP_GT_OQ)) continue;
            raised = true;
            const __m512 shrink = exp2(minus(growth));
            minus_reference[j] = minus(_mm512_mul_ps(max[j], scale));
            _mm512_store_ps(panel.reference + j * kVector, max[j]);
            _mm512_store_ps(panel.sum + j * kVector, _mm512_mul_ps(_mm512_load_ps(panel.sum + j * kVector), shrink));
            for (int64_t d = 0; d < f_.width; ++d) {
                float* out = panel.out + d * kPanel + j * kVector;
                _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), shrink));
            }
        }
        return raised;
    }

    void finish(const Segment& segment, const Panel& panel) {
        float* lse = f_.lse + (segment.batch * f_.tile.query_heads + panel.head) * f_.tile.queries + panel.query;
        for (int64_t i = 0; i < panel.count; ++i) lse[i] = panel.reference[i] * f_.scale + logf(panel.sum[i]);
        for (int64_t i = 0; i < kPanel; i += kVector)
            _mm512_store_ps(panel.sum + i, _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_load_ps(panel.sum + i)));
        store_transposed(panel.out, panel.sum, panel.count, f_.tile.head_dim,
                         static_cast<bf16*>(f_.out.data) + segment.batch * f_.out.batch + panel.head * f_.out.head +
                             panel.query * f_.out.token,
                         f_.out.token);
    }

    const Forward& f_;
    const Tiles tiles_;
    Scratch memory_;
    bf16 *k_, *v_;   // [128][width], [width][128]
    float* scores_;  // [128][64]
    bf16* p_;        // [64][64][2]
    Panel* panels_;
};

}  // namespace

void KERNEL(longfit_attention_forward)(const longfit_attention_tile* tile, const longfit_attention_view* q,
                                           const longfit_attention_view* k, const longfit_attention_view* v,
                                           const longfit_attention_view* out, float* lse) {
    const int64_t width = blocks_of(tile->head_dim, kDepthStep) * kDepthStep, group = tile->query_heads / tile->kv_heads;
    // Q and O of a chunk, 6 bytes an element, wait in half of a second-level cache of 1 MiB ...
    int64_t chunk = most(1, (512 << 10) / (6 * width * group * kPanel));
    // ... unless that leaves too few tasks to keep the threads equally busy.
    const int64_t parts = num_segments(*tile), wanted = blocks_of(4 * tile->threads, parts);
    chunk = kPanel * most(1, least(chunk, blocks_of(tile->queries, kPanel) / wanted));
    const Forward f{*tile, *q, *k, *v, *out, lse, width, chunk, group * (chunk / kPanel), score_scale(*tile)};

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
