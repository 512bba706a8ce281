// Products of bfloat16 weights and tokens by pairs (vdpbf16ps), which take subnormal numbers for zero: what
// packed_rows.h and packed_panels.h want of a set of instructions.
//
// Of few vectors, a step's expanded words multiply those of x as they are. In a panel two kept weights of a row
// multiply two columns: words of 32 tokens are interleaved in registers, lane by lane of 128 bits, so sums lie in the
// order of place_of.

typedef Bfloat16 Element;
typedef __m512 Vector;
typedef __m512i Weight;
const int COLUMNS = 32, PIECES = 1, LANES = 16, PANEL_TOKENS = 16 * LANES, LEAST_PANEL = 32;
INLINE Element element_of(float value) {  // exact: the tokens were bfloat16
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {(uint16_t)(bits >> 16)};
}
constexpr int rows_at_once(int vectors) { return vectors <= 4 ? 4 : 2; }
template <typename>
constexpr int place_in_step(int column) { return column; }
TARGET INLINE int count_bits(uint32_t bits) { return _mm_popcnt_u32(bits); }
TARGET INLINE float total(Vector sum) { return _mm512_reduce_add_ps(sum); }
TARGET INLINE void expand(const Bfloat16* values, uint32_t bits, Weight (&weight)[PIECES]) {
    __m512i words = _mm512_loadu_si512(values);
    asm("" : "+v"(words));  // as in packed_product.cpp
    weight[0] = _mm512_maskz_expand_epi16(bits, words);
}
TARGET INLINE void add_product(Vector& sum, Weight weight, const Element* x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)_mm512_loadu_si512(x));
}

INLINE int place_of(int64_t token) {
    int lane = token % 32 / 8, word = token % 8;
    return (int)(token / 32 * 32) + word / 4 * LANES + lane * 4 + word % 4;
}

// sum[k] of LANES tokens gets the low half of `weights` times column x and the high half times column y (null: zeros).
template <int TOKENS>
TARGET INLINE void add_pair(Vector* sum, uint32_t weights, const Element* x, const Element* y) {
    __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights);
    for (int k = 0; k < TOKENS / LANES; k += 2) {
        __m512i low = _mm512_loadu_si512(x + k * LANES);
        __m512i high = y ? _mm512_loadu_si512(y + k * LANES) : _mm512_setzero_si512();
        asm("" : "+v"(low), "+v"(high));  // each is loaded once: loads bind this loop, and compilers would repeat them
        sum[k] = _mm512_dpbf16_ps(sum[k], (__m512bh)_mm512_unpacklo_epi16(low, high), weight);
        sum[k + 1] = _mm512_dpbf16_ps(sum[k + 1], (__m512bh)_mm512_unpackhi_epi16(low, high), weight);
    }
}

template <typename T, int TOKENS>
TARGET static void add_block(Row<T>* rows, int64_t count, int64_t first, int64_t columns, const Element* x,
                             float* sums) {
    const int VECTORS = TOKENS / LANES;
    for (int64_t row = 0; row < count; row++, sums += TOKENS) {
        __builtin_prefetch(rows[row + ROWS_AHEAD].values);
        __builtin_prefetch(rows[row + ROWS_AHEAD].mask + first / 8);
        const T* value = rows[row].values;
        Vector sum[VECTORS] = {};
        uint32_t bits = bits_of<BLOCK>(rows[row].mask + first / 8, columns - first);
        while (bits) {
            const Element* one = x + __builtin_ctz(bits) * TOKENS;
            bits &= bits - 1;
            uint32_t weights = (value++)->bits;
            if (bits) {
                const Element* other = x + __builtin_ctz(bits) * TOKENS;
                bits &= bits - 1;
                weights |= (uint32_t)(value++)->bits << 16;
                add_pair<TOKENS>(sum, weights, one, other);
            } else {
                add_pair<TOKENS>(sum, weights, one, nullptr);
            }
        }
        rows[row].values = value;
        for (int k = 0; k < VECTORS; k++)
            _mm512_storeu_ps(sums + k * LANES, _mm512_loadu_ps(sums + k * LANES) + sum[k]);
    }
}
