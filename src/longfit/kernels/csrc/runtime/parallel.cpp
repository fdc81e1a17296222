// Threads for the kernels: borrowed from the OpenMP runtime that torch has already loaded.
//
// Linking OpenMP ourselves would put a second runtime beside torch's: two pools of workers that spin on the same cores after every
// parallel region (a matmul tile alternates between this library and torch). So the fork-join call is looked up in the running process.
// GOMP_parallel is the stable entry of libgomp, and LLVM's and Intel's runtimes export it too. Where no runtime is loaded, threads are
// started per call: slower by some 50 us, but without any state. Both forms are safe for concurrent callers.
//
// No OpenMP worker survives fork(): a forked child would wait for them for ever. It runs on the calling thread alone.
#include "../longfit.h"

#include <atomic>
#include <thread>
#include <vector>
#if !defined(_WIN32)  // which neither forks nor finds a symbol in the whole process
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace {

std::atomic<bool> forked{false};

struct OpenMP {
    void (*fork_join)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_number)() = nullptr;

    OpenMP() {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { forked = true; });
        fork_join = reinterpret_cast<decltype(fork_join)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread_number = reinterpret_cast<decltype(thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        if (!thread_number) fork_join = nullptr;
#endif
    }
};

const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

constexpr int kMostThreads = 256;

// The parts are dealt to the threads in runs, and a thread that is through with its own takes those of others, so it does not matter
// how many threads really came. Dealt alike at every call, they meet what the same core left in its cache.
struct Job {
    void (*work)(void*, int64_t, int64_t);
    void* context;
    int64_t count;
    int64_t parts;  // their lengths differ by one at most
    int threads;
    std::atomic<int64_t> taken[kMostThreads];  // of each thread's run

    Job(void (*work)(void*, int64_t, int64_t), void* context, int64_t count, int64_t parts, int threads)
        : work(work), context(context), count(count), parts(parts), threads(threads) {
        for (int i = 0; i < threads; ++i) taken[i].store(0, std::memory_order_relaxed);
    }
    void take_parts(int thread) {
        for (int i = 0; i < threads; ++i) {
            const int owner = (thread + i) % threads;
            const int64_t first = owner * parts / threads, last = (owner + 1) * parts / threads;
            for (int64_t part; (part = first + taken[owner].fetch_add(1, std::memory_order_relaxed)) < last;)
                work(context, part * count / parts, (part + 1) * count / parts);
        }
    }
};

}  // namespace

extern "C" void longfit_parallel(void (*work)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads) {
    const OpenMP& omp = openmp();
    if (count <= 0) return;
    const int64_t most = count > grain ? count / grain : 1;
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > most) threads = static_cast<int>(most);
    if (threads <= 1 || forked) {
        work(context, 0, count);
        return;
    }
    // Four parts a thread let a thread that started late be helped out, and still cost few calls.
    Job job(work, context, count, most < 4 * threads ? most : 4 * threads, threads);
    if (omp.fork_join) {
        omp.fork_join([](void* data) { static_cast<Job*>(data)->take_parts(openmp().thread_number()); }, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&job, i] { job.take_parts(i); });
    job.take_parts(0);
    for (std::thread& helper : helpers) helper.join();
}
