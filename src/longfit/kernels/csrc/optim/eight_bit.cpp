// Values <-> 8-bit codes of any codebook of up to 256 levels, with an fp32 absmax per block: the constants of double quantisation, the
// moments of 8-bit AdamW. Exactly the nearest level, where a table over equal steps (common, and fast) misses small values.
#include "../common/blocks.h"
#include "nearest.h"
#include "../common/parallel.h"

namespace {

constexpr int64_t kTask = 8192;  // values: some microseconds

template <class T> void quantize_block(const NearestTable& nearest, const T* x, int64_t count, uint8_t* codes, float* absmax) {
    const float top = absmax_of(x, count);
    if (!finite(top)) {
        *absmax = float_of(kNaN);
        memset(codes, nearest.highest(), count);
        return;
    }
    *absmax = top;
    const float factor = reciprocal_of(top);
    for (int64_t i = 0; i < count; i += NearestTable::kChunk)
        nearest.codes(x + i, factor, static_cast<int>(count - i < NearestTable::kChunk ? count - i : NearestTable::kChunk), codes + i);
}

template <class T> void dequantize_block(const float* codebook, const uint8_t* codes, int64_t count, float absmax, T* out) {
    constexpr int64_t kChunk = 128;
    float level[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
        const int64_t n = count - i < kChunk ? count - i : kChunk;
        for (int64_t j = 0; j < n; ++j) {
            uint32_t code = codes[i + j];
            asm("" : "+r"(code));  // keeps the compiler from a gather
            level[j] = codebook[code];
        }
        for (int64_t j = 0; j < n; ++j) out[i + j] = narrow<T>(level[j] * absmax);
    }
}

}  // namespace

// Fills `table`, LONGFIT_NEAREST_BYTES at a boundary of 4, with what quantize_8bit wants to know of a codebook of up to 256 levels.
LONGFIT_EXPORT void KERNEL(longfit_nearest_table)(const float* codebook, int levels, void* table) {
    static_assert(sizeof(NearestTable) <= LONGFIT_NEAREST_BYTES && alignof(NearestTable) <= 4 && __is_trivially_copyable(NearestTable),
                  "a caller keeps it as bytes");
    const NearestTable nearest(codebook, levels);
    memcpy(table, &nearest, sizeof nearest);
}

LONGFIT_EXPORT void KERNEL(longfit_quantize_8bit)(const void* values, int64_t numel, int dtype, const void* table, int64_t block_size,
                                                  uint8_t* codes, float* absmax, int threads) {
    const NearestTable& nearest = *static_cast<const NearestTable*>(table);
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const T* x = static_cast<const T*>(values);
        const int64_t blocks = (numel + block_size - 1) / block_size;
        parallel_for(blocks, (kTask - 1) / block_size + 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t start = block * block_size;
                quantize_block(nearest, x + start, numel - start < block_size ? numel - start : block_size, codes + start, absmax + block);
            }
        });
    });
}

LONGFIT_EXPORT void KERNEL(longfit_dequantize_8bit)(const uint8_t* codes, const float* absmax, int64_t numel, const float* codebook,
                                                    int64_t block_size, void* out, int dtype, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t blocks = (numel + block_size - 1) / block_size;
        parallel_for(blocks, (kTask - 1) / block_size + 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t start = block * block_size;
                dequantize_block(codebook, codes + start, numel - start < block_size ? numel - start : block_size, absmax[block],
                                 static_cast<T*>(out) + start);
            }
        });
    });
}
