// gemm() of gemm_bf16.h on AMX: tile registers of 16 rows of 64 bytes, and one instruction that multiplies two of them.
//
// The operands are those of the vectors: a tile of A is 16 rows of 16 pairs of K, one of B is 16 pairs of K for 16 columns. Two by two
// tiles of C are held, so that four loads feed four products of 8,192 multiplications each. All sizes are multiples of 32: who packs for
// gemm() asks kRowStep and kDepthStep how far to pad.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include <immintrin.h>

namespace {

constexpr int64_t kTile = 16;  // rows of a tile, columns of C, pairs of K
constexpr int64_t kScoreRows = 128;
constexpr int64_t kRowStep = 2 * kTile;
constexpr int64_t kDepthStep = 2 * kTile;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tile registers of a thread, for as long as this lives.
struct Tiles {
    Tiles() {
        TileConfig config;
        for (int i = 0; i < 8; ++i) config.rows[i] = kTile, config.row_bytes[i] = 64;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// 32 rows by 32 columns: tiles 0 to 3 are C, two by two; 4 and 5 two of A, one below the other; 6 and 7 two of B side by side.
template <bool Add>
inline void gemm_block(int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c, int64_t ldc) {
    const int64_t a_bytes = 2 * lda, b_bytes = 2 * ldb, c_bytes = 4 * ldc;
    float* below = c + kTile * ldc;
    if constexpr (Add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + kTile, c_bytes);
        _tile_loadd(2, below, c_bytes);
        _tile_loadd(3, below + kTile, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < pairs; p += kTile, a += 2 * kTile, b += kTile * ldb) {
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(4, a, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + kTile * lda, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, b + 2 * kTile, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile, c_bytes);
    _tile_stored(2, below, c_bytes);
    _tile_stored(3, below + kTile, c_bytes);
}

// rows = M, vectors = N / 16, pairs = K / 2; lda, ldb (of a pair of K) and ldc in elements. Some Tiles must live in this thread.
template <bool Add>
inline void gemm(int64_t rows, int64_t vectors, int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                 int64_t ldc) {
    __asm__ volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    for (int64_t column = 0; column < vectors * kVector; column += 2 * kTile)
        for (int64_t row = 0; row < rows; row += 2 * kTile)
            gemm_block<Add>(pairs, a + row * lda, lda, b + 2 * column, ldb, c + row * ldc + column, ldc);
}

}  // namespace
