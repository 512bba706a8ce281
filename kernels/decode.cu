// Packed N:M weights times a few vectors, as decoding needs: y[v, out] = sum over k of W[out, k] x[v, k] + bias[out].
//
// Bound by memory: every byte of values and mask is read once, 16 at a time. A warp computes two rows of W. Its lanes
// share a row's values out in turns of 8 (one chunk each); the columns that these belong to are the next set bits of
// the row's mask. The vectors' entries for the columns at hand lie in shared memory, all vectors of a column together.
//
// 2:4 has a way of its own, further below.
//
// in_features is a multiple of 128 and of M, a row keeps a multiple of 8 values; every group keeps exactly `kept`.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32, ROWS = 2;  // rows of a warp: a mask of 2 x 16 chunks is one a lane
constexpr u32 TILE_COLUMNS = 2048;                            // most columns whose x lies in shared memory at once
constexpr u32 ROW_WORDS = TILE_COLUMNS / 32;                  // of a mask
constexpr u32 ROW_CHUNKS = ROW_WORDS / 4;
constexpr u32 CHUNK_VALUES = 8;
static_assert(ROWS * ROW_CHUNKS == 32, "a lane has one chunk of the masks");

// W as it lies in the packed format.
struct Packed {
    const Chunk* values;  // [out_features, in_features / group_size * kept / 8]
    const Chunk* mask;    // [out_features, in_features / 128]
    u32 out_features, in_features, kept, group_size;
    u32 tile_columns;  // at most TILE_COLUMNS, a multiple of 128 and of M, with a multiple of 8 values; or in_features
};

// Of one column the 16-bit values of all vectors, two in a word, the lower one first.
template <int VECTORS>
struct alignas((VECTORS + 1) / 2 * 4) Entry {
    u32 word[(VECTORS + 1) / 2];
};

// Lanes read columns about 8 M / N apart at the same time: without this, many would be in the same banks.
DEVICE u32 swizzled(u32 column) { return column ^ (column / 32 % 32); }

DEVICE u32 half_of_word(u32 word, u32 half) { return half ? word >> 16 : word & 0xFFFF; }

// The kept columns of a row's mask in shared memory, in ascending order. MASKS is a __shared__ array of words.
template <class Masks>
struct KeptColumns {
    const Masks& masks;
    const u32 begin;  // the row's first word
    u32 word, bits;   // where it is, and what is left there

    DEVICE KeptColumns(const Masks& masks, u32 begin, u32 column)
        : masks(masks), begin(begin), word(begin + column / 32), bits(masks[word] & ~0u << column % 32) {}

    DEVICE u32 next() {
        while (bits == 0) bits = masks[++word];
        const u32 column = (word - begin) * 32 + (u32)__ffs((int)bits) - 1;
        bits &= bits - 1;
        return column;
    }
};

// Which value of a row: value `rest` of a group.
struct ValuePlace {
    u32 group, rest;

    DEVICE void advance(u32 groups, u32 values, u32 kept) {
        group += groups;
        rest += values;
        if (rest >= kept) group++, rest -= kept;
    }
};

// Put the vectors' entries for `columns` columns from `first` on into shared memory; vectors that are none become 0.
template <int VECTORS, class Entries>
DEVICE void fill_entries(Entries& entries, const u16* x, u32 vectors, u32 in_features, u32 first, u32 columns) {
    for (u32 column = threadIdx.x; column < columns; column += THREADS) {
        Entry<VECTORS> entry = {};
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++)
            if (v < vectors) entry.word[v / 2] |= (u32)x[(u64)v * in_features + first + column] << v % 2 * 16;
        entries[swizzled(column)] = entry;
    }
}

// Each lane puts one chunk of its warp's two rows of masks into shared memory.
template <class Masks>
DEVICE void fill_masks(Masks& masks, const Packed& packed, u32 warp, u32 first_row, u32 first, u32 columns) {
    const u32 lane = threadIdx.x % 32, chunk = lane % ROW_CHUNKS;
    if (chunk >= columns / 128) return;
    const u64 row = min(first_row + lane / ROW_CHUNKS, packed.out_features - 1);
    const Chunk bits = packed.mask[row * (packed.in_features / 128) + first / 128 + chunk];
#pragma unroll
    for (u32 i = 0; i < 4; i++) masks[(warp * ROWS + lane / ROW_CHUNKS) * ROW_WORDS + chunk * 4 + i] = bits.word[i];
}

// sums += a chunk's values times the vectors' entries in their columns.
template <class Type, int VECTORS, class Entries, class Masks>
DEVICE void add_products(float (&sums)[VECTORS], const Chunk& values, KeptColumns<Masks> columns,
                         const Entries& entries) {
#pragma unroll
    for (u32 i = 0; i < CHUNK_VALUES; i++) {
        const float value = Type::to_float((u16)half_of_word(values.word[i / 2], i % 2));
        const Entry<VECTORS> entry = entries[swizzled(columns.next())];
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++)
            sums[v] += value * Type::to_float((u16)half_of_word(entry.word[v / 2], v % 2));
    }
}

// A row's sums over the lanes, always in the same order; lane v writes vector v's.
template <class Type, int VECTORS>
DEVICE void write_sums(float (&sums)[VECTORS], const u16* bias, u16* y, u32 vectors, u32 row, u32 out_features) {
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) sums[v] += shuffle_xor(sums[v], distance);
        if (threadIdx.x % 32 == v && v < vectors && row < out_features)
            y[(u64)v * out_features + row] = Type::from_float(sums[v] + (bias ? Type::to_float(bias[row]) : 0.0f));
    }
}

template <class Type, int VECTORS>
DEVICE void decode(const Packed& packed, const u16* x, const u16* bias, u16* y, u32 vectors) {
    typedef Entry<VECTORS> EntryType;
    SHARED_ARRAY(EntryType, entries, TILE_COLUMNS);
    SHARED_ARRAY(u32, masks, WARPS * ROWS * ROW_WORDS);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, kept = packed.kept;
    const u32 first_row = (blockIdx.x * WARPS + warp) * ROWS;
    const u32 row_chunks = packed.in_features / packed.group_size * kept / CHUNK_VALUES;
    const Chunk* values[ROWS];
    float sums[ROWS][VECTORS] = {};
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
        values[r] = packed.values + (u64)min(first_row + r, packed.out_features - 1) * row_chunks;
    const ValuePlace begin = {lane * CHUNK_VALUES / kept, lane * CHUNK_VALUES % kept};
    const u32 turn_groups = 32 * CHUNK_VALUES / kept, turn_rest = 32 * CHUNK_VALUES % kept;

    for (u32 first = 0; first < packed.in_features; first += packed.tile_columns) {
        const u32 columns = min(packed.tile_columns, packed.in_features - first);
        const u32 chunks = columns / packed.group_size * kept / CHUNK_VALUES;
        __syncthreads();  // everybody is done with the tile before
        fill_entries<VECTORS>(entries, x, vectors, packed.in_features, first, columns);
        fill_masks(masks, packed, warp, first_row, first, columns);
        __syncthreads();
        ValuePlace place = begin;
        for (u32 chunk = lane; chunk < chunks; chunk += 32) {
            Chunk read[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) read[r] = values[r][chunk];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                const u32 row_begin = (warp * ROWS + r) * ROW_WORDS;
                KeptColumns<decltype(masks)> kept_columns(masks, row_begin, place.group * packed.group_size);
                for (u32 i = 0; i < place.rest; i++) kept_columns.next();
                add_products<Type>(sums[r], read[r], kept_columns, entries);
            }
            place.advance(turn_groups, turn_rest, kept);
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) values[r] += chunks;
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) write_sums<Type>(sums[r], bias, y, vectors, first_row + r, packed.out_features);
}

// --- 2:4 -------------------------------------------------------------------------------------------------------------
// A chunk of 8 values belongs to 16 columns whose mask is a half-word. What a group of 4 keeps follows from its nibble
// without a loop: a lane reads the x of its 16 columns and picks the kept ones by byte permutations, two at a time. The
// columns are the same in every row, so that what a lane has read of x serves its warp's rows.

constexpr u32 PARTS = 2;  // warps that share their rows' chunks, in turns
constexpr u32 TURN_CHUNKS = PARTS * 32, TURN_COLUMNS = TURN_CHUNKS * 16;

template <int VECTORS>
struct Sizes24 {
    static constexpr u32 ROWS = VECTORS >= 4 ? 4 : 2;  // of a warp
    static constexpr u32 BLOCK_ROWS = WARPS / PARTS * ROWS;
    static constexpr u32 AHEAD = VECTORS <= 4 ? 2 : 1;  // turns whose chunks are read before they are needed
    static constexpr u32 TILE_COLUMNS = VECTORS == 8 ? 2048 : 8192 / VECTORS;
    static constexpr u32 TILE_CHUNKS = TILE_COLUMNS / 8;  // of one vector
    static_assert(TILE_COLUMNS % (AHEAD * TURN_COLUMNS) == 0, "a tile ends with a turn of the last buffer");
};

// What a lane reads of its warp's rows in one turn.
template <u32 ROWS>
struct Turn {
    Chunk values[ROWS];
    u32 bits[ROWS];
};

// Put the x of a tile, `chunks` chunks of each vector from `first` on, into shared memory: even chunks, then odd ones,
// as a lane reads two that are neighbours. Vectors that are none become 0.
template <int VECTORS, class Tile>
DEVICE void fill_tile24(Tile& tile, const Chunk* x, u32 vectors, u32 vector_chunks, u32 first, u32 chunks) {
    constexpr u32 TILE_CHUNKS = Sizes24<VECTORS>::TILE_CHUNKS, EACH = TILE_CHUNKS / THREADS;
    Chunk read[EACH][VECTORS] = {};  // all of them before the first is needed
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 chunk = i * THREADS + threadIdx.x;
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++)
            if (chunk < chunks && v < vectors) read[i][v] = x[(u64)v * vector_chunks + first + chunk];
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 chunk = i * THREADS + threadIdx.x;
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++)
            if (chunk < chunks) tile[v * TILE_CHUNKS + chunk % 2 * (TILE_CHUNKS / 2) + chunk / 2] = read[i][v];
    }
}

// For select_bytes, the bytes that four groups keep of their columns' 16-bit values: group p's in half p % 2 of word
// p / 2. Bits 0 to 2 of a group's nibble tell apart all that keep two of four. By these bits, one table has the first
// column's two bytes and another the second's.
DEVICE void kept_bytes(u32 (&selectors)[2], u32 mask) {
    const u32 bits = mask & 0x7777;
    const u32 first = select_bytes(0x10321000, 0x00321054, bits), second = select_bytes(0x32767600, 0x00545476, bits);
    selectors[0] = select_bytes(first, second, 0x5140);
    selectors[1] = select_bytes(first, second, 0x7362);
}

// sums += the rows' chunks times every vector's x; x of the lane's columns are chunks `at` of the tile's halves.
template <class Type, int VECTORS, u32 ROWS, class Tile>
DEVICE void add_products24(float (&sums)[ROWS * VECTORS], const Turn<ROWS>& turn, const Tile& tile, u32 at) {
    constexpr u32 TILE_CHUNKS = Sizes24<VECTORS>::TILE_CHUNKS;
    u32 selectors[ROWS][2];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) kept_bytes(selectors[r], turn.bits[r]);
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const Chunk x[2] = {tile[v * TILE_CHUNKS + at], tile[v * TILE_CHUNKS + TILE_CHUNKS / 2 + at]};
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float& sum = sums[r * VECTORS + v];
#pragma unroll
            for (u32 p = 0; p < 4; p++) {
                const u32* columns = x[p / 2].word + p % 2 * 2;
                const u32 kept = select_bytes(columns[0], columns[1], selectors[r][p / 2] >> p % 2 * 16);
                const u32 values = turn.values[r].word[p];
                sum += Type::to_float((u16)half_of_word(values, 0)) * Type::to_float((u16)half_of_word(kept, 0));
                sum += Type::to_float((u16)half_of_word(values, 1)) * Type::to_float((u16)half_of_word(kept, 1));
            }
        }
    }
}

// Sums over the lanes, of COUNT (a power of two) at once, always in the same order: lane l receives number
// l / (32 / COUNT). A lane gives away half of the sums it has left, and adds what it receives to the others.
template <u32 COUNT>
DEVICE float sums_over_lanes(float (&sums)[COUNT]) {
    const u32 lane = threadIdx.x % 32;
    u32 left = COUNT;
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
        left /= 2;
        if (left == 0) sums[0] += shuffle_xor(sums[0], distance);
#pragma unroll
        for (u32 i = 0; i < COUNT / 2; i++) {
            if (i >= left) continue;
            const bool upper = lane & distance;
            const float given = upper ? sums[i] : sums[left + i], kept = upper ? sums[left + i] : sums[i];
            sums[i] = kept + shuffle_xor(given, distance);
        }
    }
    return sums[0];
}

template <class Type, int VECTORS>
DEVICE void decode24(const Chunk* values, const u16* mask, const Chunk* x, const u16* bias, u16* y, u32 vectors,
                     u32 out_features, u32 in_features) {
    typedef Sizes24<VECTORS> Sizes;
    constexpr u32 ROWS = Sizes::ROWS, BLOCK_ROWS = Sizes::BLOCK_ROWS, AHEAD = Sizes::AHEAD, COUNT = ROWS * VECTORS;
    constexpr u32 TILE_CHUNKS = Sizes::TILE_CHUNKS;
    SHARED_ARRAY(Chunk, tile, VECTORS * TILE_CHUNKS);
    SHARED_ARRAY(float, parts, PARTS * BLOCK_ROWS * VECTORS);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % PARTS;
    const u32 block_row = warp / PARTS * ROWS, first_row = blockIdx.x * BLOCK_ROWS + block_row;
    const u32 own = part * 32 + lane, chunks = in_features / 16;  // a lane's first chunk of a row, and all of them
    u64 begin[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) begin[r] = (u64)min(first_row + r, out_features - 1) * chunks + own;

    Turn<ROWS> ahead[AHEAD];
    auto read = [&](Turn<ROWS>& turn, u32 done, u32 more) {
        if (own + done + more >= chunks) return;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            turn.values[r] = (values + begin[r] + done)[more];
            turn.bits[r] = (mask + begin[r] + done)[more];
        }
    };
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) read(ahead[i], 0, i * TURN_CHUNKS);

    float sums[COUNT] = {};
    for (u32 first = 0; first < chunks; first += TILE_CHUNKS / 2) {
        const u32 tile_chunks = min(TILE_CHUNKS / 2, chunks - first);  // of a row
        if (first > 0) __syncthreads();                                // everybody is done with the tile before
        fill_tile24<VECTORS>(tile, x, vectors, chunks * 2, first * 2, tile_chunks * 2);
        __syncthreads();
        for (u32 done = 0; done < tile_chunks; done += AHEAD * TURN_CHUNKS) {
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                const u32 at = own + done + i * TURN_CHUNKS;
                if (at < tile_chunks) add_products24<Type, VECTORS>(sums, ahead[i], tile, at);
                read(ahead[i], first + done, (AHEAD + i) * TURN_CHUNKS);
            }
        }
    }

    const float sum = sums_over_lanes(sums);
    if (lane % (32 / COUNT) == 0) parts[(part * BLOCK_ROWS + block_row) * VECTORS + lane / (32 / COUNT)] = sum;
    __syncthreads();
    const u32 v = threadIdx.x / BLOCK_ROWS, row = blockIdx.x * BLOCK_ROWS + threadIdx.x % BLOCK_ROWS;
    if (v >= vectors || row >= out_features) return;
    float result = parts[threadIdx.x % BLOCK_ROWS * VECTORS + v];
#pragma unroll
    for (u32 i = 1; i < PARTS; i++) result += parts[(i * BLOCK_ROWS + threadIdx.x % BLOCK_ROWS) * VECTORS + v];
    y[(u64)v * out_features + row] = Type::from_float(result + (bias ? Type::to_float(bias[row]) : 0.0f));
}

#define PARAMETERS                                                                                                  \
    const Chunk *values, const Chunk *mask, const u16 *x, const u16 *bias, u16 *y, int vectors, int out_features,   \
        int in_features, int kept, int group_size, int tile_columns
#define ARGUMENTS                                                                                                    \
    {values, mask, (u32)out_features, (u32)in_features, (u32)kept, (u32)group_size, (u32)tile_columns}, x, bias, y,  \
        (u32)vectors

extern "C" __global__ void __launch_bounds__(256, 4) decode_f16_1(PARAMETERS) { decode<Float16, 1>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 4) decode_f16_2(PARAMETERS) { decode<Float16, 2>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 4) decode_f16_4(PARAMETERS) { decode<Float16, 4>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 3) decode_f16_8(PARAMETERS) { decode<Float16, 8>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 4) decode_bf16_1(PARAMETERS) { decode<BFloat16, 1>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 4) decode_bf16_2(PARAMETERS) { decode<BFloat16, 2>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 4) decode_bf16_4(PARAMETERS) { decode<BFloat16, 4>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(256, 3) decode_bf16_8(PARAMETERS) { decode<BFloat16, 8>(ARGUMENTS); }

#define PARAMETERS24                                                                                               \
    const Chunk *values, const u16 *mask, const Chunk *x, const u16 *bias, u16 *y, int vectors, int out_features,  \
        int in_features
#define ARGUMENTS24 values, mask, x, bias, y, (u32)vectors, (u32)out_features, (u32)in_features

extern "C" __global__ void __launch_bounds__(256, 4) decode24_f16_1(PARAMETERS24) {
    decode24<Float16, 1>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 4) decode24_f16_2(PARAMETERS24) {
    decode24<Float16, 2>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 2) decode24_f16_4(PARAMETERS24) {
    decode24<Float16, 4>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 2) decode24_f16_8(PARAMETERS24) {
    decode24<Float16, 8>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 4) decode24_bf16_1(PARAMETERS24) {
    decode24<BFloat16, 1>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 4) decode24_bf16_2(PARAMETERS24) {
    decode24<BFloat16, 2>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 2) decode24_bf16_4(PARAMETERS24) {
    decode24<BFloat16, 4>(ARGUMENTS24);
}
extern "C" __global__ void __launch_bounds__(256, 2) decode24_bf16_8(PARAMETERS24) {
    decode24<BFloat16, 8>(ARGUMENTS24);
}
