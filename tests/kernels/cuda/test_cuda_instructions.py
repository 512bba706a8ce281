"""Fragments of the tensor cores' instructions as the PTX manual's figures have them, not as our code has.

One warp runs one instruction; the test puts matrices into registers and takes them out by tables copied from the
figures, and the result must be the product. Run by both: the host shim, and the PTX that NVRTC emits.
"""

import numpy as np
import pytest
import torch
from cuda_tools import host, ptx

from streamprune_kernels.launch import FOLDER, Launch, joined_source

KERNEL = """
#include "device.cuh"
extern "C" __global__ void __launch_bounds__(32) one_product(const u32* a, const u32* b, const u32* e, float* d) {{
    const u32 lane = threadIdx.x;
    u32 a_fragment[4], b_fragment[4];
    float d_fragment[4];
    for (int r = 0; r < 4; r++) {{
        a_fragment[r] = a[4 * lane + r];
        b_fragment[r] = b[4 * lane + r];
        d_fragment[r] = d[4 * lane + r];
    }}
    {instruction}
    for (int r = 0; r < 4; r++) d[4 * lane + r] = d_fragment[r];
}}
"""
# One row of a figure for every eighth row: which thread of a group of four holds each pair of columns, in which
# registers. Row 8 i + g belongs to the group g. Pairs of registers count 16-bit values: register pair 2 is a2, a3.
A_ROWS = {
    0: ("T0 a0 a1", "T1 a0 a1", "T2 a0 a1", "T3 a0 a1", "T0 a4 a5", "T1 a4 a5", "T2 a4 a5", "T3 a4 a5"),
    8: ("T0 a2 a3", "T1 a2 a3", "T2 a2 a3", "T3 a2 a3", "T0 a6 a7", "T1 a6 a7", "T2 a6 a7", "T3 a6 a7"),
}
# Columns of B, pairs of its rows; column n belongs to the group n. The first 16 rows are all of a dense product's.
B_COLUMN = (
    *("T0 b0 b1", "T1 b0 b1", "T2 b0 b1", "T3 b0 b1", "T0 b2 b3", "T1 b2 b3", "T2 b2 b3", "T3 b2 b3"),
    *("T0 b4 b5", "T1 b4 b5", "T2 b4 b5", "T3 b4 b5", "T0 b6 b7", "T1 b6 b7", "T2 b6 b7", "T3 b6 b7"),
)
D_ROWS = {
    0: ("T0 c0 c1", "T1 c0 c1", "T2 c0 c1", "T3 c0 c1"),
    8: ("T0 c2 c3", "T1 c2 c3", "T2 c2 c3", "T3 c2 c3"),
}
# Metadata of a row's first and second 16 dense columns, by selector: thread of the group and first bit.
E_ROWS = {0: {0: ("T0", "T1"), 1: ("T2", "T3")}, 8: {0: ("T0", "T1"), 1: ("T2", "T3")}}
E_FIRST_BIT = {0: 0, 8: 16}


def place(group: int, cell: str) -> tuple[int, int]:
    """Lane and first value of a cell."""
    thread, first, second = cell.split()
    assert int(second[1:]) == int(first[1:]) + 1
    return 4 * group + int(thread[1:]), int(first[1:])


def a_registers(a: np.ndarray) -> np.ndarray:
    """16-bit values [32, 8] of A [16, 16]."""
    values = np.zeros((32, 8), np.uint16)
    for row in range(16):
        for pair, cell in enumerate(A_ROWS[row // 8 * 8]):
            lane, first = place(row % 8, cell)
            values[lane, first : first + 2] = a[row, 2 * pair : 2 * pair + 2]
    return values


def b_registers(b: np.ndarray) -> np.ndarray:
    """16-bit values [32, 8] of B [16 or 32, 8]; of 16 rows half of them."""
    values = np.zeros((32, 8), np.uint16)
    for column in range(8):
        for pair, cell in enumerate(B_COLUMN[: len(b) // 2]):
            lane, first = place(column, cell)
            values[lane, first : first + 2] = b[2 * pair : 2 * pair + 2, column]
    return values


def d_matrix(registers: np.ndarray) -> np.ndarray:
    """D [16, 8] of float32 [32, 4]."""
    d = np.zeros((16, 8), np.float32)
    for row in range(16):
        for pair, cell in enumerate(D_ROWS[row // 8 * 8]):
            lane, first = place(row % 8, cell)
            d[row, 2 * pair : 2 * pair + 2] = registers[lane, first : first + 2]
    return d


def metadata_registers(places: np.ndarray, selector: int) -> np.ndarray:
    """uint32 [32] of the kept places [16, 8 groups, 2]; all other bits are legal, and wrong."""
    lanes = np.full(32, 0xEEEEEEEE, np.uint64)
    for row in range(16):
        for half, thread in enumerate(E_ROWS[row // 8 * 8][selector]):
            lane = 4 * (row % 8) + int(thread[1:])
            for group in range(4):
                first, second = places[row, 4 * half + group]
                bit = np.uint64(E_FIRST_BIT[row // 8 * 8] + 4 * group)
                lanes[lane] = lanes[lane] & ~(np.uint64(15) << bit) | np.uint64(first | second << 2) << bit
    return lanes.astype(np.uint32)


def run_host(text: str, launch: Launch) -> None:
    host.run_text(joined_source("test", lambda name: text if name == "test" else host.read_over_shim(name)), launch)


def run_ptx(text: str, launch: Launch) -> None:
    ptx.run(launch, source=joined_source("test", lambda name: text if name == "test" else (FOLDER / name).read_text()))


def product(run, instruction, a, b, metadata, start):
    """D of one instruction on the bits of A and B, for a start D that is everywhere the same."""
    registers = [torch.from_numpy(x.view(np.int32).copy()) for x in (a_registers(a), b_registers(b), metadata)]
    d = torch.full((32, 4), start)
    run(
        KERNEL.format(instruction=instruction), Launch("test", "one_product", (1, 1, 1), (32, 1, 1), 0, (*registers, d))
    )
    return d_matrix(d.numpy())


def bits(dtype, *shape, seed):
    """Whole numbers, whose products are exact, as bits and as values."""
    values = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()


@pytest.mark.parametrize("run", [run_host, run_ptx])
@pytest.mark.parametrize(("type_name", "dtype"), [("Float16", torch.float16), ("BFloat16", torch.bfloat16)])
def test_dense_product(run, type_name, dtype):
    (a_bits, a), (b_bits, b) = bits(dtype, 16, 16, seed=0), bits(dtype, 16, 8, seed=1)
    instruction = f"{type_name}::mma_dense(d_fragment, a_fragment, b_fragment[0], b_fragment[1]);"
    d = product(run, instruction, a_bits, b_bits, np.zeros(32, np.uint32), start=3.0)
    assert np.array_equal(d, a @ b + 3)


@pytest.mark.parametrize("run", [run_host, run_ptx])
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("type_name", "dtype"), [("Float16", torch.float16), ("BFloat16", torch.bfloat16)])
def test_sparse_product(run, selector, type_name, dtype):
    (kept_bits, kept), (b_bits, b) = bits(dtype, 16, 16, seed=0), bits(dtype, 32, 8, seed=1)
    random = np.random.default_rng(2)
    places = np.sort(random.permuted(np.tile(np.arange(4), (16, 8, 1)), axis=2)[:, :, :2], axis=2)
    a = np.zeros((16, 8, 4))
    np.put_along_axis(a, places, kept.reshape(16, 8, 2), axis=2)
    instruction = f"{type_name}::mma_sparse<{selector}>(d_fragment, a_fragment, b_fragment, e[lane]);"
    d = product(run, instruction, kept_bits, b_bits, metadata_registers(places, selector), start=-2.0)
    assert np.array_equal(d, a.reshape(16, 32) @ b - 2)
