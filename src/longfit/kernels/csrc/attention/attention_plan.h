// How a tile is cut into work: segments of query heads that share keys, and the keys that a run of queries sees.
//
// Include only from translation units compiled for one instruction set: everything here has internal linkage (longfit.h says why).
#pragma once

#include "attention.h"

// Memory at a 64-byte boundary, or null; and its return. (runtime/scratch.cpp)
extern "C" void* longfit_allocate(int64_t num_bytes);
extern "C" void longfit_release(void* memory);

namespace {

constexpr int64_t kPanel = 64;  // queries that are worked on together: four registers of fp32

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

// The query heads [head, head + heads) of one batch row that share a KV head and a class, so that they see the same keys.
struct Segment {
    int64_t batch, kv_head, head, heads;  // heads may be 0
    const int32_t* first_key;             // [queries]
};

inline int64_t num_segments(const longfit_attention_tile& tile) { return tile.batch * tile.kv_heads * tile.classes; }

inline Segment segment_at(const longfit_attention_tile& tile, int64_t number) {
    const int64_t c = number % tile.classes, kv = number / tile.classes % tile.kv_heads;
    const int64_t b = number / tile.classes / tile.kv_heads, group = tile.query_heads / tile.kv_heads;
    const int64_t from = most(kv * group, tile.head_bounds[c]), to = least((kv + 1) * group, tile.head_bounds[c + 1]);
    return {b, kv, from, most(to - from, 0), tile.first_key + (c * tile.batch + b) * tile.queries};
}

struct Range {
    int64_t low, high;
};

// The keys that the queries [from, to) of the tile see, from the first of any to the last of any.
inline Range visible_keys(const longfit_attention_tile& tile, const Segment& segment, int64_t from, int64_t to) {
    return {segment.first_key[from], tile.start + to};
}

// Some keys of a block as seen by the queries [query, query + count): rows [low, low + rows) of the block, whole groups of `multiple`, or
// none. A block whose size is no multiple is the last one.
struct Seen {
    int64_t low, rows;
    bool masked;  // some of the queries do not see all of the keys
};

inline Seen seen_of_block(const longfit_attention_tile& tile, const Segment& segment, int64_t query, int64_t count, int64_t block_low,
                          int64_t block_size, int64_t multiple) {
    const Range all = visible_keys(tile, segment, query, query + count);
    const int64_t low = most(all.low - block_low, 0) / multiple * multiple, high = least(block_size, all.high - block_low);
    if (low >= high) return {0, 0, false};
    const int64_t rows = blocks_of(high - low, multiple) * multiple, first = block_low + low;
    return {low, rows, first < segment.first_key[query + count - 1] || first + rows - 1 > tile.start + query};
}

// One allocation from which one thread takes its buffers, each on a cache line of its own.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : data_(static_cast<char*>(longfit_allocate(bytes))) {}
    ~Scratch() { longfit_release(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool failed() const { return data_ == nullptr; }
    template <class T> T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(data_ + used_);
        used_ += size<T>(count);
        return here;
    }
    template <class T> static int64_t size(int64_t count) { return blocks_of(count * int64_t(sizeof(T)), 64) * 64; }

  private:
    char* data_;
    int64_t used_ = 0;
};

// Hands out 0 .. count - 1 to whichever thread asks next.
class Queue {
  public:
    explicit Queue(int64_t count) : count_(count) {}
    bool take(int64_t& number) { return (number = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < count_; }

  private:
    int64_t next_ = 0;
    const int64_t count_;
};

inline void report_out_of_memory(const longfit_attention_tile& tile) { __atomic_store_n(tile.out_of_memory, 1, __ATOMIC_RELAXED); }

}  // namespace
