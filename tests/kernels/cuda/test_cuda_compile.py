"""Every CUDA kernel compiled for every supported GPU, and what its machine code consists of. No GPU is needed.

Each kernel of each .cu file has its gate below: a file or a kernel without one fails. Figures stand at the end of the
run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cuda_tools.nvrtc import CompilationError, compile_source, resources
from cuda_tools.sass import Machine, disassemble, main_loop, mix, products

from streamprune_kernels.gemm import COMMON_TILE, NARROW_TILE, NM_SHARED_BYTES, WIDE_TILE, sparse_shared_bytes
from streamprune_kernels.launch import FOLDER, cuda_source
from streamprune_kernels.search import SUMS_SHARED_BYTES, SWAPS_SHARED_BYTES

ARCHITECTURES = (80, 86, 89, 90)
REGISTERS = 65536  # of a multiprocessor
# Shared memory of a multiprocessor, of which each block takes 1 KiB for itself.
SHARED_BYTES = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024}
OWN_BYTES = 1024
Show = Callable[[str, str, int, str], None]
SOURCES = sorted(path.stem for path in FOLDER.glob("*.cu"))


@dataclass(frozen=True)
class Gate:
    """Bounds of the kernels whose names match: threads of a block, blocks that a multiprocessor must hold, dynamic
    shared memory of one, and the least share of matrix products in the main loop."""

    kernels: str
    threads: int
    blocks: int
    shared_bytes: int = 0
    product: str = ""
    share: float = 0


GATES = {
    "sparse_gemm": [
        Gate(r"sparse_gemm_b?f16_256x128", 256, 1, sparse_shared_bytes(WIDE_TILE), "HMMA.SP", 0.35),
        Gate(r"sparse_gemm_b?f16_128x128", 128, 1, sparse_shared_bytes(COMMON_TILE), "HMMA.SP", 0.35),
        Gate(r"sparse_gemm_b?f16_128x32", 128, 1, sparse_shared_bytes(NARROW_TILE), "HMMA.SP", 0.19),
    ],
    # Expanding a tile costs about six instructions for each product; `any` walks over its values one by one.
    "nm_gemm": [
        Gate(r"nm_gemm_b?f16_[24]", 128, 1, NM_SHARED_BYTES, "HMMA", 0.13),
        Gate(r"nm_gemm_b?f16_any", 128, 1, NM_SHARED_BYTES, "HMMA", 0.08),
    ],
    "metadata": [Gate(r"sparse_metadata", 256, 8)],
    "decode": [
        Gate(r"decode_b?f16_[124]", 256, 4),
        Gate(r"decode_b?f16_8", 256, 2),
        Gate(r"decode24_b?f16_[12]", 256, 4),
        Gate(r"decode24_b?f16_[48]", 256, 2),
    ],
    "statistics": [Gate(r"add_tokens_(b?f16|f32)", 256, 2)],
    "search": [Gate("hinge_sums", 256, 4, SUMS_SHARED_BYTES), Gate("local_swaps", 256, 2, SWAPS_SHARED_BYTES)],
    "refine": [Gate("refine_rows", 256, 4, 8 * 192 * 4)],
    "packing": [Gate(r"(un)?pack_mask", 256, 8), Gate(r"(pack_values|expand)_(16|32)", 256, 6)],
}
# Of decoding kernels by what their names begin and end with, the loads of 16 bytes in the text: of values, masks and x.
WIDE_LOADS = {
    "decode": {1: 2 + 1, 2: 2 + 1, 4: 2 + 1, 8: 2 + 1},  # of two rows, and of both their masks
    # Before the loop and in it, of 2 turns x 2 rows, 2 x 4 and 1 x 4; then of a tile of x, 4 or 8 a thread.
    "decode24": {1: 2 * 4 + 4, 2: 2 * 4 + 4, 4: 2 * 8 + 4, 8: 2 * 4 + 8},
}
WIDE = re.compile(r"sparse_gemm_b?f16_256x128")  # its 136 KiB a block are for the GPUs that have them


def gate_of(source: str, kernel: str) -> Gate:
    (gate,) = [gate for gate in GATES.get(source, []) if re.fullmatch(gate.kernels, kernel)]
    return gate


def kernels_in_text(source: str) -> set[str]:
    return set(
        re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\))?\s*(\w+)\(', cuda_source(source))
    )


def test_every_source_has_gates() -> None:
    assert sorted(GATES) == SOURCES
    for source in SOURCES:
        for gate in GATES[source]:
            assert any(re.fullmatch(gate.kernels, kernel) for kernel in kernels_in_text(source)), gate


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_use_no_more_than_their_gates_allow(source: str, architecture: int, show: Show) -> None:
    """Nothing spilled, no stack, and room for the blocks of the gate in registers, threads and shared memory."""
    compiled = compile_source(cuda_source(source), architecture)
    assert set(compiled.kernels) == kernels_in_text(source) != set()
    for kernel, used in sorted(compiled.kernels.items()):
        gate = gate_of(source, kernel)
        shared_bytes = used.shared_bytes + gate.shared_bytes
        show("registers / bytes spilled / KiB shared", kernel, architecture,
             f"{used.registers} / {used.spilled_bytes} / {shared_bytes / 1024:.0f}")  # fmt: skip
        assert (used.spilled_bytes, used.stack_bytes) == (0, 0), kernel
        assert -(-used.registers // 8) * 8 * gate.threads * gate.blocks <= REGISTERS, kernel
        if not (WIDE.fullmatch(kernel) and architecture in (86, 89)):
            assert (shared_bytes + OWN_BYTES) * gate.blocks <= SHARED_BYTES[architecture], kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source for source in SOURCES if any(gate.product for gate in GATES[source])])
def test_main_loops_multiply(source: str, architecture: int, show: Show) -> None:
    """The share of tensor-core products in the loop over input channels; nothing there touches local memory."""
    for kernel, instructions in sorted(disassemble(compile_source(cuda_source(source), architecture).cubin).items()):
        gate, loop = gate_of(source, kernel), main_loop(instructions)
        counts = mix(loop)
        share = counts[gate.product] / len(loop)
        figure = f"{counts[gate.product]} {gate.product} of {len(loop)}, {share:.0%}"
        show("matrix products of the main loop's instructions", kernel, architecture, figure)
        assert share >= gate.share, kernel
        assert counts[gate.product] == products(loop)  # no dense product in a sparse kernel, and the reverse
        assert not {"LDL", "STL"} & set(counts)
        assert not {"BAR", "LDGSTS"} - set(counts)  # the loop itself fetches and waits: it is the one meant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_bytes_are_read_sixteen_at_a_time(architecture: int) -> None:
    """Decoding: all loads are of 16 bytes but those of bias, of x (for 2:4 those are too), and of 2:4's masks, of which
    a lane wants a half-word at a time."""
    for kernel, instructions in disassemble(compile_source(cuda_source("decode"), architecture).cubin).items():
        way, _, vectors = kernel.split("_")
        loads = [one.text for one in instructions if one.name == "LDG"]
        wide = [text for text in loads if ".128" in text.split()[0]]
        assert len(wide) == WIDE_LOADS[way][int(vectors)], kernel
        assert all(".U16" in text.split()[0] for text in loads if text not in wide), kernel


def test_a_gate_is_needed_and_notices() -> None:
    """What would be reported of a kernel that spills, and of a name that no gate knows."""
    source = """
extern "C" __global__ void greedy(float* x) {
    float held[64];
    for (int i = 0; i < 64; i++) held[i] = x[i * 128 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; i++) x[i * 128 + threadIdx.x] = held[i] * held[(i * 7 + 1) % 64] + held[63 - i];
}
"""
    (used,) = compile_source(source, 80, maximum_registers=32).kernels.values()
    assert used.registers <= 32
    assert used.spilled_bytes > 0
    with pytest.raises(ValueError, match="not enough values"):
        gate_of("decode", "greedy")
    with pytest.raises(CompilationError, match="undeclared"):
        compile_source('extern "C" __global__ void wrong() { undeclared = 1; }', 80)
    with pytest.raises(CompilationError, match="says nothing"):
        resources("Compiling entry function 'lonely' for 'sm_80'")


def test_the_main_loop_is_the_one_with_most_products() -> None:
    def program(*texts: str) -> list[Machine]:
        return [Machine(16 * i, text) for i, text in enumerate(texts)]

    code = program(
        "MOV R1, R2", "HMMA.16816.F32 R0", "BRA 0x10", "HMMA.SP.16832.F32 R0", "HMMA.SP.16832.F32 R0", "IADD3 R1",
        "BRA.U P0, `(0x30)", "BRA 0x0", "EXIT",
    )  # fmt: skip
    assert [one.address for one in main_loop(code)] == list(range(0, 128, 16))
    assert mix(main_loop(code[3:7])) == {"HMMA.SP": 2, "IADD3": 1, "BRA": 1}
    assert main_loop(program("IADD3 R1", "BRA 0x0")) == []
