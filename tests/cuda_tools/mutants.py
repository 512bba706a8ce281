"""Kernels broken on purpose, and who notices: the host shim, the PTX interpreter, or both.

A check that no broken kernel fails is no check. `python -m cuda_tools.mutants`, from tests/, prints the table of
docs/kernels.md; it takes some minutes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cuda_tools import host, ptx
from cuda_tools.layers import assert_accurate, assert_error_sums, random_inputs, random_layer
from streamprune_kernels.gemm import (
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear,
    sparse_linear_with_error,
)
from streamprune_kernels.launch import FOLDER, Launch, Run, joined_source
from streamprune_kernels.metadata import SparseWeight, make_metadata, metadata_of_mask

SCHEDULES = (0, 1, 2)
NOISE = r"^.*thread \d+: |^.*block \(.*?\): |^\w+: | at \d{6,}|: nearest is .*$|, at `.*`$"  # where it was
SHIM_ALONE = "inline assembly: the shim has its own"  # why the host shim does not run a mutant of device.cuh


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


def check_sparse(run: Run) -> None:
    """Two tiles each way, neither full, five steps through three stages."""
    layer = random_layer(190, 320, 2, 4, torch.float16)
    weight = SparseWeight(layer.values, metadata_of_mask(layer.mask))
    x, reference = random_inputs(150, 320, torch.float16), random_inputs(150, 190, torch.float16)
    y, error, norm = sparse_linear_with_error(x, weight, reference, layer.bias, tile=128, run=run)
    assert_accurate(y, x, layer)
    assert_error_sums(y, reference, error, norm)
    unrounded = sparse_linear(x, weight, layer.bias, float_output=True, tile=128, run=run)
    assert_accurate(unrounded, x, layer)
    assert torch.equal(y, unrounded.half()), "y is not the rounded sum"


def check_nm(run: Run) -> None:
    """A pattern whose groups are no whole bytes, and one of the fast ways; the last step is not full."""
    for kept, group_size in ((3, 12), (4, 8)):
        layer = random_layer(150, 264, kept, group_size, torch.bfloat16)
        weight = nm_weight(layer.values, layer.mask, kept, group_size)
        x, reference = random_inputs(20, 264, torch.bfloat16), random_inputs(20, 150, torch.bfloat16)
        y, error, norm = nm_linear_with_error(x, weight, reference, layer.bias, run=run)
        assert_accurate(y, x, layer)
        assert_error_sums(y, reference, error, norm)
        unrounded = nm_linear_cuda(x, weight, layer.bias, float_output=True, run=run)
        assert torch.equal(y, unrounded.bfloat16()), "y is not the rounded sum"


def check_metadata(run: Run) -> None:
    """And that the product can use it."""
    layer = random_layer(90, 192, 2, 4, torch.float16)
    metadata = make_metadata(layer.mask, run=run)
    assert torch.equal(metadata, metadata_of_mask(layer.mask)), "metadata differs"
    broken = layer.mask.clone()
    broken[89, 23] ^= 1
    try:
        make_metadata(broken, run=run)
    except ValueError:
        return
    raise AssertionError("a mask that is not 2:4 is taken")


CASES: dict[str, Callable[[Run], None]] = {
    "sparse_gemm": check_sparse,
    "nm_gemm": check_nm,
    "metadata": check_metadata,
}


def noticed_by_host(mutant: Mutant | None, case: str) -> str | None:
    """What the host shim says under some schedule; None if nothing. Bank conflicts count as noticed."""

    def check(schedule: int) -> None:
        def run(launch: Launch) -> None:
            read = host.read_over_shim
            source = mutant.source(launch.source, read) if mutant else host.host_source(launch.source)
            counts = host.run_text(source, launch, schedule)
            assert not counts.bank_conflicts, f"{counts.bank_conflicts} bank conflicts"

        CASES[case](run)

    return _first_complaint(check, host.HostFault)


def noticed_by_ptx(mutant: Mutant | None, case: str) -> str | None:
    """What the PTX interpreter says under some schedule; None if nothing."""

    def check(schedule: int) -> None:
        def run(launch: Launch) -> None:
            source = mutant.source(launch.source, lambda name: (FOLDER / name).read_text()) if mutant else None
            ptx.run(launch, schedule, source)

        CASES[case](run)

    return _first_complaint(check, ptx.PtxError)


def _first_complaint(check: Callable[[int], None], fault: type[Exception]) -> str | None:
    for schedule in SCHEDULES:
        try:
            check(schedule)
        except fault as error:
            if "does not compile" in str(error):
                raise
            return re.sub(NOISE, "", str(error).splitlines()[0])
        except (AssertionError, ValueError) as error:  # wrong results, or a launcher that refuses what it should not
            return str(error).splitlines()[0]
    return None


def outcome(mutant: Mutant) -> tuple[str | None, str | None]:
    """What the host shim and the PTX interpreter say of a mutant."""
    by_host = None if mutant.file == "device.cuh" else noticed_by_host(mutant, mutant.case)
    return by_host, noticed_by_ptx(mutant, mutant.case)


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
        "WARP_TILE + lane % 16, lane / 16)",
        "WARP_TILE + lane / 16 * 8 + lane % 8, lane / 8 % 2)",
    ),
    Mutant(
        "X's rows shifted by one",
        "sparse_gemm.cu",
        "sparse_gemm",
        "WARP_TILE + lane % 8,",
        "WARP_TILE + (lane + 1) % 8,",
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
        "min(place.first_out / WARP_TILE + threadIdx.x / 32, row_blocks - 1)",
        "place.first_out / WARP_TILE + threadIdx.x / 32 + 0 * row_blocks",
    ),
    Mutant(
        "metadata overlaps X in a stage",
        "sparse_gemm.cu",
        "sparse_gemm",
        "METADATA = X + X_TILE_BYTES;",
        "METADATA = X + X_TILE_BYTES - CHUNK_BYTES;",
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
        "min(product.tokens - place.first_token, (u32)TILE_TOKENS)",
        "min(product.tokens - place.first_token + 1, (u32)TILE_TOKENS)",
    ),
    Mutant(
        "bias of the tile's first features", "gemm.cuh", "sparse_gemm", "product.bias[out]", "product.bias[threadIdx.x]"
    ),
    Mutant(
        "partial sums of token tiles overlap",
        "gemm.cuh",
        "sparse_gemm",
        "place.token_tile * 2 * product.out_features",
        "place.token_tile * product.out_features",
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
)


def main() -> None:
    print("| file | mutant | host shim | PTX interpreter |\n| --- | --- | --- | --- |")
    for mutant in MUTANTS:
        by_host, by_ptx = outcome(mutant)
        if mutant.file == "device.cuh":
            by_host = SHIM_ALONE
        print(f"| {mutant.file} | {mutant.name} | {by_host or '-'} | {by_ptx or '-'} |", flush=True)


if __name__ == "__main__":
    main()
