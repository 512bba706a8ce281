// Mask refinement, behind a plain C ABI; refine.py launches it, and reference.py says what it computes. Threads take rows
// of their own, so results do not depend on their number.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "parts.h"
#include "vectors.h"

static const int MAX_PLACES = 64, MAX_PATTERNS = 256;  // of a group; that are tried one by one

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
