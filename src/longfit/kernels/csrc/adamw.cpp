// AdamW in one pass: each block of 256 elements is read, decoded, moved, rounded, encoded and written while it is in the first-level cache.
// fp32 parameters with fp32 moments are updated where they lie.
#include "adamw.h"
#include "blocks.h"
#include "moments.h"
#include "parallel.h"

namespace {

constexpr int64_t kTask = 64;  // blocks: 16,384 elements, some 10 microseconds

template <class T> inline void widen_all(int n, const T* __restrict x, float* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = widen(x[i]);
}
template <class T> inline void narrow_all(int n, const float* __restrict x, T* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = narrow<T>(x[i]);
}

// The gradient of a block in fp32: where it lies, or widened to `scratch`.
inline const float* widened(int, const float* grad, float*) { return grad; }
template <class T> inline const float* widened(int n, const T* grad, float* scratch) {
    widen_all(n, grad, scratch);
    return scratch;
}

struct Moments32 {
    float *m, *v;
    Moments32(const longfit_adamw_run& s, const MomentMaps*, int64_t first, int)
        : m(static_cast<float*>(s.exp_avg) + first), v(static_cast<float*>(s.exp_avg_sq) + first) {}
    void store(int) {}
};

struct Moments8 {
    const MomentMaps& maps;
    uint8_t *m_codes, *v_codes;
    float *m_absmax, *v_absmax;
    alignas(64) float m[kAdamwBlock];
    alignas(64) float v[kAdamwBlock];
    Moments8(const longfit_adamw_run& s, const MomentMaps* maps, int64_t first, int n)
        : maps(*maps), m_codes(static_cast<uint8_t*>(s.exp_avg) + first), v_codes(static_cast<uint8_t*>(s.exp_avg_sq) + first),
          m_absmax(s.exp_avg_absmax + first / kAdamwBlock), v_absmax(s.exp_avg_sq_absmax + first / kAdamwBlock) {
        maps->decode_m(m_codes, n, *m_absmax, m);
        maps->decode_v(v_codes, n, *v_absmax, v);
    }
    void store(int n) { encode_moments(maps, n, m, v, m_codes, m_absmax, v_codes, v_absmax); }
};

// Moves a block of parameters: where they lie, through their masters, or widened and rounded back.
template <class Moments>
inline void move_block(const longfit_adamw_run& s, int64_t, int n, const float* grad, float* param, Moments& moments) {
    adamw_update(s, n, grad, param, moments.m, moments.v);
}
template <class Moments, class T>
inline void move_block(const longfit_adamw_run& s, int64_t first, int n, const float* grad, T* param, Moments& moments) {
    if (s.master) {
        float* master = s.master + first;
        refresh_master(n, param, master);
        adamw_update(s, n, grad, master, moments.m, moments.v);
        narrow_all(n, master, param);
        return;
    }
    alignas(64) float wide[kAdamwBlock];
    widen_all(n, param, wide);
    adamw_update(s, n, grad, wide, moments.m, moments.v);
    round_stochastically(n, wide, s.rounding_key, s.start + static_cast<uint32_t>(first), reinterpret_cast<bf16*>(param));
}

template <class Moments, class P, class G>
void run_blocks(const longfit_adamw_run& s, const MomentMaps* maps, int64_t begin, int64_t end) {
    P* param = static_cast<P*>(s.param);
    const G* grad = static_cast<const G*>(s.grad);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kAdamwBlock;
        const int n = static_cast<int>(s.numel - first < kAdamwBlock ? s.numel - first : kAdamwBlock);
        alignas(64) float scratch[kAdamwBlock];
        Moments moments(s, maps, first, n);
        move_block(s, first, n, widened(n, grad + first, scratch), param + first, moments);
        moments.store(n);
    }
}

template <class Moments> void run_all(const longfit_adamw_run& s, const MomentMaps* maps, int threads) {
    const int64_t blocks = (s.numel + kAdamwBlock - 1) / kAdamwBlock;
    with_type(s.param_dtype, [&](auto param_type) {
        with_type(s.grad_dtype, [&](auto grad_type) {
            parallel_for(blocks, kTask, threads, [&](int64_t begin, int64_t end) {
                run_blocks<Moments, decltype(param_type), decltype(grad_type)>(s, maps, begin, end);
            });
        });
    });
}

}  // namespace

// Prepares the 8-bit maps, [256] ascending levels each: fills `tables`, which begin at a multiple of 64, and sets num_bytes to their size,
// or to 0 where these kernels cannot serve such maps. With null `tables` it only says the size.
LONGFIT_EXPORT void KERNEL(longfit_adamw_maps)(const float* signed_map, const float* unsigned_map, void* tables, int64_t* num_bytes) {
    const bool built = !tables || static_cast<MomentMaps*>(tables)->build(signed_map, unsigned_map);
    *num_bytes = built ? sizeof(MomentMaps) : 0;
}

LONGFIT_EXPORT void KERNEL(longfit_adamw)(const longfit_adamw_run* run, int threads) {
    const MomentMaps* maps = static_cast<const MomentMaps*>(run->maps);
    if (run->exp_avg_absmax) run_all<Moments8>(*run, maps, threads);
    else run_all<Moments32>(*run, maps, threads);
}
