// Packing of N:M weights on a processor and its reverse, behind a plain C ABI; packing.py launches them, and
// reference.py says what they compute. Values are moved as unsigned integers, so that no bit of them changes.
//
// Every row goes through words of 64 bits that say which columns it keeps. They are counted before a value moves: a row
// that does not keep as many as it must is reported and nothing of it is moved, and of the others all ends are known.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instructions.h"
#include "pages.h"
#include "parts.h"

#if HAS_X86
#include <immintrin.h>
#endif

namespace {

const int64_t WORD = 64;                   // columns of a word of bits
const uint64_t ONES = ~uint64_t{0} / 255;  // the lowest bit of each byte

INLINE int64_t words_of(int64_t columns) { return (columns + WORD - 1) / WORD; }

// The first `count` bits; count may be any.
INLINE uint64_t first_bits(int64_t count) {
    return count >= WORD ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

// The bits of `count` bytes, up to 8: set where a byte is not 0.
INLINE uint64_t bits_of_eight(const uint8_t* keep, int64_t count) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, keep, count);
    uint64_t kept = (bytes | ((bytes & 127 * ONES) + 127 * ONES)) >> 7 & ONES;  // each byte's top bit, moved down
    return kept * 0x0102040810204080 >> 56;
}

// The reverse, of the lowest bits; bytes are 0 and 1.
INLINE void write_eight(uint64_t bits, uint8_t* keep, int64_t count) {
    uint64_t own = (bits & 255) * ONES & 0x8040201008040201;  // byte i: bit i alone
    uint64_t kept = (own + 127 * ONES) >> 7 & ONES;
    std::memcpy(keep, &kept, count);
}

// What a set of instructions does with a row: keep is a byte for each column, bits are words. `kept` values move:
// as many as bits are set.
struct Portable {
    static void bits_of_bytes(const uint8_t* keep, int64_t width, uint64_t* bits) {
        int64_t whole = width / 8 * 8;
        std::fill_n(bits, words_of(width), 0);
        for (int64_t c = 0; c < whole; c += 8) bits[c / WORD] |= bits_of_eight(keep + c, 8) << c % WORD;
        if (whole < width) bits[whole / WORD] |= bits_of_eight(keep + whole, width - whole) << whole % WORD;
    }

    static void bytes_of_bits(const uint64_t* bits, int64_t width, uint8_t* keep) {
        int64_t whole = width / 8 * 8;
        for (int64_t c = 0; c < whole; c += 8) write_eight(bits[c / WORD] >> c % WORD, keep + c, 8);
        if (whole < width) write_eight(bits[whole / WORD] >> whole % WORD, keep + whole, width - whole);
    }

    static int64_t count(const uint64_t* bits, int64_t words) {
        int64_t total = 0;
        for (int64_t w = 0; w < words; w++) total += __builtin_popcountll(bits[w]);
        return total;
    }

    template <typename T>
    static void pack(const T* x, const uint64_t* bits, int64_t width, int64_t, T* out) {
        for (int64_t w = 0; w < words_of(width); w++)
            for (uint64_t left = bits[w]; left; left &= left - 1) *out++ = x[w * WORD + __builtin_ctzll(left)];
    }

    template <typename T>
    static void expand(const T* values, const uint64_t* bits, int64_t width, int64_t, T* out) {
        std::fill_n(out, width, T{});
        for (int64_t w = 0; w < words_of(width); w++)
            for (uint64_t left = bits[w]; left; left &= left - 1) out[w * WORD + __builtin_ctzll(left)] = *values++;
    }
};

#if HAS_X86
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vbmi2,bmi2,popcnt")))

// A vector of values, of which those in `lanes` alone are read or written.
#define LANES_OF(T, BITS)                                                                                              \
    TARGET INLINE __m512i load(const T* from, uint64_t lanes) { return _mm512_maskz_loadu_epi##BITS(lanes, from); }    \
    TARGET INLINE void store(T* to, uint64_t lanes, __m512i x) { _mm512_mask_storeu_epi##BITS(to, lanes, x); }         \
    TARGET INLINE __m512i compressed(T, uint64_t bits, __m512i x) { return _mm512_maskz_compress_epi##BITS(bits, x); } \
    TARGET INLINE __m512i expanded(T, uint64_t bits, __m512i x) { return _mm512_maskz_expand_epi##BITS(bits, x); }
LANES_OF(uint8_t, 8)
LANES_OF(uint16_t, 16)
LANES_OF(uint32_t, 32)
LANES_OF(uint64_t, 64)

struct Avx512 {
    TARGET static void bits_of_bytes(const uint8_t* keep, int64_t width, uint64_t* bits) {
        for (int64_t c = 0; c < width; c += WORD) {
            __m512i bytes = load(keep + c, first_bits(width - c));
            bits[c / WORD] = _mm512_test_epi8_mask(bytes, bytes);
        }
    }

    TARGET static void bytes_of_bits(const uint64_t* bits, int64_t width, uint8_t* keep) {
        for (int64_t c = 0; c < width; c += WORD)
            store(keep + c, first_bits(width - c), _mm512_maskz_set1_epi8(bits[c / WORD], 1));
    }

    TARGET static int64_t count(const uint64_t* bits, int64_t words) {
        int64_t total = 0;
        for (int64_t w = 0; w < words; w++) total += _mm_popcnt_u64(bits[w]);
        return total;
    }

    template <typename T>
    TARGET static void pack(const T* x, const uint64_t* bits, int64_t width, int64_t kept, T* out) {
        const int64_t lanes = 64 / sizeof(T);
        for (int64_t c = 0, packed = 0; c < width; c += lanes) {
            uint64_t own = bits[c / WORD] >> c % WORD & first_bits(lanes);
            __m512i values = compressed(T{}, own, load(x + c, first_bits(width - c)));
            store(out + packed, first_bits(kept - packed), values);
            packed += _mm_popcnt_u64(own);
        }
    }

    template <typename T>
    TARGET static void expand(const T* values, const uint64_t* bits, int64_t width, int64_t kept, T* out) {
        const int64_t lanes = 64 / sizeof(T);
        for (int64_t c = 0, read = 0; c < width; c += lanes) {
            uint64_t own = bits[c / WORD] >> c % WORD & first_bits(lanes);
            __m512i next = load(values + read, first_bits(kept - read));
            asm("" : "+v"(next));  // in a register: expanding from memory is slow on Zen 4
            store(out + c, first_bits(width - c), expanded(T{}, own, next));
            read += _mm_popcnt_u64(own);
        }
    }
};
#undef TARGET
#endif

// Calls work(Portable{}) or that of the path. AVX2 has nothing for this that is worth a path of its own.
template <typename Work>
int64_t on_path(int64_t path, Work work) {
#if HAS_X86
    if (path == AVX512) return work(Avx512{});
#endif
    return work(Portable{});
}

// Calls work(T{}) for the unsigned integer T of `bytes` bytes.
template <typename Work>
int64_t of_size(int64_t bytes, Work work) {
    if (bytes == 1) return work(uint8_t{});
    if (bytes == 2) return work(uint16_t{});
    return bytes == 4 ? work(uint32_t{}) : work(uint64_t{});
}

// Calls work(row, bits) for each of `rows` rows, bits being room for the words of one, and adds up what it returns.
template <typename Work>
int64_t for_rows(int64_t rows, int64_t width, int64_t threads, Work work) {
    std::atomic<int64_t> total{0};
    in_parts(rows, 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> bits(words_of(width));
        int64_t own = 0;
        for (int64_t row = begin; row < end; row++) own += work(row, bits.data());
        total += own;
    });
    return total;
}

// The words of a row of a mask; what it says of columns beyond its width is left out.
void read_mask(const uint8_t* mask, int64_t width, uint64_t* bits) {
    bits[width / WORD - (width % WORD == 0)] = 0;
    std::memcpy(bits, mask, (width + 7) / 8);
    if (width % WORD) bits[width / WORD] &= first_bits(width % WORD);
}

// Expands a row with column c at place[c]: bound by one store a value, which vectors do not change.
template <typename T>
void expand_to(const int32_t* place, const T* values, const uint64_t* bits, int64_t width, T* out) {
    std::fill_n(out, width, T{});
    for (int64_t w = 0; w < words_of(width); w++)
        for (uint64_t left = bits[w]; left; left &= left - 1)
            out[place[w * WORD + __builtin_ctzll(left)]] = *values++;
}

bool is_permutation(const int32_t* place, int64_t width) {
    std::vector<bool> seen(width);
    for (int64_t c = 0; c < width; c++) {
        if (place[c] < 0 || place[c] >= width || seen[place[c]]) return false;
        seen[place[c]] = true;
    }
    return true;
}

}  // namespace

extern "C" {

// keep [rows, width], a byte a column, kept where it is not 0, to mask [rows, ceil(width / 8)]; padding bits are 0.
int64_t pack_mask(const uint8_t* keep, int64_t rows, int64_t width, uint8_t* mask, int64_t path, int64_t threads) {
    const int64_t bytes = (width + 7) / 8;
    return on_path(path, [=](auto way) {
        return for_rows(rows, width, threads, [=](int64_t row, uint64_t* bits) {
            way.bits_of_bytes(keep + row * width, width, bits);
            std::memcpy(mask + row * bytes, bits, bytes);
            return 0;
        });
    });
}

// The reverse; what the mask says of columns beyond its width is ignored.
int64_t unpack_mask(const uint8_t* mask, int64_t rows, int64_t width, uint8_t* keep, int64_t path, int64_t threads) {
    want_large_pages(keep, rows * width);
    return on_path(path, [=](auto way) {
        return for_rows(rows, width, threads, [=](int64_t row, uint64_t* bits) {
            read_mask(mask + row * ((width + 7) / 8), width, bits);
            way.bytes_of_bits(bits, width, keep + row * width);
            return 0;
        });
    });
}

// The kept values of x [rows, width], `kept` of them in each row of out. Returns how many rows keep another number;
// theirs are not written.
int64_t pack_rows(const void* x, const uint8_t* keep, int64_t rows, int64_t width, int64_t kept, int64_t bytes,
                  void* out, int64_t path, int64_t threads) {
    want_large_pages(out, rows * kept * bytes);
    return on_path(path, [=](auto way) {
        return of_size(bytes, [=](auto kind) {
            using T = decltype(kind);
            return for_rows(rows, width, threads, [=](int64_t row, uint64_t* bits) {
                way.bits_of_bytes(keep + row * width, width, bits);
                if (way.count(bits, words_of(width)) != kept) return 1;
                way.pack((const T*)x + row * width, bits, width, kept, (T*)out + row * kept);
                return 0;
            });
        });
    });
}

// The reverse: out [rows, width], the values where the mask's bits are set and 0 elsewhere; column c at place[c] (null:
// at c). Returns how many rows' masks do not keep `kept` values, -1 where place is no permutation of the columns.
int64_t expand_rows(const void* values, const uint8_t* mask, const int32_t* place, int64_t rows, int64_t width,
                    int64_t kept, int64_t bytes, void* out, int64_t path, int64_t threads) {
    if (place && !is_permutation(place, width)) return -1;
    want_large_pages(out, rows * width * bytes);
    return on_path(path, [=](auto way) {
        return of_size(bytes, [=](auto kind) {
            using T = decltype(kind);
            return for_rows(rows, width, threads, [=](int64_t row, uint64_t* bits) {
                read_mask(mask + row * ((width + 7) / 8), width, bits);
                if (way.count(bits, words_of(width)) != kept) return 1;
                const T* own = (const T*)values + row * kept;
                if (place)
                    expand_to(place, own, bits, width, (T*)out + row * width);
                else
                    way.expand(own, bits, width, kept, (T*)out + row * width);
                return 0;
            });
        });
    });
}
}
