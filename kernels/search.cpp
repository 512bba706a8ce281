// The searches over orders of channels, behind a plain C ABI; search.py launches them, and reference.py says what they
// compute. Threads share no sum, so results do not depend on their number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parts.h"
#include "vectors.h"

// Rows of scores that stay in the first-level cache while a tile is computed.
static const int64_t ROWS_AT_ONCE = 1024;
static const int TILE_T = 4, TILE_S = 6;  // 24 accumulators of the 32 registers
static const int MAX_PLACES = 64;         // of a group

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
INLINE void hinges(const float* const* column, int64_t n, const float* threshold, int64_t m, int64_t rows, float* out,
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
                hinges(column.data(), n, threshold.data(), m, rows, gain.data() + g * m * size, size);
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

extern "C" {

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
}
