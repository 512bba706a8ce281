// What the kernels need of the device itself: instructions that C++ has no name for, and the few built-in functions.
// Kernels are written over these names alone, so that tests can run the same .cu text on a CPU: there,
// tests/cuda_tools/host_shim.h stands in for this file. No header is included: NVRTC has none.
//
// 16-bit floating-point values travel as raw unsigned short. Shared memory is addressed by 32-bit byte addresses.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

// 16 bytes: what one thread copies at once, what one row of an 8x8 matrix of ldmatrix is, and 4 banks.
struct alignas(16) Chunk {
    u32 word[4];
};

extern __shared__ __align__(128) Chunk dynamic_shared_memory[];

// Byte address of the block's dynamic shared memory, a multiple of 128.
DEVICE u32 dynamic_shared() { return (u32)__cvta_generic_to_shared(dynamic_shared_memory); }

DEVICE Chunk load_shared_chunk(u32 address) {
    Chunk chunk;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
                 : "r"(address)
                 : "memory");
    return chunk;
}

DEVICE void store_shared_chunk(u32 address, Chunk chunk) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(chunk.word[0]), "r"(chunk.word[1]), "r"(chunk.word[2]), "r"(chunk.word[3])
                 : "memory");
}

DEVICE float load_shared_float(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void store_shared_float(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" : : "r"(address), "f"(value) : "memory");
}

// Copy 16 bytes from global to shared memory, both aligned to 16, past the registers and L1. Of the source only
// `bytes` (0 or 16) are read; the rest becomes zero. Visible to this thread after cp_async_wait, to others after a
// barrier on top.
DEVICE void cp_async_chunk(u32 shared_address, const void* source, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address), "l"(__cvta_generic_to_global(source)), "r"(bytes)
                 : "memory");
}

// Close the group of this thread's copies begun since the last call; a group may be empty.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Wait until at most `PENDING` of this thread's latest groups are under way.
template <int PENDING>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Byte i of the result is the one of the eight in high:low that nibble i of the selector names; all four are below 8, and
// what stands above them does not count.
DEVICE u32 select_bytes(u32 low, u32 high, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// Four 8x8 matrices of 16-bit values. Lane 8 m + i gives the address of row i of matrix m (16 bytes, aligned); lane l
// receives in fragment[m] the columns 2 (l % 4) and 2 (l % 4) + 1 of its row l / 4.
DEVICE void ldmatrix_x4(u32 (&fragment)[4], u32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row_address)
                 : "memory");
}

// d += A B for one warp, A sparse 2:4. With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for sparse
// mma.m16n8k32"):
//   a  A's kept values, 16x16: a[0] = (row g, columns 2t, 2t+1), a[1] = (g+8, same), a[2] = (g, 2t+8, 2t+9),
//      a[3] = (g+8, 2t+8, 2t+9); the pair in columns 2p, 2p+1 belongs to A's dense columns 4p..4p+3
//   b  B 32x8: b[r] = (rows 8r+2t, 8r+2t+1, column g)
//   d  16x8: d[0], d[1] = (row g, columns 2t, 2t+1); d[2], d[3] = (row g+8, same)
//   metadata  4 bits a group, first place | second place << 2, first < second. Lane 4g + 2 SELECTOR + h supplies the
//      dense columns 16h..16h+15 of row g in its low half and those of row g+8 in its high half.
// `ordered_metadata` needs the places in ascending order; two equal ones are undefined behaviour.
#define MMA_SPARSE(type)                                                                                         \
    template <int SELECTOR>                                                                                      \
    static DEVICE void mma_sparse(float(&d)[4], const u32(&a)[4], const u32(&b)[4], u32 metadata) {              \
        asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 "         \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"       \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),   \
                       "r"(metadata), "n"(SELECTOR));                                                            \
    }

// d += A B for one warp, dense m16n8k16: a and d as above, with A's own 16 columns; b0 = (rows 2t, 2t+1, column g),
// b1 = (rows 2t+8, 2t+9, column g).
#define MMA_DENSE(type)                                                                                          \
    static DEVICE void mma_dense(float(&d)[4], const u32(&a)[4], u32 b0, u32 b1) {                               \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                              \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                            \
    }

// A 16-bit type: conversions (to the nearest, ties to even) and its tensor-core products.
struct Float16 {
    static DEVICE float to_float(u16 bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static DEVICE u16 from_float(float value) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    MMA_SPARSE("f16")
    MMA_DENSE("f16")
};

struct BFloat16 {
    static DEVICE float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static DEVICE u16 from_float(float value) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    MMA_SPARSE("bf16")
    MMA_DENSE("bf16")
};

// threadIdx.x, read anew: where it is wanted once more at a kernel's end, so that no register holds it through the main
// loop, nor the loop works out again what follows from it.
DEVICE u32 thread_anew() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Values of other lanes; every lane of the warp takes part.
const u32 WHOLE_WARP = 0xffffffffu;

template <typename T>
DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(WHOLE_WARP, value, lane);
}

template <typename T>
DEVICE T shuffle_xor(T value, int lane_bits) {
    return __shfl_xor_sync(WHOLE_WARP, value, lane_bits);
}

template <typename T>
DEVICE T shuffle_down(T value, int distance) {
    return __shfl_down_sync(WHOLE_WARP, value, distance);
}

template <typename T>
DEVICE T shuffle_up(T value, int distance) {
    return __shfl_up_sync(WHOLE_WARP, value, distance);
}

DEVICE u32 ballot(bool vote) { return __ballot_sync(WHOLE_WARP, vote); }
