// Products of packed N:M weights on a processor, behind a plain C ABI; packed_product.py loads and launches them, and
// reference.py says what they compute. Which instructions run is decided when they run: AVX-512 with VBMI2, whose
// vpexpandw is the very expansion of a mask, AVX2 with a table of shuffles, or none.
//
// A product of few vectors is bound by memory: each packed byte is read once, whatever N:M is, and weights become
// floats in registers (packed_rows.h). One of many tokens is bound by arithmetic, which kept weights alone take
// (packed_panels.h). Where the processor multiplies bfloat16, weights go two at a time, with few vectors
// (packed_pairs.h) and with many tokens (packed_strips.h). Sums are float32.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "instructions.h"
#include "parts.h"

#if HAS_X86
#include <immintrin.h>
#endif

namespace {

const int MAX_VECTORS = 8;         // of packed_rows.h at once
const int64_t BYTES_AHEAD = 1024;  // fetched early, beyond the page that the processor's own prefetching stops at
const int64_t BEHIND = 64;         // values and mask bytes that a step may read beyond its own

const int BLOCK = 32;                                 // columns whose panel of 256 tokens fits the first-level cache
const int64_t ROWS_IN_CACHE = 512, ROWS_AHEAD = 8;    // rows whose sums for 256 tokens fit the second-level cache
const int64_t LINE = 16;                              // floats of a cache line
const int64_t MIN_WORK = 1 << 18;                     // products that are worth a thread: about 25 microseconds
struct alignas(64) Line { float values[LINE]; };

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// A packed matrix: values [rows, kept], mask [rows, ceil(columns / 8)].
template <typename T>
struct Matrix {
    const T* values;
    const uint8_t* mask;
    int64_t rows, columns, kept;
};

template <typename T>
struct Row {
    const T* values;
    const uint8_t* mask;
};

template <typename T>
struct Room {
    std::vector<T> values;
    std::vector<uint8_t> mask;
};

// A row that steps can read. They load whole vectors, and as many values as a mask claims, be it right or not: where
// that could reach beyond the matrix, the row is copied to a room with space behind it.
template <typename T>
Row<T> readable_row(const Matrix<T>& matrix, int64_t row, Room<T>& room) {
    int64_t mask_bytes = (matrix.columns + 7) / 8;
    const T* values = matrix.values + row * matrix.kept;
    const uint8_t* mask = matrix.mask + row * mask_bytes;
    int64_t values_left = (matrix.rows - row) * matrix.kept, mask_left = (matrix.rows - row) * mask_bytes;
    if (values_left >= matrix.columns + BEHIND && mask_left >= mask_bytes + BEHIND) return {values, mask};
    room.values.assign(matrix.columns + BEHIND, T{});
    room.mask.assign(mask_bytes + BEHIND, 0);
    std::memcpy(room.values.data(), values, sizeof(T) * matrix.kept);
    std::memcpy(room.mask.data(), mask, mask_bytes);
    return {room.values.data(), room.mask.data()};
}

// The mask of a step: its columns' bits, 0 beyond the `left` columns of the row.
template <int COLUMNS>
INLINE uint32_t bits_of(const uint8_t* mask, int64_t left) {
    uint32_t bits = 0;
    std::memcpy(&bits, mask, COLUMNS / 8);
    return left >= COLUMNS ? bits : bits & ((1u << left) - 1);
}

// `count` vectors [count, columns], of which the matrix's column c is multiplied by column place[c] (null: c).
template <typename X>
struct Inputs {
    const X* x;
    const int32_t* place;
    int64_t count, columns;
    X at(int64_t vector, int64_t column) const { return x[vector * columns + (place ? place[column] : column)]; }
};

INLINE float float_of(float value) { return value; }

INLINE float float_of(Bfloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE float float_of(Float16 value) {
    uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, part = value.bits & 1023;
    float result;
    if (exponent == 0) {  // zero and subnormal numbers: multiples of 2^-24
        result = (float)part * 0x1p-24f;
        return sign ? -result : result;
    }
    uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | part << 13;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE Bfloat16 rounded_to_even(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {(uint16_t)(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 8 floats are passed between inlined functions alone
namespace portable {
#define TARGET
const int COLUMNS = 8, PIECES = 1, LANES = 8;
typedef float Vector __attribute__((vector_size(32)));
typedef Vector Weight;
typedef float Element;
template <typename>
constexpr int place_in_step(int column) { return column; }
const int PANEL_TOKENS = 4 * LANES;
constexpr int rows_at_once(int) { return 1; }
INLINE Vector load(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
INLINE Vector all_of(float x) { return x - Vector{}; }
INLINE void store(float* to, const Vector& x) { std::memcpy(to, &x, sizeof x); }
INLINE void add_product(Vector& sum, const Vector& weight, const float* x) { sum += weight * load(x); }
INLINE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
INLINE float total(const Vector& sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}
template <typename T>
INLINE void expand(const T* values, uint32_t bits, Vector (&weight)[PIECES]) {
    for (int column = 0; column < COLUMNS; column++) {
        weight[0][column] = bits >> column & 1 ? float_of(*values) : 0.0f;
        values += bits >> column & 1;
    }
}
#include "packed_rows.h"
#include "packed_panels.h"
#undef TARGET
}  // namespace portable

#if HAS_X86
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
const int COLUMNS = 8, PIECES = 1, LANES = 8;
typedef __m256 Vector;
typedef Vector Weight;
typedef float Element;
template <typename>
constexpr int place_in_step(int column) { return column; }

// For each mask byte: which of the next values each column takes, with the top bit set where it takes none.
struct Places {
    uint8_t of_values[256][8];
    uint8_t of_bytes[256][16];  // the same for two bytes a value
    constexpr Places() : of_values{}, of_bytes{} {
        for (int bits = 0; bits < 256; bits++)
            for (int column = 0, next = 0; column < 8; column++) {
                bool kept = bits >> column & 1;
                of_values[bits][column] = kept ? next : 0x80;
                for (int byte = 0; byte < 2; byte++)
                    of_bytes[bits][2 * column + byte] = kept ? 2 * next + byte : 0x80;
                next += kept;
            }
    }
};
constexpr Places PLACES;

const int PANEL_TOKENS = 8 * LANES;
constexpr int rows_at_once(int vectors) { return vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1; }
TARGET INLINE Vector load(const float* from) { return _mm256_loadu_ps(from); }
TARGET INLINE Vector all_of(float x) { return _mm256_set1_ps(x); }
TARGET INLINE void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
TARGET INLINE void add_product(Vector& sum, Vector weight, const float* x) {
    sum = _mm256_fmadd_ps(weight, load(x), sum);
}
TARGET INLINE int count_bits(uint32_t bits) { return _mm_popcnt_u32(bits); }
TARGET INLINE float total(Vector sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
TARGET INLINE __m128i expanded_words(const void* values, uint32_t bits) {
    __m128i places = _mm_loadu_si128((const __m128i*)PLACES.of_bytes[bits]);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), places);
}
TARGET INLINE void expand(const Bfloat16* values, uint32_t bits, Vector (&weight)[PIECES]) {
    __m256i wide = _mm256_cvtepu16_epi32(expanded_words(values, bits));
    weight[0] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TARGET INLINE void expand(const Float16* values, uint32_t bits, Vector (&weight)[PIECES]) {
    weight[0] = _mm256_cvtph_ps(expanded_words(values, bits));
}
TARGET INLINE void expand(const float* values, uint32_t bits, Vector (&weight)[PIECES]) {
    __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)PLACES.of_values[bits]));
    __m256 taken = _mm256_permutevar8x32_ps(load(values), places);
    weight[0] = _mm256_blendv_ps(taken, _mm256_setzero_ps(), _mm256_castsi256_ps(places));  // by the top bit
}
#include "packed_rows.h"
#include "packed_kept.h"
#include "packed_panels.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,popcnt")))
const int COLUMNS = 32, PIECES = 2, LANES = 16;
typedef __m512 Vector;
typedef Vector Weight;
typedef float Element;
template <typename>
constexpr int place_in_step(int column) { return column; }
const int PANEL_TOKENS = 16 * LANES;
constexpr int rows_at_once(int vectors) { return vectors <= 4 ? 4 : 2; }
TARGET INLINE Vector load(const float* from) { return _mm512_loadu_ps(from); }
TARGET INLINE Vector all_of(float x) { return _mm512_set1_ps(x); }
TARGET INLINE void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
TARGET INLINE void add_product(Vector& sum, Vector weight, const float* x) {
    sum = _mm512_fmadd_ps(weight, load(x), sum);
}
TARGET INLINE int count_bits(uint32_t bits) { return _mm_popcnt_u32(bits); }
TARGET INLINE float total(Vector sum) { return _mm512_reduce_add_ps(sum); }
TARGET INLINE __m512i in_register(const void* values) {  // expanding from memory is slow on Zen 4
    __m512i words = _mm512_loadu_si512(values);
    asm("" : "+v"(words));
    return words;
}
TARGET INLINE __m512i expanded_words(const void* values, uint32_t bits) {
    return _mm512_maskz_expand_epi16(bits, in_register(values));
}
// Even columns, then odd ones: a pair of words becomes two floats by a shift and a mask.
template <>
constexpr int place_in_step<Bfloat16>(int column) { return column % 2 * LANES + column / 2; }
TARGET INLINE void expand(const Bfloat16* values, uint32_t bits, Vector (&weight)[PIECES]) {
    __m512i words = expanded_words(values, bits);
    weight[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    weight[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}
TARGET INLINE void expand(const Float16* values, uint32_t bits, Vector (&weight)[PIECES]) {
    __m512i words = expanded_words(values, bits);
    weight[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    weight[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}
TARGET INLINE void expand(const float* values, uint32_t bits, Vector (&weight)[PIECES]) {
    __m512i low = in_register(values), high = in_register(values + count_bits(bits & 0xffff));
    weight[0] = _mm512_castsi512_ps(_mm512_maskz_expand_epi32((__mmask16)bits, low));
    weight[1] = _mm512_castsi512_ps(_mm512_maskz_expand_epi32((__mmask16)(bits >> 16), high));
}
#include "packed_rows.h"
#include "packed_panels.h"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")))
#include "packed_pairs.h"
#include "packed_rows.h"
#include "packed_strips.h"
#undef TARGET
}  // namespace avx512_bf16
#endif

typedef int64_t Words __attribute__((vector_size(64)));
const int64_t READ_STREAMS = 4;

// From several streams at once, as the products read: one alone reaches a little less.
CLONES int64_t xor_part(const int64_t* words, int64_t count) {
    int64_t stretch = count / READ_STREAMS / 8 * 8, all = 0;
    Words found[READ_STREAMS] = {};
    for (int64_t i = 0; i < stretch; i += 8)
        for (int stream = 0; stream < READ_STREAMS; stream++) {
            Words next;
            std::memcpy(&next, words + stream * stretch + i, sizeof next);
            found[stream] ^= next;
        }
    for (int64_t i = READ_STREAMS * stretch; i < count; i++) all ^= words[i];
    for (int stream = 0; stream < READ_STREAMS; stream++)
        for (int lane = 0; lane < 8; lane++) all ^= found[stream][lane];
    return all;
}

// Calls product(matrix, inputs, y, threads) for `step` vectors at a time. Returns how many masks are wrong.
template <typename T, typename X, typename Y, typename Product>
int64_t in_steps(const Matrix<T>& matrix, const Inputs<X>& x, Y* y, int64_t step, int64_t threads, Product product) {
    int64_t wrong = 0, useful = std::min(threads, 1 + matrix.rows * matrix.kept * x.count / MIN_WORK);
    for (int64_t first = 0; first < x.count; first += step) {
        Inputs<X> some = {x.x + first * x.columns, x.place, std::min(step, x.count - first), x.columns};
        wrong += product(matrix, some, y + first * matrix.rows, useful);
    }
    return wrong;
}

// Calls work(T{}) for the type of the values: 0 bfloat16, 1 float16, 2 float32.
template <typename Work>
int64_t of_type(int64_t type, Work work) {
    return type == 0 ? work(Bfloat16{}) : type == 1 ? work(Float16{}) : work(float{});
}

}  // namespace

#if HAS_X86
#define ON_PATH(path, what) ((path) == AVX512 ? avx512::what : (path) == AVX2 ? avx2::what : portable::what)
#else
#define ON_PATH(path, what) (portable::what)
#endif

extern "C" {

// y [count, rows] of x [count, columns]; place int32 [columns] or null: the column of x that each column of the matrix
// belongs to. `panels`: by packed_panels.h, else by packed_rows.h. Returns how many masks are wrong.
int64_t product_rows(const void* values, const uint8_t* mask, int64_t type, int64_t rows, int64_t columns,
                     int64_t kept, const float* x, const int32_t* place, int64_t count, float* y, int64_t panels,
                     int64_t path, int64_t threads) {
    return of_type(type, [=](auto kind) {
        using T = decltype(kind);
        Matrix<T> matrix = {(const T*)values, mask, rows, columns, kept};
        Inputs<float> inputs = {x, place, count, columns};
        return in_steps(matrix, inputs, y, panels ? ON_PATH(path, PANEL_TOKENS) : MAX_VECTORS, threads,
                        [=](auto... some) {
                            if (panels) return ON_PATH(path, panel(some...));
#if HAS_X86
                            if (path == AVX2) return avx2::few_or_kept(some...);
#endif
                            return ON_PATH(path, few(some...));
                        });
    });
}

// Has this processor what product_pairs runs on?
int64_t has_product_pairs() {
#if HAS_X86
    __builtin_cpu_init();
    return best_path() == AVX512 && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

// As product_rows, of bfloat16 values and x. `strips`: by packed_strips.h, else by packed_rows.h. y is float32, or bfloat16
// if it is to be `rounded`.
int64_t product_pairs(const void* values, const uint8_t* mask, int64_t rows, int64_t columns, int64_t kept,
                      const void* x, const int32_t* place, int64_t count, void* y, int64_t strips, int64_t rounded,
                      int64_t threads) {
#if HAS_X86
    namespace path = avx512_bf16;
    Matrix<Bfloat16> matrix = {(const Bfloat16*)values, mask, rows, columns, kept};
    Inputs<Bfloat16> inputs = {(const Bfloat16*)x, place, count, columns};
    auto few = [](auto... some) { return path::few(some...); };
    auto many = [](auto... some) { return path::strips(some...); };
    if (!strips && rounded) {
        std::vector<float> sums(count * rows);
        int64_t wrong = in_steps(matrix, inputs, sums.data(), MAX_VECTORS, threads, few);
        for (int64_t i = 0; i < count * rows; i++) ((Bfloat16*)y)[i] = rounded_to_even(sums[i]);
        return wrong;
    }
    if (!strips) return in_steps(matrix, inputs, (float*)y, MAX_VECTORS, threads, few);
    if (rounded) return in_steps(matrix, inputs, (Bfloat16*)y, path::MAX_TOKENS, threads, many);
    return in_steps(matrix, inputs, (float*)y, path::MAX_TOKENS, threads, many);
#else
    return rows;
#endif
}

// All 8-byte words of a buffer in one: what reading alone takes, which benchmarks hold products against.
int64_t xor_of_words(const void* buffer, int64_t count, int64_t threads) {
    std::atomic<int64_t> all{0};
    in_parts(count, READ_STREAMS * 16, threads, [&](int64_t begin, int64_t end) {
        all ^= xor_part((const int64_t*)buffer + begin, end - begin);
    });
    return all;
}

}
