// C = A dq(W)^T and C = A dq(W) in bf16 for any number of rows: a GEMM that reads its right operand in 4 bits.
//
// A GEMM copies its operands into the layout of its registers in any case. Here that copy is where the weight is de-quantised, so a
// product costs what it costs with a dense weight, and nothing of W but a piece in the second-level cache ever exists in 16 bits.
// The loops are those of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008) with A left where it is: a task
// computes up to 512 x 64 of C and passes over K in runs. A sum always goes up K one pair at a time, so its bits depend neither on the
// threads nor on the other rows. Widths of 128 and 256 that share a copy of A were slower: with W's own lines they overflow the cache.
#include "gemm_bf16.h"
#include "../common/parallel.h"
#include "weight4.h"

namespace {

constexpr int64_t kWidth = 64;              // columns of B at once: what gemm() takes
constexpr int64_t kDepth = 576;             // of K at once, at most: 72 KiB of B
constexpr int64_t kRows = 512;              // of A at once, at most: 128 KiB of C
constexpr int64_t kFillRows = 8;            // de-quantising a piece of W costs about as much as multiplying it with 8 rows
constexpr int64_t kAhead = 16;              // rows of W from a prefetch to its use
constexpr int64_t kTaskProducts = 1 << 20;  // some 10 us

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

struct Product {
    const longfit_weight4& w;
    bool transposed;  // B = W^T
    int64_t rows, columns, depth;
    const bf16* a;
    int64_t a_stride;
    bf16* c;
};

// How C is cut into tasks.
struct Cut {
    int64_t height, width;
};

// The cut that takes least time when every thread takes its share of equal tasks.
inline Cut cut_of(const Product& p, int threads) {
    Cut best = {0, 0};
    int64_t best_cost = INT64_MAX;
    for (int64_t parts = blocks_of(p.rows, kRows), last = parts + threads; parts < last; ++parts) {
        const int64_t height = blocks_of(p.rows, parts);
        for (int64_t width = kWidth; width >= (p.transposed ? kWidth / 2 : kWidth); width /= 2) {  // never through a block of W
            const int64_t tasks = blocks_of(p.columns, width) * blocks_of(p.rows, height);
            const int64_t cost = blocks_of(tasks, threads) * width * (height + kFillRows);
            if (cost < best_cost) best_cost = cost, best = {height, width};
        }
    }
    return best;
}

// Where a thread works.
struct Room {
    bf16 b[kDepth * kWidth];  // [pair of K][64][2]
    float c[kRows * kWidth];
    bf16 runs[16 * kDepth];
};

// 64 weights of one block.
inline void look_up_group(const longfit_weight4& w, bool plain_levels, int64_t row, int64_t column, __m512i& first,
                          __m512i& second) {
    const int64_t element = row * w.element_stride + column;
    const float absmax = absmax_at(w, row, element >> log2_of(w.block_size));
    const Levels<bf16> levels(w.codebook, absmax, plain_levels && plain_scales(&absmax, 1));
    levels.lookup(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.codes + row * w.code_stride + element / 2)), first, second);
}

// Whether groups of 64 weights along a row of W, from `column` on, are parts of one block: they then go from register to register.
inline bool groups_are_whole(const longfit_weight4& w, int64_t column, int64_t count) {
    return (column | count | w.element_stride | w.block_size) % kWidth == 0;
}

inline void store_transposed(__m512i rows[16], bf16* to) {
    transpose16(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 2 * kWidth, rows[i]);
}

// B = W^T: 16 rows of W at a time, transposed in pairs of K.
inline void fill_transposed(const longfit_weight4& w, bool plain, int64_t column, int64_t columns, int64_t k, int64_t depth, Room& room) {
    const bool whole = groups_are_whole(w, k, depth);
    for (int64_t n = 0; n < columns; n += 16) {
        const int64_t rows = least(16, columns - n);
        bf16* to = room.b + 2 * n;
        if (whole && rows == 16) {
            for (int64_t at = 0; at < depth; at += kWidth) {
                __m512i first[16], second[16];
                for (int64_t i = 0; i < 16; ++i) look_up_group(w, plain, column + n + i, k + at, first[i], second[i]);
                store_transposed(first, to + at * kWidth);
                store_transposed(second, to + (at + 32) * kWidth);
            }
            continue;
        }
        memset(room.runs, 0, sizeof room.runs);
        for (int64_t i = 0; i < rows; ++i) dequantize_run<bf16, false>(w, plain, column + n + i, k, depth, room.runs + i * kDepth);
        for (int64_t at = 0; at < depth; at += 32) {
            __m512i block[16];
            for (int64_t i = 0; i < 16; ++i) block[i] = _mm512_load_si512(room.runs + i * kDepth + at);
            store_transposed(block, to + at * kWidth);
        }
    }
}

// A row of W is a jump ahead in memory that the processor does not foresee.
inline void prefetch(const longfit_weight4& w, int64_t row, int64_t column) {
    const int64_t element = row * w.element_stride + column;
    __builtin_prefetch(w.codes + row * w.code_stride + element / 2);
    __builtin_prefetch(w.scales + row * w.scale_stride + (element >> log2_of(w.block_size)));
}

// B = W: rows of W in pairs, interleaved.
inline void fill_straight(const longfit_weight4& w, bool plain, int64_t column, int64_t columns, int64_t k, int64_t depth, Room& room) {
    const bool whole = groups_are_whole(w, column, columns);
    memset(room.runs, 0, 2 * kWidth * sizeof(bf16));
    for (int64_t row = 0; row < depth; row += 2) {
        __m512i even[2], odd[2] = {};
        prefetch(w, k + row + kAhead, column), prefetch(w, k + row + kAhead + 1, column);
        if (whole) {
            look_up_group(w, plain, k + row, column, even[0], even[1]);
            if (row + 1 < depth) look_up_group(w, plain, k + row + 1, column, odd[0], odd[1]);
        } else {
            dequantize_run<bf16, false>(w, plain, k + row, column, columns, room.runs);
            if (row + 1 < depth) dequantize_run<bf16, false>(w, plain, k + row + 1, column, columns, room.runs + kWidth);
            else memset(room.runs + kWidth, 0, columns * sizeof(bf16));
            for (int64_t i = 0; i < 2; ++i) {
                even[i] = _mm512_load_si512(room.runs + 32 * i);
                odd[i] = _mm512_load_si512(room.runs + kWidth + 32 * i);
            }
        }
        for (int64_t i = 0; i < 2; ++i) {
            __m512i first, second;
            interleave(even[i], odd[i], first, second);
            _mm512_store_si512(room.b + row * kWidth + 64 * i, first);
            _mm512_store_si512(room.b + row * kWidth + 64 * i + 32, second);
        }
    }
}

inline void store_rounded(const float* sums, int64_t count, bf16* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<bf16>(sums[i]);
}

inline void task(const Product& p, bool plain, int64_t row, int64_t rows, int64_t column, int64_t columns, Room& room) {
    const int64_t vectors = blocks_of(columns, kVector);
    const int64_t step = blocks_of(blocks_of(p.depth, blocks_of(p.depth, kDepth)), kWidth) * kWidth;  // K in equal parts
    for (int64_t k = 0; k < p.depth; k += step) {
        const int64_t depth = least(step, p.depth - k), pairs = blocks_of(depth, 2);
        if (p.transposed) fill_transposed(p.w, plain, column, columns, k, depth, room);
        else fill_straight(p.w, plain, column, columns, k, depth, room);
        const bf16* a = p.a + row * p.a_stride + k;
        if (k == 0) gemm<false>(rows, vectors, pairs, a, p.a_stride, room.b, 2 * kWidth, room.c, kWidth);
        else gemm<true>(rows, vectors, pairs, a, p.a_stride, room.b, 2 * kWidth, room.c, kWidth);
    }
    for (int64_t i = 0; i < rows; ++i) store_rounded(room.c + i * kWidth, columns, p.c + (row + i) * p.columns + column);
}

}  // namespace

// a [rows, depth] with rows at any stride, each followed by one more 0 where depth is odd; c [rows, columns] dense. W is [columns, depth]
// if it is to be transposed, else [depth, columns].
LONGFIT_EXPORT void KERNEL(longfit_matmul_4bit)(const longfit_weight4* w, int transposed, int64_t rows, int64_t columns, int64_t depth,
                                                    const void* a, int64_t a_stride, void* c, int threads) {
    if (rows == 0) return;
    const Product p = {*w, transposed != 0, rows, columns, depth, static_cast<const bf16*>(a), a_stride, static_cast<bf16*>(c)};
    const bool plain = plain_levels(w->codebook);
    const Cut cut = cut_of(p, threads);
    const int64_t across = blocks_of(columns, cut.width), tasks = blocks_of(rows, cut.height) * across;
    const int64_t grain = kTaskProducts / (cut.width * (cut.height + kFillRows) * depth) + 1;
    parallel_for(tasks, grain, threads, [&](int64_t begin, int64_t end) {
        Room& room = *static_cast<Room*>(longfit_scratch(sizeof(Room)));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / across * cut.height, column = i % across * cut.width;
            task(p, plain, row, least(cut.height, rows - row), column, least(cut.width, columns - column), room);
        }
    });
}
