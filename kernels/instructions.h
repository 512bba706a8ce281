// Which instructions kernels run on. It is decided when they run, for one library serves every processor: by the
// compiler's clones, or by a path that a kernel is given.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define HAS_X86 1
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HAS_X86 0
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

// Sets of instructions, as native.py numbers them. AVX512 is that with VBMI2, whose vpexpandw and vpcompressw are the very
// expansion and packing by a mask.
enum Path { PORTABLE, AVX2, AVX512 };

// The best that this processor has.
extern "C" int64_t best_path();
