// What the products of packed weights share: Y[token, out] = sum over k of W[out, k] X[token, k], plus bias[out].
//
// A block computes a tile of output features by tokens in warp tiles, one for each 64 output features and half of the
// tokens. It walks over the input channels in steps of K_STEP; the tiles of the next steps are under way as cp.async
// while the tensor cores work on this one.
//
// Where tiles are too few for the device, gridDim.y blocks share each: all take a part of the steps, and the last of them
// to be done adds their sums up.
#include "device.cuh"

constexpr int K_STEP = 64;  // input channels: 128 bytes of X for a token, as wide as shared memory's 32 banks
constexpr int WARP_OUT = 64;   // output features of one warp
constexpr int MMA_OUT = 16;    // output features of one mma instruction
constexpr int MMA_TOKENS = 8;  // tokens of one mma instruction
constexpr int OUT_STEPS = WARP_OUT / MMA_OUT;
constexpr int CHUNK_BYTES = sizeof(Chunk);

// The tile of a block.
template <int OUT_FEATURES, int TILE_TOKENS>
struct TileOf {
    static constexpr int OUT = OUT_FEATURES, TOKENS = TILE_TOKENS;
    static constexpr int WARP_ROWS = OUT / WARP_OUT, WARP_COLUMNS = 2, WARP_TOKENS = TOKENS / WARP_COLUMNS;
    static constexpr int TOKEN_STEPS = WARP_TOKENS / MMA_TOKENS;
    static constexpr int THREADS = WARP_ROWS * WARP_COLUMNS * 32;
    static constexpr int X_BYTES = TOKENS * K_STEP * sizeof(u16);
    static_assert(THREADS == OUT, "in the epilogue each thread has one output feature");
    typedef float Sums[OUT_STEPS][TOKEN_STEPS][4];  // a lane's
};

// What is multiplied and where results go. Matrices are row-major without gaps and aligned to 16 bytes.
struct Product {
    const u16* x;           // [tokens, in_features]
    const u16* bias;        // [out_features] or null
    const void* reference;  // null, or outputs to compare with, in y's type and shape
    void* y;                // [tokens, out_features], 16-bit as x, or float
    float* partials;        // with a reference: [token tiles, 2, out_features], sums of (y - reference)^2, reference^2
    Chunk* sums;            // of shared tiles: [parts, tiles, tokens of a tile, its output features] floats
    int* arrived;           // of shared tiles: [tiles], how many blocks have left their sums; 0 at first
    u32 tokens, out_features, in_features;
    bool float_output;
};

// Which tile a block computes, and which steps of it.
struct TilePlace {
    u32 first_out, first_token, token_tile, first_step, steps;
};

// Blocks that run at the same time should share rows of W and X in L2: they go through groups of GROUP tiles of output
// features, in each group all tiles of tokens. Parts differ by one step at most, the first ones have it.
template <class Tile>
DEVICE TilePlace tile_of_block(const Product& product) {
    constexpr u32 GROUP = 8;
    const u32 out_tiles = (product.out_features + Tile::OUT - 1) / Tile::OUT;
    const u32 token_tiles = (product.tokens + Tile::TOKENS - 1) / Tile::TOKENS;
    const u32 group = blockIdx.x / (GROUP * token_tiles), in_group = blockIdx.x % (GROUP * token_tiles);
    const u32 group_tiles = min(out_tiles - group * GROUP, GROUP);
    const u32 token_tile = in_group / group_tiles, first_out = (group * GROUP + in_group % group_tiles) * Tile::OUT;
    const u32 all_steps = (product.in_features + K_STEP - 1) / K_STEP, part = blockIdx.y;
    const u32 steps = all_steps / gridDim.y, longer = all_steps % gridDim.y;
    const u32 first_step = part * steps + min(part, longer);
    return {first_out, token_tile * Tile::TOKENS, token_tile, first_step, steps + (part < longer)};
}

// Byte offset of a chunk in a tile whose rows have ROW_CHUNKS chunks (4 or 8). The chunks of a row change places, so
// that the same chunk of 8 successive rows, which ldmatrix reads at once, lies in 8 different places of the 128 bytes
// that the banks serve together.
template <int ROW_CHUNKS>
DEVICE u32 swizzled(u32 row, u32 chunk) {
    const u32 turn = row / (8 / ROW_CHUNKS) % ROW_CHUNKS;
    return (row * ROW_CHUNKS + (chunk ^ turn)) * CHUNK_BYTES;
}

// A thread's share in copying tiles of ROWS rows, ROW_CHUNKS chunks wide, from a matrix to shared memory, one tile
// after the other along the rows. Addresses are worked out once. Rows past the matrix's end repeat its last one: what
// they give is never written.
template <int ROWS, int ROW_CHUNKS, int THREADS>
struct TileCopy {
    static constexpr int COPIES = ROWS * ROW_CHUNKS / THREADS;
    static constexpr int ROWS_APART = THREADS / ROW_CHUNKS;
    static_assert(COPIES * THREADS == ROWS * ROW_CHUNKS && ROWS_APART % 8 == 0, "copies of a thread share a swizzle");
    const u8* source[COPIES];
    u32 target;

    DEVICE TileCopy(const u16* matrix, u32 row_values, u32 first_row, u32 rows) {
        const u32 row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u32 source_row = min(first_row + row + i * ROWS_APART, rows - 1);
            source[i] = (const u8*)(matrix + (u64)source_row * row_values) + chunk * CHUNK_BYTES;
        }
        target = swizzled<ROW_CHUNKS>(row, chunk);
    }

    // Begin copying the next tile to the address `tile`; with 0 bytes a chunk, zeros instead.
    DEVICE void begin(u32 tile, u32 bytes = CHUNK_BYTES) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            cp_async_chunk(tile + target + i * ROWS_APART * ROW_CHUNKS * CHUNK_BYTES, source[i], bytes);
            source[i] += ROW_CHUNKS * CHUNK_BYTES;
        }
    }
};

template <class Tile>
DEVICE void clear(typename Tile::Sums& sums) {
#pragma unroll
    for (int i = 0; i < OUT_STEPS; i++)
#pragma unroll
        for (int j = 0; j < Tile::TOKEN_STEPS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) sums[i][j][c] = 0;
}

// The epilogue turns the tile around: tensor cores leave a lane scattered outputs, memory wants neighbours together.
// A token's sums lie OUT + 4 floats apart, so that the 32 lanes of a warp, 8 output features of 4 token pairs, write to
// 32 different banks.
template <class Tile>
struct OutputTile {
    static constexpr int TOKEN_BYTES = (Tile::OUT + 4) * sizeof(float);
    static constexpr int BYTES = Tile::TOKENS * TOKEN_BYTES;

    // Lane 4g + t has of each 16x8 product the rows g and g + 8, columns 2t and 2t + 1.
    static DEVICE void fill(u32 tile, const typename Tile::Sums& sums) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u32 out = warp % Tile::WARP_ROWS * WARP_OUT + lane / 4;
        const u32 token = warp / Tile::WARP_ROWS * Tile::WARP_TOKENS + lane % 4 * 2;
        const u32 place = tile + token * TOKEN_BYTES + out * sizeof(float);
#pragma unroll
        for (int i = 0; i < OUT_STEPS; i++)
#pragma unroll
            for (int j = 0; j < Tile::TOKEN_STEPS; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const u32 token_bytes = (j * MMA_TOKENS + c % 2) * TOKEN_BYTES;
                    store_shared_float(place + token_bytes + (i * MMA_OUT + c / 2 * 8) * sizeof(float), sums[i][j][c]);
                }
    }
};

// Write an output in y's type; returns what was written.
template <class Type>
DEVICE float store_output(const Product& product, u64 place, float value) {
    if (product.float_output) {
        ((float*)product.y)[place] = value;
        return value;
    }
    const u16 rounded = Type::from_float(value);
    ((u16*)product.y)[place] = rounded;
    return Type::to_float(rounded);
}

template <class Type>
DEVICE float load_reference(const Product& product, u64 place) {
    if (product.float_output) return ((const float*)product.reference)[place];
    return Type::to_float(((const u16*)product.reference)[place]);
}

// Each thread writes one output feature of all tokens of the tile, neighbours in memory by neighbouring threads, and,
// against a reference, sums its error in the order of the tokens: the same bits whatever the schedule.
template <class Type, class Tile>
DEVICE void write_outputs(const Product& product, TilePlace place, u32 tile) {
    const u32 out = place.first_out + threadIdx.x;
    if (out >= product.out_features) return;
    const float bias = product.bias ? Type::to_float(product.bias[out]) : 0.0f;
    const u32 tokens = min(product.tokens - place.first_token, (u32)Tile::TOKENS);
    float squared_error = 0, squared_norm = 0;
    for (u32 token = 0; token < tokens; token++) {
        const u32 source = tile + token * OutputTile<Tile>::TOKEN_BYTES + threadIdx.x * sizeof(float);
        const u64 target = (u64)(place.first_token + token) * product.out_features + out;
        const float written = store_output<Type>(product, target, load_shared_float(source) + bias);
        if (product.reference) {
            const float reference = load_reference<Type>(product, target);
            squared_error += (written - reference) * (written - reference);
            squared_norm += reference * reference;
        }
    }
    if (product.reference) {
        float* partial = product.partials + (u64)place.token_tile * 2 * product.out_features + out;
        partial[0] = squared_error;
        partial[product.out_features] = squared_norm;
    }
}

// The tile of one of the blocks that share it. Leaves its sums in memory; in the last block to do so they are replaced by
// the sums of all parts, added in their order, so that bits are the same at every run. Returns whether this is the last.
template <class Tile>
DEVICE bool add_parts(const Product& product, u32 tile) {
    constexpr u32 TOKEN_CHUNKS = Tile::OUT * sizeof(float) / CHUNK_BYTES, CHUNKS = Tile::TOKENS * TOKEN_CHUNKS;
    constexpr u32 AT_ONCE = 4;  // chunks of a thread, so that many reads are under way
    static_assert(CHUNKS % (AT_ONCE * Tile::THREADS) == 0, "threads take as many chunks");
    const u32 thread = thread_anew();
    const auto place = [=](u32 i) {
        return tile + i / TOKEN_CHUNKS * OutputTile<Tile>::TOKEN_BYTES + i % TOKEN_CHUNKS * CHUNK_BYTES;
    };
    const u32 last = place(TOKEN_CHUNKS - 1) + CHUNK_BYTES;  // between two tokens there is room
    const u64 apart = (u64)gridDim.x * CHUNKS;
    Chunk* of_tile = product.sums + (u64)blockIdx.x * CHUNKS;
    for (u32 i = thread; i < CHUNKS; i += Tile::THREADS)
        of_tile[blockIdx.y * apart + i] = load_shared_chunk(place(i));
    __threadfence();  // before the block is counted
    __syncthreads();
    if (thread == 0)
        store_shared_float(last, atomicAdd(product.arrived + blockIdx.x, 1) == (int)gridDim.y - 1 ? 1.0f : 0.0f);
    __syncthreads();
    if (load_shared_float(last) == 0) return false;
    __threadfence();  // behind the count of the others
    for (u32 first = thread; first < CHUNKS; first += AT_ONCE * Tile::THREADS) {
        float added[AT_ONCE][4] = {};
#pragma unroll 2
        for (u32 part = 0; part < gridDim.y; part++)
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                const Chunk sums = of_tile[part * apart + first + i * Tile::THREADS];
#pragma unroll
                for (u32 k = 0; k < 4; k++) added[i][k] += __uint_as_float(sums.word[k]);
            }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            Chunk sums;
#pragma unroll
            for (u32 k = 0; k < 4; k++) sums.word[k] = __float_as_uint(added[i][k]);
            store_shared_chunk(place(first + i * Tile::THREADS), sums);
        }
    }
    __syncthreads();
    return true;
}

// From accumulators to memory, over the main loop's tiles: no copy to them is under way any more.
template <class Type, class Tile>
DEVICE void finish(const Product& product, TilePlace place, u32 shared, const typename Tile::Sums& sums) {
    __syncthreads();  // every warp is done with the last step's tiles
    OutputTile<Tile>::fill(shared, sums);
    __syncthreads();
    if (gridDim.y > 1 && !add_parts<Tile>(product, shared)) return;
    write_outputs<Type, Tile>(product, place, shared);
}
