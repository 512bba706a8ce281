// What the library says of itself: the version of its functions, and the processor's instructions. native.py loads it.

#include "instructions.h"

extern "C" {

// What native.py declares must be what was compiled: raised with every change of a signature or of its meaning.
int64_t interface_number() { return 15; }

int64_t best_path() {
#if HAS_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("popcnt");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
    return avx2 && avx512 ? AVX512 : avx2 ? AVX2 : PORTABLE;
#else
    return PORTABLE;
#endif
}
}
