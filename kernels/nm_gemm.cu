// Product with weights of any N:M on dense tensor cores. W is read packed; each step's values are expanded by the mask
// in registers and put into shared memory as a dense tile; they are read while the step before is multiplied.
// in_features is a multiple of 8 and of M, M at most 32.
#include "gemm.cuh"

typedef TileOf<128, 128> NmTile;
constexpr int OUT = NmTile::OUT, THREADS = NmTile::THREADS, TOKEN_STEPS = NmTile::TOKEN_STEPS, STAGES = 3;
constexpr int ROW_CHUNKS = K_STEP * sizeof(u16) / CHUNK_BYTES;  // of both dense tiles
constexpr int W_TILE_BYTES = OUT * K_STEP * sizeof(u16), X_TILE_BYTES = NmTile::X_BYTES;
constexpr int SHARED_BYTES = 2 * W_TILE_BYTES + STAGES * X_TILE_BYTES;
constexpr int CHUNK_VALUES = 8;  // columns of a chunk: one byte of the mask
static_assert(OutputTile<NmTile>::BYTES <= SHARED_BYTES, "the epilogue's tile fits");

// W as it lies in the packed format.
struct Packed {
    const u16* values;  // [out_features, in_features / group_size * kept]
    const u8* mask;     // [out_features, in_features / 8]
    u32 kept, group_size;
};

// What the kept values of a chunk may be: ANY, or so many in every chunk. The latter holds where M divides 8, and makes
// a chunk's values one aligned word.
constexpr int ANY = 0;

// The next columns' values, two at a time: `values` begins with those that are left.
DEVICE u32 expanded_pair(u64 values, u32 low_kept, u32 high_kept) {
    const u32 next = low_kept ? (u32)values : (u32)values << 16;
    return next & ((low_kept ? 0xFFFFu : 0u) | (high_kept ? 0xFFFF0000u : 0u));
}

// A chunk from all its kept values, in order, and its byte of the mask; dropped columns are 0.
DEVICE Chunk expanded(u64 values, u32 kept) {
    Chunk chunk;
#pragma unroll
    for (int pair = 0; pair < CHUNK_VALUES / 2; pair++) {
        const u32 low_kept = kept >> 2 * pair & 1, high_kept = kept >> (2 * pair + 1) & 1;
        chunk.word[pair] = expanded_pair(values, low_kept, high_kept);
        values >>= 16 * (low_kept + high_kept);
    }
    return chunk;
}

// How many values a row keeps before `column`, a multiple of 8: whole groups keep N each, the rest is counted.
DEVICE u32 values_before(const Packed& packed, const u8* row_mask, u32 column) {
    const u32 groups = column / packed.group_size, start = groups * packed.group_size;
    u32 count = groups * packed.kept;
#pragma unroll 1
    for (u32 byte = start / 8; byte < column / 8; byte++) {
        const u32 in_group = byte == start / 8 ? 0xFFu << start % 8 : 0xFFu;
        count += __popc(row_mask[byte] & in_group);
    }
    return count;
}

// A chunk of any pattern: its values one by one.
DEVICE Chunk expanded_any(const Packed& packed, const u16* row_values, const u8* row_mask, u32 column) {
    const u16* value = row_values + values_before(packed, row_mask, column);
    const u32 kept = row_mask[column / 8];
    Chunk chunk = {};
#pragma unroll
    for (int i = 0; i < CHUNK_VALUES; i++)
        if (kept >> i & 1) chunk.word[i / 2] |= (u32)*value++ << i % 2 * 16;
    return chunk;
}

// A thread's share in expanding W's tiles: the same chunk of every 16th row. Rows past the end repeat the last one,
// columns past the end are 0.
template <int CHUNK_KEPT>
struct Expansion {
    static constexpr int COPIES = OUT * ROW_CHUNKS / THREADS, ROWS_APART = THREADS / ROW_CHUNKS;
    const Packed& packed;
    const u16* values;  // of the thread's first row
    const u8* mask;
    u32 row_values, row_mask, last_row, columns, column, target;  // last_row counted from the thread's first row
    u64 read_values[COPIES];
    u32 read_mask[COPIES];

    DEVICE Expansion(const Product& product, TilePlace place, const Packed& packed) : packed(packed) {
        const u32 first_row = min(place.first_out + threadIdx.x / ROW_CHUNKS, product.out_features - 1);
        columns = product.in_features;
        column = place.first_step * K_STEP + threadIdx.x % ROW_CHUNKS * CHUNK_VALUES;
        row_values = columns / packed.group_size * packed.kept;
        row_mask = columns / 8;
        values = packed.values + (u64)first_row * row_values;
        mask = packed.mask + (u64)first_row * row_mask;
        last_row = product.out_features - 1 - first_row;
        target = swizzled<ROW_CHUNKS>(threadIdx.x / ROW_CHUNKS, threadIdx.x % ROW_CHUNKS);
    }

    // Begin reading the next step's values and masks; only `write` needs them.
    DEVICE void read() {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            read_values[i] = read_mask[i] = 0;
            if (CHUNK_KEPT == ANY || column >= columns) continue;
            const u32 row = min((u32)i * ROWS_APART, last_row);
            const u16* source = values + (u64)row * row_values + column / CHUNK_VALUES * CHUNK_KEPT;
            read_values[i] = CHUNK_KEPT == 4 ? *(const u64*)source : *(const u32*)source;
            read_mask[i] = mask[(u64)row * row_mask + column / CHUNK_VALUES];
        }
    }

    // Put what was read last into a tile, expanded.
    DEVICE void write(u32 tile) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            Chunk chunk = expanded(read_values[i], read_mask[i]);
            if (CHUNK_KEPT == ANY && column < columns) {
                const u64 row = min((u32)i * ROWS_APART, last_row);
                chunk = expanded_any(packed, values + row * row_values, mask + row * row_mask, column);
            }
            store_shared_chunk(tile + target + i * ROWS_APART * ROW_CHUNKS * CHUNK_BYTES, chunk);
        }
        column += K_STEP;
    }
};

// A thread's share in fetching X; columns past the end become 0.
struct FetchX {
    TileCopy<NmTile::TOKENS, ROW_CHUNKS, THREADS> copy;
    u32 column;

    DEVICE FetchX(const Product& product, TilePlace place)
        : copy(product.x + place.first_step * K_STEP, product.in_features, place.first_token, product.tokens),
          column(place.first_step * K_STEP + threadIdx.x % ROW_CHUNKS * CHUNK_VALUES) {}

    DEVICE void begin(u32 tile, u32 in_features) {
        copy.begin(tile, column < in_features ? CHUNK_BYTES : 0);
        column += K_STEP;
    }
};

// Where a lane finds its fragments in tiles at address 0.
struct DenseFragments {
    u32 w, x;

    DEVICE DenseFragments() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u32 warp_row = warp % NmTile::WARP_ROWS, warp_column = warp / NmTile::WARP_ROWS;
        // ldmatrix: rows 0-7, rows 8-15 of the first 8 channels, then the same of the next 8
        w = swizzled<ROW_CHUNKS>(warp_row * WARP_OUT + lane % 16, lane / 16);
        // ldmatrix: both 8 channels of tokens 0-7, then of tokens 8-15
        x = swizzled<ROW_CHUNKS>(warp_column * NmTile::WARP_TOKENS + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }

    // sums += the product of a whole step, 16 channels (2 chunks) at a time.
    template <class Type>
    DEVICE void multiply(u32 w_tile, u32 x_tile, NmTile::Sums& sums) const {
#pragma unroll
        for (int k = 0; k < ROW_CHUNKS; k += 2) {
            u32 a[OUT_STEPS][4], b[TOKEN_STEPS / 2][4];
#pragma unroll
            for (int i = 0; i < OUT_STEPS; i++)
                ldmatrix_x4(a[i], w_tile + (w ^ k * CHUNK_BYTES) + i * MMA_OUT * ROW_CHUNKS * CHUNK_BYTES);
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS / 2; j++)
                ldmatrix_x4(b[j], x_tile + (x ^ k * CHUNK_BYTES) + j * 2 * MMA_TOKENS * ROW_CHUNKS * CHUNK_BYTES);
#pragma unroll
            for (int i = 0; i < OUT_STEPS; i++)
#pragma unroll
                for (int j = 0; j < TOKEN_STEPS; j++)
                    Type::mma_dense(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
};

template <class Type, int CHUNK_KEPT>
DEVICE void nm_gemm(const Product& product, const Packed& packed) {
    const TilePlace place = tile_of_block<NmTile>(product);
    const u32 shared = dynamic_shared(), x_tiles = shared + 2 * W_TILE_BYTES, steps = place.steps;
    Expansion<CHUNK_KEPT> expansion(product, place, packed);
    FetchX fetch(product, place);
    const DenseFragments fragments;
    NmTile::Sums sums;
    clear<NmTile>(sums);
    for (u32 step = 0; step < STAGES - 1; step++) {
        if (step < steps) fetch.begin(x_tiles + step * X_TILE_BYTES, product.in_features);
        cp_async_commit();  // empty groups too: cp_async_wait counts them
    }
    expansion.read();
    expansion.write(shared);
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this step's tiles are there, and nobody reads those of the step before
        const u32 next = step + STAGES - 1;
        if (next < steps) fetch.begin(x_tiles + next % STAGES * X_TILE_BYTES, product.in_features);
        cp_async_commit();
        if (step + 1 < steps) expansion.read();
        fragments.multiply<Type>(shared + step % 2 * W_TILE_BYTES, x_tiles + step % STAGES * X_TILE_BYTES, sums);
        if (step + 1 < steps) expansion.write(shared + (step + 1) % 2 * W_TILE_BYTES);
    }
    finish<Type, NmTile>(product, place, shared, sums);
}

#define PARAMETERS                                                                                                   \
    const u16 *values, const u8 *mask, const u16 *x, const u16 *bias, const void *reference, void *y,                \
        float *partials, Chunk *sums, int *arrived, int tokens, int out_features,                                    \
        int in_features, int kept, int group_size, int float_output
#define PRODUCT                                                                                                      \
    {x, bias, reference, y, partials, sums, arrived, (u32)tokens, (u32)out_features, (u32)in_features,               \
     float_output != 0}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_f16_4(PARAMETERS) {
    nm_gemm<Float16, 4>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_f16_2(PARAMETERS) {
    nm_gemm<Float16, 2>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_f16_any(PARAMETERS) {
    nm_gemm<Float16, ANY>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_bf16_4(PARAMETERS) {
    nm_gemm<BFloat16, 4>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_bf16_2(PARAMETERS) {
    nm_gemm<BFloat16, 2>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}

extern "C" __global__ void __launch_bounds__(128, 1) nm_gemm_bf16_any(PARAMETERS) {
    nm_gemm<BFloat16, ANY>(PRODUCT, {values, mask, (u32)kept, (u32)group_size});
}
