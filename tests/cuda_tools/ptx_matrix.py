"""The tensor-core instructions of the PTX interpreter: ldmatrix, mma and mma.sp over whole warps.

Which lane holds what (PTX ISA, "Warp-level matrix instructions"), with g = lane / 4 and t = lane % 4. A fragment's
register holds two neighbouring 16-bit values, the first in its low half:

    A 16x16   register r: row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next; for mma.sp these are A's kept values
    B Kx8     register r: column g, rows 2t + 8 r and the next
    C, D 16x8 register r: row g + 8 (r / 2), column 2t + r % 2, one float32

Products of 16-bit values are exact in float64; their sum with C is rounded once to float32. A tensor core's own order
and rounding of these sums is not specified.
"""

import numpy as np

from cuda_tools.ptx_arithmetic import NUMPY
from cuda_tools.ptx_text import PtxError

LANES = 32
SHAPES = {"mma.sync.aligned.m16n8k16.row.col": 16, "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col": 32}


def _places(rows: int, columns: int, by_column: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Register, lane and half of each element [rows, columns] of A, or of B if `by_column`."""
    i, j = np.indices((rows, columns))
    if by_column:
        i, j = j, i
    register = (i // 8) + 2 * (j // 8) if not by_column else j // 8
    return register, 4 * (i % 8) + j % 8 // 2, j % 2


A_PLACES = _places(16, 16, by_column=False)
B_PLACES = {rows: _places(rows, 8, by_column=True) for rows in (16, 32)}
D_ROW, D_COLUMN = np.indices((16, 8))
D_REGISTER, D_LANE = 2 * (D_ROW // 8) + D_COLUMN % 2, 4 * (D_ROW % 8) + D_COLUMN // 2
# Of mma.sp, for each row and group of four dense columns: which lane (selector 0) holds its metadata, and at which bit.
GROUP_ROW, GROUP = np.indices((16, 8))
METADATA_LANE, METADATA_SHIFT = 4 * (GROUP_ROW % 8) + GROUP // 4, 16 * (GROUP_ROW // 8) + 4 * (GROUP % 4)


def multiply(
    opcode: str,
    a: list[np.ndarray],
    b: list[np.ndarray],
    c: list[np.ndarray],
    metadata: np.ndarray | None,
    selector: int,
) -> list[np.ndarray]:
    """d = A B + c of every warp; registers are uint32 [warps * 32]. Raises PtxError for an unknown shape or type."""
    shape, types = opcode.rsplit(".f32.", 1)[0], opcode.split(".row.col.")[1]
    depth = SHAPES.get(shape)
    if depth is None or types not in ("f32.f16.f16.f32", "f32.bf16.bf16.f32"):
        raise PtxError(f"{opcode} is not understood")
    bf16 = "bf16" in types
    left, right = _matrix(a, A_PLACES, bf16), _matrix(b, B_PLACES[depth], bf16)
    if metadata is not None:
        left = spread(left, metadata.reshape(-1, LANES), selector)
    added = np.stack(c).view(np.float32).reshape(4, -1, LANES)
    d = (left @ right + added[D_REGISTER, :, D_LANE].transpose(2, 0, 1)).astype(np.float32)
    result = np.empty((4, len(d), LANES), np.float32)
    result[D_REGISTER, :, D_LANE] = d.transpose(1, 2, 0)
    return [register.ravel().view(np.uint32) for register in result]


def spread(kept: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """Dense A [warps, 16, 32] of kept values [warps, 16, 16] and metadata uint32 [warps, 32]."""
    nibbles = (metadata[:, METADATA_LANE + 2 * selector] >> METADATA_SHIFT.astype(np.uint32)) & np.uint32(15)
    first, second = (nibbles & 3).astype(np.int64), (nibbles >> 2).astype(np.int64)
    if (first >= second).any():
        raise PtxError("mma.sp: places of kept values are not in ascending order, which is undefined behaviour")
    dense = np.zeros((len(kept), 16, 32))
    columns = np.stack([4 * GROUP + first, 4 * GROUP + second], axis=3).reshape(len(kept), 16, 16)
    np.put_along_axis(dense, columns, kept, axis=2)
    return dense


def _matrix(registers: list[np.ndarray], places: tuple[np.ndarray, ...], bf16: bool) -> np.ndarray:
    """Matrices float64 [warps, rows, columns] of a fragment."""
    register, lane, half = places
    halves = np.stack(registers).view(np.uint16).reshape(len(registers), -1, LANES, 2)
    bits = halves[register, :, lane, half]  # [rows, columns, warps]
    values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32) if bf16 else bits.view(NUMPY["f16"])
    return values.astype(np.float64).transpose(2, 0, 1)


def matrix_rows(addresses: np.ndarray, matrices: int) -> np.ndarray:
    """Addresses [matrices, lanes] that each lane's register of ldmatrix is read from.

    Lane 8 m + i of a warp gives the address of row i of matrix m; lane l receives 4 bytes of its row l / 4.
    """
    lanes = np.arange(LANES)
    rows = addresses.reshape(-1, LANES)
    return np.stack([(rows[:, 8 * m + lanes // 4] + 4 * (lanes % 4)).ravel() for m in range(matrices)])
