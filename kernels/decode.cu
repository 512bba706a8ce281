// Packed N:M weights times a few vectors, as decoding needs: y[v, out] = sum over k of W[out, k] x[v, k] + bias[out].
//
// Bound by memory: every byte of values and mask is read once, 16 at a time. A warp computes two rows of W. Its lanes
// share a row's values out in turns of 8 (one chunk each); the columns that these belong to are the next set bits of
// the row's mask. The vectors' entries for the columns at hand lie in shared memory, all vectors of a column together.
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
