// One block of columns for a panel of float tokens, included before packed_panels.h. A vector is LANES tokens of one
// column; a kept weight multiplies all of them.

typedef float Element;
const int LEAST_PANEL = 16;
INLINE Element element_of(float value) { return value; }
INLINE int place_of(int64_t token) { return (int)token; }

template <typename T, int TOKENS>
TARGET static void add_block(Row<T>* rows, int64_t count, int64_t first, int64_t columns, const Element* x,
                             float* sums) {
    const int VECTORS = TOKENS / LANES;
    for (int64_t row = 0; row < count; row++, sums += TOKENS) {
        __builtin_prefetch(rows[row + ROWS_AHEAD].values);
        __builtin_prefetch(rows[row + ROWS_AHEAD].mask + first / 8);
        const T* value = rows[row].values;
        Vector sum[VECTORS] = {};
        for (uint32_t bits = bits_of<BLOCK>(rows[row].mask + first / 8, columns - first); bits; bits &= bits - 1) {
            Vector weight = all_of(float_of(*value++));
            const Element* column = x + __builtin_ctz(bits) * TOKENS;
            for (int k = 0; k < VECTORS; k++) add_product(sum[k], weight, column + k * LANES);
        }
        rows[row].values = value;
        for (int k = 0; k < VECTORS; k++) store(sums + k * LANES, load(sums + k * LANES) + sum[k]);
    }
}
