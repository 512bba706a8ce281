// Few vectors by packed rows whose mask bytes all keep PER_BYTE of their 8 columns (2:4, 4:8, 1:2: 4; 1:4, 2:8: 2; 1:8:
// 1), for AVX2. Nothing is expanded: values are multiplied as they lie, by the elements of x that their mask bytes pick,
// and where the next ones lie is known before the mask is. packed_product.cpp includes this file in the namespace avx2.
//
// A step is 16 values and the 16 / PER_BYTE mask bytes that they belong to, each of a chunk of 8 columns. Lane j of both
// its products takes the same value and column whatever x is held as and however many vectors and rows there are: a
// row's sums are the same bits.

const int STEP_VALUES = 16;
const int64_t CACHED_BYTES = 16 << 10;  // of x, which stay in the first-level cache while rows pass
const int64_t CACHED_ROWS = 16;         // that pass

// What picks from a chunk the columns that a mask byte keeps.
struct Picks {
    uint8_t of_words[4][256][16];     // bfloat16: [at] as floats at place `at` of four and behind, 0 elsewhere
    int32_t of_floats[3][256][8];     // float32: [log2 of PER_BYTE] over and over
    constexpr Picks() : of_words{}, of_floats{} {
        for (int bits = 0; bits < 256; bits++) {
            int columns[8] = {}, count = 0;
            for (int column = 0; column < 8; column++)
                if (bits >> column & 1) columns[count++] = column;
            for (int at = 0; at < 4; at++)
                for (int place = 0; place < 4; place++)
                    for (int byte = 0; byte < 4; byte++) {
                        bool taken = byte >= 2 && place >= at && place - at < count;
                        of_words[at][bits][4 * place + byte] = taken ? 2 * columns[place - at] + byte - 2 : 0x80;
                    }
            for (int log = 0; log < 3; log++)
                for (int lane = 0; lane < 8; lane++) of_floats[log][bits][lane] = columns[lane % (1 << log)];
        }
    }
};
alignas(64) constexpr Picks PICKS;

// The 16 values of a step as floats: 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15.
TARGET INLINE void widen(const Bfloat16* values, Vector (&weight)[2]) {
    __m256i words = _mm256_loadu_si256((const __m256i*)values), zero = _mm256_setzero_si256();
    weight[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words));
    weight[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words));
}
TARGET INLINE void widen(const Float16* values, Vector (&weight)[2]) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)values), 0b11011000);
    weight[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    weight[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
}
TARGET INLINE void widen(const float* values, Vector (&weight)[2]) {
    for (int half = 0; half < 2; half++)
        weight[half] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(values + 4 * half)),
                                            _mm_loadu_ps(values + 8 + 4 * half), 1);
}

// The bytes of a step's mask, in registers.
template <int BYTES>
struct Bytes {
    uint32_t words[BYTES / 4];
    explicit Bytes(const uint8_t* mask) { std::memcpy(words, mask, BYTES); }
    uint32_t operator[](int byte) const { return words[byte / 4] >> byte % 4 * 8 & 255; }
};

// What picks from x for a step's two products, by what x is held as: `read` from the step's mask, then `picked` for each
// half and vector. `place` is where in a step a chunk lies. (Static, as INLINE makes all.)
//
// x as bfloat16: chunks lie as lanes take them, chunk q beside chunk q + 2 * PARTS.
template <int PER_BYTE>
struct PickedWords {
    typedef Bfloat16 Held;
    static const int PARTS = 4 / PER_BYTE, CHUNKS = 4 * PARTS;
    __m256i picks[2 * PARTS];
    static int place(int chunk) { return chunk % (2 * PARTS) * 2 + chunk / (2 * PARTS); }
    TARGET INLINE void read(PickedWords& self, const uint8_t* from) {
        Bytes<CHUNKS> mask(from);
#pragma GCC unroll 8
        for (int q = 0; q < 2 * PARTS; q++) {
            const uint8_t(*table)[16] = PICKS.of_words[q % PARTS * PER_BYTE];
            __m128i low = _mm_load_si128((const __m128i*)table[mask[q]]);
            __m128i high = _mm_load_si128((const __m128i*)table[mask[q + 2 * PARTS]]);
            self.picks[q] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
    }
    TARGET INLINE Vector picked(const PickedWords& self, const Held* x, int half) {
        __m256i all = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int q = half * PARTS; q < (half + 1) * PARTS; q++) {
            __m256i words = _mm256_loadu_si256((const __m256i*)(x + 16 * q));
            __m256i some = _mm256_shuffle_epi8(words, self.picks[q]);
            all = q == half * PARTS ? some : _mm256_or_si256(all, some);
        }
        return _mm256_castsi256_ps(all);
    }
};

// x as float32, a step's chunks one after another.
template <int PER_BYTE>
struct PickedFloats {
    typedef float Held;
    static const int PARTS = 4 / PER_BYTE, CHUNKS = 4 * PARTS;
    const uint8_t* mask;
    static int place(int chunk) { return chunk; }
    TARGET INLINE void read(PickedFloats& self, const uint8_t* mask) { self.mask = mask; }
    TARGET INLINE Vector of_chunk(const PickedFloats& self, const Held* x, int chunk) {
        const int32_t(*table)[8] = PICKS.of_floats[PER_BYTE / 2];
        return _mm256_permutevar8x32_ps(load(x + 8 * chunk),
                                        _mm256_load_si256((const __m256i*)table[self.mask[chunk]]));
    }
    template <int PART>
    TARGET INLINE Vector with_part(const PickedFloats& self, const Held* x, int half, Vector all) {
        const int LANES_OF_PART = ((1 << PER_BYTE) - 1) << PART * PER_BYTE;
        all = _mm256_blend_ps(all, of_chunk(self, x, half * PARTS + PART), LANES_OF_PART);
        return _mm256_blend_ps(all, of_chunk(self, x, (2 + half) * PARTS + PART), LANES_OF_PART << 4);
    }
    TARGET INLINE Vector picked(const PickedFloats& self, const Held* x, int half) {
        Vector all = with_part<0>(self, x, half, _mm256_setzero_ps());
        if constexpr (PARTS > 1) all = with_part<1>(self, x, half, all);
        if constexpr (PARTS > 2) all = with_part<2>(self, x, half, all);
        if constexpr (PARTS > 2) all = with_part<3>(self, x, half, all);
        return all;
    }
};

// Adds `steps` steps of ROWS rows to sum[row][vector]; x [steps][VECTORS][8 * CHUNKS].
template <typename Picked, typename T, int VECTORS, int ROWS>
TARGET INLINE void add_steps(const Row<T>* rows, int64_t steps, const typename Picked::Held* x, int64_t values_ahead,
                             int64_t mask_ahead, Vector (*sums)[VECTORS]) {
    const int CHUNKS = Picked::CHUNKS;
    Vector sum[ROWS][VECTORS];
    for (int row = 0; row < ROWS; row++)
        for (int vector = 0; vector < VECTORS; vector++) sum[row][vector] = sums[row][vector];
    for (int64_t step = 0; step < steps; step++, x += VECTORS * 8 * CHUNKS) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            const T* values = rows[row].values + step * STEP_VALUES;
            const uint8_t* mask = rows[row].mask + step * CHUNKS;
            __builtin_prefetch((const char*)values + values_ahead);
            __builtin_prefetch(mask + mask_ahead);
            Vector weight[2];
            widen(values, weight);
            Picked kept;
            Picked::read(kept, mask);
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; vector++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
                    sum[row][vector] = _mm256_fmadd_ps(
                        weight[half], Picked::picked(kept, x + vector * 8 * CHUNKS, half), sum[row][vector]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int vector = 0; vector < VECTORS; vector++) sums[row][vector] = sum[row][vector];
}

// Does each of the mask bytes keep PER_BYTE?
template <int PER_BYTE>
TARGET static bool keeps_alike(const uint8_t* mask, int64_t bytes) {
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                            0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15), all = _mm256_set1_epi8(PER_BYTE);
    __m256i other = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32) {
        __m256i bits = _mm256_loadu_si256((const __m256i*)(mask + i));
        __m256i count = _mm256_add_epi8(
            _mm256_shuffle_epi8(counts, _mm256_and_si256(bits, low)),
            _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(bits, 4), low)));
        other = _mm256_or_si256(other, _mm256_xor_si256(count, all));
    }
    bool alike = _mm256_testz_si256(other, other);
    for (; i < bytes; i++) alike &= count_bits(mask[i]) == PER_BYTE;
    return alike;
}

// The last chunks of a row, fewer than a step's, with zeros behind them.
template <typename T, int CHUNKS>
struct Tail {
    T values[STEP_VALUES];
    uint8_t mask[CHUNKS];
};

// sums[row][vector] of `count` rows, which ROWS divides, a block of columns at a time.
template <typename Picked, typename T, int VECTORS, int ROWS>
TARGET static void add_rows(const Matrix<T>& matrix, const Row<T>* rows, int64_t count, const typename Picked::Held* x,
                            Vector (*sums)[VECTORS]) {
    const int CHUNKS = Picked::CHUNKS;
    const int64_t step_size = VECTORS * 8 * CHUNKS;
    int64_t whole = matrix.columns / (8 * CHUNKS), values_left = matrix.kept - whole * STEP_VALUES;
    int64_t block = count == ROWS ? whole : CACHED_BYTES / (step_size * sizeof(*x));
    int64_t values_ahead = count == ROWS ? BYTES_AHEAD : matrix.kept * sizeof(T);
    int64_t mask_ahead = matrix.columns / 8;
    for (int64_t first = 0; first < whole; first += block)
        for (int64_t row = 0; row < count; row += ROWS) {
            Row<T> some[ROWS];
            for (int k = 0; k < ROWS; k++)
                some[k] = {rows[row + k].values + first * STEP_VALUES, rows[row + k].mask + first * CHUNKS};
            add_steps<Picked, T, VECTORS, ROWS>(some, std::min(block, whole - first), x + first * step_size,
                                                values_ahead, mask_ahead, sums + row);
        }
    for (int64_t row = 0; values_left && row < count; row++) {
        Tail<T, CHUNKS> tail = {};
        std::memcpy(tail.values, rows[row].values + whole * STEP_VALUES, values_left * sizeof(T));
        std::memcpy(tail.mask, rows[row].mask + whole * CHUNKS, matrix.columns / 8 - whole * CHUNKS);
        Row<T> one = {tail.values, tail.mask};
        add_steps<Picked, T, VECTORS, 1>(&one, 1, x + whole * step_size, 0, 0, sums + row);
    }
}

// Rows [begin, end), several at a time from as many stretches, as in packed_rows.h. False where a mask byte keeps
// another number.
template <int PER_BYTE, typename Picked, typename T, int VECTORS>
TARGET static bool kept_part(const Matrix<T>& matrix, const typename Picked::Held* x, int64_t vectors, float* y,
                             int64_t begin, int64_t end) {
    const int64_t ROWS = VECTORS <= 2 ? 4 : VECTORS <= 4 ? 2 : 1, CACHED = VECTORS <= 2 ? ROWS : CACHED_ROWS;
    int64_t stretch = (end - begin) / ROWS, mask_bytes = matrix.columns / 8;
    Row<T> rows[CACHED];
    int64_t numbers[CACHED], count = 0;
    auto multiply = [&](auto rows_at_once) TARGET {
        Vector sums[CACHED][VECTORS] = {};
        add_rows<Picked, T, VECTORS, rows_at_once()>(matrix, rows, count, x, sums);
        for (int64_t k = 0; k < count; k++)
            for (int64_t vector = 0; vector < vectors; vector++)
                y[vector * matrix.rows + numbers[k]] = total(sums[k][vector]);
        count = 0;
    };
    auto take = [&](int64_t row) TARGET {
        numbers[count] = row;
        rows[count] = {matrix.values + row * matrix.kept, matrix.mask + row * mask_bytes};
        return keeps_alike<PER_BYTE>(rows[count++].mask, mask_bytes);
    };
    for (int64_t i = 0; i < stretch; i++) {
        for (int64_t k = 0; k < ROWS; k++)
            if (!take(begin + k * stretch + i)) return false;
        if (count == CACHED || i + 1 == stretch) multiply(std::integral_constant<int, ROWS>());
    }
    for (int64_t row = begin + ROWS * stretch; row < end; row++) {
        if (!take(row)) return false;
        multiply(std::integral_constant<int, 1>());
    }
    return true;
}

INLINE void hold(float value, float& held) { held = value; }
INLINE void hold(float value, Bfloat16& held) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    held.bits = bits >> 16;
}

// Inputs as [steps][VECTORS][8 * CHUNKS], zero beyond the last column and vector.
template <typename Picked, int VECTORS>
static std::vector<Line> picked_from(const Inputs<float>& x, int64_t columns) {
    typedef typename Picked::Held Held;
    const int CHUNKS = Picked::CHUNKS;
    int64_t chunks = columns / 8, steps = (chunks + CHUNKS - 1) / CHUNKS;
    std::vector<Line> lines(steps * VECTORS * CHUNKS * 8 * sizeof(Held) / sizeof(Line));
    Held* held = (Held*)lines.data();
    for (int64_t chunk = 0; chunk < chunks; chunk++, held += chunk % CHUNKS ? 0 : VECTORS * CHUNKS * 8)
        for (int64_t vector = 0; vector < x.count; vector++) {
            Held* to = held + (vector * CHUNKS + Picked::place(chunk % CHUNKS)) * 8;
            float eight[8];
            for (int column = 0; column < 8; column++) eight[column] = x.at(vector, 8 * chunk + column);
            for (int column = 0; column < 8; column++) hold(eight[column], to[column]);
        }
    return lines;
}

// y [vectors, rows] of up to VECTORS vectors. False where a mask byte does not keep PER_BYTE.
template <int PER_BYTE, typename Picked, int VECTORS, typename T>
static bool kept_product(const Matrix<T>& matrix, const Inputs<float>& x, float* y, int64_t threads) {
    std::vector<Line> lines = picked_from<Picked, VECTORS>(x, matrix.columns);
    auto* held = (const typename Picked::Held*)lines.data();
    std::atomic<bool> alike{true};
    in_parts(matrix.rows, 1, threads, [&](int64_t begin, int64_t end) {
        if (!kept_part<PER_BYTE, Picked, T, VECTORS>(matrix, held, x.count, y, begin, end)) alike = false;
    });
    return alike;
}

// Are all of them values of bfloat16 too?
CLONES static bool are_words(const float* x, int64_t count) {
    uint32_t low = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        low |= bits;
    }
    return (low & 0xffff) == 0;
}

// As kept_product, in the narrowest that holds the vectors.
template <int PER_BYTE, int VECTORS = 1, typename T>
static bool kept_alike(const Matrix<T>& matrix, const Inputs<float>& x, float* y, int64_t threads) {
    if constexpr (VECTORS < MAX_VECTORS)
        if (x.count > VECTORS) return kept_alike<PER_BYTE, 2 * VECTORS>(matrix, x, y, threads);
    if (!matrix.rows || !keeps_alike<PER_BYTE>(matrix.mask, matrix.columns / 8)) return false;
    if (are_words(x.x, x.count * x.columns))
        return kept_product<PER_BYTE, PickedWords<PER_BYTE>, VECTORS>(matrix, x, y, threads);
    return kept_product<PER_BYTE, PickedFloats<PER_BYTE>, VECTORS>(matrix, x, y, threads);
}

// 1 to MAX_VECTORS vectors, by packed_rows.h where mask bytes keep different numbers. Returns how many masks are wrong.
template <typename T>
static int64_t few_or_kept(const Matrix<T>& matrix, const Inputs<float>& x, float* y, int64_t threads) {
    bool chunks = matrix.columns % 8 == 0;
    if (chunks && 2 * matrix.kept == matrix.columns && kept_alike<4>(matrix, x, y, threads)) return 0;
    if (chunks && 4 * matrix.kept == matrix.columns && kept_alike<2>(matrix, x, y, threads)) return 0;
    if (chunks && 8 * matrix.kept == matrix.columns && kept_alike<1>(matrix, x, y, threads)) return 0;
    return few<T>(matrix, x, y, threads);
}
