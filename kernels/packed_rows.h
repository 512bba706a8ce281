// Few vectors by packed rows. packed_product.cpp includes this file in a namespace for each set of instructions, which
// says what one step along a row is:
//   COLUMNS, PIECES, LANES  a step's columns, a multiple of 8, are PIECES weights for LANES sums
//   Vector                  LANES floats, with total, and with add_product of a Weight and as much of x from memory
//   Element, element_of     what x is held as
//   expand                  the Weights of a step's columns: zero where the mask's bit is 0, else the next value
//   place_in_step           where in them a column lies, by the type of the values
//   rows_at_once(vectors)   how many rows' sums the registers hold
//   TARGET                  the attribute that allows the instructions
// A row's product is summed in one order, whatever rows and vectors are computed beside it and by how many threads.

// One step of ROWS rows and VECTORS vectors: the columns from `first` on, of which `left` are there.
template <typename T, int VECTORS, int ROWS>
TARGET INLINE void add_step(const Row<T>* rows, const T** values, int64_t first, int64_t left, const Element* x,
                            Vector (&sum)[ROWS][VECTORS]) {
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
        const uint8_t* mask = rows[row].mask + first / 8;
        uint32_t bits = bits_of<COLUMNS>(mask, left);
        Weight weight[PIECES];
        expand(values[row], bits, weight);
        __builtin_prefetch((const char*)values[row] + BYTES_AHEAD);
        __builtin_prefetch(mask + BYTES_AHEAD / 4);
        values[row] += count_bits(bits);
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; vector++)
            for (int piece = 0; piece < PIECES; piece++)
                add_product(sum[row][vector], weight[piece], x + vector * COLUMNS + piece * (COLUMNS / PIECES));
    }
}

// y[row][vector * y_stride] of ROWS rows and VECTORS vectors; x [steps][VECTORS][COLUMNS], zero where a step reaches
// beyond the last column. Returns how many of the rows' masks do not keep `kept` values.
template <typename T, int VECTORS, int ROWS>
TARGET static int64_t product_of(const Row<T>* rows, const Element* x, const Matrix<T>& matrix, float* const* y,
                                 int64_t y_stride) {
    Vector sum[ROWS][VECTORS] = {};
    const T* values[ROWS];
    for (int row = 0; row < ROWS; row++) values[row] = rows[row].values;
    int64_t whole = matrix.columns / COLUMNS * COLUMNS, first = 0;
    for (; first < whole; first += COLUMNS, x += VECTORS * COLUMNS)
        add_step<T, VECTORS, ROWS>(rows, values, first, COLUMNS, x, sum);
    if (whole < matrix.columns) add_step<T, VECTORS, ROWS>(rows, values, whole, matrix.columns - whole, x, sum);
    int64_t wrong = 0;
    for (int row = 0; row < ROWS; row++) {
        wrong += values[row] - rows[row].values != matrix.kept;
        for (int vector = 0; vector < VECTORS; vector++) y[row][vector * y_stride] = total(sum[row][vector]);
    }
    return wrong;
}

// Rows [begin, end), several at a time. Each of them runs through a stretch of rows of its own, so that what is fetched
// ahead is what it needs next.
template <typename T, int VECTORS>
TARGET static int64_t few_part(const Matrix<T>& matrix, const Element* x, float* y, int64_t begin, int64_t end) {
    const int ROWS = rows_at_once(VECTORS);
    int64_t stretch = (end - begin) / ROWS, wrong = 0;
    Room<T> room[ROWS];
    Row<T> rows[ROWS];
    float* out[ROWS];
    for (int64_t i = 0; i < stretch; i++) {
        for (int k = 0; k < ROWS; k++) {
            int64_t row = begin + k * stretch + i;
            rows[k] = readable_row(matrix, row, room[k]);
            out[k] = y + row;
        }
        wrong += product_of<T, VECTORS, ROWS>(rows, x, matrix, out, matrix.rows);
    }
    for (int64_t row = begin + ROWS * stretch; row < end; row++) {
        rows[0] = readable_row(matrix, row, room[0]);
        out[0] = y + row;
        wrong += product_of<T, VECTORS, 1>(rows, x, matrix, out, matrix.rows);
    }
    return wrong;
}

// Inputs as [steps][VECTORS][COLUMNS], zero beyond the last column.
template <typename T, int VECTORS>
static std::vector<Element> steps_of(const Inputs<Element>& x, int64_t columns) {
    std::vector<Element> steps((columns + COLUMNS - 1) / COLUMNS * VECTORS * COLUMNS);
    for (int64_t vector = 0; vector < VECTORS; vector++)
        for (int64_t column = 0; column < columns; column++) {
            int64_t step = column / COLUMNS * VECTORS + vector;
            steps[step * COLUMNS + place_in_step<T>(column % COLUMNS)] = x.at(vector, column);
        }
    return steps;
}

// 1 to MAX_VECTORS vectors: y [vectors, rows]. Returns how many masks are wrong.
template <typename T, int VECTORS = 1>
static int64_t few(const Matrix<T>& matrix, const Inputs<Element>& x, float* y, int64_t threads) {
    if constexpr (VECTORS < MAX_VECTORS)
        if (x.count > VECTORS) return few<T, VECTORS + 1>(matrix, x, y, threads);
    std::vector<Element> steps = steps_of<T, VECTORS>(x, matrix.columns);
    std::atomic<int64_t> wrong{0};
    in_parts(matrix.rows, 1, threads, [&](int64_t begin, int64_t end) {
        wrong += few_part<T, VECTORS>(matrix, steps.data(), y, begin, end);
    });
    return wrong;
}
