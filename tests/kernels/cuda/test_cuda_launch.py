"""Launches as data, joined sources, and what is handed to CuPy (a stand-in of it: no test here runs on a GPU)."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch

from streamprune_kernels import launch as launch_module
from streamprune_kernels.launch import (
    FOLDER,
    KernelUnavailable,
    Launch,
    cuda_source,
    joined_source,
    on_device,
    runner_for,
    unsupported_reason,
)


def some_launch(*arguments, grid=(1, 1, 1), block=(32, 1, 1), shared_bytes=0):
    return Launch("metadata", "sparse_metadata", grid, block, shared_bytes, arguments)


def test_launches_that_cannot_be_are_refused():
    for number in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match="does not fit a C int"):
            some_launch(number)
    with pytest.raises(ValueError, match="nothing to run"):
        some_launch(grid=(0, 1, 1))
    for block in ((33, 1, 1), (512, 3, 1)):
        with pytest.raises(ValueError, match="whole warps"):
            some_launch(block=block)


def test_includes_are_joined_once_and_keep_their_line_numbers():
    files = {
        "a.cu": '#include "b.cuh"\n#include "c.cuh"\nlast\n',
        "b.cuh": 'b\n#include "c.cuh"\n',
        "c.cuh": "c\n",
    }
    assert joined_source("a.cu", files.__getitem__) == (
        '#line 1 "a.cu"\n'
        '#line 1 "b.cuh"\nb\n'
        '#line 1 "c.cuh"\nc\n'
        '#line 3 "b.cuh"\n'
        '#line 2 "a.cu"\n'
        '#line 3 "a.cu"\n'
        "last\n"
    )


@pytest.mark.parametrize("stem", sorted(path.stem for path in FOLDER.glob("*.cu")))
def test_sources_stand_alone(stem):
    """No header is left to be found: a compiler's cache sees all there is."""
    assert "#include" not in cuda_source(stem)
    assert cuda_source(stem).count("struct Float16 {") == 1


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(KernelUnavailable, match="need tensors on a GPU, these are on cpu"):
        on_device(some_launch(torch.zeros(1)))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="move them to one device"):
        on_device(some_launch(torch.zeros(1), torch.zeros(1, device="meta")))


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """torch and CuPy as on a machine with two GPUs, so far as launching asks; lists what is launched."""
    launched = []

    class RawKernel:
        max_dynamic_shared_size_bytes = 48 * 1024

        def __call__(self, *arguments, shared_mem):
            launched.append((*arguments, shared_mem, self.max_dynamic_shared_size_bytes))

    class RawModule:
        def __init__(self, code, options, backend):
            assert (code, options, backend) == (cuda_source("metadata"), ("--std=c++17",), "nvrtc")

        def get_function(self, name):
            assert name == "sparse_metadata"
            return RawKernel()

    streams = SimpleNamespace(from_external=lambda stream: nullcontext(launched.append(stream)))
    cupy = SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(Device=nullcontext, Stream=streams))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    asked_once = (launch_module._function, launch_module._runs_kernels, launch_module._cupy_stream)
    for function in asked_once:
        function.cache_clear()
    yield launched
    for function in asked_once:
        function.cache_clear()


def test_what_cupy_is_given(gpu):
    """Values whose bytes are those of the kernel's parameters; more shared memory only after it was asked for."""
    tensor = torch.zeros(3).as_subclass(DeviceTensor)
    on_device(some_launch(tensor, None, 7, -1, 0.5, grid=(5, 1, 1), shared_bytes=99 * 1024))
    stream, (grid, block, values, shared_mem, most_shared) = gpu
    assert stream == "stream of cuda:1"
    assert (grid, block, shared_mem, most_shared) == ((5, 1, 1), (32, 1, 1), 99 * 1024, 99 * 1024)
    expected = numpy.uint64(tensor.data_ptr()), numpy.uint64(0), numpy.int32(7), numpy.int32(-1), numpy.float32(0.5)
    assert [(type(value), value) for value in values] == [(type(value), value) for value in expected]


def test_a_failed_import_of_cupy_is_not_for_ever(gpu, monkeypatch):
    """What runs stays as it was found until somebody asks anew, as each job does."""
    tensor = torch.zeros(3).as_subclass(DeviceTensor)
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "cupy", None)
        assert runner_for(tensor) is None
    assert runner_for(tensor) is None
    assert unsupported_reason(tensor.device) is None
    assert runner_for(tensor) is on_device
    on_device(some_launch(tensor))
    assert len(gpu) == 2


def test_on_device_finds_out_before_it_refuses(gpu, monkeypatch):
    launch = some_launch(torch.zeros(3).as_subclass(DeviceTensor))
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "cupy", None)
        with pytest.raises(KernelUnavailable, match="does not import"):
            on_device(launch)
    on_device(launch)
    assert len(gpu) == 2


def test_reasons_against_a_gpu(gpu, monkeypatch):
    device = torch.device("cuda", 1)
    assert unsupported_reason(device) is None
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "cupy", None)
        assert "pip install 'streamprune[gpu]'" in unsupported_reason(device)
    with monkeypatch.context() as changed:
        changed.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        changed.setattr(torch.cuda, "get_device_name", lambda device: "Old")
        assert "Old is sm_75" in unsupported_reason(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "need a GPU and a torch built for CUDA" in unsupported_reason(device)
