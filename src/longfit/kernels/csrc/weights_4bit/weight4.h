// Any run of elements of a stored 4-bit weight -> values: the core of de-quantisation and of the matmuls.
#pragma once

#include "lookup.h"

namespace {

inline int log2_of(int64_t power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }

// The constant of a block: absmax = map[code] * nested + offset with two float32 roundings (the build forbids contraction to a fused
// multiply-add, which would change 1 constant in 15).
inline float absmax_at(const longfit_weight4& w, int64_t row, int64_t block) {
    const uint8_t* scales = w.scales + row * w.scale_stride;
    if (!w.scale_map) return load_float(scales + 4 * block);
    const int64_t number = w.first_block + row * w.block_stride + block;
    const float product = w.scale_map[scales[block]] * load_float(w.nested + 4 * (number >> log2_of(w.absmax_block_size)));
    return product + load_float(w.offset);
}

// The constants of the blocks of one row in order, the same decoding with less arithmetic.
class AbsmaxCursor {
  public:
    AbsmaxCursor(const longfit_weight4& w, int64_t row, int64_t block)
        : scale_map(w.scale_map), scales(w.scales + row * w.scale_stride), block(block) {
        if (!scale_map) return;
        const int64_t number = w.first_block + row * w.block_stride + block;
        period = w.absmax_block_size;
        left = period - (number & (period - 1));
        nested = w.nested + 4 * (number >> log2_of(period));
        scale = load_float(nested);
        offset = load_float(w.offset);
    }
    // The next `count` constants, at most kGroup.
    static constexpr int kGroup = 128;
    void next(int64_t count, float* out) {
        if (!scale_map) {
            memcpy(out, scales + 4 * block, 4 * count);
            block += count;
            return;
        }
        while (count > 0) {
            if (left == 0) {
                left = period;
                nested += 4;
                scale = load_float(nested);
            }
            const int64_t run = count < left ? count : left;
            for (int64_t i = 0; i < run; ++i) {
                const float product = scale_map[scales[block + i]] * scale;
                out[i] = product + offset;
            }
            out += run, block += run, left -= run, count -= run;
        }
    }

  private:
    const float* scale_map;
    const uint8_t* scales;
    int64_t block, period = 0, left = 0;
    const uint8_t* nested = nullptr;
    float scale = 0, offset = 0;
};

// Whether level * absmax is neither NaN nor subnormal for all of these constants and every level of at least 2^-20 (or 0).
inline bool plain_scales(const float* absmax, int64_t count) {
    uint32_t furthest = 0;  // a maximum, which compilers turn into vector code
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t beyond = (bits_of(absmax[i]) & 0x7fffffff) - 0x1f800000;  // 2^-64
        furthest = beyond > furthest ? beyond : furthest;
    }
    return furthest < 0x7f800000 - 0x1f800000;  // infinity
}
inline bool plain_levels(const float* codebook) {
    bool plain = true;
    for (int i = 0; i < 16; ++i) {
        const uint32_t magnitude = bits_of(codebook[i]) & 0x7fffffff;
        plain &= magnitude == 0 || magnitude - 0x35800000 < 0x7f800000 - 0x35800000;  // 2^-20 to infinity
    }
    return plain;
}

template <class T, bool stream> inline void expand(const Levels<T>& levels, const uint8_t* packed, int64_t pairs, T* out) {
    constexpr int64_t kStep = Levels<T>::kStep;
    for (; pairs >= kStep / 2; pairs -= kStep / 2, packed += kStep / 2, out += kStep) levels.template step<stream>(packed, out);
    if (pairs > 0) levels.tail(packed, pairs, out);
}

// `count` whole blocks of 64 values or of any multiple of kStep: no branch per block, as a block takes only some ten cycles.
template <class T, bool stream, bool blocks_of_64>
inline void dequantize_blocks(const float* codebook, const float* absmax, bool plain, const uint8_t* packed, int64_t count,
                              int64_t block_size, T* out) {
    constexpr int64_t kStep = Levels<T>::kStep;
    for (int64_t i = 0; i < count; ++i) {
        const Levels<T> levels(codebook, absmax[i], plain);
        for (int64_t j = 0; j < (blocks_of_64 ? 64 : block_size); j += kStep, packed += kStep / 2, out += kStep)
            levels.template step<stream>(packed, out);
    }
}

// Elements [column, column + count) of row `row` -> out[0 .. count). With `stream` the stores bypass the caches; every block must
// then start at a 64-byte boundary of `out`. `levels_are_plain` is plain_levels(w.codebook).
template <class T, bool stream>
inline void dequantize_run(const longfit_weight4& w, bool levels_are_plain, int64_t row, int64_t column, int64_t count, T* out) {
    int64_t element = row * w.element_stride + column;
    const int64_t end = element + count;
    const uint8_t* codes = w.codes + row * w.code_stride;
    const int log2_block = log2_of(w.block_size);
    int64_t block = element >> log2_block;
    AbsmaxCursor constants(w, row, block);
    float absmax[AbsmaxCursor::kGroup];
    while (element < end) {
        // Whole blocks come in groups; a block of which the run has only a part comes alone.
        const int64_t left = element == block * w.block_size ? (end - element) >> log2_block : 0;
        const int64_t group = left > AbsmaxCursor::kGroup ? AbsmaxCursor::kGroup : left > 0 ? left : 1;
        constants.next(group, absmax);
        const bool plain = levels_are_plain && plain_scales(absmax, group);
        if (left > 0 && w.block_size >= Levels<T>::kStep) {
            const uint8_t* packed = codes + element / 2;
            if (w.block_size != 64) dequantize_blocks<T, stream, false>(w.codebook, absmax, plain, packed, group, w.block_size, out);
            else if (plain) dequantize_blocks<T, stream, true>(w.codebook, absmax, true, packed, group, 64, out);
            else dequantize_blocks<T, stream, true>(w.codebook, absmax, false, packed, group, 64, out);
            element += group * w.block_size, out += group * w.block_size, block += group;
            continue;
        }
        for (int64_t i = 0; i < group; ++i) {
            const int64_t block_end = ++block * w.block_size, stop = block_end < end ? block_end : end;
            if (element % 2) {  // a run that starts inside a byte: flat storage and an odd C
                *out++ = narrow<T>(w.codebook[codes[element / 2] & 15] * absmax[i]);
                ++element;
            }
            const int64_t pairs = (stop - element) / 2;
            expand<T, stream>(Levels<T>(w.codebook, absmax[i], plain), codes + element / 2, pairs, out);
            out += 2 * pairs;
            element += 2 * pairs;
            if (element < stop) {
                *out++ = narrow<T>(w.codebook[codes[element / 2] >> 4] * absmax[i]);
                ++element;
            }
        }
    }
}

}  // namespace
