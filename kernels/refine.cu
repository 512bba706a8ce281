// Mask refinement: one pass of coordinate descent over the groups of every row. kernels/reference.py, refine_rows, is the
// definition.
//
// With D the dropped weights, q = off D H + a linear term, off-diagonal H counting `off` times: where group g drops
// d + e in place of d, the row's objective d H d^T + 2 d l^T changes by
//     sum_i e_i (2 (q_i + (1 - off) h_ii d_i) + e_i h_ii)  +  2 off sum_{i < j} h_ij e_i e_j,
// so that the places that differ are all that need be looked at. A warp has one row; its lanes share the group's
// candidates out, and after a change the columns of q, which lies in shared memory meanwhile.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;
constexpr u32 NONE = 0xffffffffu;

// A group of one row.
struct Group {
    const float* weight;   // of its first place
    const float* moments;  // of its first place: row and column
    u32 q;                 // shared address of its first place
    u32 width, m;
    u64 kept;
    float off;

    DEVICE bool keeps(u32 place) const { return kept >> place & 1; }
    DEVICE float moment(u32 i, u32 j) const { return moments[(u64)i * width + j]; }

    // What is dropped at a place that another mask keeps or not: e, above.
    DEVICE float added(u32 place) const { return keeps(place) ? weight[place] : -weight[place]; }

    // What taking the mask `wanted` adds to the objective.
    DEVICE float change(u64 wanted) const {
        const u64 differing = wanted ^ kept;
        float sum = 0;
        for (u32 i = 0; i < m; i++) {
            if (!(differing >> i & 1)) continue;
            const float e = added(i), own = moment(i, i), dropped = keeps(i) ? 0.0f : weight[i];
            sum += e * (2 * (load_shared_float(q + i * 4) + (1 - off) * own * dropped) + e * own);
            for (u32 j = 0; j < i; j++)
                if (differing >> j & 1) sum += 2 * off * moment(i, j) * e * added(j);
        }
        return sum;
    }

    DEVICE float energy() const {
        float sum = 0;
        for (u32 i = 0; i < m; i++) sum += weight[i] * weight[i] * moment(i, i);
        return sum;
    }
};

// Place of the `number`-th bit that is set.
DEVICE u32 place_of_bit(u64 bits, u32 number) {
    u32 place = 0;
    for (;; place++)
        if (bits >> place & 1 && number-- == 0) return place;
}

// Masks that a group may take: those of a table, or without one all exchanges of a kept place for a dropped one.
struct Candidates {
    const u64* table;
    u32 tabled;

    DEVICE u32 count(u64 kept, u32 m) const {
        if (tabled) return tabled;
        const u32 inside = __popc((u32)kept) + __popc((u32)(kept >> 32));
        return inside * (m - inside);
    }

    DEVICE u64 mask(u64 kept, u32 m, u32 number) const {
        if (tabled) return table[number];
        const u32 outside = m - __popc((u32)kept) - __popc((u32)(kept >> 32));
        return kept ^ (u64)1 << place_of_bit(kept, number / outside) ^ (u64)1 << place_of_bit(~kept, number % outside);
    }
};

// The kept places of a group, read by the lanes together.
DEVICE u64 kept_places(const u8* keep, u32 m) {
    u64 bits = 0;
    for (u32 first = 0; first < m; first += 32) {
        const u32 place = first + threadIdx.x % 32;
        bits |= (u64)ballot(place < m && keep[place]) << first;
    }
    return bits;
}

// Number of the candidate that lowers the objective most, by more than `least`; of equal ones the first. NONE where
// there is none, or where a change is not a number.
DEVICE u32 best_candidate(const Group& group, const Candidates& candidates, float least) {
    float best = 0;
    u32 number = NONE;
    bool faulty = false;
    for (u32 i = threadIdx.x % 32; i < candidates.count(group.kept, group.m); i += 32) {
        const float change = group.change(candidates.mask(group.kept, group.m, i));
        faulty |= change != change;
        if (change < best) {
            best = change;
            number = i;
        }
    }
    for (u32 distance = 16; distance > 0; distance /= 2) {
        const float other = shuffle_xor(best, (int)distance);
        const u32 other_number = shuffle_xor(number, (int)distance);
        if (other < best || (other == best && other_number < number)) {
            best = other;
            number = other_number;
        }
    }
    return ballot(faulty) == 0 && best < -least ? number : NONE;
}

// weight and q float [rows, width], keep bool [rows, width], moments [width, width], changed [rows]: how many groups
// have. keep and q are updated. Shared memory holds 8 rows of q.
extern "C" __global__ void __launch_bounds__(256)
    refine_rows(const float* weight, u8* keep, float* q, const float* moments, const u64* table, int* changed, int rows,
                int width, int m, int tabled, float off, float least_gain) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, own_row = blockIdx.x * WARPS + warp;
    const bool has_row = own_row < (u32)rows;  // a warp without one goes along, for the barriers
    const u64 begin = (u64)min(own_row, (u32)rows - 1) * (u32)width;
    const u32 own_q = dynamic_shared() + warp * (u32)width * 4;
    const Candidates candidates = {table, (u32)tabled};
    for (u32 column = lane; column < (u32)width; column += 32) store_shared_float(own_q + column * 4, q[begin + column]);
    int count = 0;
    for (u32 first = 0; first < (u32)width; first += (u32)m) {
        __syncthreads();  // q is up to date
        u8* kept = keep + begin + first;
        const Group group = {weight + begin + first, moments + (u64)first * (u32)width + first, own_q + first * 4,
                             (u32)width,             (u32)m,
                             kept_places(kept, (u32)m), off};
        const u32 number = best_candidate(group, candidates, least_gain * group.energy());
        __syncthreads();  // all lanes have read q
        if (number == NONE || !has_row) continue;
        const u64 wanted = candidates.mask(group.kept, group.m, number);
        for (u32 place = lane; place < group.m; place += 32) kept[place] = (u8)(wanted >> place & 1);
        for (u32 column = lane; column < group.width; column += 32) {
            float sum = load_shared_float(own_q + column * 4);
            for (u32 i = 0; i < group.m; i++)
                if ((wanted ^ group.kept) >> i & 1)
                    sum += off * group.added(i) * moments[(u64)(first + i) * group.width + column];
            store_shared_float(own_q + column * 4, sum);
        }
        count++;
    }
    if (!has_row) return;
    for (u32 column = lane; column < (u32)width; column += 32) q[begin + column] = load_shared_float(own_q + column * 4);
    if (lane == 0) changed[own_row] = count;
}
