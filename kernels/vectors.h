// Vectors of 16 lanes, for all kernels but those of packing and products: one AVX-512 register, two of AVX2.

#pragma once

#include <cstdint>
#include <cstring>

#include "instructions.h"

typedef float Vector __attribute__((vector_size(64)));
typedef float HalfVector __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
static const int LANES = 16, DOUBLES = 8;

#define LOAD(pointer) \
    ({ Vector loaded_; std::memcpy(&loaded_, (pointer), sizeof loaded_); loaded_; })
#define WIDEN(type, pointer) \
    ({ type narrow_; std::memcpy(&narrow_, (pointer), sizeof narrow_); __builtin_convertvector(narrow_, Doubles); })
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

INLINE double total_of(Doubles lanes) {
    double sum = 0;
    for (int lane = 0; lane < DOUBLES; lane++) sum += lanes[lane];
    return sum;
}
