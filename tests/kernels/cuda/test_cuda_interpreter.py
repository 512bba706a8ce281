"""The PTX interpreter itself, on small kernels: what it computes, and that it notices what no kernel may do."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from cuda_tools import ptx
from cuda_tools.ptx_arithmetic import bfloat16, fused, operation
from cuda_tools.ptx_text import PtxError, parse

from streamprune_kernels.launch import FOLDER, Argument, Launch

DEVICE = (FOLDER / "device.cuh").read_text()
DTYPES = {"Float16": torch.float16, "BFloat16": torch.bfloat16}


def run(
    body: str, *arguments: Argument, parameters: str, threads: int = 32, shared: int = 0, schedule: int = 0
) -> None:
    """Run one block of a kernel with this body."""
    source = (
        DEVICE
        + f'extern "C" __global__ void kernel({parameters}) {{ const u32 tid = threadIdx.x; (void)tid;\n{body}\n}}'
    )
    launch = Launch("handwritten", "kernel", (1, 1, 1), (threads, 1, 1), shared, arguments)
    ptx.run(launch, schedule, source)


def words(count: int = 32) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


# --- matrices: fragments written element by element, as the manual's tables have them ---------------------------------


def halves_to_registers(elements: dict[tuple[int, int], torch.Tensor], registers: int) -> torch.Tensor:
    """(lane, i) -> element i of the lane, to int32 [32, registers], two elements each."""
    held = torch.zeros(32, 2 * registers, dtype=torch.int16)
    for (lane, i), value in elements.items():
        held[lane, i] = value.view(torch.int16)
    return held.view(torch.int32)


def a_elements(a: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Manual, m16n8k16, fragment A: a0..a7."""
    found = {}
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            found[lane, i] = a[row, column]
    return found


def b_elements(b: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Manual, m16n8k16 (b0..b3) and sparse m16n8k32 (b0..b7), fragment B: column group, rows from 2 thread on."""
    return {
        (lane, i): b[(lane % 4) * 2 + (i & 1) + 8 * (i // 2), lane >> 2]
        for lane in range(32)
        for i in range(len(b) // 4)
    }


def product_of_registers(c: torch.Tensor, type_name: str, call: str, *registers: torch.Tensor) -> torch.Tensor:
    """d [16, 8] of one mma whose operands the lanes load from int32 [32, n] tensors; c0..c3 as the manual's table."""
    held = torch.zeros(32, 4)
    for lane in range(32):
        for i in range(4):
            held[lane, i] = c[(lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)]
    counts = [tensor.shape[1] for tensor in registers]
    loads = "".join(
        f"u32 r{n}[{count}]; for (int i = 0; i < {count}; i++) r{n}[i] = p{n}[tid * {count} + i];"
        for n, count in enumerate(counts)
    )
    body = f"float d[4]; for (int i = 0; i < 4; i++) d[i] = c[tid * 4 + i]; {loads} {type_name}::{call};"
    body += "for (int i = 0; i < 4; i++) c[tid * 4 + i] = d[i];"
    parameters = "float* c" + "".join(f", const u32* p{n}" for n in range(len(counts)))
    run(body, held, *registers, parameters=parameters)
    d = torch.zeros(16, 8)
    for lane in range(32):
        for i in range(4):
            d[(lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)] = held[lane, i]
    return d


@pytest.mark.parametrize("type_name", DTYPES)
def test_dense_product(type_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(DTYPES[type_name]) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    registers = halves_to_registers(a_elements(a), 4), halves_to_registers(b_elements(b), 2)
    d = product_of_registers(c, type_name, "mma_dense(d, r0, r1[0], r1[1])", *registers)
    assert torch.equal(d, (c.double() + a.double() @ b.double()).float())


# Manual, figure of the sparse m16n8k32's metadata for 16-bit types: the lanes that give rows 0-7 their bits 0-15 and
# rows 8-15 their bits 16-31, for dense columns 0-15 and 16-31.
METADATA_LANES = {
    0: ([0, 4, 8, 12, 16, 20, 24, 28], [1, 5, 9, 13, 17, 21, 25, 29]),
    1: ([2, 6, 10, 14, 18, 22, 26, 30], [3, 7, 11, 15, 19, 23, 27, 31]),
}


def sparse_operands(a: torch.Tensor, selector: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Registers of the kept values, and metadata int32 [32, 1], of a 2:4 matrix [16, 32] without zeros kept."""
    kept = torch.stack([a[row][a[row] != 0] for row in range(16)])  # [16, 16]
    metadata = [0xEEEEEEEE] * 32  # what the other lanes hold has no effect
    for half, lanes in enumerate(METADATA_LANES[selector]):
        for row, lane in enumerate(lanes):
            metadata[lane] = 0
            for second in (0, 1):
                for group in range(4):
                    columns = a[row + 8 * second, 16 * half + 4 * group :][:4].nonzero()[:, 0].tolist()
                    metadata[lane] |= (columns[0] | columns[1] << 2) << (16 * second + 4 * group)
    return halves_to_registers(a_elements(kept), 4), torch.tensor(np.array(metadata, np.uint32).view(np.int32))[:, None]


@pytest.mark.parametrize("selector", METADATA_LANES)
@pytest.mark.parametrize("type_name", DTYPES)
def test_sparse_product(type_name: str, selector: int) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).to(DTYPES[type_name]) for shape in ((16, 32), (32, 8)))
    scores = torch.rand(16, 8, 4, generator=generator)
    a[(scores < scores.sort(dim=2).values[:, :, 2:3]).view(16, 32)] = 0
    c = torch.randn(16, 8, generator=generator)
    values, metadata = sparse_operands(a, selector)
    operands = values, halves_to_registers(b_elements(b), 4), metadata
    d = product_of_registers(c, type_name, f"mma_sparse<{selector}>(d, r0, r1, r2[0])", *operands)
    assert torch.equal(d, (c.double() + a.double() @ b.double()).float())
    zeros = torch.zeros_like(metadata)
    with pytest.raises(PtxError, match="undefined behaviour"):
        product_of_registers(c, type_name, f"mma_sparse<{selector}>(d, r0, r1, r2[0])", *operands[:2], zeros)


@pytest.mark.parametrize("threads", [32, 64])
def test_ldmatrix(threads: int) -> None:
    """Rows in any order: lane 8 m + i of a warp names row i of matrix m."""
    stored = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(2)).int().repeat(threads // 32)
    out = torch.zeros(threads, 4, dtype=torch.int32)
    body = """
    if (tid < 32) store_shared_chunk(dynamic_shared() + 16 * tid, stored[tid]);
    __syncthreads();
    u32 fragment[4];
    ldmatrix_x4(fragment, dynamic_shared() + 16 * rows[tid]);
    for (int i = 0; i < 4; i++) out[4 * tid + i] = fragment[i];"""
    parameters = "const Chunk* stored, const int* rows, u32* out"
    run(body, stored, rows, out, parameters=parameters, threads=threads, shared=512)
    for lane in range(threads):
        for matrix in range(4):
            row = rows[8 * matrix + lane % 32 // 4]
            assert out.view(torch.int16)[lane, 2 * matrix].item() == stored[row, lane % 4 * 2]
            assert out.view(torch.int16)[lane, 2 * matrix + 1].item() == stored[row, lane % 4 * 2 + 1]


# --- memory ----------------------------------------------------------------------------------------------------------

UNWRITTEN = -1  # all bits set


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_copies_arrive_when_they_are_waited_for(schedule: int) -> None:
    """Two groups: neither is there at once, the first after wait<1>, the second, of zeros, after wait<0>."""
    source = torch.arange(1, 129, dtype=torch.int32)
    out = torch.zeros(32, 6, dtype=torch.int32)
    body = """
    const u32 first = dynamic_shared() + 16 * tid, second = first + 512;
    store_shared_chunk(first, source[tid]);
    store_shared_chunk(second, source[tid]);
    cp_async_chunk(first, source + tid);
    cp_async_commit();
    cp_async_chunk(second, source + tid, 0);
    cp_async_commit();
    out[6 * tid] = load_shared_chunk(first).word[3], out[6 * tid + 1] = load_shared_chunk(second).word[3];
    cp_async_wait<1>();
    out[6 * tid + 2] = load_shared_chunk(first).word[3], out[6 * tid + 3] = load_shared_chunk(second).word[3];
    cp_async_wait<0>();
    out[6 * tid + 4] = load_shared_chunk(first).word[3], out[6 * tid + 5] = load_shared_chunk(second).word[3];"""
    run(body, source, out, parameters="const Chunk* source, u32* out", shared=1024, schedule=schedule)
    for lane in range(32):
        there = 4 * lane + 4
        assert out[lane].tolist() == [UNWRITTEN, UNWRITTEN, there, UNWRITTEN, there, 0]


def test_a_missing_barrier_shows_between_schedules() -> None:
    body = """
    store_shared_float(dynamic_shared() + 4 * tid, (float)tid);
    BARRIER
    out[tid] = load_shared_float(dynamic_shared() + 4 * (63 - tid));"""
    results = {}
    for barrier in ("", "__syncthreads();"):
        for schedule in ptx.SCHEDULES:
            out = torch.zeros(64)
            text = body.replace("BARRIER", barrier)
            run(text, out, parameters="float* out", threads=64, shared=256, schedule=schedule)
            results[barrier, schedule] = out
    reverse = torch.arange(63.0, -1, -1)
    assert all(torch.equal(results["__syncthreads();", schedule], reverse) for schedule in ptx.SCHEDULES)
    assert not torch.equal(results["", 1], reverse)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[tid + 1] = 1;", r"global access of 4 bytes at \d+ out of bounds"),
        ("if (tid == 7) out[-1] = 1;", "global access"),
        ("out[tid] = (int)load_shared_float(dynamic_shared() + 4 * tid + 4);", "shared access of 4 bytes"),
        ("store_shared_float(4 * tid, 1);", "shared access"),
        ("out[tid] = (int)load_shared_float(dynamic_shared() + 2 * tid);", "unaligned"),
        ("*(u64*)(out + 2 * tid % 8 + 1) = 1;", "unaligned"),
        ("out[0] = (int)tid;", "different values to one address"),
        ("cp_async_chunk(dynamic_shared(), out + 32);", "out of bounds"),
        ("if (tid < 16) out[tid] = (int)shuffle_xor((int)tid, 1);", "do not take part"),
        ("if (tid < 16) { u32 f[4]; ldmatrix_x4(f, dynamic_shared()); out[tid] = f[0]; }", "part of a warp"),
        ("if (tid < 16) __syncthreads();", "a barrier is not reached by all threads"),
        ("out[tid] = (int)__sinf((float)tid);", "not understood: sin.approx"),
        ("out[tid] = atomicAdd(out, 1);", "result several lanes read"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body, words(), parameters="int* out", shared=128)


def test_the_old_value_of_an_atomic_addition_by_one_lane() -> None:
    out = words()
    out[0] = 5
    run("if (tid == 7) out[tid] = atomicAdd(out, 3);", out, parameters="int* out")
    assert (int(out[0]), int(out[7])) == (8, 5)


def test_a_part_of_a_warp_at_another_barrier() -> None:
    body = "if (tid < 16) { __syncthreads(); out[tid] = 1; } else { out[tid] = 2; __syncthreads(); }"
    with pytest.raises(PtxError, match="a barrier is reached by a part of a warp"):
        run(body, words(64), parameters="volatile int* out", threads=64)


def test_tensors_are_all_that_may_be_touched() -> None:
    """Neighbours in memory are not: a view ends where its last element does, and its gaps belong to it."""
    storage = torch.zeros(64, dtype=torch.int32)
    run("out[tid] = 1;", storage[16:48], parameters="int* out")
    assert storage.sum() == storage[16:48].sum() == 32
    with pytest.raises(PtxError, match="out of bounds"):
        run("out[tid] = 1;", storage[16:47], parameters="int* out")
    rows = torch.zeros(4, 16, dtype=torch.int32)[:, :8]
    with pytest.raises(PtxError, match="out of bounds"):
        run("out[2 * tid] = 1;", rows, parameters="int* out")
    run("out[tid % 4 * 16 + tid / 4] = (int)tid;", rows, parameters="int* out")
    assert torch.equal(rows.T.flatten(), torch.arange(32, dtype=torch.int32))


def test_launches_that_do_not_fit_the_kernel() -> None:
    for arguments, message in [((words(), 1), "takes 1 arguments"), ((1.5,), "is u64, the launch passes f32")]:
        with pytest.raises(PtxError, match=message):
            run("out[tid] = 1;", *arguments, parameters="int* out")
    launch = Launch("handwritten", "other", (1, 1, 1), (32, 1, 1), 0, ())
    with pytest.raises(PtxError, match="has no kernel other, it has kernel"):
        ptx.run(launch, 0, 'extern "C" __global__ void kernel() {}')


# --- control ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_lanes_go_apart_and_meet_again(schedule: int) -> None:
    """Loops of each lane's own length inside branches; the warp votes, and all threads meet, after each."""
    body = """
    u32 steps = 0, seen = 0;
    for (u32 n = start[tid]; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) {
        if (n % 3 == 0) continue;
        steps++;
        if (steps > 40) break;
    }
    seen = ballot(steps % 2);
    __syncthreads();
    if (tid % 3) for (u32 i = 0; i < tid % 7; i++) steps += i * seen % 5;
    out[tid] = (int)(shuffle(steps, 31 - tid % 32) + seen % 1000);"""
    start = torch.arange(1, 65, dtype=torch.int32)
    out = words(64)
    run(body, start, out, parameters="const u32* start, int* out", threads=64, schedule=schedule)
    steps = []
    for begin in start.tolist():
        count, n = 0, begin
        while n != 1:
            if n % 3:
                count += 1
                if count > 40:
                    break
            n = 3 * n + 1 if n % 2 else n // 2
        steps.append(count)
    expected = []
    for warp in (0, 32):
        seen = sum((steps[warp + lane] % 2) << lane for lane in range(32))
        lanes = []
        for lane in range(32):
            thread = warp + lane
            extra = sum((i * seen & 0xFFFFFFFF) % 5 for i in range(thread % 7)) if thread % 3 else 0
            lanes.append(steps[thread] + extra)
        expected += [lanes[31 - lane] + seen % 1000 for lane in range(32)]
    assert out.tolist() == expected


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_blocks_threads_and_arguments(schedule: int) -> None:
    """Every thread of a grid of three dimensions once, with a float, a negative int and a null pointer."""
    source = (
        DEVICE
        + """
extern "C" __global__ void kernel(int* out, const int* nothing, int offset, float factor) {
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(out + block * 32 + thread, (int)(factor * (float)thread) + offset + (nothing ? 1000 : (int)block));
}"""
    )
    out = words(6 * 32)
    ptx.run(Launch("handwritten", "kernel", (3, 1, 2), (4, 4, 2), 0, (out, None, -5, 1.5)), schedule, source)
    assert out.tolist() == [int(1.5 * thread) - 5 + block for block in range(6) for thread in range(32)]


@pytest.mark.parametrize("schedule", ptx.SCHEDULES)
def test_shuffles(schedule: int) -> None:
    body = """
    out[tid] = shuffle((int)tid, 3) + 100 * shuffle_xor((int)tid, 5);
    out[32 + tid] = shuffle_up((int)tid, 2) + 100 * shuffle_down((int)tid, 7);
    out[64 + tid] = (int)shuffle_xor((double)tid, 16);"""
    out = words(96)
    run(body, out, parameters="int* out", schedule=schedule)
    lanes = range(32)
    up, down = (
        [lane - 2 if lane >= 2 else lane for lane in lanes],
        [lane + 7 if lane < 25 else lane for lane in lanes],
    )
    assert out[:32].tolist() == [3 + 100 * (lane ^ 5) for lane in lanes]
    assert out[32:64].tolist() == [up[lane] + 100 * down[lane] for lane in lanes]
    assert out[64:].tolist() == [lane ^ 16 for lane in lanes]


# --- arithmetic ------------------------------------------------------------------------------------------------------


def float32_of(exact: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even, by comparing it with the neighbours of a first guess."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(side)) for side in (-np.inf, np.inf)] + [guess]
    distance = [abs(Fraction(float(one)) - exact) for one in near]
    best = [one for one, d in zip(near, distance, strict=True) if d == min(distance)]
    return float(next((one for one in best if int(one.view(np.uint32)) % 2 == 0), best[0]))


def test_fma_rounds_once() -> None:
    generator = np.random.default_rng(3)
    a, b = (generator.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (-a.astype(np.float64) * b * (1 + generator.choice([0, 2.0**-25, 2.0**-12, 3.0], 3000))).astype(np.float32)
    # a product between two neighbours of c's grid, and a c that is just too small to matter, or does
    a[:2], b[:2], c[:2] = 1 + 2.0**-12, 1 + 2.0**-12, [2.0**-60, -(2.0**-60)]
    expected = [
        float32_of(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert fused(a, b, c).tolist() == expected
    with pytest.raises(PtxError, match="factors that float32 holds"):
        fused(np.array([0.1]), np.array([0.1]), np.array([0.1]))


def test_conversions_are_torchs() -> None:
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    finite = x[torch.isfinite(x)]
    assert np.array_equal(bfloat16(finite.numpy()).view(np.int16), finite.bfloat16().view(torch.int16).numpy())
    with np.errstate(over="ignore"):
        halves = operation("cvt.rn.f16.f32")[2](finite.numpy())
    assert np.array_equal(halves.view(np.int16), finite.half().view(torch.int16).numpy())
    whole = operation("cvt.rzi.s32.f32")[2](np.array([1.9, -1.9, 3e9, -3e9, np.nan], np.float32))
    assert whole.tolist() == [1, -1, 2**31 - 1, -(2**31), 0]


def signed(value: int) -> int:
    return struct.unpack("<i", struct.pack("<I", value & 0xFFFFFFFF))[0]


INTEGER_OPERATIONS = {
    "add.s32": lambda a, b: a + b,
    "mul.lo.s32": lambda a, b: signed(a) * signed(b),
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.wide.s32": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32": lambda a, b: a * b,
    "div.s32": lambda a, b: int(Fraction(signed(a), signed(b))),
    "rem.s32": lambda a, b: signed(a) - signed(b) * int(Fraction(signed(a), signed(b))),
    "div.u32": lambda a, b: a // b,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "shl.b32": lambda a, b: a << (b % 40),
    "shr.u32": lambda a, b: a >> (b % 40),
    "shr.s32": lambda a, b: signed(a) >> (b % 40),
    "shf.l.wrap.b32": lambda a, b, c: ((b << 32 | a) << c % 32) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> c % 32,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "popc.b32": lambda a: a.bit_count(),
    "clz.b32": lambda a: 32 - a.bit_length(),
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "not.b32": lambda a: ~a,
    "neg.s32": lambda a: -signed(a),
    "bfe.u32": lambda a, b, c: a >> b % 24 & ((1 << c % 9) - 1),
    "bfi.b32": lambda a, b, c, d: b & ~(((1 << d % 9) - 1) << c % 24) | (a & ((1 << d % 9) - 1)) << c % 24,
    "prmt.b32": lambda a, b, c: sum(((b << 32 | a) >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
}
# What the last operands are taken modulo of above, for the manual's range or for all cases to occur.
REDUCED = {"shl.b32": (40,), "shr.u32": (40,), "shr.s32": (40,), "bfe.u32": (24, 9), "bfi.b32": (24, 9)}


@pytest.mark.parametrize("opcode", INTEGER_OPERATIONS)
def test_integer_instructions(opcode: str) -> None:
    function = INTEGER_OPERATIONS[opcode]
    kinds, result, compute = operation(opcode)
    generator = np.random.default_rng(4)
    values = [generator.choice([1, 2, 7, 31, 2**31, 2**32 - 1, *generator.integers(1, 2**32, 40)], 200) for _ in kinds]
    if opcode == "prmt.b32":
        values[2] &= 0x7777
    given = [value.copy() for value in values]
    for place, modulus in enumerate(REDUCED.get(opcode, ())):
        given[len(kinds) - len(REDUCED[opcode]) + place] %= modulus
    dtypes = {"u": np.uint32, "b": np.uint32, "s": np.int32}
    with np.errstate(all="ignore"):
        typed = [one.astype(np.uint32).view(dtypes[kind[0]]) for one, kind in zip(given, kinds, strict=True)]
        got = compute(*typed)
    bits = 8 * got.itemsize
    expected = [function(*(int(one[i]) for one in values)) % 2**bits for i in range(200)]
    assert [int(one) % 2**bits for one in got] == expected
    assert result.endswith(str(bits))


@pytest.mark.parametrize(
    ("name", "found"),
    [("eq", [1, 0, 0]), ("ne", [0, 1, 0]), ("equ", [1, 0, 1]), ("neu", [0, 1, 1]), ("lt", [0, 1, 0]),
     ("geu", [1, 0, 1]), ("nan", [0, 0, 1]), ("num", [1, 1, 0])],
)  # fmt: skip
def test_comparisons_with_what_is_no_number(name: str, found: list[int]) -> None:
    """1 with 1, 2 and NaN, on both sides (manual, setp: ordered comparisons are false where an operand is NaN)."""
    known = operation(f"setp.{name}.f32")
    assert known is not None
    a, b = np.array([1, 1, 1], dtype=np.float32), np.array([1, 2, np.nan], dtype=np.float32)
    assert known[2](a, b).tolist() == found
    if name not in ("lt", "geu"):
        assert known[2](b, a).tolist() == found


def test_what_is_not_understood() -> None:
    body = ".visible .entry k(.param .u64 k_0) {{ .reg .b32 %r<3>; {} ret; }}"
    launch = Launch("handwritten", "k", (1, 1, 1), (32, 1, 1), 0, (words(),))
    for statement, message in [
        ("mad.hi.u32 %r1, %r1, %r1, %r1;", "not understood: mad.hi.u32"),
        ("add.ftz.f32 %r1, %r1, %r1;", "not understood: add.ftz.f32"),
        ("mov.u32 %r1, %clock;", "not understood"),
        ("mov.u32 %r1, table;", "table is no shared variable"),
        (".local .b8 stack[8];", "a directive is not understood"),
        ("add.s32 %r1, %r2, 1;", "%r2 is read before it is written"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "before it is written"),
    ]:
        with pytest.raises(PtxError, match=message):
            ptx.run_ptx(body.format(statement), launch)
    with pytest.raises(PtxError, match="a function was not inlined"):
        parse(".func f() { ret; }" + body.format(""))
