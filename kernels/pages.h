// Memory that is new to the process, for all kernels.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for large pages for a new tensor, where the system gives them on request: most of the time would go into getting
// it page by page. From this size on the C library maps a tensor by itself, so that no other has a part in its pages.
static inline void want_large_pages(void* tensor, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20;
    uintptr_t begin = ((uintptr_t)tensor + page - 1) / page * page, end = ((uintptr_t)tensor + bytes) / page * page;
    if (bytes >= 32 << 20) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: it may well be ignored
#else
    (void)tensor, (void)bytes;
#endif
}
