// What the processor can run, among what this library was compiled for.
#include "../longfit.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Whether the processor multiplies bf16 matrices in tiles (AMX), and Linux lets this process use the tile registers: it must be asked,
// as they make a thread's saved state eight times as large. Asking twice does no harm.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBf16)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

LONGFIT_EXPORT int longfit_abi() { return LONGFIT_ABI; }

// Comma-separated, fastest first; a name is the suffix of the exported kernels.
LONGFIT_EXPORT const char* longfit_isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (bf16 && may_use_amx()) return "amx_bf16,avx512_bf16,avx512,avx2,scalar";
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
