// Calibration statistics of activations X [tokens, channels], one channel at a time: lowest and highest value, sum of
// squares, and a histogram in a window of bins that first widens where it must. streamprune_kernels.reference.add_range
// and count_values are the definitions.
//
// A block has ROW_BYTES of every row: 32 channels of 16 bits or 16 of 32 bits. Four threads share a row, a chunk each;
// THREADS / 4 rows are read at the same time. A histogram's window depends on all tokens, so that values are needed
// twice: the first `resident_tokens` rows stay in shared memory meanwhile, each chunk read back by the thread that put
// it there, and are read from global memory once. Sums add the same values in the same order at every run.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;
constexpr u32 ROW_BYTES = 64, ROW_CHUNKS = ROW_BYTES / sizeof(Chunk), ROWS_AT_ONCE = THREADS / ROW_CHUNKS;
constexpr u32 READ_AHEAD = 4;         // rows of a thread whose reading is under way at the same time
constexpr u32 MAX_BINS = 4096;        // of a window
constexpr int MIN_EXPONENT = -126;    // of a bin's width: its inverse does not overflow
constexpr int FLOAT_BITS = 24;        // bin numbers stay below 2^24, so that float holds them exactly

// What a chunk's values are.
struct Float32 {
    static constexpr u32 VALUES = 4;
    static DEVICE float value(const Chunk& chunk, u32 i) { return __uint_as_float(chunk.word[i]); }
};

template <class Type>
struct Values16 {
    static constexpr u32 VALUES = 8;
    static DEVICE float value(const Chunk& chunk, u32 i) {
        return Type::to_float((u16)(i % 2 ? chunk.word[i / 2] >> 16 : chunk.word[i / 2] & 0xFFFF));
    }
};

// X and the state of its channels, which is updated. `counts` null: no histogram, nor `exponent` and `first_bin`.
struct Channels {
    const Chunk* x;  // [tokens, channels]
    float *low, *high;
    double* square_sum;
    int *exponent, *first_bin, *counts;  // bin i of channel c covers (first_bin[c] + i + [0, 1)) * 2^exponent[c]
    u32 tokens, channels, bins, count_stride, resident_tokens;
};

// Of the values of one channel that a thread, or several, has seen.
struct Range {
    float low, high;
    double square_sum;

    DEVICE void add(float value) {
        add_bounds(value, value);
        square_sum += (double)value * (double)value;
    }

    DEVICE void add(const Range& other) {
        add_bounds(other.low, other.high);
        square_sum += other.square_sum;
    }

    // A NaN stays, as in torch.minimum and torch.maximum: its channel is then not counted.
    DEVICE void add_bounds(float other_low, float other_high) {
        low = other_low < low || other_low != other_low ? other_low : low;
        high = other_high > high || other_high != other_high ? other_high : high;
    }
};

// A channel's window of bins: bin 0 begins at first * 2^exponent. 16 bytes, for one access.
struct alignas(16) Window {
    int exponent, first;
    u32 used;  // 0: its values are not finite, and not counted
};

// 2^exponent, between -126 and 127.
DEVICE float power_of_two(int exponent) { return __uint_as_float((u32)(exponent + 127) << 23); }

// Least e with |value| < 2^e, of a normal number; of a smaller one -126.
DEVICE int exponent_above(float value) { return (int)(__float_as_uint(value) >> 23 & 0xFF) - 126; }

// Scaling by a power of two is exact, so that bins twice as wide are pairs of these.
DEVICE float bin_of(float value, int exponent) { return floorf(value * power_of_two(-exponent)); }

DEVICE float absolute(float value) { return __uint_as_float(__float_as_uint(value) & 0x7FFFFFFF); }

DEVICE bool is_finite(float value) { return (__float_as_uint(value) & 0x7F800000) != 0x7F800000; }

// Least exponent at which low and high lie within `bins` bins, and within 2^24 of bin 0.
DEVICE int least_exponent(float low, float high, u32 bins) {
    const float tiny = power_of_two(MIN_EXPONENT);
    const int span = exponent_above(max(high - low, tiny) / (float)bins);
    const int reach = exponent_above(max(max(absolute(low), absolute(high)), tiny));
    int exponent = min(max(max(span - 1, reach - FLOAT_BITS), MIN_EXPONENT), -MIN_EXPONENT);
    for (int i = 0; i < 2; i++)  // the window starts on the grid, so that it may need a width more
        exponent += bin_of(high, exponent) - bin_of(low, exponent) >= (float)bins;
    return exponent;
}

// The window that values between low and high need: the old one if they are inside, else one with room on both sides.
DEVICE Window widened(Window old, float low, float high, u32 bins) {
    if (!is_finite(low) || !is_finite(high) || !is_finite(high - low)) return {old.exponent, old.first, 0};
    const int exponent = max(old.exponent, least_exponent(low, high, bins));
    const int lowest = (int)bin_of(low, exponent), highest = (int)bin_of(high, exponent);
    const bool inside = exponent == old.exponent && lowest >= old.first && highest < old.first + (int)bins;
    return {exponent, inside ? old.first : lowest - ((int)bins - 1 - (highest - lowest)) / 2, 1};
}

// What all threads of a block need of its channels.
template <class Type>
struct Tile {
    static constexpr u32 CHANNELS = Type::VALUES * ROW_CHUNKS;
    const Channels& all;
    const u32 first_channel, chunk, first_row;  // the thread has this chunk of rows first_row + i * ROWS_AT_ONCE

    DEVICE Tile(const Channels& all)
        : all(all),
          first_channel(blockIdx.x * CHANNELS),
          chunk(threadIdx.x % ROW_CHUNKS),
          first_row(threadIdx.x / ROW_CHUNKS) {}

    // Whether the thread has channels; the last block may have some less. A chunk is whole or not there.
    DEVICE bool has_channels() const { return first_channel + chunk * Type::VALUES < all.channels; }
    DEVICE u32 own_channel(u32 i) const { return chunk * Type::VALUES + i; }  // in the tile
    DEVICE Chunk global_chunk(u32 row) const {
        return all.x[((u64)row * all.channels + first_channel) / Type::VALUES + chunk];
    }
    DEVICE u32 shared_place(u32 row) const {
        return dynamic_shared() + (row * ROW_CHUNKS + chunk) * (u32)sizeof(Chunk);
    }
};

// The thread's ranges of its channels, over its rows; rows that are resident go to shared memory.
template <class Type>
DEVICE void read_rows(const Tile<Type>& tile, Range (&ranges)[Type::VALUES]) {
    const u32 tokens = tile.has_channels() ? tile.all.tokens : 0;
    for (u32 first = tile.first_row; first < tokens; first += READ_AHEAD * ROWS_AT_ONCE) {
        Chunk read[READ_AHEAD];
#pragma unroll
        for (u32 i = 0; i < READ_AHEAD; i++) read[i] = tile.global_chunk(min(first + i * ROWS_AT_ONCE, tokens - 1));
#pragma unroll
        for (u32 i = 0; i < READ_AHEAD; i++) {
            const u32 row = first + i * ROWS_AT_ONCE;
            if (row >= tokens) break;
            if (row < tile.all.resident_tokens) store_shared_chunk(tile.shared_place(row), read[i]);
#pragma unroll
            for (u32 c = 0; c < Type::VALUES; c++) ranges[c].add(Type::value(read[i], c));
        }
    }
}

// Every lane's range becomes that of all lanes with the same chunk, in an order that is always the same.
DEVICE void reduce_over_rows(Range& range) {
#pragma unroll
    for (u32 distance = ROW_CHUNKS; distance < 32; distance *= 2)
        range.add({shuffle_xor(range.low, distance), shuffle_xor(range.high, distance),
                   shuffle_xor(range.square_sum, distance)});
}

// Add a channel's range to its state and find its window.
DEVICE Window update_channel(const Channels& all, u32 channel, const Range& range, Window& old) {
    Range whole = {all.low[channel], all.high[channel], all.square_sum[channel]};
    whole.add(range);
    all.low[channel] = whole.low;
    all.high[channel] = whole.high;
    all.square_sum[channel] = whole.square_sum;
    if (!all.counts) return {};
    old = {all.exponent[channel], all.first_bin[channel], 1};
    const Window wide = widened(old, whole.low, whole.high, all.bins);
    all.exponent[channel] = wide.exponent;
    all.first_bin[channel] = wide.first;
    return wide;
}

// All threads of a block move one channel's counts from its old window to a wider one, or to one elsewhere.
DEVICE void move_counts(int* counts, u32 bins, Window old, Window wide) {
    int taken[MAX_BINS / THREADS];
#pragma unroll
    for (u32 i = 0; i < MAX_BINS / THREADS; i++) {
        const u32 bin = threadIdx.x + i * THREADS;
        taken[i] = bin < bins ? counts[bin] : 0;
        if (bin < bins) counts[bin] = 0;
    }
    __syncthreads();
    const int shift = min(wide.exponent - old.exponent, 31);
#pragma unroll
    for (u32 i = 0; i < MAX_BINS / THREADS; i++) {
        const int target = ((old.first + (int)(threadIdx.x + i * THREADS)) >> shift) - wide.first;
        if (taken[i]) atomicAdd(counts + min(max(target, 0), (int)bins - 1), taken[i]);
    }
    __syncthreads();  // the next channel's, or the values', come on top
}

// Count the thread's values in its channels' windows. Counts are integers: their order does not show.
template <class Type, class Windows>
DEVICE void count_rows(const Tile<Type>& tile, const Windows& windows) {
    const Channels& all = tile.all;
    float scale[Type::VALUES];
    int first[Type::VALUES];
    u32 used = 0;
#pragma unroll
    for (u32 c = 0; c < Type::VALUES; c++) {
        const Window window = windows[tile.own_channel(c)];
        scale[c] = power_of_two(-window.exponent);
        first[c] = window.first;
        used |= window.used << c;
    }
    int* counts = all.counts + (u64)(tile.first_channel + tile.own_channel(0)) * all.count_stride;
    for (u32 row = tile.first_row; row < all.tokens; row += ROWS_AT_ONCE) {
        const bool resident = row < all.resident_tokens;
        const Chunk chunk = resident ? load_shared_chunk(tile.shared_place(row)) : tile.global_chunk(row);
#pragma unroll
        for (u32 c = 0; c < Type::VALUES; c++) {
            const u32 bin = (u32)((int)floorf(Type::value(chunk, c) * scale[c]) - first[c]);
            if (used >> c & 1) atomicAdd(counts + c * all.count_stride + min(bin, all.bins - 1), 1);
        }
    }
}

template <class Type>
DEVICE void add_tokens(const Channels& all) {
    constexpr u32 CHANNELS = Tile<Type>::CHANNELS;
    SHARED_ARRAY(Range, warp_ranges, WARPS * CHANNELS);
    SHARED_ARRAY(Window, old_windows, CHANNELS);
    SHARED_ARRAY(Window, windows, CHANNELS);
    const Tile<Type> tile(all);
    const float infinity = __uint_as_float(0x7F800000);
    Range ranges[Type::VALUES];
#pragma unroll
    for (u32 c = 0; c < Type::VALUES; c++) ranges[c] = {infinity, -infinity, 0.0};
    read_rows(tile, ranges);
#pragma unroll
    for (u32 c = 0; c < Type::VALUES; c++) {
        reduce_over_rows(ranges[c]);
        if (threadIdx.x % 32 < ROW_CHUNKS) warp_ranges[threadIdx.x / 32 * CHANNELS + tile.own_channel(c)] = ranges[c];
    }
    __syncthreads();

    if (threadIdx.x < CHANNELS && tile.first_channel + threadIdx.x < all.channels) {
        Range range = {infinity, -infinity, 0.0};
        for (u32 warp = 0; warp < WARPS; warp++) range.add(warp_ranges[warp * CHANNELS + threadIdx.x]);
        Window old = {};
        windows[threadIdx.x] = update_channel(all, tile.first_channel + threadIdx.x, range, old);
        old_windows[threadIdx.x] = old;
    }
    if (!all.counts) return;
    __syncthreads();

    const u32 channels = min(all.channels - tile.first_channel, CHANNELS);
    for (u32 c = 0; c < channels; c++) {
        const Window old = old_windows[c], wide = windows[c];
        if (wide.exponent != old.exponent || wide.first != old.first)
            move_counts(all.counts + (u64)(tile.first_channel + c) * all.count_stride, all.bins, old, wide);
    }
    if (tile.has_channels()) count_rows(tile, windows);
}

#define PARAMETERS                                                                                              \
    const Chunk *x, float *low, float *high, double *square_sum, int *exponent, int *first_bin, int *counts,    \
        int tokens, int channels, int bins, int count_stride, int resident_tokens
#define CHANNELS_OF_ARGUMENTS                                                                                   \
    {x, low, high, square_sum, exponent, first_bin, counts, (u32)tokens, (u32)channels, (u32)bins,              \
     (u32)count_stride, (u32)resident_tokens}

extern "C" __global__ void __launch_bounds__(256, 1) add_tokens_f16(PARAMETERS) {
    add_tokens<Values16<Float16>>(CHANNELS_OF_ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(256, 1) add_tokens_bf16(PARAMETERS) {
    add_tokens<Values16<BFloat16>>(CHANNELS_OF_ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(256, 1) add_tokens_f32(PARAMETERS) {
    add_tokens<Float32>(CHANNELS_OF_ARGUMENTS);
}
