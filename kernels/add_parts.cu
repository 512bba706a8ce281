// Ends a product whose steps were shared out in parts (gemm.cuh): adds the parts' sums, then the bias, rounds, and
// compares with a reference. Parts are added in their order, so that the bits are the same at every run.
#include "gemm.cuh"

constexpr u32 OUTS = 128;  // output features of a block, one for each thread
constexpr u32 TOKENS = 4;  // of a block; a thread adds them beside each other, so that more reads are under way

template <class Type>
DEVICE void add_parts(const Product& product, const float* sums, u32 parts) {
    const u32 out = blockIdx.y * OUTS + threadIdx.x, first_token = blockIdx.x * TOKENS;
    if (out >= product.out_features) return;
    float added[TOKENS] = {};
#pragma unroll 4
    for (u32 part = 0; part < parts; part++)
#pragma unroll
        for (u32 i = 0; i < TOKENS; i++) {
            const u32 token = min(first_token + i, product.tokens - 1);  // past the end: added, but never written
            added[i] += sums[((u64)part * product.tokens + token) * product.out_features + out];
        }
    OutputColumn<Type> column(product, out);
#pragma unroll
    for (u32 i = 0; i < TOKENS; i++)
        if (first_token + i < product.tokens) column.write(first_token + i, added[i]);
    column.finish(blockIdx.x);
}

#define PARAMETERS                                                                                            \
    const float *sums, const u16 *bias, const void *reference, void *y, float *partials, int tokens,          \
        int out_features, int parts, int float_output
#define PRODUCT {nullptr, bias, reference, y, partials, (u32)tokens, (u32)out_features, 0, float_output != 0}

extern "C" __global__ void __launch_bounds__(128, 8) add_parts_f16(PARAMETERS) {
    add_parts<Float16>(PRODUCT, sums, (u32)parts);
}

extern "C" __global__ void __launch_bounds__(128, 8) add_parts_bf16(PARAMETERS) {
    add_parts<BFloat16>(PRODUCT, sums, (u32)parts);
}
