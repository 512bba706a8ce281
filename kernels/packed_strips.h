// Many tokens by strips of packed rows, of bfloat16 by pairs (vdpbf16ps). Included behind packed_pairs.h.
//
// A lane is a row of the strip. Its kept weights go two at a time, and vpermw picks for each lane the two of a token's
// 32 columns that they belong to: so any N:M goes, a dropped weight costs nothing, and tokens are read and results
// written as they lie. Pairs are made once for a strip, and multiply all tokens.
//
// The sum of one row and token goes through the row's pairs in their order, SUMMED blocks of 32 columns by themselves,
// whatever is computed beside it: it depends neither on the number of tokens nor on threads. A weight without a partner
// in its block adds 0 for it.

const int STRIP = 16;                // rows
const int TOKENS = 8;                // whose sums are in registers
const int64_t MAX_TOKENS = 1024;     // in a call
const int MAX_PAIRS = COLUMNS / 2;   // of a block of COLUMNS columns
const int64_t SUMMED = 4;            // blocks: long sums of floats have large errors
const int64_t VALUES_AHEAD = 256;    // bytes of a row that are fetched early

// Two columns of a block, and their weights, for each row of a strip: the first of them in the low half of a word.
struct alignas(64) Pair {
    uint32_t columns[STRIP], weights[STRIP];
};

struct Strip {
    struct Block {
        int whole, pairs;  // how many have both columns in all rows; these come first
    };
    std::vector<Block> blocks;
    std::unique_ptr<Pair[]> pairs;  // of all blocks, one after the other
    std::vector<uint32_t> there;    // of each pair that is not whole, two bits a row: which of the two are there
    explicit Strip(int64_t count) : blocks(count), pairs(new Pair[count * MAX_PAIRS]), there(count * MAX_PAIRS) {}
};

// Words [8 pairs] of each row become words [STRIP] of each pair, a Pair apart.
TARGET INLINE void turn_words(const __m256i (&row)[STRIP], uint32_t* words) {
    const int APART = sizeof(Pair) / sizeof(uint32_t);
    __m512i turned[8];  // k, and k + 4 for the rows 4 further on: pairs k and 4 + k in lanes of 128 bits
    for (int first = 0; first < 8; first += 4) {
        __m512i two[4];  // rows 8 apart
        for (int k = 0; k < 4; k++)
            two[k] = _mm512_inserti64x4(_mm512_castsi256_si512(row[first + k]), row[first + k + 8], 1);
        __m512i low = _mm512_unpacklo_epi32(two[0], two[1]), high = _mm512_unpackhi_epi32(two[0], two[1]);
        __m512i next_low = _mm512_unpacklo_epi32(two[2], two[3]), next_high = _mm512_unpackhi_epi32(two[2], two[3]);
        turned[first] = _mm512_unpacklo_epi64(low, next_low);
        turned[first + 1] = _mm512_unpackhi_epi64(low, next_low);
        turned[first + 2] = _mm512_unpacklo_epi64(high, next_high);
        turned[first + 3] = _mm512_unpackhi_epi64(high, next_high);
    }
    for (int k = 0; k < 4; k++) {
        __m512i pair = _mm512_shuffle_i32x4(turned[k], turned[4 + k], 0x88);  // rows 0 to 3, 8 to 11, 4 to 7, 12 to 15
        __m512i other = _mm512_shuffle_i32x4(turned[k], turned[4 + k], 0xdd);
        _mm512_store_si512(words + k * APART, _mm512_shuffle_i32x4(pair, pair, 0xd8));
        _mm512_store_si512(words + (4 + k) * APART, _mm512_shuffle_i32x4(other, other, 0xd8));
    }
}

// Words [STRIP rows][MAX_PAIRS] of a block to those of its pairs.
TARGET INLINE void turn_block(const __m512i (&rows)[STRIP], int pairs, uint32_t* words) {
    __m256i half[STRIP];
    for (int row = 0; row < STRIP; row++) half[row] = _mm512_castsi512_si256(rows[row]);
    turn_words(half, words);
    if (pairs <= 8) return;
    for (int row = 0; row < STRIP; row++) half[row] = _mm512_extracti64x4_epi64(rows[row], 1);
    turn_words(half, words + 8 * sizeof(Pair) / sizeof(uint32_t));
}

// The mask of a block, 0 beyond the last column; nothing is read beyond the row.
INLINE uint32_t block_bits(const uint8_t* mask, int64_t first, int64_t columns) {
    if (columns - first >= COLUMNS) return bits_of<COLUMNS>(mask + first / 8, COLUMNS);
    uint8_t bytes[COLUMNS / 8] = {};
    std::memcpy(bytes, mask + first / 8, (columns - first + 7) / 8);
    return bits_of<COLUMNS>(bytes, columns - first);
}

// Makes the pairs of the rows from `first` on. Returns how many of their masks are wrong; then the pairs mean nothing.
TARGET static int64_t fill(Strip& strip, const Matrix<Bfloat16>& matrix, int64_t first) {
    const int64_t rows = std::min<int64_t>(STRIP, matrix.rows - first), mask_bytes = (matrix.columns + 7) / 8;
    const uint8_t* mask = matrix.mask + first * mask_bytes;
    alignas(64) uint16_t steps[COLUMNS], both[COLUMNS];
    for (int k = 0; k < COLUMNS; k++) steps[k] = k, both[k] = k % 2;
    const __m512i step = _mm512_load_si512(steps), place = _mm512_load_si512(both);
    const Bfloat16 *values[STRIP], *end = matrix.values + matrix.rows * matrix.kept;
    int64_t claimed[STRIP] = {};  // by the masks, right or not
    for (int64_t row = 0; row < rows; row++) values[row] = matrix.values + (first + row) * matrix.kept;
    Pair* pair = strip.pairs.get();
    uint32_t* there = strip.there.data();
    __m512i columns[STRIP] = {}, weights[STRIP] = {};  // of a block; rows that are not there keep nothing
    alignas(64) uint32_t twice[STRIP] = {};            // how many weights a row keeps, in both halves
    for (int64_t column = 0; column < matrix.columns; column += COLUMNS) {
        int least = rows < STRIP ? 0 : COLUMNS, most = 0;
        for (int64_t row = 0; row < rows; row++) {
            uint32_t bits = block_bits(mask + row * mask_bytes, column, matrix.columns);
            claimed[row] += count_bits(bits);
            int kept = (int)std::min<int64_t>(count_bits(bits), end - values[row]);
            columns[row] = _mm512_maskz_compress_epi16(bits, step);
            weights[row] = _mm512_maskz_loadu_epi16((uint32_t)((1ull << kept) - 1), values[row]);
            values[row] += kept;
            __builtin_prefetch((const char*)values[row] + VALUES_AHEAD);
            twice[row] = kept * 0x10001u;
            least = std::min(least, kept);
            most = std::max(most, kept);
        }
        const int whole = least / 2, pairs = (most + 1) / 2;
        strip.blocks[column / COLUMNS] = {whole, pairs};
        if (pairs) {
            turn_block(columns, pairs, pair->columns);
            turn_block(weights, pairs, pair->weights);
        }
        const __m512i kept = _mm512_load_si512(twice);
        for (int k = whole; k < pairs; k++)
            *there++ = _mm512_cmpgt_epi16_mask(kept, _mm512_add_epi16(place, _mm512_set1_epi16(2 * k)));
        pair += pairs;
    }
    return std::count_if(claimed, claimed + rows, [&](int64_t kept) { return kept != matrix.kept; });
}

TARGET INLINE void write(float* y, __mmask16 rows, __m512 sum) { _mm512_mask_storeu_ps(y, rows, sum); }
TARGET INLINE void write(Bfloat16* y, __mmask16 rows, __m512 sum) {
    _mm256_mask_storeu_epi16(y, rows, (__m256i)_mm512_cvtneps_pbh(sum));
}

// Adds a pair's products with TOKENS tokens, whose words are `stride` apart. WHOLE: both columns are there in all rows.
template <bool WHOLE>
TARGET INLINE void add_pair(const Pair& pair, __mmask32 there, const Bfloat16* x, int64_t stride,
                            __m512 (&sum)[TOKENS]) {
    const __m512i columns = _mm512_load_si512(pair.columns);
    const __m512bh weights = (__m512bh)_mm512_load_si512(pair.weights);
#pragma GCC unroll 8
    for (int token = 0; token < TOKENS; token++) {
        __m512i words = _mm512_loadu_si512(x + token * stride);
        words = WHOLE ? _mm512_permutexvar_epi16(columns, words)
                      : _mm512_maskz_permutexvar_epi16(there, columns, words);
        sum[token] = _mm512_dpbf16_ps(sum[token], (__m512bh)words, weights);
    }
}

// y [tokens, rows of the strip] of x [TOKENS, blocks * COLUMNS]; tokens are x_stride and y_stride apart.
template <typename Y>
TARGET static void multiply(const Strip& strip, const Bfloat16* x, int64_t x_stride, Y* y, int64_t y_stride,
                            int64_t tokens, __mmask16 rows) {
    for (int64_t token = 0; token < tokens; token++) __builtin_prefetch(y + token * y_stride, 1);
    __m512 total[TOKENS] = {};
    const Pair* pair = strip.pairs.get();
    const uint32_t* there = strip.there.data();
    const int64_t blocks = strip.blocks.size();
    for (int64_t first = 0; first < blocks; first += SUMMED) {
        __m512 sum[TOKENS] = {};
        for (int64_t i = first; i < std::min(first + SUMMED, blocks); i++, x += COLUMNS) {
            const Pair *whole = pair + strip.blocks[i].whole, *end = pair + strip.blocks[i].pairs;
            for (; pair < whole; pair++) add_pair<true>(*pair, 0, x, x_stride, sum);
            for (; pair < end; pair++) add_pair<false>(*pair, *there++, x, x_stride, sum);
        }
        for (int token = 0; token < TOKENS; token++) total[token] += sum[token];
    }
    for (int64_t token = 0; token < tokens; token++) write(y + token * y_stride, rows, total[token]);
}

// x [TOKENS or more, stride] in the matrix's order of columns, zero where x has no token or no column.
static std::unique_ptr<Line[]> laid_out(const Inputs<Bfloat16>& x, int64_t columns, int64_t stride, int64_t threads) {
    const int64_t tokens = std::max<int64_t>(x.count, TOKENS);
    std::unique_ptr<Line[]> room(new Line[tokens * stride * sizeof(Bfloat16) / sizeof(Line)]);
    Bfloat16* words = (Bfloat16*)room.get();
    in_parts(tokens, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
            const int64_t width = token < x.count ? columns : 0;
            Bfloat16* row = words + token * stride;
            for (int64_t column = 0; column < width; column++) row[column] = x.at(token, column);
            std::fill(row + width, row + stride, Bfloat16{});
        }
    });
    return room;
}

// y [tokens, rows], float or rounded to bfloat16. Returns how many masks are wrong.
template <typename Y>
static int64_t strips(const Matrix<Bfloat16>& matrix, const Inputs<Bfloat16>& x, Y* y, int64_t threads) {
    const int64_t blocks = (matrix.columns + COLUMNS - 1) / COLUMNS, stride = blocks * COLUMNS;
    const bool as_it_lies = !x.place && x.columns == stride && x.count >= TOKENS;
    std::unique_ptr<Line[]> room;
    if (!as_it_lies) room = laid_out(x, matrix.columns, stride, threads);
    const Bfloat16* words = as_it_lies ? x.x : (const Bfloat16*)room.get();
    std::atomic<int64_t> wrong{0};
    in_parts(matrix.rows, STRIP, threads, [&](int64_t begin, int64_t end) {
        Strip strip(blocks);
        for (int64_t row = begin; row < end; row += STRIP) {
            if (int64_t found = fill(strip, matrix, row)) {
                wrong += found;
                continue;
            }
            const __mmask16 rows = (__mmask16)((1u << std::min<int64_t>(STRIP, end - row)) - 1);
            for (int64_t token = 0; token < x.count; token += TOKENS) {
                const int64_t first = std::max<int64_t>(std::min(token, x.count - TOKENS), 0);  // the last overlap
                multiply(strip, words + first * stride, stride, y + first * matrix.rows + row, matrix.rows,
                         std::min<int64_t>(TOKENS, x.count), rows);
            }
        }
    });
    return wrong;
}
