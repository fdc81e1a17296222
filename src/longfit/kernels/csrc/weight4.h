// Any run of elements of a stored 4-bit weight -> values: the core of de-quantisation and of the matmuls.
#pragma once

#include "lookup.h"

namespace {

// The block constants of one row in order, decoded on the way: absmax = map[code] * nested + offset with two float32 roundings
// (the build forbids contraction to a fused multiply-add, which would change 1 constant in 15).
class AbsmaxCursor {
  public:
    AbsmaxCursor(const longfit_weight4& w, int64_t row, int64_t block)
        : scale_map(w.scale_map), scales(w.scales + row * w.scale_stride), block(block) {
        if (!scale_map) return;
        const int64_t number = w.first_block + row * w.block_stride + block;
        period = w.absmax_block_size;
        left = period - number % period;
        nested = w.nested + 4 * (number / period);
        scale = load_float(nested);
        offset = load_float(w.offset);
    }
    float next() {
        if (!scale_map) return load_float(scales + 4 * block++);
        if (left == 0) {
            left = period;
            nested += 4;
            scale = load_float(nested);
        }
        --left;
        const float product = scale_map[scales[block++]] * scale;
        return product + offset;
    }

  private:
    const float* scale_map;
    const uint8_t* scales;
    int64_t block, period = 0, left = 0;
    const uint8_t* nested = nullptr;
    float scale = 0, offset = 0;
};

// Elements [column, column + count) of row `row` -> out[0 .. count). With `stream` the stores bypass the caches; every block must
// then start at a 64-byte boundary of `out`.
template <class T, bool stream = false>
inline void dequantize_run(const longfit_weight4& w, int64_t row, int64_t column, int64_t count, T* out) {
    int64_t element = row * w.element_stride + column;
    const int64_t end = element + count;
    const uint8_t* codes = w.codes + row * w.code_stride;
    int64_t block_end = element / w.block_size * w.block_size;
    AbsmaxCursor absmax(w, row, element / w.block_size);
    while (element < end) {
        block_end += w.block_size;
        const int64_t stop = block_end < end ? block_end : end;
        const float scale = absmax.next();
        if (element % 2) {  // a run that starts inside a byte: flat storage and an odd C
            *out++ = narrow<T>(w.codebook[codes[element / 2] & 15] * scale);
            ++element;
        }
        const Levels<T> levels(w.codebook, scale);
        const int64_t pairs = (stop - element) / 2;
        levels.template expand<stream>(codes + element / 2, pairs, out);
        out += 2 * pairs;
        element += 2 * pairs;
        if (element < stop) {
            *out++ = narrow<T>(w.codebook[codes[element / 2] >> 4] * scale);
            ++element;
        }
    }
}

}  // namespace
