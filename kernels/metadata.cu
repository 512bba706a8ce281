// Metadata of 2:4 weights for mma.sp, from the packed mask: [out/64, in/64, 32 lanes] chunks of 4 words. Word i of lane
// 4g + t belongs to rows 16i + g (low half) and 16i + g + 8 (high half) of the 64 and to the dense columns 16t..16t+15
// of the 64: lanes t = 0, 1 supply the first 32 columns, t = 2, 3 the second 32 (the instruction's selector).
// kernels/metadata.py holds the plain version.
#include "device.cuh"

constexpr u32 ROWS = 64, COLUMNS = 64, MMA_ROWS = 16;
constexpr u32 PADDING = 0x4444;  // places 0 and 1 of each group: rows past the end have values that nobody reads

// The 4 bits of a group, which of its values are kept, to first place | second place << 2; 0 if not two are kept.
DEVICE u32 places_of(u32 kept) {
    constexpr u64 PLACES = 4ull << 4 * 0x3 | 8ull << 4 * 0x5 | 9ull << 4 * 0x6 | 0xCull << 4 * 0x9 |
                           0xDull << 4 * 0xA | 0xEull << 4 * 0xC;
    return PLACES >> 4 * kept & 0xF;
}

// One thread makes one chunk. *faulty becomes 1 where a group does not keep two values.
extern "C" __global__ void __launch_bounds__(256)
    sparse_metadata(const u16* mask, Chunk* metadata, int* faulty, u32 out_features, u32 in_features) {
    const u32 index = blockIdx.x * 256 + threadIdx.x, lane = index % 32;
    const u32 column_blocks = in_features / COLUMNS, column_block = index / 32 % column_blocks;
    const u32 row_block = index / 32 / column_blocks;
    if (row_block * ROWS >= out_features) return;
    Chunk chunk;
#pragma unroll
    for (u32 i = 0; i < ROWS / MMA_ROWS; i++) {
        chunk.word[i] = 0;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = row_block * ROWS + i * MMA_ROWS + half * 8 + lane / 4;
            u32 places = PADDING;
            if (row < out_features) {
                const u32 kept = mask[(u64)row * (in_features / 16) + column_block * 4 + lane % 4];
                places = 0;
#pragma unroll
                for (u32 group = 0; group < 4; group++) {
                    const u32 place = places_of(kept >> 4 * group & 0xF);
                    if (place == 0) *faulty = 1;
                    places |= place << 4 * group;
                }
            }
            chunk.word[i] |= places << 16 * half;
        }
    }
    metadata[index] = chunk;
}
