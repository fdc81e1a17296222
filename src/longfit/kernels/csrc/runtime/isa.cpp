// What the processor can run, among what this library was compiled for.
#include "../longfit.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

LONGFIT_EXPORT int longfit_abi() { return LONGFIT_ABI; }

// Comma-separated, fastest first; a name is the suffix of the exported kernels.
LONGFIT_EXPORT const char* longfit_isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (bf16) return "avx512_bf16,avx512,avx2,scalar";
    if (avx512) return "avx512,avx2,scalar";
    if (avx2) return "avx2,scalar";
    return "scalar";
#elif defined(__aarch64__)
    return "neon,scalar";
#else
    return "scalar";
#endif
}

// Whether the processor multiplies bf16 matrices in tiles (AMX): torch's GEMM then outruns any made of vector instructions.
LONGFIT_EXPORT int longfit_has_amx() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
    return 0;
#endif
}
