// Kernels for a processor without a GPU, behind a plain C ABI. cpu.py loads and launches them; reference.py says what
// each computes. A kernel works on the part [begin, end) of its problem; threads share no sum, so results do not depend
// on their number. Vectors are 16 floats: one AVX-512 register, two of AVX2.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parts.h"
#include "vectors.h"

// Rows of scores that stay in the first-level cache while a tile is computed.
static const int64_t ROWS_AT_ONCE = 1024;
static const int TILE_T = 4, TILE_S = 6;  // 24 accumulators of the 32 registers
static const int RANGE_STRIP = 4;         // vectors of channels; 16 accumulators
static const int64_t ROWS_AHEAD = 16;     // fetched early: each row of a strip lies in a page of its own
static const int MIN_EXPONENT = -126;     // of a bin's width: float scales by its inverse without overflow
static const int MAX_PLACES = 64, MAX_PATTERNS = 256;  // of a group; that are tried one by one

// out[i, b] = sum over rows of max(s[b, row], t[i, row]), for i in [begin, end); s [n_s, rows], t [n_t, rows],
// out [n_t, n_s]. Rows must be a multiple of 16 (padded with equal values on both sides by the caller).
CLONES static void sum_of_maxima_part(const float* s, int64_t n_s, const float* t, int64_t begin, int64_t end,
                                      int64_t rows, float* out) {
    for (int64_t i = begin; i < end; i++) std::memset(out + i * n_s, 0, sizeof(float) * n_s);
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        int64_t last = first + ROWS_AT_ONCE < rows ? first + ROWS_AT_ONCE : rows;
        for (int64_t b = 0; b < n_s; b += TILE_S) {
            int64_t width = n_s - b < TILE_S ? n_s - b : TILE_S;
            for (int64_t i = begin; i < end; i += TILE_T) {
                int64_t height = end - i < TILE_T ? end - i : TILE_T;
                const float *left[TILE_T], *right[TILE_S];
                for (int k = 0; k < TILE_T; k++) left[k] = t + (i + (k < height ? k : 0)) * rows;
                for (int k = 0; k < TILE_S; k++) right[k] = s + (b + (k < width ? k : 0)) * rows;
                Vector sum[TILE_T][TILE_S] = {};
                for (int64_t row = first; row < last; row += LANES) {
                    Vector column[TILE_S];
                    for (int k = 0; k < TILE_S; k++) column[k] = LOAD(right[k] + row);
                    for (int j = 0; j < TILE_T; j++) {
                        Vector threshold = LOAD(left[j] + row);
                        for (int k = 0; k < TILE_S; k++) sum[j][k] += MAX(column[k], threshold);
                    }
                }
                for (int j = 0; j < height; j++)
                    for (int k = 0; k < width; k++) {
                        float total = 0;
                        for (int lane = 0; lane < LANES; lane++) total += sum[j][k][lane];
                        out[(i + j) * n_s + b + k] += total;
                    }
            }
        }
    }
}

// out[i * stride + b] = sum over rows of max(0, column[b] - threshold[i]), for n columns and m thresholds.
INLINE void excess(const float* const* column, int64_t n, const float* threshold, int64_t m, int64_t rows, float* out,
                   int64_t stride) {
    for (int64_t i = 0; i < m; i++) std::memset(out + i * stride, 0, sizeof(float) * n);
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        int64_t last = MIN(first + ROWS_AT_ONCE, rows);
        for (int64_t b = 0; b < n; b += TILE_S)
            for (int64_t i = 0; i < m; i += TILE_T) {
                Vector sum[TILE_T][TILE_S] = {}, zero = {};
                for (int64_t row = first; row < last; row += LANES) {
                    Vector value[TILE_S];
                    for (int k = 0; k < TILE_S; k++) value[k] = LOAD(column[MIN(b + k, n - 1)] + row);
                    for (int j = 0; j < TILE_T; j++) {
                        Vector least = LOAD(threshold + MIN(i + j, m - 1) * rows + row);
                        for (int k = 0; k < TILE_S; k++) {
                            Vector above = value[k] - least;
                            sum[j][k] += MAX(above, zero);
                        }
                    }
                }
                for (int j = 0; j < TILE_T && i + j < m; j++)
                    for (int k = 0; k < TILE_S && b + k < n; k++) {
                        float total = 0;
                        for (int lane = 0; lane < LANES; lane++) total += sum[j][k][lane];
                        out[(i + j) * stride + b + k] += total;
                    }
            }
    }
}

// For each of m columns the `kept`-th greatest of the others, row by row: threshold [m, rows].
INLINE void thresholds_of(const float* const* column, int m, int kept, int64_t rows, float* threshold) {
    for (int64_t row = 0; row < rows; row += LANES) {
        Vector best[MAX_PLACES];  // the kept + 1 greatest, greatest first
        for (int place = 0; place <= kept; place++) best[place] = Vector{} - INFINITY;
        for (int i = 0; i < m; i++) {
            Vector value = LOAD(column[i] + row);
            for (int place = 0; place <= kept; place++) {
                Vector greater = MAX(best[place], value);
                value = MIN(best[place], value);
                best[place] = greater;
            }
        }
        for (int i = 0; i < m; i++) {
            Vector value = LOAD(column[i] + row);
            Vector other = value >= best[kept - 1] ? best[kept] : best[kept - 1];
            std::memcpy(threshold + i * rows + row, &other, sizeof other);
        }
    }
}

struct Swap {
    float gain;
    int64_t i, j;
};

// Greedy swaps inside each of the blocks [begin, end) of `size` places. s [channels, rows] holds the scores of the
// channels as they lie at first, rows a multiple of 16; order [channels]: the channel at each place, as reference.py's
// local_swaps has it.
CLONES static void local_swaps_part(const float* s, int64_t channels, int64_t rows, int64_t begin, int64_t end,
                                    int64_t size, int64_t m, int64_t kept, int64_t rounds, float least_gain,
                                    int64_t* order) {
    std::vector<float> gain(size * size), threshold(m * rows);
    std::vector<const float*> column(size);
    std::vector<Swap> swaps;
    for (int64_t block = begin; block < end; block++) {
        int64_t *places = order + block * size, n = MIN(size, channels - block * size), groups = n / m;
        if (groups < 2) continue;
        std::vector<char> stale(groups, 1), used(groups);
        for (int64_t k = 0; k < n; k++) column[k] = s + places[k] * rows;
        for (int64_t round = 0; round < rounds; round++) {
            for (int64_t g = 0; g < groups; g++) {
                if (!stale[g]) continue;
                thresholds_of(column.data() + g * m, (int)m, (int)kept, rows, threshold.data());
                excess(column.data(), n, threshold.data(), m, rows, gain.data() + g * m * size, size);
                stale[g] = 0;
            }
            swaps.clear();
            for (int64_t a = 0; a < groups; a++)
                for (int64_t b = a + 1; b < groups; b++) {
                    Swap best = {0, -1, -1};
                    for (int64_t i = a * m; i < a * m + m; i++)
                        for (int64_t j = b * m; j < b * m + m; j++) {
                            float own_i = gain[i * size + i], own_j = gain[j * size + j];
                            float change = (gain[i * size + j] - own_i) + (gain[j * size + i] - own_j);
                            if (change > least_gain * (own_i + own_j) && change > best.gain) best = {change, i, j};
                        }
                    if (best.gain > 0) swaps.push_back(best);
                }
            if (swaps.empty()) break;
            std::stable_sort(swaps.begin(), swaps.end(), [](const Swap& x, const Swap& y) { return x.gain > y.gain; });
            std::fill(used.begin(), used.end(), 0);
            for (const Swap& swap : swaps) {
                if (used[swap.i / m] || used[swap.j / m]) continue;
                used[swap.i / m] = used[swap.j / m] = stale[swap.i / m] = stale[swap.j / m] = 1;
                std::swap(column[swap.i], column[swap.j]);
                std::swap(places[swap.i], places[swap.j]);
                for (int64_t k = 0; k < n; k++) std::swap(gain[k * size + swap.i], gain[k * size + swap.j]);
            }
        }
    }
}

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

INLINE double total_of(Doubles lanes) {
    double sum = 0;
    for (int lane = 0; lane < DOUBLES; lane++) sum += lanes[lane];
    return sum;
}

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

// Cost of the pattern that costs least, and the places that it keeps.
INLINE float cheapest_pattern(const float* term, int count, const float* terms, int64_t lanes, int64_t patterns, int m,
                              const uint8_t* kept_places, uint8_t* wanted) {
    Vector cost[MAX_PATTERNS / LANES], least;
    int chunks = (int)(lanes / LANES);
    for (int c = 0; c < chunks; c++) {
        Vector total = LOAD(terms + count * lanes + c * LANES);
        for (int f = 0; f < count; f++) total += term[f] * LOAD(terms + f * lanes + c * LANES);
        cost[c] = total;
        least = c ? MIN(least, total) : total;
    }
    float lowest = least[0];
    for (int lane = 1; lane < LANES; lane++) lowest = MIN(lowest, least[lane]);
    for (int64_t p = 0; p < patterns; p++)
        if (cost[p / LANES][p % LANES] == lowest) {
            std::memcpy(wanted, kept_places + p * m, m);
            return lowest;
        }
    return INFINITY;  // not a number: nothing changes
}

// What the best exchange of a kept place for a dropped one adds to the cost, and the places that are then kept.
INLINE float cheapest_exchange(const float* term, int m, const uint8_t* kept, uint8_t* wanted) {
    float marginal[MAX_PLACES];
    for (int i = 0; i < m; i++) marginal[i] = term[i];
    int pair = m;
    for (int i = 0; i < m; i++)
        for (int j = i + 1; j < m; j++, pair++) {
            if (!kept[j]) marginal[i] += term[pair];
            if (!kept[i]) marginal[j] += term[pair];
        }
    float least = INFINITY;
    int drop = 0, restore = 0;
    pair = m;
    for (int i = 0; i < m; i++)
        for (int j = i + 1; j < m; j++, pair++) {
            if (kept[i] == kept[j]) continue;
            int in = kept[i] ? i : j, out = kept[i] ? j : i;
            float added = marginal[in] - marginal[out] - term[pair];
            bool earlier = in < drop || (in == drop && out < restore);  // of equal ones the first, by the kept place
            if (added < least || (added == least && earlier)) least = added, drop = in, restore = out;
        }
    std::memcpy(wanted, kept, m);
    wanted[drop] = 0, wanted[restore] = 1;
    return least;
}

// One pass of coordinate descent over the groups of rows [begin, end) of one block of columns.
//   weight, q float [rows, width]; keep uint8 [rows, width]; h [width, width]; width a multiple of m
//   kept_places uint8 [patterns, m]; terms [m + m (m - 1) / 2 + 1, lanes]: 1 where a pattern's cost has that term; the
//   last row is what a cost starts with: 0, or infinity in the lanes that are no pattern
// A pattern costs the sum of u_i over the places i that it drops, and of a_ij over their pairs i < j, with
//   u_i = w_i^2 h_ii + 2 w_i (q_i less the group's own part),  a_ij = 2 w_i w_j h_ij
// where off-diagonal h counts `off` times. q is the row of off D H + linear term (D: the dropped weights); it is
// kept up to date here. Without patterns (0 of them) the best exchange of one kept place for a dropped one is tried
// instead. A change must lower the cost by least_gain of the group's sum of w^2 h. Returns how many groups changed.
template <int M>
INLINE int64_t refine(const float* weight, uint8_t* keep, float* q, const float* h, int64_t begin,
                      int64_t end, int64_t width, int64_t group_size, int64_t patterns, const uint8_t* kept_places,
                      const float* terms, int64_t lanes, float off, float least_gain) {
    const int m = M ? M : (int)group_size;
    const int count = m + m * (m - 1) / 2;
    int64_t changed = 0;
    float term[MAX_PLACES + MAX_PLACES * (MAX_PLACES - 1) / 2];
    for (int64_t row = begin; row < end; row++) {
        const float* w = weight + row * width;
        uint8_t* kept = keep + row * width;
        float* running = q + row * width;
        for (int64_t g = 0; g < width; g += m) {
            float dropped[MAX_PLACES], energy = 0, now = 0;
            for (int i = 0; i < m; i++) dropped[i] = kept[g + i] ? 0.0f : 1.0f;
            int pair = m;
            float rest[MAX_PLACES];
            for (int i = 0; i < m; i++) {
                float own = w[g + i] * w[g + i] * h[(g + i) * width + g + i];
                energy += own;
                rest[i] = 2 * w[g + i] * running[g + i] + own - 2 * off * own * dropped[i];
            }
            for (int i = 0; i < m; i++)
                for (int j = i + 1; j < m; j++, pair++) {
                    float both = 2 * off * w[g + i] * w[g + j] * h[(g + i) * width + g + j];
                    term[pair] = both;
                    rest[i] -= both * dropped[j];
                    rest[j] -= both * dropped[i];
                    now += both * dropped[i] * dropped[j];
                }
            for (int i = 0; i < m; i++) term[i] = rest[i], now += rest[i] * dropped[i];
            uint8_t wanted_places[MAX_PLACES];
            float least =
                patterns ? cheapest_pattern(term, count, terms, lanes, patterns, m, kept_places, wanted_places)
                         : now + cheapest_exchange(term, m, kept + g, wanted_places);
            // the same pattern's cost may round to less than `now`
            if (!(least < now - least_gain * energy) || !std::memcmp(wanted_places, kept + g, m)) continue;
            changed++;
            for (int i = 0; i < m; i++) {
                uint8_t wanted = wanted_places[i];
                if (wanted == kept[g + i]) continue;
                float delta = wanted ? -w[g + i] : w[g + i];
                kept[g + i] = wanted;
                const float* line = h + (g + i) * width;
                for (int64_t k = 0; k < width; k++) running[k] += off * delta * line[k];
            }
        }
    }
    return changed;
}

CLONES static int64_t refine_rows_part(const float* weight, uint8_t* keep, float* q, const float* h,
                                       int64_t begin, int64_t end, int64_t width, int64_t m, int64_t patterns,
                                       const uint8_t* kept_places, const float* terms, int64_t lanes, float off,
                                       float least_gain) {
    if (m == 4)
        return refine<4>(weight, keep, q, h, begin, end, width, m, patterns, kept_places, terms, lanes, off,
                         least_gain);
    if (m == 8)
        return refine<8>(weight, keep, q, h, begin, end, width, m, patterns, kept_places, terms, lanes, off,
                         least_gain);
    return refine<0>(weight, keep, q, h, begin, end, width, m, patterns, kept_places, terms, lanes, off,
                     least_gain);
}

extern "C" {

// What cpu.py calls must be what was compiled: raised with every change of a signature or of its meaning.
int64_t interface_number() { return 14; }

int64_t best_path() {
#if HAS_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("popcnt");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
    return avx2 && avx512 ? AVX512 : avx2 ? AVX2 : PORTABLE;
#else
    return PORTABLE;
#endif
}

void sum_of_maxima(const float* s, int64_t n_s, const float* t, int64_t n_t, int64_t rows, float* out,
                   int64_t threads) {
    in_parts(n_t, TILE_T, threads,
             [=](int64_t begin, int64_t end) { sum_of_maxima_part(s, n_s, t, begin, end, rows, out); });
}

void local_swaps(const float* s, int64_t channels, int64_t rows, int64_t size, int64_t m, int64_t kept,
                 int64_t rounds, float least_gain, int64_t* order, int64_t threads) {
    in_parts((channels + size - 1) / size, 1, threads, [=](int64_t begin, int64_t end) {
        local_swaps_part(s, channels, rows, begin, end, size, m, kept, rounds, least_gain, order);
    });
}

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

void squared_distances(const float* x, const float* y, int64_t rows, int64_t width, double* out, int64_t threads) {
    in_parts(rows, 1, threads, [=](int64_t begin, int64_t end) {
        squared_distances_part(x, y, begin, end, width, out);
    });
}

int64_t refine_rows(const float* weight, uint8_t* keep, float* q, const float* h, int64_t rows,
                    int64_t width, int64_t m, int64_t patterns, const uint8_t* kept_places, const float* terms,
                    int64_t lanes, float off, float least_gain, int64_t threads) {
    std::atomic<int64_t> changed{0};
    in_parts(rows, 1, threads, [&](int64_t begin, int64_t end) {
        changed += refine_rows_part(weight, keep, q, h, begin, end, width, m, patterns, kept_places, terms,
                                    lanes, off, least_gain);
    });
    return changed;
}
}
