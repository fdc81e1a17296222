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
#include <dlfcn.h>
#include <pthread.h>
#include <thread>
#include <vector>

namespace {

using ForkJoin = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

ForkJoin find_fork_join() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return reinterpret_cast<ForkJoin>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

struct Job {
    void (*work)(void*, int64_t, int64_t);
    void* context;
    int64_t count;
    int64_t parts;  // their lengths differ by one at most
    std::atomic<int64_t> next{0};
};

// Every thread takes the next part until none is left, so it does not matter how many threads really came.
void take_parts(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t part; (part = job.next.fetch_add(1)) < job.parts;)
        job.work(job.context, part * job.count / job.parts, (part + 1) * job.count / job.parts);
}

}  // namespace

extern "C" void longfit_parallel(void (*work)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads) {
    static const ForkJoin fork_join = find_fork_join();
    if (count <= 0) return;
    const int64_t most = count > grain ? count / grain : 1;
    if (threads > most) threads = static_cast<int>(most);
    if (threads <= 1 || forked) {
        work(context, 0, count);
        return;
    }
    // Four parts a thread let a thread that started late be helped out, and still cost few calls.
    Job job{work, context, count, most < 4 * threads ? most : 4 * threads};
    if (fork_join) {
        fork_join(take_parts, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(take_parts, &job);
    take_parts(&job);
    for (std::thread& helper : helpers) helper.join();
}

LONGFIT_EXPORT int longfit_borrows_openmp() { return dlsym(RTLD_DEFAULT, "GOMP_parallel") != nullptr; }
