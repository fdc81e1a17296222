// The C ABI between Python (kernels/cpu/library.py, ctypes) and the C++ kernels. No torch headers: a tensor arrives as a pointer.
//
// How one source serves every instruction set. CMake compiles each csrc/*.cpp once per instruction set ("ISA": scalar, avx2, avx512,
// avx512_bf16, amx_bf16, neon), each time with that set's compiler flags and with LONGFIT_ISA and LONGFIT_<ISA> defined. KERNEL(name) appends the
// ISA to the exported name, so the library holds longfit_dequantize_4bit_scalar, longfit_dequantize_4bit_avx2, ... and Python calls the
// one it chose. There is no dispatch in C++, and a test forces an ISA by calling its symbol. csrc/runtime/*.cpp is compiled once, for the
// oldest processor.
//
// The one rule that this needs: a kernel source instantiates no inline function with external linkage (no std:: containers, no public
// templates), because the linker keeps one copy of those and might keep the AVX-512 one. Everything shared lives in an unnamed namespace.
#pragma once

#include <stdint.h>

#define LONGFIT_EXPORT extern "C" __attribute__((visibility("default")))
#define LONGFIT_JOIN2(name, isa) name##_##isa
#define LONGFIT_JOIN(name, isa) LONGFIT_JOIN2(name, isa)
#define KERNEL(name) LONGFIT_JOIN(name, LONGFIT_ISA)

// Raised by one whenever an exported function comes or changes its meaning; kernels/cpu/library.py refuses a library with another number.
#define LONGFIT_ABI 9

// Size of a table of longfit_nearest_table.
#define LONGFIT_NEAREST_BYTES (44 << 10)

enum longfit_dtype { LONGFIT_FP32 = 0, LONGFIT_BF16 = 1, LONGFIT_FP16 = 2 };

// A 4-bit weight [R, C], however it is stored. Element (r, c) is number e = r * element_stride + c of the code run that starts at
// codes + r * code_stride, and its block constant is number b = e / block_size of scales + r * scale_stride; with double quantisation the
// constant's own block is (first_block + r * block_stride + b) / absmax_block_size. Flat storage: element_stride = C and the other strides are 0.
// Row storage (numerics/row_format.py): element_stride = 0.
struct longfit_weight4 {
    const uint8_t* codes;   // two codes a byte, high nibble first
    const uint8_t* scales;  // float32 absmax of any alignment, or, where scale_map is set, its 8-bit codes
    const float* codebook;  // [16] in code order
    const float* scale_map; // [256] or null
    const uint8_t* nested;  // float32 absmax of the absmax, any alignment; then `offset`, one float32
    const uint8_t* offset;
    int64_t element_stride, code_stride, scale_stride, block_stride;  // elements, bytes, bytes, blocks
    int64_t first_block;
    int64_t block_size, absmax_block_size;  // powers of two, at least 32
};

// Calls work(context, begin, end) so that [0, count) is covered once, on at most `threads` threads, each part at least `grain` long
// unless there is but one. Returns when all parts are done. (runtime/parallel.cpp)
extern "C" void longfit_parallel(void (*work)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads);

// At least num_bytes of this thread's working memory at a 64-byte boundary, valid until the thread asks again. (runtime/scratch.cpp)
extern "C" void* longfit_scratch(int64_t num_bytes);
