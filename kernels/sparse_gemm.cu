// Product with 2:4 weights on sparse tensor cores. Kept values are used as they lie in the packed format; the places of
// the kept values are given to the instruction as metadata, made once by metadata.cu from the packed mask.
// in_features is a multiple of 64.
#include "gemm.cuh"

// One step of a stage, from its beginning: values, X, metadata.
template <class Tile>
struct SparseStage {
    static constexpr int VALUE_CHUNKS = K_STEP / 2 * sizeof(u16) / CHUNK_BYTES;  // of a row: half of K_STEP is kept
    static constexpr int X_CHUNKS = K_STEP * sizeof(u16) / CHUNK_BYTES;
    static constexpr int METADATA_CHUNKS = Tile::WARP_ROWS * 32;  // one for a lane and 64 rows: 32 bits for 16 rows
    static constexpr int X = Tile::OUT * VALUE_CHUNKS * CHUNK_BYTES;
    static constexpr int METADATA = X + Tile::X_BYTES;
    static constexpr int BYTES = METADATA + METADATA_CHUNKS * CHUNK_BYTES;
};

// A thread's share in fetching the stages. Metadata is never zero-filled, since 0 is no legal place of two values: rows
// past the end take the last 64 rows' metadata.
template <class Tile>
struct SparseFetch {
    typedef SparseStage<Tile> Stage;
    TileCopy<Tile::OUT, Stage::VALUE_CHUNKS, Tile::THREADS> values;
    TileCopy<Tile::TOKENS, Stage::X_CHUNKS, Tile::THREADS> x;
    const Chunk* metadata;

    DEVICE SparseFetch(const Product& product, TilePlace place, const u16* all_values, const Chunk* all_metadata)
        : values(all_values + place.first_step * (K_STEP / 2), product.in_features / 2, place.first_out,
                 product.out_features),
          x(product.x + place.first_step * K_STEP, product.in_features, place.first_token, product.tokens) {
        const u32 row_blocks = (product.out_features + WARP_OUT - 1) / WARP_OUT;
        const u32 row_block = min(place.first_out / WARP_OUT + threadIdx.x / 32, row_blocks - 1);
        const u64 block_steps = (u64)row_block * (product.in_features / K_STEP);
        metadata = all_metadata + (block_steps + place.first_step) * 32 + threadIdx.x % 32;
    }

    DEVICE void begin(u32 stage) {
        values.begin(stage);
        x.begin(stage + Stage::X);
        if (threadIdx.x < Stage::METADATA_CHUNKS)
            cp_async_chunk(stage + Stage::METADATA + threadIdx.x * CHUNK_BYTES, metadata);
        metadata += 32;
    }
};

// Where a lane finds its fragments in the stage at address 0.
template <class Tile>
struct SparseFragments {
    typedef SparseStage<Tile> Stage;
    u32 values, x, metadata;

    DEVICE SparseFragments() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u32 warp_row = warp % Tile::WARP_ROWS, warp_column = warp / Tile::WARP_ROWS;
        // ldmatrix: 8x8 matrices in the order rows 0-7, rows 8-15 of chunk 0, then the same of chunk 1
        values = swizzled<Stage::VALUE_CHUNKS>(warp_row * WARP_OUT + lane % 16, lane / 16);
        // ldmatrix: the four chunks that 8 tokens have in a step of 32 channels
        x = Stage::X + swizzled<Stage::X_CHUNKS>(warp_column * Tile::WARP_TOKENS + lane % 8, lane / 8);
        metadata = Stage::METADATA + (warp_row * 32 + lane) * CHUNK_BYTES;
    }

    // sums += the product of the HALF-th 32 channels of a stage. A swizzle is undone by xor, so that the chunks of the
    // other half are found by xor as well.
    template <class Type, int HALF>
    DEVICE void multiply(u32 stage, const Chunk& places, typename Tile::Sums& sums) const {
        u32 a[OUT_STEPS][4], b[Tile::TOKEN_STEPS][4];
        const u32 half_values = stage + (values ^ HALF * Stage::VALUE_CHUNKS / 2 * CHUNK_BYTES);
        const u32 half_x = stage + (x ^ HALF * Stage::X_CHUNKS / 2 * CHUNK_BYTES);
#pragma unroll
        for (int i = 0; i < OUT_STEPS; i++)
            ldmatrix_x4(a[i], half_values + i * MMA_OUT * Stage::VALUE_CHUNKS * CHUNK_BYTES);
#pragma unroll
        for (int j = 0; j < Tile::TOKEN_STEPS; j++)
            ldmatrix_x4(b[j], half_x + j * MMA_TOKENS * Stage::X_CHUNKS * CHUNK_BYTES);
#pragma unroll
        for (int i = 0; i < OUT_STEPS; i++)
#pragma unroll
            for (int j = 0; j < Tile::TOKEN_STEPS; j++)
                Type::template mma_sparse<HALF>(sums[i][j], a[i], b[j], places.word[i]);
    }
};

template <class Type, class Tile, int STAGES>
DEVICE void sparse_gemm(const Product& product, const u16* values, const Chunk* metadata) {
    typedef SparseStage<Tile> Stage;
    static_assert(OutputTile<Tile>::BYTES <= STAGES * Stage::BYTES, "the epilogue's tile fits in the stages");
    const TilePlace place = tile_of_block<Tile>(product);
    const u32 shared = dynamic_shared(), end = shared + STAGES * Stage::BYTES, steps = place.steps;
    SparseFetch<Tile> fetch(product, place, values, metadata);
    const SparseFragments<Tile> fragments;
    typename Tile::Sums sums;
    clear<Tile>(sums);
    u32 fetched = 0, filling = shared, reading = shared;
#pragma unroll
    for (; fetched < STAGES - 1; fetched++, filling += Stage::BYTES) {
        if (fetched < steps) fetch.begin(filling);
        cp_async_commit();  // empty groups too: cp_async_wait counts them
    }
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this step's copies are there, and nobody reads the stage that is filled next
        if (fetched++ < steps) fetch.begin(filling);
        cp_async_commit();
        filling = reading;  // next time, when the barrier has freed it
        const Chunk places = load_shared_chunk(reading + fragments.metadata);
        fragments.template multiply<Type, 0>(reading, places, sums);
        fragments.template multiply<Type, 1>(reading, places, sums);
        reading = reading + Stage::BYTES == end ? shared : reading + Stage::BYTES;
    }
    finish<Type, Tile>(product, place, shared, sums);
}

#define PARAMETERS                                                                                                   \
    const u16 *values, const Chunk *metadata, const u16 *x, const u16 *bias, const void *reference, void *y,         \
        float *partials, Chunk *sums, int *arrived, int tokens, int out_features, int in_features, int float_output
#define PRODUCT                                                                                                      \
    {x, bias, reference, y, partials, sums, arrived, (u32)tokens, (u32)out_features, (u32)in_features,               \
     float_output != 0}

// 4 stages of 256 output features take 136 KiB of shared memory: sm_80.
extern "C" __global__ void __launch_bounds__(256, 1) sparse_gemm_f16_256x128(PARAMETERS) {
    sparse_gemm<Float16, TileOf<256, 128>, 4>(PRODUCT, values, metadata);
}

extern "C" __global__ void __launch_bounds__(256, 1) sparse_gemm_bf16_256x128(PARAMETERS) {
    sparse_gemm<BFloat16, TileOf<256, 128>, 4>(PRODUCT, values, metadata);
}

// 3 stages of 128 output features take 75 KiB: sm_86, sm_89 have 99 KiB for a block, sm_90 has room for two blocks.
extern "C" __global__ void __launch_bounds__(128, 1) sparse_gemm_f16_128x128(PARAMETERS) {
    sparse_gemm<Float16, TileOf<128, 128>, 3>(PRODUCT, values, metadata);
}

extern "C" __global__ void __launch_bounds__(128, 1) sparse_gemm_bf16_128x128(PARAMETERS) {
    sparse_gemm<BFloat16, TileOf<128, 128>, 3>(PRODUCT, values, metadata);
}

// For few tokens: 4 stages take 52 KiB. Registers are bounded so that sm_90 has room for four blocks.
extern "C" __global__ void __launch_bounds__(128, 4) sparse_gemm_f16_128x32(PARAMETERS) {
    sparse_gemm<Float16, TileOf<128, 32>, 4>(PRODUCT, values, metadata);
}

extern "C" __global__ void __launch_bounds__(128, 4) sparse_gemm_bf16_128x32(PARAMETERS) {
    sparse_gemm<BFloat16, TileOf<128, 32>, 4>(PRODUCT, values, metadata);
}
