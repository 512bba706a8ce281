// What outputs are judged by, behind a plain C ABI; validation.py launches it, and reference.py says what it computes.
// Threads share no sum, so results do not depend on their number.

#include <atomic>
#include <cstdint>

#include "parts.h"
#include "vectors.h"

// Squared distances of rows [begin, end) of x and y [rows, width].
CLONES static void squared_distances_part(const float* x, const float* y, int64_t begin, int64_t end, int64_t width,
                                          double* out) {
    for (int64_t row = begin; row < end; row++) {
        const float *one = x + row * width, *other = y + row * width;
        Doubles lanes = {};
        int64_t c = 0;
        for (; c + DOUBLES <= width; c += DOUBLES) {
            Doubles difference = WIDEN(HalfVector, one + c) - WIDEN(HalfVector, other + c);
            lanes += difference * difference;
        }
        out[row] = total_of(lanes);
        for (; c < width; c++) out[row] += ((double)one[c] - other[c]) * ((double)one[c] - other[c]);
    }
}

// How many of values [begin, end) are NaN or infinite: those whose exponent is all ones.
template <typename T>
CLONES static int64_t not_finite_part(const T* values, int64_t begin, int64_t end, T exponent) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; i++) count += (values[i] & exponent) == exponent;
    return count;
}

extern "C" {

void squared_distances(const float* x, const float* y, int64_t rows, int64_t width, double* out, int64_t threads) {
    in_parts(rows, 1, threads, [=](int64_t begin, int64_t end) {
        squared_distances_part(x, y, begin, end, width, out);
    });
}

int64_t count_not_finite(const void* values, int64_t count, int64_t bytes, int64_t exponent, int64_t threads) {
    std::atomic<int64_t> found{0};
    in_parts(count, 1 << 12, threads, [&](int64_t begin, int64_t end) {
        found += bytes == 2 ? not_finite_part((const uint16_t*)values, begin, end, (uint16_t)exponent)
                            : not_finite_part((const uint32_t*)values, begin, end, (uint32_t)exponent);
    });
    return found;
}
}
