"""The host shim itself: every fault that it is there to notice, and what faultless kernels may rely on."""

import math
from itertools import product

import pytest
import torch
from cuda_tools import host

from streamprune_kernels.launch import Launch, joined_source

# Each kernel of 64 threads does one thing wrong; x has 64 floats, y too. The message that says so is in FAULTS.
FAULTY = """
#include "device.cuh"

extern "C" __global__ void reads_before_the_barrier(const float* x, float* y) {
    SHARED_ARRAY(float, values, 64);
    values[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = values[63 - threadIdx.x];
    __syncthreads();
}

extern "C" __global__ void writes_before_the_barrier(const float* x, float* y) {
    store_shared_float(threadIdx.x * 4, x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = load_shared_float(252 - threadIdx.x * 4);
    store_shared_float(threadIdx.x * 4, 0);
}

extern "C" __global__ void writes_twice(const float* x, float* y) { store_shared_float(threadIdx.x / 2 * 4, 0); }

extern "C" __global__ void reads_what_nobody_wrote(const float* x, float* y) {
    if (threadIdx.x < 63) store_shared_float(threadIdx.x * 4, x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = load_shared_float(threadIdx.x * 4);
}

extern "C" __global__ void leaves_shared_memory(const float* x, float* y) {
    store_shared_float(1020 + threadIdx.x * 4, 0);
}

extern "C" __global__ void leaves_an_array(const float* x, float* y) {
    SHARED_ARRAY(float, values, 63);
    values[threadIdx.x] = 0;
}

extern "C" __global__ void misaligned(const float* x, float* y) { store_shared_float(threadIdx.x * 4 + 2, 0); }

extern "C" __global__ void copy_not_waited_for(const float* x, float* y) {
    if (threadIdx.x < 16) cp_async_chunk(threadIdx.x * 16, x + 4 * threadIdx.x);
    cp_async_commit();
    y[0] = load_shared_float(0);
}

extern "C" __global__ void copy_waited_for_by_one(const float* x, float* y) {
    if (threadIdx.x < 16) cp_async_chunk(threadIdx.x * 16, x + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    y[threadIdx.x] = load_shared_float(threadIdx.x * 4);
}

extern "C" __global__ void copy_of_the_latest_group(const float* x, float* y) {
    if (threadIdx.x < 16) cp_async_chunk(threadIdx.x * 16, x + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    y[threadIdx.x] = load_shared_float(threadIdx.x * 4);
}

extern "C" __global__ void copy_from_outside(const float* x, float* y) {
    if (threadIdx.x < 17) cp_async_chunk(threadIdx.x * 16, x + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
}

extern "C" __global__ void copy_never_waited_for(const float* x, float* y) { cp_async_chunk(threadIdx.x * 16, x); }

extern "C" __global__ void diverges(const float* x, float* y) {
    y[threadIdx.x] = threadIdx.x % 2 ? shuffle_xor(1.0f, 1) : shuffle_down(1.0f, 1);
}

extern "C" __global__ void barrier_in_a_branch(const float* x, float* y) {
    if (threadIdx.x < 32) __syncthreads();
}

extern "C" __global__ void half_a_warp_shuffles(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = shuffle_xor(1.0f, 1);
    __syncthreads();
}

extern "C" __global__ void illegal_metadata(const float* x, float* y) {
    u32 a[4] = {}, b[4] = {};
    float d[4] = {};
    BFloat16::mma_sparse<1>(d, a, b, threadIdx.x == 2 ? 0x44445444 : 0x44444444);
}

extern "C" __global__ void writes_past_the_end(const float* x, float* y) { y[threadIdx.x + 1] = 0; }

extern "C" __global__ void writes_before_the_start(const float* x, float* y) { y[(int)threadIdx.x - 1] = 0; }
"""
FAULTS = {
    "reads_before_the_barrier": r"another thread has written|nobody has written|another thread has read",
    "writes_before_the_barrier": "writes .* that another thread has read|reads .* that another thread has written",
    "writes_twice": "writes shared memory at .* that another thread has written",
    "reads_what_nobody_wrote": "reads shared memory at 252 that nobody has written",
    "leaves_shared_memory": "out of bounds: 4 bytes at 1.* of 1024",
    "leaves_an_array": "index 63 of a __shared__ array of 63",
    "misaligned": "is not a multiple of 4",
    "copy_not_waited_for": "before its cp.async copy was waited for|that nobody has written",
    "copy_waited_for_by_one": "another thread has written|before its cp.async copy was waited for|nobody has written",
    "copy_of_the_latest_group": "before its cp.async copy was waited for",
    "copy_from_outside": "thread 16: cp.async from outside of the tensors",
    "copy_never_waited_for": "returns with a cp.async copy under way",
    "diverges": "while other lanes of its warp are in shuffle",
    "barrier_in_a_branch": "returns while others wait|after other threads have returned",
    "half_a_warp_shuffles": "while other lanes of its warp are in shuffle_xor|deadlock",
    "illegal_metadata": "metadata 0x5 of lane 2 is not ascending",
    "writes_past_the_end": r"writes outside of a tensor \[64\]",
    "writes_before_the_start": r"writes outside of a tensor \[64\]",
}

FAULTLESS = """
#include "device.cuh"
extern "C" __global__ void lanes(int* y) {
    const u32 lane = threadIdx.x % 32;
    int* mine = y + 8 * threadIdx.x;
    mine[0] = shuffle((int)threadIdx.x, 5);
    mine[1] = shuffle_xor((int)threadIdx.x, 3);
    mine[2] = shuffle_down((int)threadIdx.x, 2);
    mine[3] = shuffle_up((int)threadIdx.x, 2);
    mine[4] = (int)ballot(lane % 3 == 0);
    mine[5] = __popc(threadIdx.x);
    mine[6] = shuffle_xor(lane < 16, 16);
    mine[7] = __float_as_uint(shuffle(lane * 0.5f, 31));
}

extern "C" __global__ void turned(const u8* x, u8* y) {
    SHARED_ARRAY(u8, bytes, 64);
    SHARED_ARRAY(u16, words, 64);
    bytes[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    words[63 - threadIdx.x] = bytes[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = (u8)words[threadIdx.x];
}

extern "C" __global__ void indices(int* y) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + block + 1000 * thread;
}

extern "C" __global__ void rounded(const float* x, u16* half, u16* brain, float* from_half, float* from_brain) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    half[i] = Float16::from_float(x[i]);
    brain[i] = BFloat16::from_float(x[i]);
    from_half[i] = Float16::to_float((u16)i);
    from_brain[i] = BFloat16::to_float((u16)i);
}

extern "C" __global__ void same_banks(const Chunk* x, Chunk* y) {
    store_shared_chunk(threadIdx.x * 128, x[threadIdx.x]);
    __syncthreads();
    u32 fragment[4];
    ldmatrix_x4(fragment, threadIdx.x * 128);
    y[threadIdx.x] = {fragment[0], fragment[1], fragment[2], fragment[3]};
}

extern "C" __global__ void scaled(const float* x, float* y, int count, float factor) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = x ? x[i] * factor : factor;
}
"""


def run(text, kernel, *arguments, grid=(1, 1, 1), block=(64, 1, 1), shared_bytes=0, schedule=0):
    source = joined_source("test", lambda name: text if name == "test" else host.read_over_shim(name))
    return host.run_text(source, Launch("test", kernel, grid, block, shared_bytes, arguments), schedule)


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("kernel", FAULTS)
def test_faults_are_noticed_under_every_schedule(kernel, schedule):
    with pytest.raises(host.HostFault, match=FAULTS[kernel]):
        run(FAULTY, kernel, torch.ones(64), torch.zeros(64), shared_bytes=1024, schedule=schedule)


def test_every_faulty_kernel_is_tested():
    assert sorted(host.KERNEL.findall(FAULTY)) == sorted(FAULTS)


@pytest.mark.parametrize("schedule", range(4))
def test_lanes_exchange_values(schedule):
    y = torch.zeros(64, 8, dtype=torch.int32)
    run(FAULTLESS, "lanes", y, schedule=schedule)
    for thread, row in enumerate(y.tolist()):
        warp, lane = thread // 32 * 32, thread % 32
        expected = [
            warp + 5,
            thread ^ 3,
            thread + 2 if lane < 30 else thread,
            thread - 2 if lane >= 2 else thread,
            sum(1 << bit for bit in range(0, 32, 3)) - (1 << 32 if 31 % 3 == 0 else 0),
            thread.bit_count(),
            int(lane >= 16),
            torch.tensor(15.5).view(torch.int32).item(),
        ]
        assert row == expected


@pytest.mark.parametrize("schedule", range(4))
def test_shared_arrays_of_small_types(schedule):
    x, y = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    run(FAULTLESS, "turned", x, y, schedule=schedule)
    assert torch.equal(y, x.flip(0))


def test_blocks_and_threads_of_three_dimensions():
    y = torch.zeros(2 * 3 * 4, 64, dtype=torch.int32)
    run(FAULTLESS, "indices", y, grid=(4, 3, 2), block=(8, 4, 2))
    blocks, threads = torch.arange(24, dtype=torch.int32), torch.arange(64, dtype=torch.int32)
    assert torch.equal(y, 1 + blocks[:, None] + 1000 * threads[None, :])


def test_conversions_are_those_of_torch():
    """Of all 16-bit values, of float32 around every tie between two of them, and of what does not fit."""
    count = 65536
    every = torch.arange(count, dtype=torch.int32).to(torch.int16)
    ties = [every.view(dtype).float().view(torch.int32) for dtype in (torch.float16, torch.bfloat16)]
    ties[0], ties[1] = ties[0] + (1 << 12), ties[1] + (1 << 15)
    around = [bits + difference for bits, difference in product(ties, (-1, 0, 1))]
    extremes = torch.tensor([0.0, -0.0, math.inf, 65519.99, 65520.0, 3.4e38, 2.9802322e-8, 2.98e-8, 1e-45] * 16)
    for bits in (*around, torch.cat([extremes.view(torch.int32), torch.zeros(count - 144, dtype=torch.int32)])):
        x = bits.view(torch.float32)
        half, brain = torch.empty(2, count, dtype=torch.int16)
        from_half, from_brain = torch.empty(2, count)
        run(FAULTLESS, "rounded", x, half, brain, from_half, from_brain, grid=(count // 256, 1, 1), block=(256, 1, 1))
        for dtype, to, back in ((torch.float16, half, from_half), (torch.bfloat16, brain, from_brain)):
            torch.testing.assert_close(to.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(back, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_bank_conflicts_are_counted():
    """All eight rows of each of four matrices in the same banks: seven turns more for each."""
    x, y = torch.arange(32 * 4, dtype=torch.int32), torch.zeros(32 * 4, dtype=torch.int32)
    counts = run(FAULTLESS, "same_banks", x, y, block=(32, 1, 1), shared_bytes=32 * 128)
    assert (counts.ldmatrix, counts.bank_conflicts, counts.barriers) == (1, 4 * 7, 1)
    assert torch.equal(y.view(32, 4), x.view(4, 8, 4).permute(1, 2, 0).reshape(32, 4))


def test_arguments_are_numbers_and_null_pointers_too():
    y = torch.zeros(5)
    run(FAULTLESS, "scaled", torch.arange(5.0), y, 4, 0.5, block=(32, 1, 1))
    assert y.tolist() == [0, 0.5, 1, 1.5, 0]
    run(FAULTLESS, "scaled", None, y, 5, -2.0, block=(32, 1, 1))
    assert y.tolist() == [-2] * 5


def test_launches_that_do_not_fit_the_text_are_refused():
    with pytest.raises(host.HostFault, match="there is no such kernel"):
        run(FAULTLESS, "nothing")
    with pytest.raises(host.HostFault, match="has 4 parameters"):
        run(FAULTLESS, "scaled", None)
    with pytest.raises(host.HostFault, match="not on the CPU"):
        run(FAULTLESS, "turned", torch.zeros(64, dtype=torch.uint8, device="meta"), torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(host.HostFault, match="does not compile"):
        run("no C++", "nothing")
