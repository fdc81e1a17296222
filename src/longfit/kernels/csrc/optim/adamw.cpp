// AdamW in one pass: a chunk of elements is read, decoded, moved, rounded, encoded and written while it is in the first-level cache.
// fp32 parameters with fp32 moments are updated where they lie.
#include "adamw.h"
#include "../common/blocks.h"
#include "moments.h"
#include "../common/parallel.h"

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
    static constexpr int kChunk = 2048;  // elements handled at once; what must be widened stays in the first-level cache
    float *m, *v;
    Moments32(const longfit_adamw_run& s, int64_t first, int)
        : m(static_cast<float*>(s.exp_avg) + first), v(static_cast<float*>(s.exp_avg_sq) + first) {}
    void store(int) {}
};

struct Moments8 {
    static constexpr int kChunk = kAdamwBlock;
    const MomentMaps& maps;
    uint8_t *m_codes, *v_codes;
    float *m_absmax, *v_absmax;
    alignas(64) float m[kAdamwBlock];
    alignas(64) float v[kAdamwBlock];
    Moments8(const longfit_adamw_run& s, int64_t first, int n)
        : maps(*static_cast<const MomentMaps*>(s.maps)), m_codes(static_cast<uint8_t*>(s.exp_avg) + first),
          v_codes(static_cast<uint8_t*>(s.exp_avg_sq) + first), m_absmax(s.exp_avg_absmax + first / kAdamwBlock), v_absmax(s.exp_avg_sq_absmax + first / kAdamwBlock) {
        maps.decode_m(m_codes, n, *m_absmax, m);
        maps.decode_v(v_codes, n, *v_absmax, v);
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
    alignas(64) float wide[Moments::kChunk];
    widen_all(n, param, wide);
    adamw_update(s, n, grad, wide, moments.m, moments.v);
    round_stochastically(n, wide, s.rounding_key, s.start + static_cast<uint32_t>(first), reinterpret_cast<bf16*>(param));
}

// Blocks begin .. end - 1 of one run.
template <class Moments, class P, class G> void step_blocks(const longfit_adamw_run& s, int64_t begin, int64_t end) {
    P* param = static_cast<P*>(s.param);
    const G* grad = static_cast<const G*>(s.grad);
    const int64_t stop = end * kAdamwBlock < s.numel ? end * kAdamwBlock : s.numel;
    for (int64_t first = begin * kAdamwBlock; first < stop; first += Moments::kChunk) {
        const int n = static_cast<int>(stop - first < Moments::kChunk ? stop - first : Moments::kChunk);
        alignas(64) float scratch[Moments::kChunk];
        Moments moments(s, first, n);
        move_block(s, first, n, widened(n, grad + first, scratch), param + first, moments);
        moments.store(n);
    }
}

void step_run(const longfit_adamw_run& s, int64_t begin, int64_t end) {
    with_type(s.param_dtype, [&](auto param_type) {
        with_type(s.grad_dtype, [&](auto grad_type) {
            using P = decltype(param_type);
            using G = decltype(grad_type);
            if (s.exp_avg_absmax) step_blocks<Moments8, P, G>(s, begin, end);
            else step_blocks<Moments32, P, G>(s, begin, end);
        });
    });
}

inline int64_t blocks_of(const longfit_adamw_run& s) { return (s.numel + kAdamwBlock - 1) / kAdamwBlock; }

// Blocks begin .. end - 1 of all runs together.
void step_runs(const longfit_adamw_run* runs, int64_t count, int64_t begin, int64_t end) {
    int64_t low = 0, high = count - 1;  // the first run that ends after `begin`
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (runs[middle].end_block > begin) high = middle;
        else low = middle + 1;
    }
    for (const longfit_adamw_run* run = runs + low; begin < end; ++run) {
        const int64_t start = run->end_block - blocks_of(*run), stop = run->end_block < end ? run->end_block : end;
        step_run(*run, begin - start, stop - start);
        begin = stop;
    }
}

}  // namespace

// Prepares the 8-bit maps, [256] ascending levels each: fills `tables`, which begin at a multiple of 64, and sets num_bytes to their size,
// or to 0 where these kernels cannot serve such maps. With null `tables` it only says the size.
LONGFIT_EXPORT void KERNEL(longfit_adamw_maps)(const float* signed_map, const float* unsigned_map, void* tables, int64_t* num_bytes) {
    const bool built = !tables || static_cast<MomentMaps*>(tables)->build(signed_map, unsigned_map);
    *num_bytes = built ? sizeof(MomentMaps) : 0;
}

// One step of all runs, in one parallel region.
LONGFIT_EXPORT void KERNEL(longfit_adamw)(const longfit_adamw_run* runs, int64_t count, int threads) {
    if (count == 0) return;
    parallel_for(runs[count - 1].end_block, kTask, threads,
                 [&](int64_t begin, int64_t end) { step_runs(runs, count, begin, end); });
}
