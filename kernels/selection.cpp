// Choosing which weights of a group are kept, and the sums that the choice is judged by, behind a plain C ABI;
// selection.py launches them, and reference.py says what they compute. Threads take rows of their own, and a row is
// summed in one order, so results do not depend on their number.
//
// A weight of 16 bits becomes float32 in registers: a copy of a layer in float32 costs more than all that is done to it.

#include <vector>

#include "pages.h"
#include "parts.h"
#include "vectors.h"

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

static const uint32_t SIGN = 1u << 31;

template <typename To, typename From>
INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Words words_of(const void* pointer) {
    Shorts bits;
    std::memcpy(&bits, pointer, sizeof bits);
    return __builtin_convertvector(bits, Words);
}

// LANES weights as floats, every one exactly.
INLINE Vector floats_of(const float* values) { return LOAD(values); }

INLINE Vector floats_of(const Bfloat16* values) { return same_bits<Vector>(words_of(values) << 16); }

INLINE Vector floats_of(const Float16* values) {
    const uint32_t bias = 112u << 23;  // between the exponents of the two formats
    Words bits = words_of(values), magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    Words infinite = (Words)(magnitude >= 31u << 23) & bias, tiny = (Words)(magnitude < 1u << 23);
    Words usual = magnitude + bias + infinite;
    // subnormal: with an exponent whose leading 1 is then subtracted
    Words rest = same_bits<Words>(same_bits<Vector>(magnitude + bias + (1u << 23)) - 0x1p-14f);
    return same_bits<Vector>(sign | (tiny & rest) | (~tiny & usual));
}

struct Halves { HalfVector low, high; };

INLINE Doubles low_of(Vector values) { return __builtin_convertvector(same_bits<Halves>(values).low, Doubles); }
INLINE Doubles high_of(Vector values) { return __builtin_convertvector(same_bits<Halves>(values).high, Doubles); }

// LANES elements of a row from `at` on: where it ends before, they are copied to `room`, with zeros behind them.
template <typename T>
INLINE const T* chunk_of(const T* row, int64_t at, int64_t width, T* room) {
    if (at + LANES <= width) return row + at;
    std::memset(room, 0, sizeof(T) * LANES);
    std::memcpy(room, row + at, sizeof(T) * (width - at));
    return room;
}

INLINE void store_bytes(Integers set, uint8_t* row, int64_t at, int64_t width) {
    Bytes bytes = __builtin_convertvector(set, Bytes) & 1;
    std::memcpy(row + at, &bytes, MIN((int64_t)LANES, width - at));
}

INLINE Integers load_bytes(const uint8_t* row, int64_t at, int64_t width) {
    uint8_t room[LANES];
    Bytes bytes;
    std::memcpy(&bytes, chunk_of(row, at, width, room), sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Integers);  // at once it goes byte by byte
}

// -1 in the lanes of the `kept` greatest of every M, which divides LANES; of equal ones the first.
template <int M>
INLINE Integers greatest_lanes(Vector score, int kept) {
    Integers greater = {};  // less the number of those that go before
#pragma GCC unroll 16
    for (int turn = 1; turn < M; turn++) {
        Integers from, first;
        for (int lane = 0; lane < LANES; lane++) {
            from[lane] = lane / M * M + (lane + turn) % M;
            first[lane] = lane % M + turn >= M ? -1 : 0;
        }
        Vector other = __builtin_shuffle(score, from);
        greater += (other > score) | ((other == score) & first);
    }
    return greater > -kept;
}

// As bytes, for any m: one group after the other.
static void greatest_of_groups(const float* scores, int64_t width, int m, int kept, uint8_t* keep) {
    for (int64_t at = 0; at < width; at += m)
        for (int i = 0; i < m; i++) {
            int rank = 0;
            for (int j = 0; j < i; j++) rank += scores[at + j] >= scores[at + i];
            for (int j = i + 1; j < m; j++) rank += scores[at + j] > scores[at + i];
            keep[at + i] = rank < kept;
        }
}

template <int M>
INLINE void select_rows(const float* scores, int64_t begin, int64_t end, int64_t width, int m, int kept,
                        uint8_t* keep) {
    for (int64_t row = begin; row < end; row++) {
        const float* score = scores + row * width;
        if (!M) {
            greatest_of_groups(score, width, m, kept, keep + row * width);
            continue;
        }
        for (int64_t at = 0; at < width; at += LANES) {
            float room[LANES];
            Integers chosen = greatest_lanes<M ? M : 1>(LOAD(chunk_of(score, at, width, room)), kept);
            store_bytes(chosen, keep + row * width, at, width);
        }
    }
}

CLONES static void select_part(const float* scores, int64_t begin, int64_t end, int64_t width, int m, int kept,
                               uint8_t* keep) {
    if (m == 4) return select_rows<4>(scores, begin, end, width, m, kept, keep);
    if (m == 8) return select_rows<8>(scores, begin, end, width, m, kept, keep);
    if (m == 16) return select_rows<16>(scores, begin, end, width, m, kept, keep);
    select_rows<0>(scores, begin, end, width, m, kept, keep);
}

// Sum of the kept values of a row.
INLINE double kept_sum(const float* values, const uint8_t* keep, int64_t width) {
    Doubles low = {}, high = {};
    for (int64_t at = 0; at < width; at += LANES) {
        float room[LANES];
        Vector value = LOAD(chunk_of(values, at, width, room));
        Vector kept = same_bits<Vector>(same_bits<Integers>(value) & -load_bytes(keep, at, width));
        low += low_of(kept);
        high += high_of(kept);
    }
    return total_of(low + high);
}

CLONES static void kept_sums_part(const float* x, const uint8_t* keep, int64_t begin, int64_t end, int64_t width,
                                  double* out) {
    for (int64_t row = begin; row < end; row++) out[row] = kept_sum(x + row * width, keep + row * width, width);
}

// Rows [begin, end) of a weight [rows, width] by the scores |w| * factor, which stay in registers or, where m does not
// divide them, in a row's room: what is kept, and the sum of the kept scores. factor [width].
template <typename T, int M>
INLINE void select_weight_rows(const T* weight, const float* factor, int64_t begin, int64_t end, int64_t width, int m,
                               int kept, uint8_t* keep, double* sums) {
    std::vector<float> scores(M ? 0 : width + LANES);
    for (int64_t row = begin; row < end; row++) {
        Doubles low = {}, high = {};
        for (int64_t at = 0; at < width; at += LANES) {
            T value_room[LANES];
            float factor_room[LANES];
            Vector value = floats_of(chunk_of(weight + row * width, at, width, value_room));
            Vector magnitude = same_bits<Vector>(same_bits<Words>(value) & ~SIGN);
            Vector score = magnitude * LOAD(chunk_of(factor, at, width, factor_room));
            if (!M) {
                std::memcpy(scores.data() + at, &score, sizeof score);
                continue;
            }
            Integers chosen = greatest_lanes<M ? M : 1>(score, kept);
            store_bytes(chosen, keep + row * width, at, width);
            Vector kept_scores = same_bits<Vector>(same_bits<Integers>(score) & chosen);
            low += low_of(kept_scores);
            high += high_of(kept_scores);
        }
        if (M) {
            sums[row] = total_of(low + high);
            continue;
        }
        greatest_of_groups(scores.data(), width, m, kept, keep + row * width);
        sums[row] = kept_sum(scores.data(), keep + row * width, width);
    }
}

template <typename T>
CLONES static void select_weights_part(const T* weight, const float* factor, int64_t begin, int64_t end, int64_t width,
                                       int m, int kept, uint8_t* keep, double* sums) {
    if (m == 4) return select_weight_rows<T, 4>(weight, factor, begin, end, width, m, kept, keep, sums);
    if (m == 8) return select_weight_rows<T, 8>(weight, factor, begin, end, width, m, kept, keep, sums);
    if (m == 16) return select_weight_rows<T, 16>(weight, factor, begin, end, width, m, kept, keep, sums);
    select_weight_rows<T, 0>(weight, factor, begin, end, width, m, kept, keep, sums);
}

// Sums of the squares of x * scale, over the dropped columns and over all, of rows [begin, end); scale [width].
template <typename T>
CLONES static void weighted_squares_part(const T* x, const uint8_t* keep, const float* scale, int64_t begin,
                                         int64_t end, int64_t width, double* dropped, double* all) {
    for (int64_t row = begin; row < end; row++) {
        Doubles lost = {}, whole = {};
        for (int64_t at = 0; at < width; at += LANES) {
            T value_room[LANES];
            float scale_room[LANES];
            Vector value = floats_of(chunk_of(x + row * width, at, width, value_room));
            Vector by = LOAD(chunk_of(scale, at, width, scale_room));
            Vector gone = same_bits<Vector>(same_bits<Integers>(value) & (load_bytes(keep + row * width, at, width) - 1));
            Doubles low = low_of(value) * low_of(by), high = high_of(value) * high_of(by);
            Doubles low_gone = low_of(gone) * low_of(by), high_gone = high_of(gone) * high_of(by);
            whole += low * low;
            whole += high * high;
            lost += low_gone * low_gone;
            lost += high_gone * high_gone;
        }
        dropped[row] = total_of(lost), all[row] = total_of(whole);
    }
}

// Calls work(T{}) for the type of the values, as native.py numbers them.
template <typename Work>
static void of_type(int64_t type, Work work) {
    if (type == 0) return work(Bfloat16{});
    if (type == 1) return work(Float16{});
    work(float{});
}

extern "C" {

void select_groups(const float* scores, int64_t rows, int64_t width, int64_t m, int64_t kept, uint8_t* keep,
                   int64_t threads) {
    in_parts(rows, 1, threads,
             [=](int64_t begin, int64_t end) { select_part(scores, begin, end, width, (int)m, (int)kept, keep); });
}

void select_weights(const void* weight, int64_t type, const float* factor, int64_t rows, int64_t width, int64_t m,
                    int64_t kept, uint8_t* keep, double* sums, int64_t threads) {
    want_large_pages(keep, rows * width);
    of_type(type, [=](auto kind) {
        const auto* values = (const decltype(kind)*)weight;
        in_parts(rows, 1, threads, [=](int64_t begin, int64_t end) {
            select_weights_part(values, factor, begin, end, width, (int)m, (int)kept, keep, sums);
        });
    });
}

void kept_sums(const float* x, const uint8_t* keep, int64_t rows, int64_t width, double* out, int64_t threads) {
    in_parts(rows, 1, threads, [=](int64_t begin, int64_t end) { kept_sums_part(x, keep, begin, end, width, out); });
}

void weighted_squares(const void* x, int64_t type, const uint8_t* keep, const float* scale, int64_t rows,
                      int64_t width, double* dropped, double* all, int64_t threads) {
    of_type(type, [=](auto kind) {
        const auto* values = (const decltype(kind)*)x;
        in_parts(rows, 1, threads, [=](int64_t begin, int64_t end) {
            weighted_squares_part(values, keep, scale, begin, end, width, dropped, all);
        });
    });
}
}
