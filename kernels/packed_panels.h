// Many tokens by packed rows: a kept weight multiplies all tokens of a panel at its column, so dropped weights cost
// nothing. Included in a namespace for each set of instructions, which says
//   Vector, LANES       LANES floats, with load, store, all_of and add_product
//   PANEL_TOKENS        the widest panel
//   TARGET              the attribute that allows the instructions
// The sum of one row and token goes through kept columns in blocks of BLOCK, whatever is computed beside it: it depends
// neither on the number of tokens nor on threads. Nor on the instructions, if they multiply and add in one.

const int MIN_PANEL = 16;

// Adds to sums [count][TOKENS] what the block of BLOCK columns from `first` on contributes to each row, whose values
// are moved on; x [BLOCK][TOKENS] stays in the first-level cache.
template <typename T, int TOKENS>
TARGET static void add_block(Row<T>* rows, int64_t count, int64_t first, int64_t columns, const float* x, float* sums) {
    const int VECTORS = TOKENS / LANES;
    for (int64_t row = 0; row < count; row++, sums += TOKENS) {
        __builtin_prefetch(rows[row + ROWS_AHEAD].values);
        __builtin_prefetch(rows[row + ROWS_AHEAD].mask + first / 8);
        const T* value = rows[row].values;
        Vector sum[VECTORS] = {};
        for (uint32_t bits = bits_of<BLOCK>(rows[row].mask + first / 8, columns - first); bits; bits &= bits - 1) {
            Vector weight = all_of(float_of(*value++));
            const float* column = x + __builtin_ctz(bits) * TOKENS;
            for (int k = 0; k < VECTORS; k++) add_product(sum[k], weight, column + k * LANES);
        }
        rows[row].values = value;
        for (int k = 0; k < VECTORS; k++) store(sums + k * LANES, load(sums + k * LANES) + sum[k]);
    }
}

// Columns [begin, end) of x as [columns][TOKENS], zero beyond the last token. By tiles, which stay in the first-level
// cache: whole lines are read and written, whatever the distance between rows.
template <int TOKENS>
TARGET static void turn(const Inputs<float>& x, int64_t begin, int64_t end, float* turned) {
    float tile[LINE][MIN_PANEL];
    for (int64_t token = 0; token < TOKENS; token += MIN_PANEL)
        for (int64_t first = begin; first < end; first += LINE) {
            int64_t width = std::min(LINE, end - first), tokens = std::min<int64_t>(MIN_PANEL, x.count - token);
            if (tokens < MIN_PANEL) std::memset(tile, 0, sizeof tile);
            for (int64_t i = 0; i < tokens; i++)
                for (int64_t k = 0; k < width; k++) tile[k][i] = x.at(token + i, first + k);
            for (int64_t k = 0; k < width; k++)
                std::memcpy(turned + (first + k) * TOKENS + token, tile[k], sizeof tile[k]);
        }
}

// y[token][row] of sums [count][TOKENS], by tiles likewise; y's rows are `stride` apart.
template <int TOKENS>
TARGET static void write_turned(const float* sums, int64_t count, int64_t tokens, float* y, int64_t stride) {
    float tile[MIN_PANEL][LINE];
    for (int64_t token = 0; token < tokens; token += MIN_PANEL)
        for (int64_t row = 0; row < count; row += LINE) {
            int64_t height = std::min(LINE, count - row);
            for (int64_t k = 0; k < height; k++)
                for (int i = 0; i < MIN_PANEL; i++) tile[i][k] = sums[(row + k) * TOKENS + token + i];
            for (int64_t i = 0; i < std::min<int64_t>(MIN_PANEL, tokens - token); i++)
                std::memcpy(y + (token + i) * stride + row, tile[i], sizeof(float) * height);
        }
}

// Rows [begin, end) for `tokens` of a panel of TOKENS: x [columns][TOKENS], y [tokens, rows].
template <typename T, int TOKENS>
TARGET static int64_t panel_part(const Matrix<T>& matrix, const float* x, int64_t tokens, float* y, int64_t begin,
                                 int64_t end) {
    int64_t wrong = 0, most = std::min(ROWS_IN_CACHE, end - begin);
    std::unique_ptr<Line[]> sums(new Line[most * TOKENS / LINE]);
    std::vector<Room<T>> room(most);
    std::vector<Row<T>> rows(most + ROWS_AHEAD, Row<T>{matrix.values, matrix.mask});
    for (int64_t first = begin; first < end; first += most) {
        int64_t count = std::min(most, end - first);
        float* sum = sums[0].values;
        std::fill(sum, sum + count * TOKENS, 0.0f);
        for (int64_t row = 0; row < count; row++) rows[row] = readable_row(matrix, first + row, room[row]);
        std::vector<Row<T>> starts(rows.begin(), rows.begin() + count);
        for (int64_t column = 0; column < matrix.columns; column += BLOCK)
            add_block<T, TOKENS>(rows.data(), count, column, matrix.columns, x + column * TOKENS, sum);
        for (int64_t row = 0; row < count; row++) wrong += rows[row].values - starts[row].values != matrix.kept;
        write_turned<TOKENS>(sum, count, tokens, y + first, matrix.rows);
    }
    return wrong;
}

// Up to TOKENS tokens, in the narrowest panel that holds them: y [tokens, rows]. Returns how many masks are wrong.
template <typename T, int TOKENS = PANEL_TOKENS>
static int64_t panel(const Matrix<T>& matrix, const Inputs<float>& x, float* y, int64_t threads) {
    if constexpr (TOKENS > MIN_PANEL)
        if (2 * x.count <= TOKENS) return panel<T, TOKENS / 2>(matrix, x, y, threads);
    std::unique_ptr<Line[]> turned(new Line[matrix.columns * TOKENS / LINE]);
    float* columns = turned[0].values;  // x as [columns][TOKENS]
    in_parts(matrix.columns, LINE, threads,
             [&](int64_t begin, int64_t end) { turn<TOKENS>(x, begin, end, columns); });
    std::atomic<int64_t> wrong{0};
    in_parts(matrix.rows, 1, threads, [&](int64_t begin, int64_t end) {
        wrong += panel_part<T, TOKENS>(matrix, columns, x.count, y, begin, end);
    });
    return wrong;
}
