"""Kernels broken on purpose: what is replaced by what. mutation.py says who notices."""

from collections.abc import Callable
from dataclasses import dataclass

from streamprune_kernels.launch import joined_source


@dataclass(frozen=True)
class Mutant:
    """`old`, which `file` has once, replaced by `new`; `case` says what is run (CASES)."""

    name: str
    file: str
    case: str
    old: str
    new: str

    def text(self, name: str, read: Callable[[str], str]) -> str:
        """A file's text, broken if it is the one. Raises LookupError where `old` is not there once."""
        text = read(name)
        if name != self.file:
            return text
        if text.count(self.old) != 1:
            raise LookupError(f"{self.name}: {self.file} has its text {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)

    def source(self, stem: str, read: Callable[[str], str]) -> str:
        return joined_source(f"{stem}.cu", lambda name: self.text(name, read))


MUTANTS = (
    # The main loop of the 2:4 product.
    Mutant(
        "no barrier before a stage is read",
        "sparse_gemm.cu",
        "sparse_gemm",
        "__syncthreads();  // this step's copies are there, and",
        "// this step's copies are there, and",
    ),
    Mutant("copies are not waited for", "sparse_gemm.cu", "sparse_gemm", "        cp_async_wait<STAGES - 2>();\n", ""),
    Mutant(
        "one group of copies too few waited for",
        "sparse_gemm.cu",
        "sparse_gemm",
        "cp_async_wait<STAGES - 2>",
        "cp_async_wait<STAGES - 1>",
    ),
    Mutant(
        "groups of the main loop not committed",
        "sparse_gemm.cu",
        "sparse_gemm",
        "fetch.begin(filling);\n        cp_async_commit();\n        filling",
        "fetch.begin(filling);\n        filling",
    ),
    Mutant(
        "a stage too many filled at first",
        "sparse_gemm.cu",
        "sparse_gemm",
        "fetched < STAGES - 1;",
        "fetched < STAGES;",
    ),
    Mutant(
        "the stage being read is filled",
        "sparse_gemm.cu",
        "sparse_gemm",
        "fetch.begin(filling);\n        cp_async_commit();\n        filling",
        "fetch.begin(reading);\n        cp_async_commit();\n        filling",
    ),
    Mutant(
        "a step more fetched than there is", "sparse_gemm.cu", "sparse_gemm", "fetched++ < steps", "fetched++ <= steps"
    ),
    Mutant("selector of the other half", "sparse_gemm.cu", "sparse_gemm", "mma_sparse<HALF>", "mma_sparse<1 - HALF>"),
    Mutant("X of the other half", "sparse_gemm.cu", "sparse_gemm", "(x ^ HALF *", "(x ^ (1 - HALF) *"),
    Mutant(
        "W's rows and chunks exchanged for ldmatrix",
        "sparse_gemm.cu",
        "sparse_gemm",
        "WARP_OUT + lane % 16, lane / 16)",
        "WARP_OUT + lane / 16 * 8 + lane % 8, lane / 8 % 2)",
    ),
    Mutant(
        "X's rows shifted by one",
        "sparse_gemm.cu",
        "sparse_gemm",
        "WARP_TOKENS + lane % 8,",
        "WARP_TOKENS + (lane + 1) % 8,",
    ),
    Mutant("metadata of another 16 rows", "sparse_gemm.cu", "sparse_gemm", "places.word[i]", "places.word[i ^ 1]"),
    Mutant(
        "metadata of another 64 rows",
        "sparse_gemm.cu",
        "sparse_gemm",
        "(warp_row * 32 + lane)",
        "((1 - warp_row) * 32 + lane)",
    ),
    Mutant("metadata does not advance", "sparse_gemm.cu", "sparse_gemm", "        metadata += 32;\n", ""),
    Mutant(
        "metadata past the last rows",
        "sparse_gemm.cu",
        "sparse_gemm",
        "min(place.first_out / WARP_OUT + threadIdx.x / 32, row_blocks - 1)",
        "place.first_out / WARP_OUT + threadIdx.x / 32 + 0 * row_blocks",
    ),
    Mutant(
        "metadata overlaps X in a stage",
        "sparse_gemm.cu",
        "sparse_gemm",
        "METADATA = X + Tile::X_BYTES;",
        "METADATA = X + Tile::X_BYTES - CHUNK_BYTES;",
    ),
    # Shared by both products.
    Mutant("rows are not swizzled", "gemm.cuh", "sparse_gemm", "(chunk ^ turn)", "(chunk ^ 0 * turn)"),
    Mutant("a row past the last is read", "gemm.cuh", "sparse_gemm", "ROWS_APART, rows - 1)", "ROWS_APART, rows)"),
    Mutant(
        "source does not advance",
        "gemm.cuh",
        "sparse_gemm",
        "            source[i] += ROW_CHUNKS * CHUNK_BYTES;\n",
        "",
    ),
    Mutant(
        "the last group of tiles taken for a whole one",
        "gemm.cuh",
        "sparse_gemm",
        "min(out_tiles - group * GROUP, GROUP)",
        "min(out_tiles - group * GROUP, GROUP) + 1",
    ),
    Mutant(
        "no barrier before the epilogue's tile",
        "gemm.cuh",
        "sparse_gemm",
        "    __syncthreads();  // every warp is done",
        "    // every warp is done",
    ),
    Mutant(
        "no barrier before outputs are written",
        "gemm.cuh",
        "sparse_gemm",
        "fill(shared, sums);\n    __syncthreads();",
        "fill(shared, sums);",
    ),
    Mutant("sums are not cleared", "gemm.cuh", "sparse_gemm", "sums[i][j][c] = 0;", "sums[i][j][c] = (float)(c == 3);"),
    Mutant("rows 8 to 15 exchanged with columns", "gemm.cuh", "sparse_gemm", "c / 2 * 8)", "c % 2 * 8)"),
    Mutant("tokens of a lane not in pairs", "gemm.cuh", "sparse_gemm", "+ lane % 4 * 2;", "+ lane % 4;"),
    Mutant(
        "an output feature past the last",
        "gemm.cuh",
        "sparse_gemm",
        "out >= product.out_features",
        "out > product.out_features",
    ),
    Mutant(
        "tokens past the last",
        "gemm.cuh",
        "sparse_gemm",
        "min(product.tokens - place.first_token, (u32)Tile::TOKENS)",
        "min(product.tokens - place.first_token + 1, (u32)Tile::TOKENS)",
    ),
    Mutant(
        "bias of the tile's first features", "gemm.cuh", "sparse_gemm", "product.bias[out]", "product.bias[threadIdx.x]"
    ),
    Mutant(
        "partial sums of token tiles overlap",
        "gemm.cuh",
        "sparse_gemm",
        "(u64)place.token_tile * 2 * product.out_features",
        "(u64)place.token_tile * product.out_features",
    ),
    Mutant(
        "norm of y, not of the reference",
        "gemm.cuh",
        "sparse_gemm",
        "+= reference * reference",
        "+= written * reference",
    ),
    # Any N:M.
    Mutant(
        "no barrier before tiles are read",
        "nm_gemm.cu",
        "nm_gemm",
        "__syncthreads();  // this step's tiles are there, and",
        "// this step's tiles are there, and",
    ),
    Mutant(
        "W expanded into the tile being read",
        "nm_gemm.cu",
        "nm_gemm",
        "expansion.write(shared + (step + 1) % 2 * W_TILE_BYTES)",
        "expansion.write(shared + step % 2 * W_TILE_BYTES)",
    ),
    Mutant("X is not zero past the last column", "nm_gemm.cu", "nm_gemm", "? CHUNK_BYTES : 0)", "? CHUNK_BYTES : 16)"),
    Mutant(
        "values of the group before counted too",
        "nm_gemm.cu",
        "nm_gemm",
        "byte == start / 8 ? 0xFFu << start % 8 : 0xFFu",
        "byte == start / 8 ? 0xFFu : 0xFFu",
    ),
    Mutant(
        "values before in the wrong measure",
        "nm_gemm.cu",
        "nm_gemm",
        "groups * packed.kept",
        "groups * packed.group_size",
    ),
    Mutant("a kept value's half", "nm_gemm.cu", "nm_gemm", "low_kept ? (u32)values :", "high_kept ? (u32)values :"),
    Mutant(
        "values not used up by an upper half", "nm_gemm.cu", "nm_gemm", "16 * (low_kept + high_kept)", "16 * low_kept"
    ),
    Mutant(
        "W is not zero past the last column",
        "nm_gemm.cu",
        "nm_gemm",
        "CHUNK_KEPT == ANY || column >= columns",
        "CHUNK_KEPT == ANY || column > columns",
    ),
    Mutant("X's channels of a pair exchanged", "nm_gemm.cu", "nm_gemm", "lane / 8 % 2)", "1 - lane / 8 % 2)"),
    # Products in parts.
    Mutant("every part has a step more", "gemm.cuh", "parts", "steps + (part < longer)", "steps + 1"),
    Mutant(
        "the longer parts' step not counted",
        "gemm.cuh",
        "parts",
        "part * steps + min(part, longer)",
        "part * steps",
    ),
    Mutant("parts written over each other", "gemm.cuh", "parts", "of_tile[blockIdx.y * apart + i]", "of_tile[i]"),
    Mutant("tiles written over each other", "gemm.cuh", "parts", "blockIdx.x * CHUNKS;", "0;"),
    Mutant(
        "every part takes the first values",
        "sparse_gemm.cu",
        "parts",
        "place.first_step * (K_STEP / 2)",
        "(K_STEP / 2)",
    ),
    Mutant(
        "every part takes the first channels",
        "sparse_gemm.cu",
        "parts",
        "product.x + place.first_step * K_STEP",
        "product.x",
    ),
    Mutant(
        "every part takes the first metadata",
        "sparse_gemm.cu",
        "parts",
        "block_steps + place.first_step",
        "block_steps",
    ),
    Mutant(
        "every part expands the first columns",
        "nm_gemm.cu",
        "parts",
        "column = place.first_step * K_STEP +",
        "column =",
    ),
    Mutant(
        "X of a later part taken for the first columns",
        "nm_gemm.cu",
        "parts",
        "column(place.first_step * K_STEP +",
        "column(",
    ),
    Mutant(
        "the last part is not added",
        "gemm.cuh",
        "parts",
        "part < gridDim.y; part++",
        "part + 1 < gridDim.y; part++",
    ),
    Mutant("the last but one adds", "gemm.cuh", "parts", "(int)gridDim.y - 1 ?", "(int)gridDim.y - 2 ?"),
    Mutant("all tiles counted in one place", "gemm.cuh", "parts", "product.arrived + blockIdx.x", "product.arrived"),
    Mutant("some sums not added", "gemm.cuh", "parts", "first < CHUNKS; first +=", "first < CHUNKS / 2; first +="),
    # Metadata.
    Mutant(
        "two places exchanged",
        "metadata.cu",
        "metadata",
        "8ull << 4 * 0x5 | 9ull << 4 * 0x6",
        "9ull << 4 * 0x5 | 8ull << 4 * 0x6",
    ),
    Mutant("padding that is undefined behaviour", "metadata.cu", "metadata", "PADDING = 0x4444", "PADDING = 0"),
    Mutant(
        "rows 8 to 15 in the low half", "metadata.cu", "metadata", "places << 16 * half", "places << 16 * (1 - half)"
    ),
    Mutant(
        "wrong masks not reported",
        "metadata.cu",
        "metadata",
        "if (place == 0) *faulty = 1;",
        "if (place == 1) *faulty = 1;",
    ),
    Mutant("a row past the last", "metadata.cu", "metadata", "if (row < out_features)", "if (row <= out_features)"),
    # Inline assembly, which the shim replaces.
    Mutant(
        "A's second and third register exchanged",
        "device.cuh",
        "sparse_gemm",
        '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),   \\',
        '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),   \\',
    ),
    Mutant(
        "B's operands in the place of A's",
        "device.cuh",
        "sparse_gemm",
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12",
        "{%8, %9, %10, %11}, {%4, %5, %6, %7}, {%0, %1, %2, %3}, %12",
    ),
    Mutant("selector always 0", "device.cuh", "sparse_gemm", '"n"(SELECTOR)', '"n"(SELECTOR * 0)'),
    Mutant("float16 multiplied as bfloat16", "device.cuh", "sparse_gemm", 'MMA_SPARSE("f16")', 'MMA_SPARSE("bf16")'),
    Mutant("rounding towards zero", "device.cuh", "sparse_gemm", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    Mutant("ldmatrix of the transpose", "device.cuh", "sparse_gemm", ".x4.shared.b16", ".x4.trans.shared.b16"),
    Mutant(
        "ldmatrix's results exchanged",
        "device.cuh",
        "sparse_gemm",
        '"=r"(fragment[0]), "=r"(fragment[1])',
        '"=r"(fragment[1]), "=r"(fragment[0])',
    ),
    Mutant("waits for too few groups", "device.cuh", "sparse_gemm", '"n"(PENDING)', '"n"(PENDING + 1)'),
    Mutant("copies are never zero", "device.cuh", "nm_gemm", '[%0], [%1], 16, %2;"', '[%0], [%1], 16, 16;"'),
    Mutant("B's two registers exchanged", "device.cuh", "nm_gemm", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    Mutant(
        "words of a chunk exchanged",
        "device.cuh",
        "nm_gemm",
        "st.shared.v4.b32 [%0], {%1, %2, %3, %4};",
        "st.shared.v4.b32 [%0], {%2, %1, %3, %4};",
    ),
    # Decode.
    Mutant(
        "no barrier after a tile is filled",
        "decode.cu",
        "decode",
        "        fill_masks(masks, packed, warp, first_row, first, columns);\n        __syncthreads();\n",
        "        fill_masks(masks, packed, warp, first_row, first, columns);\n",
    ),
    Mutant(
        "no barrier before the next tile",
        "decode.cu",
        "decode",
        "        __syncthreads();  // everybody is done with the tile before\n",
        "",
    ),
    Mutant(
        "values do not advance to the next tile",
        "decode.cu",
        "decode",
        "values[r] += chunks;",
        "values[r] += 0 * chunks;",
    ),
    Mutant(
        "a mask's row past the last is read",
        "decode.cu",
        "decode",
        "min(first_row + lane / ROW_CHUNKS, packed.out_features - 1)",
        "first_row + lane / ROW_CHUNKS",
    ),
    Mutant(
        "values of the group before not passed",
        "decode.cu",
        "decode",
        "for (u32 i = 0; i < place.rest; i++) kept_columns.next();",
        "",
    ),
    Mutant(
        "a group too few between turns",
        "decode.cu",
        "decode",
        "if (rest >= kept) group++, rest -= kept;",
        "if (rest >= kept) rest -= kept;",
    ),
    Mutant("a vector past the last is read", "decode.cu", "decode", "if (v < vectors) entry", "entry"),
    Mutant("a row past the last is written", "decode.cu", "decode", "v < vectors && row < out_features", "v < vectors"),
    Mutant(
        "vectors of a word exchanged",
        "decode.cu",
        "decode",
        "half ? word >> 16 : word & 0xFFFF",
        "half ? word & 0xFFFF : word >> 16",
    ),
    # Decode, 2:4.
    Mutant(
        "no barrier after a tile of 2:4 is filled",
        "decode.cu",
        "decode",
        "first * 2, tile_chunks * 2);\n        __syncthreads();\n",
        "first * 2, tile_chunks * 2);\n",
    ),
    Mutant(
        "no barrier before the next tile of 2:4",
        "decode.cu",
        "decode",
        "        if (first > 0) __syncthreads();",
        "",
    ),
    Mutant(
        "no barrier before the warps' sums are added",
        "decode.cu",
        "decode",
        "    __syncthreads();\n    const u32 v = threadIdx.x / BLOCK_ROWS",
        "    const u32 v = threadIdx.x / BLOCK_ROWS",
    ),
    Mutant(
        "turns read into each other's places",
        "decode.cu",
        "decode",
        "(AHEAD + i) * TURN_CHUNKS",
        "(AHEAD + 1 - i) * TURN_CHUNKS",
    ),
    Mutant(
        "odd groups keep what even ones do",
        "decode.cu",
        "decode",
        "selectors[r][p / 2] >> p % 2 * 16",
        "selectors[r][p / 2]",
    ),
    Mutant(
        "the first and the fourth column kept as the first and the third",
        "decode.cu",
        "decode",
        "0x32767600",
        "0x32765400",
    ),
    Mutant(
        "a row of 2:4 past the last is read",
        "decode.cu",
        "decode",
        "(u64)min(first_row + r, out_features - 1) * chunks",
        "(u64)(first_row + r) * chunks",
    ),
    Mutant(
        "a vector of 2:4 past the last is read",
        "decode.cu",
        "decode",
        "if (chunk < chunks && v < vectors) read",
        "if (chunk < chunks) read",
    ),
    Mutant(
        "bytes selected from the words exchanged",
        "device.cuh",
        "decode",
        '"r"(low), "r"(high), "r"(selector)',
        '"r"(high), "r"(low), "r"(selector)',
    ),
    # Statistics.
    Mutant(
        "a resident row too many",
        "statistics.cu",
        "statistics",
        "if (row < tile.all.resident_tokens)",
        "if (row <= tile.all.resident_tokens)",
    ),
    Mutant(
        "no barrier after the warps' ranges",
        "statistics.cu",
        "statistics",
        "    __syncthreads();\n\n    if (threadIdx.x < CHANNELS",
        "\n    if (threadIdx.x < CHANNELS",
    ),
    Mutant(
        "no barrier before values are counted",
        "statistics.cu",
        "statistics",
        "    if (!all.counts) return;\n    __syncthreads();\n",
        "    if (!all.counts) return;\n",
    ),
    Mutant(
        "no barrier between counts taken and moved",
        "statistics.cu",
        "statistics",
        "        if (bin < bins) counts[bin] = 0;\n    }\n    __syncthreads();\n",
        "        if (bin < bins) counts[bin] = 0;\n    }\n",
    ),
    Mutant("the last row added again", "statistics.cu", "statistics", "            if (row >= tokens) break;\n", ""),
    Mutant("a NaN passed over", "statistics.cu", "statistics", "|| other_low != other_low ", ""),
    Mutant(
        "a window wider than needed",
        "statistics.cu",
        "statistics",
        "max(old.exponent, least_exponent(low, high, bins))",
        "max(old.exponent, least_exponent(low, high, bins) + 1)",
    ),
    Mutant(
        "ranges of other channels added",
        "statistics.cu",
        "statistics",
        "distance = ROW_CHUNKS; distance < 32",
        "distance = 1; distance < 8",
    ),
    # The search over orders of channels.
    Mutant(
        "rows stored before all have read those before",
        "search.cu",
        "search",
        "        __syncthreads();  // all have read the rows before\n",
        "",
    ),
    Mutant(
        "thresholds made before all have read the scores",
        "search.cu",
        "search",
        "    __syncthreads();  // the best are known, and all have read the scores\n",
        "",
    ),
    Mutant(
        "slices joined before they are there",
        "search.cu",
        "search",
        "    __syncthreads();\n    if (share.slice == 0)\n        for",
        "    if (share.slice == 0)\n        for",
    ),
    Mutant(
        "a slice of rows left out",
        "search.cu",
        "search",
        "for (u32 slice = 1; slice < share.slices;",
        "for (u32 slice = 1; slice + 1 < share.slices;",
    ),
    Mutant(
        "rows past the end read",
        "search.cu",
        "search",
        "row < end_row && own < tile.chunks(side)",
        "own < tile.chunks(side)",
    ),
    Mutant("equal scores of a group are one", "search.cu", "search", " || (score == own[r] && other < place)", ""),
    Mutant("a channel held against itself", "search.cu", "search", ">= best ? next : best", ">= best ? best : next"),
    Mutant(
        "gains of swapped groups left as they were",
        "search.cu",
        "search",
        "all.stale[a] = all.stale[b] = 1;",
        "all.stale[a] = 1;",
    ),
    Mutant(
        "gains stay where a channel was",
        "search.cu",
        "search",
        "            exchange_values(all.gain[(u64)k * all.stride + i], all.gain[(u64)k * all.stride + j]);\n",
        "            continue;\n",
    ),
    Mutant(
        "taken partners are wished for",
        "search.cu",
        "search",
        "b != a && all.chosen[b] == NONE && all",
        "b != a && all",
    ),
    Mutant("of equal partners the last", "search.cu", "search", "other_partner < partner", "other_partner > partner"),
    Mutant("of equal swaps the last", "search.cu", "search", "change > best)", "change >= best)"),
    # Mask refinement.
    Mutant("no barrier after q was changed", "refine.cu", "refine", "__syncthreads();  // q is up to date", ""),
    Mutant("no barrier before q is changed", "refine.cu", "refine", "__syncthreads();  // all lanes have read q", ""),
    Mutant("a newly dropped weight taken off", "refine.cu", "refine", "? weight[place] : -", "? -weight[place] : "),
    Mutant("the diagonal counted less", "refine.cu", "refine", "(1 - off) * own * dropped", "0 * own * dropped"),
    Mutant("pairs of changes left out", "refine.cu", "refine", "if (differing >> j & 1) sum", "if (false) sum"),
    Mutant("any gain is enough", "refine.cu", "refine", "best < -least ?", "best < 0 ?"),
    Mutant("of equal candidates the last", "refine.cu", "refine", "other_number < number", "other_number > number"),
    Mutant("a change that is no number passed over", "refine.cu", "refine", "ballot(faulty) == 0 &&", ""),
    Mutant("q left as it was", "refine.cu", "refine", "sum += off * group.added(i)", "sum += 0 * group.added(i)"),
    Mutant("rows past the end written", "refine.cu", "refine", "    if (!has_row) return;\n", ""),
    # Packing.
    Mutant(
        "own values counted as those before",
        "packing.cu",
        "packing",
        "return up_to_here - count;",
        "return up_to_here;",
    ),
    Mutant("padding bits taken for columns", "packing.cu", "packing", " & ((1u << inside) - 1)", ""),
    Mutant(
        "values beyond the row's are written",
        "packing.cu",
        "packing",
        "if (place < kept) values[place] = weight",
        "values[place] = weight",
    ),
    Mutant(
        "every 256 columns begin anew",
        "packing.cu",
        "packing",
        "columns);\n        u32 total, place = done",
        "columns);\n        u32 total, place = 0 * done",
    ),
    Mutant("flags past the last column read", "packing.cu", "packing", "first_column + i < columns && keep", "keep"),
    Mutant(
        "columns left in the packed order",
        "packing.cu",
        "packing",
        "permutation ? (u32)permutation[column + i] : column + i",
        "column + i",
    ),
)
