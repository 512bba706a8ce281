"""Kernels broken on purpose, and who notices: the host shim, the PTX interpreter, or both.

A check that no broken kernel fails is no check. `python -m cuda_tools.mutation`, from tests/, prints the table of
docs/kernels.md; it takes some minutes.
"""

import re
from collections.abc import Callable

import torch
from refinement_problems import clone, whole_problem

from cuda_tools import host, ptx
from cuda_tools.layers import assert_accurate, assert_error_sums, random_inputs, random_layer
from cuda_tools.mutants import MUTANTS, Mutant
from streamprune.config import NMPattern
from streamprune_kernels import reference
from streamprune_kernels.decode import nm_decode
from streamprune_kernels.gemm import (
    COMMON_TILE,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear,
    sparse_linear_with_error,
)
from streamprune_kernels.launch import FOLDER, Launch, Run
from streamprune_kernels.metadata import SparseWeight, make_metadata, metadata_of_mask
from streamprune_kernels.packing import expand_cuda, pack_mask_cuda, pack_values_cuda, unpack_mask_cuda
from streamprune_kernels.refine import refine_rows_cuda
from streamprune_kernels.search import hinge_sums_cuda, local_swaps_cuda
from streamprune_kernels.statistics import STATIC_BYTES, Windows, add_tokens, add_tokens_cuda

SCHEDULES = (0, 1, 2)
NOISE = r"^.*thread \d+: |^.*block \(.*?\): |^\w+: | at \d{6,}|: nearest is .*$|, at `.*`$"  # where it was
SHIM_ALONE = "inline assembly: the shim has its own"  # why the host shim does not run a mutant of device.cuh


def check_sparse(run: Run) -> None:
    """Two tiles each way, neither full, five steps through three stages."""
    layer = random_layer(190, 320, 2, 4, torch.float16)
    weight = SparseWeight(layer.values, metadata_of_mask(layer.mask))
    x, expected = random_inputs(150, 320, torch.float16), random_inputs(150, 190, torch.float16)
    y, error, norm = sparse_linear_with_error(x, weight, expected, layer.bias, tile=COMMON_TILE, run=run)
    assert_accurate(y, x, layer)
    assert_error_sums(y, expected, error, norm)
    unrounded = sparse_linear(x, weight, layer.bias, float_output=True, tile=COMMON_TILE, run=run)
    assert_accurate(unrounded, x, layer)
    assert torch.equal(y, unrounded.half()), "y is not the rounded sum"


def check_nm(run: Run) -> None:
    """A pattern whose groups are no whole bytes, and one of the fast ways; the last step is not full."""
    for kept, group_size in ((3, 12), (4, 8)):
        layer = random_layer(150, 264, kept, group_size, torch.bfloat16)
        weight = nm_weight(layer.values, layer.mask, kept, group_size)
        x, expected = random_inputs(20, 264, torch.bfloat16), random_inputs(20, 150, torch.bfloat16)
        y, error, norm = nm_linear_with_error(x, weight, expected, layer.bias, run=run)
        assert_accurate(y, x, layer)
        assert_error_sums(y, expected, error, norm)
        unrounded = nm_linear_cuda(x, weight, layer.bias, float_output=True, run=run)
        assert torch.equal(y, unrounded.bfloat16()), "y is not the rounded sum"


def check_parts(run: Run) -> None:
    """Five steps in three parts, the last of which is shorter; neither tile is full, nor the last four tokens."""
    layer = random_layer(190, 320, 2, 4, torch.float16)
    sparse = SparseWeight(layer.values, metadata_of_mask(layer.mask))
    x, expected = random_inputs(38, 320, torch.float16), random_inputs(38, 190, torch.float16)
    y, error, norm = sparse_linear_with_error(x, sparse, expected, layer.bias, tile=(128, 32), parts=3, run=run)
    assert_accurate(y, x, layer)
    assert_error_sums(y, expected, error, norm)
    layer = random_layer(150, 264, 3, 12, torch.bfloat16)
    weight = nm_weight(layer.values, layer.mask, 3, 12)
    x = random_inputs(18, 264, torch.bfloat16)
    assert_accurate(nm_linear_cuda(x, weight, layer.bias, parts=3, run=run), x, layer)


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


def check_decode(run: Run) -> None:
    """Two tiles of columns, the second not full; a pattern whose groups do not fill turns; 2:4, whose second tile has
    two turns; rows and vectors too few."""
    for in_features, kept, group_size, vectors in ((2304, 4, 8, 3), (768, 3, 8, 1), (3328, 2, 4, 3)):
        layer = random_layer(35, in_features, kept, group_size, torch.float16)
        weight = nm_weight(layer.values, layer.mask, kept, group_size)
        x = random_inputs(vectors, in_features, torch.float16)
        assert_accurate(nm_decode(x, weight, layer.bias, run=run), x, layer)


def check_statistics(run: Run) -> None:
    """Two sequences, the second wider and not all of it resident; then a NaN."""
    x = [scale * random_inputs(tokens, 40, torch.float16, tokens) for tokens, scale in ((70, 1), (131, 5))]
    states = []
    for _ in range(2):
        counts, exponent = torch.zeros(40, 64, dtype=torch.int32), torch.full((40,), -126, dtype=torch.int32)
        low = torch.full((40,), torch.inf)
        states.append((low, -low, torch.zeros(40).double(), Windows(exponent, torch.zeros_like(exponent), counts)))
    plain, state = states
    for rows in x:
        add_tokens(rows, *plain)
        add_tokens_cuda(rows, *state, run=run, shared_bytes=STATIC_BYTES + 64 * 67)
    torch.testing.assert_close(state[2], plain[2], rtol=1e-12, atol=0, msg=lambda text: f"sums differ: {text}")
    for name in ("exponent", "first_bin", "counts"):
        assert torch.equal(getattr(state[3], name), getattr(plain[3], name)), f"{name} of histograms differ"
    x[0][66, 5] = torch.nan
    for rows in x:
        add_tokens(rows, *plain[:3])
        add_tokens_cuda(rows, *state, run=run)
    for one, other in zip(state[:2], plain[:2], strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), "bounds differ"


def check_search(run: Run) -> None:
    """Whole scores, which add up exactly: more than a tile and a part; a last block that is short, and ties."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randint(0, 50, (n, 290), generator=generator).float() for n in (70, 9))
    expected = (s[None] - t[:, None]).clamp(min=0).sum(dim=2)
    assert torch.equal(hinge_sums_cuda(s, t, run=run), expected), "sums differ"
    for channels, rows, block, kept, group_size in ((40, 70, 24, 2, 4), (72, 20, 72, 1, 3)):
        s = torch.randint(0, 5, (channels, rows), generator=generator).float()
        arguments = s, torch.randperm(channels, generator=generator), block, kept, group_size, 32, 1e-6
        expected, found = reference.local_swaps(*arguments), local_swaps_cuda(*arguments, run=run)
        assert torch.equal(found, expected), "other swaps"


def check_refine(run: Run) -> None:
    """Whole numbers, exact and with many ties; a row that is no number; rows that do not fill a block."""
    for kept, group_size, least_gain in ((2, 4, 0.0), (2, 4, 0.5), (5, 12, 0.0)):
        plain = whole_problem(NMPattern(kept, group_size), 9, 4)
        plain[2][3, group_size] = torch.nan
        found = clone(plain)
        count = reference.refine_rows(*plain, 0.5, least_gain)
        assert refine_rows_cuda(*found, 0.5, least_gain, run=run) == count, "another number of groups changed"
        assert torch.equal(found[1], plain[1]), "masks differ"
        assert torch.equal(found[2].nan_to_num(), plain[2].nan_to_num()), "q differs"


def check_packing(run: Run) -> None:
    """Rows of more than a warp's 256 columns that are no whole bytes; a row that keeps too many."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 276, generator=generator).half()
    keep = reference.select_groups(torch.rand(weight.shape, generator=generator), 2, 4)
    mask, values = pack_mask_cuda(keep, run=run), pack_values_cuda(weight, keep, run=run)
    assert torch.equal(mask, reference.pack_mask(keep)), "the mask differs"
    assert torch.equal(unpack_mask_cuda(mask, 276, run=run), keep), "the unpacked mask differs"
    assert torch.equal(values, reference.pack_values(weight, keep)), "values differ"
    order, padded = torch.randperm(276, generator=generator), mask.clone()
    padded[:, -1] |= 0xF0
    expected = reference.expand(values, mask, 276, order)
    assert torch.equal(expand_cuda(values, padded, 276, order, run=run), expected), "the dense weight differs"
    keep[8, keep[8].logical_not().nonzero()[0]] = True
    try:
        pack_values_cuda(weight, keep, run=run)
    except ValueError:
        return
    raise AssertionError("a row that keeps too many is taken")


CASES: dict[str, Callable[[Run], None]] = {
    "sparse_gemm": check_sparse,
    "nm_gemm": check_nm,
    "parts": check_parts,
    "metadata": check_metadata,
    "decode": check_decode,
    "statistics": check_statistics,
    "search": check_search,
    "refine": check_refine,
    "packing": check_packing,
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


def main() -> None:
    print("| file | mutant | host shim | PTX interpreter |\n| --- | --- | --- | --- |")
    for mutant in MUTANTS:
        by_host, by_ptx = outcome(mutant)
        if mutant.file == "device.cuh":
            by_host = SHIM_ALONE
        print(f"| {mutant.file} | {mutant.name} | {by_host or '-'} | {by_ptx or '-'} |", flush=True)


if __name__ == "__main__":
    main()
