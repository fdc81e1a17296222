// Huge pages for large results: their first touch then costs one page fault per 2 MiB instead of 512, which is ten times the time of
// de-quantising the same bytes.
#include "../longfit.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// A hint about freshly allocated memory; refused without harm where the system has no such pages.
LONGFIT_EXPORT void longfit_advise_huge_pages(void* memory, int64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(num_bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)num_bytes;
#endif
}
