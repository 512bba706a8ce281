// Calibration statistics of activations, behind a plain C ABI; statistics.py launches them, and reference.py says what
// they compute. Threads take channels of their own, so results do not depend on their number.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parts.h"
#include "vectors.h"

static const int RANGE_STRIP = 4;      // vectors of channels; 16 accumulators
static const int64_t ROWS_AHEAD = 16;  // fetched early: each row of a strip lies in a page of its own
static const int MIN_EXPONENT = -126;  // of a bin's width: float scales by its inverse without overflow

// Least and greatest value, and sum of squares, of channels [begin, end) of x [tokens, channels]; both multiples of 16
// or the last channel. Adds to what low, high and square_sum hold. A strip of channels is as wide as registers allow:
// the fewer rows of x a page holds, the slower narrow ones are read.
CLONES static void channel_range_part(const float* x, int64_t tokens, int64_t channels, int64_t begin, int64_t end,
                                      float* low, float* high, double* square_sum) {
    for (int64_t c = begin; c < end;) {
        if (end - c >= RANGE_STRIP * LANES) {
            Vector least[RANGE_STRIP], greatest[RANGE_STRIP];
            Doubles squares[2 * RANGE_STRIP] = {};
            for (int v = 0; v < RANGE_STRIP; v++)
                least[v] = LOAD(low + c + v * LANES), greatest[v] = LOAD(high + c + v * LANES);
            for (int64_t row = 0; row < tokens; row++) {
                const float* values = x + row * channels + c;
                for (int v = 0; v < RANGE_STRIP; v++) __builtin_prefetch(values + ROWS_AHEAD * channels + v * LANES);
                for (int v = 0; v < RANGE_STRIP; v++) {
                    Vector value = LOAD(values + v * LANES);
                    least[v] = MIN(value, least[v]);
                    greatest[v] = MAX(value, greatest[v]);
                    for (int half = 0; half < 2; half++) {
                        Doubles wide = WIDEN(HalfVector, (const char*)&value + half * sizeof(HalfVector));
                        squares[2 * v + half] += wide * wide;
                    }
                }
            }
            std::memcpy(low + c, least, sizeof least);
            std::memcpy(high + c, greatest, sizeof greatest);
            for (int k = 0; k < RANGE_STRIP * LANES; k++) square_sum[c + k] += squares[k / 8][k % 8];
            c += RANGE_STRIP * LANES;
            continue;
        }
        float least = low[c], greatest = high[c];
        double squares = 0;
        for (int64_t row = 0; row < tokens; row++) {
            float value = x[row * channels + c];
            least = MIN(value, least);
            greatest = MAX(value, greatest);
            squares += (double)value * value;
        }
        low[c] = least, high[c] = greatest;
        square_sum[c++] += squares;
    }
}

// Number of the bin of width 2^exponent that x lies in.
INLINE int32_t bin_of(float x, int exponent) { return (int32_t)std::floor(std::ldexp(x, -exponent)); }

// Least exponent for which low and high lie within `bins` bins, and within 2^24 of bin 0.
INLINE int32_t least_exponent(float low, float high, int64_t bins) {
    const float tiny = std::ldexp(1.0f, MIN_EXPONENT);
    int span, reach;
    std::frexp(MAX(high - low, tiny) / (float)bins, &span);
    std::frexp(MAX(MAX(std::fabs(low), std::fabs(high)), tiny), &reach);
    int32_t exponent = MIN(MAX(MAX(span - 1, reach - 24), MIN_EXPONENT), -MIN_EXPONENT);
    // the window starts on the grid, so it may need a width more, and the span was rounded
    for (int again = 0; again < 2; again++) exponent += bin_of(high, exponent) - bin_of(low, exponent) >= bins;
    return exponent;
}

// Makes a channel's window hold low..high, moving its counts. Bins only ever merge in pairs.
INLINE void widen(float low, float high, int32_t* exponent, int32_t* first, int32_t* counts, int64_t bins,
                  int32_t* moved) {
    int32_t wider = MAX(*exponent, least_exponent(low, high, bins)), shift = MIN(wider - *exponent, 31);
    int32_t lowest = bin_of(low, wider), highest = bin_of(high, wider);
    if (!shift && lowest >= *first && highest < *first + bins) return;
    // room on both sides, so that the next new extreme need not move the window
    int32_t centred = lowest - ((int32_t)bins - 1 - (highest - lowest)) / 2;
    std::memset(moved, 0, sizeof(int32_t) * bins);
    for (int64_t begin = 0; begin < bins; begin += LANES) {  // most bins are empty
        int64_t end = MIN(begin + LANES, bins);
        int32_t any = 0;
        for (int64_t i = begin; i < end; i++) any |= counts[i];
        if (!any) continue;
        for (int64_t i = begin; i < end; i++)  // bins without counts may fall outside
            if (counts[i]) moved[((*first + (int32_t)i) >> shift) - centred] += counts[i];
    }
    std::memcpy(counts, moved, sizeof(int32_t) * bins);
    *exponent = wider, *first = centred;
}

// Counts the values of channels [begin, end) of x [tokens, channels] in windows of `bins` bins: that of channel c
// begins at bin first[c], its bins are 2^exponent[c] wide, and it is moved first where it does not hold
// low[c]..high[c], which bound all values so far. counts [channels, bins], rows `stride` apart; `moved` is room for one
// window.
CLONES static void count_values_part(const float* x, int64_t tokens, int64_t channels, int64_t begin, int64_t end,
                                     const float* low, const float* high, int32_t* exponent, int32_t* first,
                                     int32_t* counts, int64_t bins, int64_t stride, int32_t* moved) {
    for (int64_t c = begin; c < end; c += LANES) {
        int width = end - c < LANES ? (int)(end - c) : LANES;
        int32_t* window = counts + c * stride;
        Vector scales = {};
        Integers offsets = {};
        for (int k = 0; k < width; k++) {
            widen(low[c + k], high[c + k], exponent + c + k, first + c + k, window + k * stride, bins, moved);
            scales[k] = std::ldexp(1.0f, -exponent[c + k]);
            offsets[k] = (int32_t)(k * stride) - first[c + k];
        }
        if (width < LANES) {
            for (int64_t row = 0; row < tokens; row++)
                for (int k = 0; k < width; k++)
                    window[offsets[k] + (int32_t)std::floor(x[row * channels + c + k] * scales[k])]++;
            continue;
        }
        for (int64_t row = 0; row < tokens; row++) {
            __builtin_prefetch(x + (row + ROWS_AHEAD) * channels + c);
            Vector scaled = LOAD(x + row * channels + c) * scales;
            Integers truncated = __builtin_convertvector(scaled, Integers);
            // a comparison is -1 where it holds: one less where truncation went up
            Integers at = truncated + (__builtin_convertvector(truncated, Vector) > scaled) + offsets;
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) window[at[k]]++;
        }
    }
}

extern "C" {

void channel_range(const float* x, int64_t tokens, int64_t channels, float* low, float* high, double* square_sum,
                   int64_t threads) {
    in_parts(channels, LANES, threads, [=](int64_t begin, int64_t end) {
        channel_range_part(x, tokens, channels, begin, end, low, high, square_sum);
    });
}

void count_values(const float* x, int64_t tokens, int64_t channels, const float* low, const float* high,
                  int32_t* exponent, int32_t* first, int32_t* counts, int64_t bins, int64_t stride,
                  int64_t threads) {
    in_parts(channels, LANES, threads, [=](int64_t begin, int64_t end) {
        std::vector<int32_t> moved(bins);
        count_values_part(x, tokens, channels, begin, end, low, high, exponent, first, counts, bins, stride,
                          moved.data());
    });
}
}
