// 4-bit weight -> fp32, bf16 or fp16; a window of it, so that a matmul can ask for a tile (QLoRA, section 3: doubleDequant).
#include "../common/parallel.h"
#include "weight4.h"

namespace {

// Beyond the caches a plain store first reads the line it overwrites: a third of the traffic. Below, streaming only evicts what the
// caller is about to read. 32 MiB are the last-level cache of a common server processor, which other data share.
constexpr int64_t kStreamBytes = 32 << 20;
// Elements a task handles: some microseconds of work, and a multiple of every block size up to 4,096 that is a power of two.
constexpr int64_t kTask = 16384;

template <class T>
void dequantize_window(const longfit_weight4& w, int64_t row0, int64_t rows, int64_t column0, int64_t columns, T* out,
                       int64_t out_stride, int threads) {
    const int64_t step = (kTask + w.block_size - 1) / w.block_size * w.block_size;
    const int64_t tasks_per_row = (columns + step - 1) / step;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && (rows == 1 || out_stride * sizeof(T) % 64 == 0) &&
                         w.block_size * sizeof(T) % 64 == 0 && column0 % w.block_size == 0 && w.element_stride % w.block_size == 0;
    const bool stream = aligned && rows * columns * int64_t(sizeof(T)) >= kStreamBytes;
    const bool plain = plain_levels(w.codebook);
    const int64_t grain = (kTask - 1) / (columns < step ? columns : step) + 1;
    parallel_for(rows * tasks_per_row, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end;) {  // tasks of one row that follow each other are one run
            const int64_t row = task / tasks_per_row, first = task - row * tasks_per_row, column = first * step;
            const int64_t tasks = end - task < tasks_per_row - first ? end - task : tasks_per_row - first;
            const int64_t count = columns - column < tasks * step ? columns - column : tasks * step;
            T* at = out + row * out_stride + column;
            if (stream) dequantize_run<T, true>(w, plain, row0 + row, column0 + column, count, at);
            else dequantize_run<T, false>(w, plain, row0 + row, column0 + column, count, at);
            task += tasks;
        }
#if defined(LONGFIT_AVX2)
        if (stream) _mm_sfence();
#endif
    });
}

}  // namespace

LONGFIT_EXPORT void KERNEL(longfit_dequantize_4bit)(const longfit_weight4* w, int64_t row0, int64_t rows, int64_t column0,
                                                    int64_t columns, void* out, int64_t out_stride, int dtype, int threads) {
    if (rows == 0 || columns == 0) return;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        dequantize_window(*w, row0, rows, column0, columns, static_cast<T*>(out), out_stride, threads);
    });
}
