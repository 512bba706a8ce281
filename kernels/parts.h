// Splitting work between threads, for all kernels. The threads are OpenMP's, and so torch's own: a pool beside them
// would wait for them to stop spinning.

#pragma once

#include <cstdint>

// Calls work(begin, end) for `threads` parts of 0..count, cut at multiples of step.
template <typename Work>
static void in_parts(int64_t count, int64_t step, int64_t threads, Work work) {
    int64_t size = (count + threads * step - 1) / (threads * step) * step;
    int64_t parts = size ? (count + size - 1) / size : 0;
#pragma omp parallel for schedule(static) num_threads(parts > 0 ? (int)parts : 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t end = (part + 1) * size;
        work(part * size, end < count ? end : count);
    }
}
