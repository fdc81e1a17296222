// What forward and backward in float32 share: rows packed as float32, and the masks.
//
// A panel is kColumns queries of one head, its numbers held transposed, [..][kColumns], one query per lane, so that the maximum, the sum
// and the masks need no work across lanes. Blocks of keys begin at multiples of kKeyBlock of the whole sequence: what a query's result
// sums up in which order depends neither on the tile's cut into tasks nor on the threads.
#pragma once

#include "../common/gemm_f32.h"
#include "attention_plan.h"

#include <math.h>

namespace {

constexpr int64_t kKeyBlock = 120;  // keys that are packed at once: a multiple of the rows of a register tile
constexpr int64_t kStrip = 128;     // queries that are packed at once, a multiple of every panel

struct Rows {  // rows of a tensor in its stored type
    const char* data;
    int64_t stride, count, width;
    int dtype;
};

inline Rows rows_of(const longfit_attention_view& view, int dtype, int64_t b, int64_t h, int64_t token, int64_t count, int64_t width) {
    const int64_t at = b * view.batch + h * view.head + token * view.token, bytes = dtype == LONGFIT_FP32 ? 4 : 2;
    return {static_cast<const char*>(view.data) + at * bytes, view.token, count, width, dtype};
}

// [rows][width], rows from `count` on as zeros.
inline void pack_rows(const Rows& x, int64_t rows, float* packed) {
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t r = 0; r < x.count; ++r) {
            const T* from = reinterpret_cast<const T*>(x.data) + r * x.stride;
            for (int64_t c = 0; c < x.width; c += kLanes) store_part(packed + r * x.width + c, x.width - c, load_part(from + c, x.width - c));
        }
    });
    for (int64_t i = x.count * x.width; i < rows * x.width; ++i) packed[i] = 0;
}

// Panels over the columns: [ceil(width / kColumns)][rows][kColumns], what lies outside of x as zeros.
inline void pack_panels(const Rows& x, int64_t rows, float* packed) {
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t column = 0; column < x.width; column += kColumns, packed += rows * kColumns)
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < kColumns; c += kLanes) {
                    const int64_t left = r < x.count ? x.width - column - c : 0;
                    const T* from = reinterpret_cast<const T*>(x.data) + r * x.stride + column + c;
                    store(packed + r * kColumns + c, left > 0 ? load_part(from, left) : broadcast(0.f));
                }
    });
}

// One panel of rows, transposed and times a factor: [width][kColumns], lanes from `count` on as zeros.
inline void pack_transposed(const Rows& x, float factor, float* packed) {
    for (int64_t i = 0; i < x.width * kColumns; ++i) packed[i] = 0;
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t r = 0; r < x.count; ++r) {
            const T* from = reinterpret_cast<const T*>(x.data) + r * x.stride;
            for (int64_t c = 0; c < x.width; ++c) packed[c * kColumns + r] = widen(from[c]) * factor;
        }
    });
}

// The way back: rows [count][width] in the stored type from [width][kColumns], each lane times its factor.
inline void store_transposed(const float* x, const float* factors, int64_t count, int64_t width, int dtype, const longfit_attention_view& to,
                             int64_t b, int64_t h, int64_t token) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        T* rows = static_cast<T*>(to.data) + b * to.batch + h * to.head + token * to.token;
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < width; ++c) rows[r * to.token + c] = narrow<T>(x[c * kColumns + r] * factors[r]);
    });
}

// The token numbers of the first and the last key that each query of a panel sees. Lanes past the tile repeat its last query: what they
// compute is finite and goes nowhere.
struct Seers {
    int32_t first[kColumns], last[kColumns];

    Seers(const longfit_attention_tile& tile, const Segment& segment, int64_t query, int64_t count) {
        for (int64_t i = 0; i < kColumns; ++i) {
            const int64_t lane = query + least(i, count - 1);
            first[i] = segment.first_key[lane];
            last[i] = int32_t(tile.start + lane);
        }
    }

    // Makes what is not seen of the scores [keys][kColumns] minus infinity; row 0 belongs to the key with token number `key`.
    void mask(int64_t key, int64_t keys, float* scores) const {
        for (int64_t j = 0; j < kColumns; j += kLanes) {
            VecInt low, high;
            memcpy(&low, first + j, sizeof low), memcpy(&high, last + j, sizeof high);
            for (int64_t row = 0; row < keys; ++row) {
                const VecInt here = broadcast(int32_t(key + row));
                float* at = scores + row * kColumns + j;
                store(at, choose((here < low) | (here > high), broadcast(-INFINITY), load(at)));
            }
        }
    }
};

}  // namespace
