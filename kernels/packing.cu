// Between dense and packed N:M weights, and between masks of bytes and of bits. Bits of values are never touched.
//
// A warp has one row; a lane has 8 columns at a time, one byte of the packed mask, whose bit j % 8 is column j. Where a
// lane's kept values lie in the row's packed ones follows from how many the lanes before it keep.
// kernels/reference.py holds the plain versions.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;
constexpr u32 BYTE_COLUMNS = 8;

DEVICE u32 row_of_warp() { return blockIdx.x * WARPS + threadIdx.x / 32; }

// How many the lanes before this one count, and in `total` how many all do.
DEVICE u32 counted_before(u32 count, u32& total) {
    u32 up_to_here = count;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 below = shuffle_up(up_to_here, distance);
        if (threadIdx.x % 32 >= distance) up_to_here += below;
    }
    total = shuffle(up_to_here, 31);
    return up_to_here - count;
}

// A lane's byte of the mask from 8 of the row's flags; columns past the end are not kept.
DEVICE u32 gathered_byte(const u8* keep, u32 first_column, u32 columns) {
    u32 byte = 0;
#pragma unroll
    for (u32 i = 0; i < BYTE_COLUMNS; i++)
        if (first_column + i < columns && keep[first_column + i]) byte |= 1u << i;
    return byte;
}

// keep [rows, columns] of bool to mask [rows, columns / 8 rounded up].
extern "C" __global__ void __launch_bounds__(256) pack_mask(const u8* keep, u8* mask, int rows, int columns) {
    const u32 row = row_of_warp(), bytes = ((u32)columns + BYTE_COLUMNS - 1) / BYTE_COLUMNS;
    if (row >= (u32)rows) return;
    for (u32 byte = threadIdx.x % 32; byte < bytes; byte += 32)
        mask[(u64)row * bytes + byte] = (u8)gathered_byte(keep + (u64)row * columns, byte * BYTE_COLUMNS, columns);
}

// The reverse.
extern "C" __global__ void __launch_bounds__(256) unpack_mask(const u8* mask, u8* keep, int rows, int columns) {
    const u32 row = row_of_warp(), bytes = ((u32)columns + BYTE_COLUMNS - 1) / BYTE_COLUMNS;
    if (row >= (u32)rows) return;
    for (u32 byte = threadIdx.x % 32; byte < bytes; byte += 32) {
        const u32 bits = mask[(u64)row * bytes + byte];
#pragma unroll
        for (u32 i = 0; i < BYTE_COLUMNS; i++)
            if (byte * BYTE_COLUMNS + i < (u32)columns)
                keep[(u64)row * columns + byte * BYTE_COLUMNS + i] = bits >> i & 1;
    }
}

// The kept values of weight [rows, columns] to values [rows, kept]; counts[row]: how many the row has. Those beyond
// `kept` are not written.
template <class T>
DEVICE void pack_values(const T* weight, const u8* keep, T* values, int* counts, u32 rows, u32 columns, u32 kept) {
    const u32 row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= rows) return;
    weight += (u64)row * columns;
    keep += (u64)row * columns;
    values += (u64)row * kept;
    u32 done = 0;
    for (u32 first = 0; first < columns; first += 32 * BYTE_COLUMNS) {  // all lanes, whose counts are added up together
        const u32 column = first + lane * BYTE_COLUMNS;
        const u32 byte = gathered_byte(keep, column, columns);
        u32 total, place = done + counted_before(__popc(byte), total);
#pragma unroll
        for (u32 i = 0; i < BYTE_COLUMNS; i++)
            if (byte >> i & 1) {
                if (place < kept) values[place] = weight[column + i];
                place++;
            }
        done += total;
    }
    if (lane == 0) counts[row] = (int)done;
}

// The reverse: dense [rows, columns] with zeros where the mask keeps nothing. With a permutation, place j of the packed
// row goes to column permutation[j]. counts[row]: how many the mask keeps, of which those beyond `kept` become 0.
template <class T>
DEVICE void expand(const T* values, const u8* mask, const int* permutation, T* dense, int* counts, u32 rows,
                   u32 columns, u32 kept) {
    const u32 row = row_of_warp(), lane = threadIdx.x % 32, bytes = (columns + BYTE_COLUMNS - 1) / BYTE_COLUMNS;
    if (row >= rows) return;
    values += (u64)row * kept;
    mask += (u64)row * bytes;
    dense += (u64)row * columns;
    u32 done = 0;
    for (u32 first = 0; first < bytes; first += 32) {
        const u32 column = (first + lane) * BYTE_COLUMNS;
        const u32 inside = column >= columns ? 0 : min(columns - column, BYTE_COLUMNS);
        const u32 byte = inside ? mask[first + lane] & ((1u << inside) - 1) : 0;
        u32 total, place = done + counted_before(__popc(byte), total);
#pragma unroll
        for (u32 i = 0; i < BYTE_COLUMNS; i++) {
            if (i >= inside) break;
            const u32 target = permutation ? (u32)permutation[column + i] : column + i;
            const bool is_kept = byte >> i & 1;
            dense[target] = is_kept && place < kept ? values[place] : (T)0;
            place += is_kept;
        }
        done += total;
    }
    if (lane == 0) counts[row] = (int)done;
}

extern "C" __global__ void __launch_bounds__(256)
    pack_values_16(const u16* weight, const u8* keep, u16* values, int* counts, int rows, int columns, int kept) {
    pack_values(weight, keep, values, counts, rows, columns, kept);
}

extern "C" __global__ void __launch_bounds__(256)
    pack_values_32(const u32* weight, const u8* keep, u32* values, int* counts, int rows, int columns, int kept) {
    pack_values(weight, keep, values, counts, rows, columns, kept);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_16(const u16* values, const u8* mask, const int* permutation, u16* dense, int* counts, int rows, int columns,
              int kept) {
    expand(values, mask, permutation, dense, counts, rows, columns, kept);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_32(const u32* values, const u8* mask, const int* permutation, u32* dense, int* counts, int rows, int columns,
              int kept) {
    expand(values, mask, permutation, dense, counts, rows, columns, kept);
}
