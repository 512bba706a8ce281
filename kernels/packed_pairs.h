// Products of bfloat16 weights and tokens by pairs (vdpbf16ps), which take subnormal numbers for zero: what
// packed_rows.h wants of a set of instructions. A step's expanded words multiply those of x as they are.

typedef Bfloat16 Element;
typedef __m512 Vector;
typedef __m512i Weight;
const int COLUMNS = 32, PIECES = 1, LANES = 16;
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
