// The searches over orders of channels: sums of max(0, s_b - t_i) over rows, and the greedy swaps of channels inside
// blocks of places that rest on them. kernels/reference.py holds the plain versions, hinge_sums and local_swaps.
//
// Both sum one tile at a time: at most 64 thresholds t by 64 candidates s. 32 rows of both lie in shared memory,
// transposed, so that 4 neighbours of one row are a chunk. A thread has 4 x 4 sums; where a tile has fewer than 256 of
// those, threads share its rows. No sum depends on the order in which threads or blocks run.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;
constexpr u32 TILE = 64;             // places of a side: thresholds, or candidates
constexpr u32 ROWS = 32;             // at once; a lane's row when they are read
constexpr u32 CHUNK_PLACES = 4;
constexpr u32 SIDE_CHUNKS = TILE / CHUNK_PLACES;
constexpr u32 PITCH = SIDE_CHUNKS + 1;  // chunks of a row; odd, so that those of 8 rows fill all banks
constexpr u32 SIDE_BYTES = ROWS * PITCH * sizeof(Chunk);
constexpr u32 FETCHES = SIDE_CHUNKS / WARPS;  // chunks of a side that a thread reads at once
constexpr u32 MAX_GROUPS = TILE / 2;                  // of a tile, of two places or more
constexpr u32 THRESHOLDS = 0, CANDIDATES = 1;         // the sides
constexpr u32 NONE = 0xffffffffu;                     // no group

static_assert(THREADS * CHUNK_PLACES * sizeof(Chunk) <= 2 * SIDE_BYTES, "sums of all threads take the tile's place");

// A thread's sums, of 4 thresholds by 4 candidates.
using Sums = float[CHUNK_PLACES][CHUNK_PLACES];

DEVICE u32 chunk_address(u32 side, u32 row, u32 chunk) {
    return dynamic_shared() + side * SIDE_BYTES + (row * PITCH + chunk) * (u32)sizeof(Chunk);
}

DEVICE u32 place_address(u32 side, u32 row, u32 place) { return chunk_address(side, row, 0) + place * 4; }

// The kept-th greatest of a group, and with `next` the one after it.
DEVICE u32 best_address(u32 row, u32 group, u32 next) {
    return dynamic_shared() + 2 * SIDE_BYTES + ((row * MAX_GROUPS + group) * 2 + next) * 4;
}

// A tile: its places' rows are those of s and t whose numbers stand in tile_rows, 4 in a chunk.
struct Tile {
    const float* base[2];
    u32 row_bytes;
    u32 count[2];  // places

    DEVICE u32 chunks(u32 side) const { return (count[side] + CHUNK_PLACES - 1) / CHUNK_PLACES; }
};

SHARED_ARRAY(Chunk, tile_rows, 2 * SIDE_CHUNKS);

// Fills a side of tile_rows with number(place); places past the end repeat the last. Barriers belong before and after.
template <class Number>
DEVICE void set_rows(const Tile& tile, u32 side, Number number) {
    const u32 chunk = threadIdx.x - side * SIDE_CHUNKS;
    if (chunk >= SIDE_CHUNKS) return;
    Chunk rows;
#pragma unroll
    for (u32 k = 0; k < CHUNK_PLACES; k++) rows.word[k] = number(min(chunk * CHUNK_PLACES + k, tile.count[side] - 1));
    tile_rows[side * SIDE_CHUNKS + chunk] = rows;
}

// What a thread has read of the next rows.
struct Fetched {
    Chunk chunk[2][FETCHES];

    // Rows past the end are zeros, which add nothing.
    DEVICE void read(const Tile& tile, u32 first_row, u32 end_row) {
        const u32 row = first_row + threadIdx.x % 32;
#pragma unroll
        for (u32 side = 0; side < 2; side++)
#pragma unroll
            for (u32 f = 0; f < FETCHES; f++) {
                const u32 own = threadIdx.x / 32 + f * WARPS;
                const bool inside = row < end_row && own < tile.chunks(side);
                const Chunk numbers = tile_rows[side * SIDE_CHUNKS + own];
#pragma unroll
                for (u32 k = 0; k < CHUNK_PLACES; k++) {
                    const char* begin = (const char*)tile.base[side] + (u64)numbers.word[k] * tile.row_bytes;
                    chunk[side][f].word[k] = inside ? __float_as_uint(((const float*)begin)[row]) : 0;
                }
            }
    }

    DEVICE void store() const {
#pragma unroll
        for (u32 side = 0; side < 2; side++)
#pragma unroll
            for (u32 f = 0; f < FETCHES; f++)
                store_shared_chunk(chunk_address(side, threadIdx.x % 32, threadIdx.x / 32 + f * WARPS),
                                   chunk[side][f]);
    }
};

// Puts in the place of every score of whole groups, row by row, the kept-th greatest of its group's others.
DEVICE void make_thresholds(u32 places, u32 m, u32 kept) {
    constexpr u32 ROW_STEP = THREADS / TILE, AT_ONCE = 4;
    const u32 place = threadIdx.x % TILE, first_row = threadIdx.x / TILE, group = place / m;
    if (place < places)
        for (u32 first = first_row; first < ROWS; first += AT_ONCE * ROW_STEP) {
            float own[AT_ONCE];
            u32 before[AT_ONCE];  // how many of the group are greater, or equal and at a lower place
#pragma unroll
            for (u32 r = 0; r < AT_ONCE; r++) {
                own[r] = load_shared_float(place_address(THRESHOLDS, first + r * ROW_STEP, place));
                before[r] = 0;
            }
            for (u32 other = group * m; other < group * m + m; other++)
#pragma unroll
                for (u32 r = 0; r < AT_ONCE; r++) {
                    const float score = load_shared_float(place_address(THRESHOLDS, first + r * ROW_STEP, other));
                    before[r] += score > own[r] || (score == own[r] && other < place);
                }
#pragma unroll
            for (u32 r = 0; r < AT_ONCE; r++)
                if (before[r] + 1 == kept || before[r] == kept)
                    store_shared_float(best_address(first + r * ROW_STEP, group, before[r] == kept), own[r]);
        }
    __syncthreads();  // the best are known, and all have read the scores
    if (place < places)
#pragma unroll 4
        for (u32 row = first_row; row < ROWS; row += ROW_STEP) {
            const u32 address = place_address(THRESHOLDS, row, place);
            const float best = load_shared_float(best_address(row, group, 0));
            const float next = load_shared_float(best_address(row, group, 1));
            store_shared_float(address, load_shared_float(address) >= best ? next : best);
        }
    __syncthreads();
}

// Which 4 x 4 sums of a tile a thread has, and which of its rows.
struct Share {
    u32 threshold, candidate;  // chunks
    u32 tiles, slices, slice;  // a thread whose slice is none of the `slices` has nothing

    DEVICE explicit Share(const Tile& tile) : tiles(tile.chunks(THRESHOLDS) * tile.chunks(CANDIDATES)), slices(1) {
        while (slices < ROWS && 2 * slices * tiles <= THREADS) slices *= 2;
        slice = threadIdx.x / tiles;
        const u32 own = threadIdx.x % tiles;
        threshold = own / tile.chunks(CANDIDATES);
        candidate = own % tile.chunks(CANDIDATES);
    }
};

DEVICE void add_hinges(Sums& sums, const Share& share) {
#pragma unroll 4
    for (u32 i = 0; i < ROWS / share.slices; i++) {
        const u32 row = share.slice + i * share.slices;
        const Chunk t = load_shared_chunk(chunk_address(THRESHOLDS, row, share.threshold));
        const Chunk s = load_shared_chunk(chunk_address(CANDIDATES, row, share.candidate));
#pragma unroll
        for (u32 k = 0; k < CHUNK_PLACES; k++)
#pragma unroll
            for (u32 b = 0; b < CHUNK_PLACES; b++)
                sums[k][b] += max(__uint_as_float(s.word[b]) - __uint_as_float(t.word[k]), 0.0f);
    }
}

// Adds up the sums of the slices, in their order, for the threads of slice 0.
DEVICE void join_slices(Sums& sums, const Share& share) {
    if (share.slices == 1) return;
    const u32 address = dynamic_shared() + threadIdx.x * (u32)sizeof(Sums);
    if (share.slice > 0 && share.slice < share.slices)
#pragma unroll
        for (u32 i = 0; i < CHUNK_PLACES; i++)
#pragma unroll
            for (u32 b = 0; b < CHUNK_PLACES; b++) store_shared_float(address + (i * CHUNK_PLACES + b) * 4, sums[i][b]);
    __syncthreads();
    if (share.slice == 0)
        for (u32 slice = 1; slice < share.slices; slice++)
#pragma unroll
            for (u32 i = 0; i < CHUNK_PLACES; i++)
#pragma unroll
                for (u32 b = 0; b < CHUNK_PLACES; b++)
                    sums[i][b] += load_shared_float(address + slice * share.tiles * (u32)sizeof(Sums) +
                                                    (i * CHUNK_PLACES + b) * 4);
}

// Sums over rows [first, end) for the threads of slice 0. With GROUPS the thresholds' side holds scores of whole groups
// of m, of which thresholds are made; sums then run over all rows and are compensated (Kahan).
template <bool GROUPS>
DEVICE void sum_tile(Sums& sums, const Tile& tile, const Share& share, u32 first_row, u32 end_row, u32 m, u32 kept) {
    Sums lost = {};
    Fetched fetched;
    fetched.read(tile, first_row, end_row);
    for (u32 row = first_row; row < end_row; row += ROWS) {
        __syncthreads();  // all have read the rows before
        fetched.store();
        __syncthreads();
        if (row + ROWS < end_row) fetched.read(tile, row + ROWS, end_row);
        if (GROUPS) make_thresholds(tile.count[THRESHOLDS], m, kept);
        if (share.slice >= share.slices) continue;
        if (!GROUPS) {
            add_hinges(sums, share);
            continue;
        }
        Sums part = {};
        add_hinges(part, share);
#pragma unroll
        for (u32 i = 0; i < CHUNK_PLACES; i++)
#pragma unroll
            for (u32 b = 0; b < CHUNK_PLACES; b++) {
                const float added = part[i][b] - lost[i][b], sum = sums[i][b] + added;
                lost[i][b] = (sum - sums[i][b]) - added;
                sums[i][b] = sum;
            }
    }
    __syncthreads();  // all have read the last rows
    join_slices(sums, share);
}

// s [n_s, rows] and t [n_t, rows] to out [parts, n_t, n_s], each part the sums over `part_rows` rows. The grid is
// (parts, tiles of s, tiles of t).
extern "C" __global__ void __launch_bounds__(256)
    hinge_sums(const float* s, const float* t, float* out, int n_s, int n_t, int rows, int part_rows) {
    const u32 first_t = blockIdx.z * TILE, first_s = blockIdx.y * TILE, first_row = blockIdx.x * (u32)part_rows;
    Tile tile = {{t, s}, (u32)rows * 4, {}};
    tile.count[THRESHOLDS] = min((u32)n_t - first_t, TILE);
    tile.count[CANDIDATES] = min((u32)n_s - first_s, TILE);
    set_rows(tile, THRESHOLDS, [&](u32 place) { return first_t + place; });
    set_rows(tile, CANDIDATES, [&](u32 place) { return first_s + place; });
    __syncthreads();
    const Share share(tile);
    Sums sums = {};
    sum_tile<false>(sums, tile, share, first_row, min(first_row + (u32)part_rows, (u32)rows), 0, 0);
    if (share.slice) return;
    out += ((u64)blockIdx.x * n_t + first_t) * n_s + first_s;
#pragma unroll
    for (u32 i = 0; i < CHUNK_PLACES; i++)
#pragma unroll
        for (u32 b = 0; b < CHUNK_PLACES; b++) {
            const u32 row = share.threshold * CHUNK_PLACES + i, column = share.candidate * CHUNK_PLACES + b;
            if (row < tile.count[THRESHOLDS] && column < tile.count[CANDIDATES])
                out[(u64)row * n_s + column] = sums[i][b];
        }
}

// A block of places and what is known of it, in global memory.
struct Places {
    const float* s;            // [channels, rows]
    u64* order;                // [count] the channel at each place
    float* gain;               // [count, stride] of place i and the channel at place b: sum of max(0, s_b - t_i)
    float* best_gain;          // [groups, groups] of the best swap of two groups; 0: none gains
    int* best_swap;            // [groups, groups] for a < b: the place in group a times m, plus that in group b
    u32 *stale, *wish, *chosen;  // [groups] whether gains are to be computed; best free partner; partner in this round
    u32 rows, count, stride, groups, m, kept;
};

SHARED_ARRAY(u32, listed_groups, MAX_GROUPS + 1);
SHARED_ARRAY(u32, votes, WARPS);

// Whether any thread of the block votes for it. Between two calls all pass a barrier.
DEVICE bool any_of_block(bool vote) {
    const u32 of_warp = ballot(vote);
    if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = of_warp;
    __syncthreads();
    u32 all = 0;
    for (u32 warp = 0; warp < WARPS; warp++) all |= votes[warp];
    return all != 0;
}

// Lists the next stale groups from `group` on, as many as a tile takes, and clears their marks; returns how many. The
// last of the list is the group to go on from.
DEVICE u32 list_stale(const Places& all, u32 group) {
    __syncthreads();  // the list before has been read
    u32 count = 0;
    if (threadIdx.x == 0) {
        for (; group < all.groups && count < TILE / all.m; group++)
            if (all.stale[group]) {
                all.stale[group] = 0;
                listed_groups[count++] = group;
            }
        for (; count < TILE / all.m; count++) listed_groups[count] = NONE;
        listed_groups[MAX_GROUPS] = group;
    }
    __syncthreads();
    count = 0;
    while (count < TILE / all.m && listed_groups[count] != NONE) count++;
    return count;
}

// Computes the gains of the places of the listed groups.
DEVICE void update_listed(const Places& all, u32 listed) {
    const auto place_of = [&](u32 i) { return listed_groups[i / all.m] * all.m + i % all.m; };
    Tile tile = {{all.s, all.s}, all.rows * 4, {listed * all.m, 0}};
    set_rows(tile, THRESHOLDS, [&](u32 i) { return (u32)all.order[place_of(i)]; });
    for (u32 first = 0; first < all.count; first += TILE) {
        tile.count[CANDIDATES] = min(all.count - first, TILE);
        set_rows(tile, CANDIDATES, [&](u32 b) { return (u32)all.order[first + b]; });
        __syncthreads();
        const Share share(tile);
        Sums sums = {};
        sum_tile<true>(sums, tile, share, 0, all.rows, all.m, all.kept);
        if (share.slice == 0)
#pragma unroll
            for (u32 i = 0; i < CHUNK_PLACES; i++) {
                const u32 row = share.threshold * CHUNK_PLACES + i;
                if (row >= tile.count[THRESHOLDS]) break;
                float* gain = all.gain + (u64)place_of(row) * all.stride + first;
#pragma unroll
                for (u32 b = 0; b < CHUNK_PLACES; b++) {
                    const u32 column = share.candidate * CHUNK_PLACES + b;
                    if (column < tile.count[CANDIDATES]) gain[column] = sums[i][b];
                }
            }
    }
}

// The best swap of groups a < b that gains more than `least_gain` of what its channels add; of equal ones the first.
DEVICE void find_best_swap(const Places& all, u32 a, u32 b, float least_gain) {
    float best = 0;
    u32 at = 0;
    for (u32 pair = 0; pair < all.m * all.m; pair++) {
        const u64 i = a * all.m + pair / all.m, j = b * all.m + pair % all.m;
        const float own_i = all.gain[i * all.stride + i], own_j = all.gain[j * all.stride + j];
        const float change = (all.gain[i * all.stride + j] - own_i) + (all.gain[j * all.stride + i] - own_j);
        if (change > least_gain * (own_i + own_j) && change > best) {
            best = change;
            at = pair;
        }
    }
    all.best_gain[(u64)a * all.groups + b] = all.best_gain[(u64)b * all.groups + a] = best;
    all.best_swap[(u64)a * all.groups + b] = (int)at;
}

// A warp's search for the partner with which group a gains most, among the free ones; of equal ones the lowest.
DEVICE u32 best_partner(const Places& all, u32 a) {
    float best = 0;
    u32 partner = NONE;
    for (u32 b = threadIdx.x % 32; b < all.groups; b += 32)
        if (b != a && all.chosen[b] == NONE && all.best_gain[(u64)a * all.groups + b] > best) {
            best = all.best_gain[(u64)a * all.groups + b];
            partner = b;
        }
    for (u32 distance = 16; distance > 0; distance /= 2) {
        const float other = shuffle_xor(best, (int)distance);
        const u32 other_partner = shuffle_xor(partner, (int)distance);
        if (other > best || (other == best && other_partner < partner)) {
            best = other;
            partner = other_partner;
        }
    }
    return partner;
}

// Chooses swaps best first, each group in at most one; returns whether there is any. Two groups that wish for each other
// are such a pair whatever comes before: nothing better has either of them. Pairs of equal gain go by their groups.
DEVICE bool choose_swaps(const Places& all, float least_gain) {
    for (u32 cell = threadIdx.x; cell < all.groups * all.groups; cell += THREADS)
        if (cell / all.groups < cell % all.groups)
            find_best_swap(all, cell / all.groups, cell % all.groups, least_gain);
    for (u32 a = threadIdx.x; a < all.groups; a += THREADS) all.chosen[a] = NONE;
    for (bool any = false;; any = true) {
        __syncthreads();
        for (u32 a = threadIdx.x / 32; a < all.groups; a += WARPS) {
            if (all.chosen[a] != NONE) continue;
            const u32 partner = best_partner(all, a);
            if (threadIdx.x % 32 == 0) all.wish[a] = partner;
        }
        __syncthreads();
        bool found = false;
        for (u32 a = threadIdx.x; a < all.groups; a += THREADS) {
            if (all.chosen[a] != NONE) continue;
            const u32 partner = all.wish[a];
            if (partner == NONE || all.wish[partner] != a) continue;
            all.chosen[a] = partner;
            found = true;
        }
        if (!any_of_block(found)) return any;
    }
}

template <class T>
DEVICE void exchange_values(T& one, T& other) {
    const T kept = one;
    one = other;
    other = kept;
}

DEVICE void make_swaps(const Places& all) {
    for (u32 a = 0; a < all.groups; a++) {
        const u32 b = all.chosen[a];
        if (b == NONE || b < a) continue;
        const u32 at = (u32)all.best_swap[(u64)a * all.groups + b], i = a * all.m + at / all.m;
        const u32 j = b * all.m + at % all.m;
        for (u32 k = threadIdx.x; k < all.count; k += THREADS)
            exchange_values(all.gain[(u64)k * all.stride + i], all.gain[(u64)k * all.stride + j]);
        if (threadIdx.x) continue;
        exchange_values(all.order[i], all.order[j]);
        all.stale[a] = all.stale[b] = 1;
    }
    __syncthreads();
}

// Greedy swaps inside each block of `size` places, a block of threads each. s [channels, rows]; order [channels], the
// channel at each place, is updated. Room for each block: gain [size, size], best_gain and best_swap [groups, groups],
// marks [3, groups], with groups = size / m. At least two groups lie in every block.
extern "C" __global__ void __launch_bounds__(256, 2)
    local_swaps(const float* s, u64* order, float* gain, float* best_gain, int* best_swap, u32* marks, int channels,
                int rows, int size, int m, int kept, int rounds, float least_gain) {
    const u32 begin = blockIdx.x * (u32)size, room = (u32)size / (u32)m;
    Places all;
    all.s = s;
    all.order = order + begin;
    all.gain = gain + (u64)blockIdx.x * size * size;
    all.best_gain = best_gain + (u64)blockIdx.x * room * room;
    all.best_swap = best_swap + (u64)blockIdx.x * room * room;
    all.stale = marks + (u64)blockIdx.x * 3 * room;
    all.wish = all.stale + room;
    all.chosen = all.wish + room;
    all.rows = rows;
    all.count = min((u32)channels - begin, (u32)size);
    all.stride = size;
    all.groups = all.count / m;
    all.m = m;
    all.kept = kept;
    for (u32 a = threadIdx.x; a < all.groups; a += THREADS) all.stale[a] = 1;
    for (int round = 0; round < rounds; round++) {
        for (u32 group = 0; group < all.groups; group = listed_groups[MAX_GROUPS]) {
            const u32 listed = list_stale(all, group);
            if (listed) update_listed(all, listed);
        }
        __syncthreads();  // gains are written
        if (!choose_swaps(all, least_gain)) return;
        make_swaps(all);
    }
}
