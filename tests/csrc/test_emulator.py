"""The emulator itself, on small kernels: what its collectives compute, and that it sees what a kernel does wrong."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from csrc import build

KERNELS = r"""
#include "device.cuh"
using namespace nibble;

template <class T>
__global__ void copy(const T* x, T* y, int shift) {
    store(y + threadIdx.x, load_once(x + threadIdx.x + shift));
}

__global__ void mirror(const float* x, float* y, bool wait) {  // y[i] = x[127 - i]
    __shared__ float values[128];
    values[threadIdx.x] = load(x + threadIdx.x);
    if (wait) sync_threads();
    store(y + threadIdx.x, values[127 - threadIdx.x]);
}

__global__ void leave_behind(float* y) {  // what the block before left in shared memory
    __shared__ __align__(16) float4 left;
    if (threadIdx.x == 0) {
        store(y + blockIdx.x, left.x);
        left.x = 1.0f;
    }
}

__global__ void rotate(const float* x, float* y, int wrong) {
    const int lane = threadIdx.x % 32;
    const float value = load(x + threadIdx.x);
    if (wrong == 1 && lane >= 16) return;
    float result;
    if (wrong == 2 && lane >= 16)
        result = shuffle(value, lane - 1);
    else
        result = shuffle(value, lane - 1);  // another line
    store(y + threadIdx.x, result);
}

__global__ void barriers(float* y, int wrong) {
    if (wrong == 1 && threadIdx.x == 5) return;
    if (wrong == 2 && threadIdx.x == 5)
        sync_threads();
    else
        sync_threads();
    store(y + threadIdx.x, 1.0f);
}

__global__ void meet(float* y, int wrong) {
    if (wrong && threadIdx.x == 37) return;
    sync_warp();
    store(y + threadIdx.x, 1.0f);
}

template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;  // a [16, 16], b^T [8, 16] 16-bit, d [16, 8]
    const uint32_t left[4] = {load(a + 8 * g + t), load(a + 8 * g + 64 + t), load(a + 8 * g + t + 4),
                              load(a + 8 * g + 64 + t + 4)};
    const uint32_t right[2] = {load(b + 8 * g + t), load(b + 8 * g + t + 4)};
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = load(d + 8 * (g + i / 2 * 8) + 2 * t + i % 2);
    mma_16x8x16<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) store(d + 8 * (g + i / 2 * 8) + 2 * t + i % 2, sums[i]);
}

template <class T>
__global__ void round_pairs(const float* x, uint32_t* y) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    store(y + i, pack<T>(load(x + 2 * i), load(x + 2 * i + 1)));
}

__global__ void permute(const uint32_t* x, uint32_t* y) {
    store(y + threadIdx.x, byte_permute(load(x), load(x + 1), load(x + 2 + threadIdx.x)));
}

__global__ void last_one(float* y) { store(y, float(blockIdx.x * blockDim.x + threadIdx.x)); }

extern "C" {
int run_copy(const void* x, void* y, int bytes, int threads, int shift) {
    switch (bytes) {
        case 1: return LAUNCH(copy<uint8_t>, 1, threads, nullptr, (const uint8_t*)x, (uint8_t*)y, shift);
        case 4: return LAUNCH(copy<float>, 1, threads, nullptr, (const float*)x, (float*)y, shift);
        case 8: return LAUNCH(copy<uint2>, 1, threads, nullptr, (const uint2*)x, (uint2*)y, shift);
        default: return LAUNCH(copy<uint4>, 1, threads, nullptr, (const uint4*)x, (uint4*)y, shift);
    }
}
int run_mirror(const float* x, float* y, int wait) { return LAUNCH(mirror, 1, 128, nullptr, x, y, wait != 0); }
int run_leave_behind(float* y) { return LAUNCH(leave_behind, 3, 64, nullptr, y); }
int run_rotate(const float* x, float* y, int threads, int wrong) {
    return LAUNCH(rotate, 1, threads, nullptr, x, y, wrong);
}
int run_barriers(float* y, int wrong) { return LAUNCH(barriers, 2, 96, nullptr, y, wrong); }
int run_meet(float* y, int wrong) { return LAUNCH(meet, 1, 64, nullptr, y, wrong); }
int run_multiply(const uint32_t* a, const uint32_t* b, float* d, int bf) {
    return bf ? LAUNCH(multiply<bf16>, 1, 32, nullptr, a, b, d) : LAUNCH(multiply<fp16>, 1, 32, nullptr, a, b, d);
}
int run_round(const float* x, uint32_t* y, int blocks, int bf) {
    return bf ? LAUNCH(round_pairs<bf16>, blocks, 64, nullptr, x, y)
              : LAUNCH(round_pairs<fp16>, blocks, 64, nullptr, x, y);
}
int run_permute(const uint32_t* x, uint32_t* y) { return LAUNCH(permute, 1, 64, nullptr, x, y); }
int run_last_one(float* y, int blocks, int threads) { return LAUNCH(last_one, blocks, threads, nullptr, y); }
}
"""
EMULATOR = -8  # NIBBLE_EMULATOR


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """KERNELS, built as csrc itself is."""
    cxx = build.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    source, out = folder / "kernels.cu", folder / "kernels.so"
    source.write_text(KERNELS)
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", f"-I{build.FOLDER}"]
    line = [cxx, *flags, "-x", "c++", "-include", str(build.FOLDER / "emulator.h"), str(source), "-o", str(out)]
    subprocess.run(line, check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.nibble_emulator_failure.restype = ctypes.c_char_p
    return loaded


class Emulator:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, name: str, *arguments: Tensor | int) -> int:
        values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        status: int = getattr(self.library, f"run_{name}")(*values)
        return status

    def track(self, *tensors: Tensor) -> None:
        for x in tensors:
            self.library.nibble_emulator_track(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes))

    def counts(self, tensor: int) -> list[int]:
        values = (ctypes.c_int64 * 4)()
        assert self.library.nibble_emulator_counts(tensor, values) == 0
        return list(values)

    @property
    def failure(self) -> str:
        text: bytes = self.library.nibble_emulator_failure()
        return text.decode()


@pytest.fixture(params=[0, 1], ids=["rising", "falling"])
def emulator(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """In both orders of threads; nothing is left of the test before."""
    library.nibble_emulator_reset()
    library.nibble_emulator_reverse(request.param)
    yield Emulator(library)
    library.nibble_emulator_reverse(0)
    library.nibble_emulator_reset()


@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_accesses_are_counted(emulator: Emulator, size: int) -> None:
    x, y = torch.randint(256, (50 * size,), dtype=torch.uint8), torch.zeros(50 * size, dtype=torch.uint8)
    emulator.track(x, y)
    assert emulator.run("copy", x, y, size, 40, 10) == 0
    assert emulator.run("copy", x, y, size, 40, 5) == 0
    assert y.tolist() == x[5 * size : 45 * size].tolist() + [0] * (10 * size)
    assert emulator.counts(0) == [80 * size, 45 * size, 0, 0]
    assert emulator.counts(1) == [0, 0, 80 * size, 40 * size]
    assert emulator.library.nibble_emulator_counts(2, (ctypes.c_int64 * 4)()) == EMULATOR


@pytest.mark.parametrize("size", [1, 4, 8, 16])
@pytest.mark.parametrize(("threads", "shift", "what"), [(32, -1, "load"), (32, 2, "load"), (33, 0, "store")])
def test_accesses_out_of_bounds_fail(emulator: Emulator, size: int, threads: int, shift: int, what: str) -> None:
    """By one element, at either end; memory outside keeps its value."""
    x, y = torch.ones(33 * size, dtype=torch.uint8), torch.zeros(33 * size, dtype=torch.uint8)
    emulator.track(x, y[: 32 * size])
    assert emulator.run("copy", x, y, size, threads, shift) == EMULATOR
    assert re.search(rf"copy<.*>: kernels.cu:7, .*: a {what} of {size} bytes at .* is out of bounds", emulator.failure)
    assert y[32 * size :].count_nonzero() == 0


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_vector_that_is_half_outside_fails(emulator: Emulator, size: int) -> None:
    x, y = torch.ones(32 * size, dtype=torch.uint8), torch.zeros(32 * size, dtype=torch.uint8)
    emulator.track(x, y[: -size // 2], y[-size // 2 :])  # both halves are tracked, but as two tensors
    assert emulator.run("copy", x, y, size, 32, 0) == EMULATOR
    assert "a store" in emulator.failure
    assert y[-size:].count_nonzero() == 0


@pytest.mark.parametrize("size", [4, 8, 16])
def test_misaligned_accesses_fail(emulator: Emulator, size: int) -> None:
    """Also where nothing is tracked: a GPU would stop there too."""
    x = torch.zeros(16 * size, dtype=torch.uint8)
    y = torch.zeros_like(x)
    assert emulator.run("copy", x, y, size, 8, 0) == 0
    assert emulator.run("copy", x[size // 2 :], y, size, 8, 0) == EMULATOR
    assert "a load" in emulator.failure
    assert "not aligned" in emulator.failure
    emulator.library.nibble_emulator_reset()
    assert emulator.run("copy", x, y[size // 2 :], size, 8, 0) == EMULATOR
    assert "a store" in emulator.failure


def test_a_barrier_orders_shared_memory(emulator: Emulator) -> None:
    x, y = torch.randn(128), torch.zeros(128)
    assert emulator.run("mirror", x, y, 1) == 0
    assert y.equal(x.flip(0))


def test_a_missing_barrier_shows(emulator: Emulator) -> None:
    """As NaNs, at other places when the order is reversed."""
    y = torch.zeros(128)
    assert emulator.run("mirror", torch.randn(128), y, 0) == 0
    assert int(y.isnan().sum()) == 64


def test_shared_memory_is_not_a_number_at_first(emulator: Emulator) -> None:
    y = torch.zeros(3)
    assert emulator.run("leave_behind", y) == 0
    assert y.isnan().all()


def test_shuffle(emulator: Emulator) -> None:
    x, y = torch.randn(64), torch.zeros(64)
    assert emulator.run("rotate", x, y, 64, 0) == 0
    assert y.view(2, 32).equal(x.view(2, 32).roll(1, 1))


@pytest.mark.parametrize(
    ("threads", "wrong", "text"),
    [(48, 0, "warp of less than 32"), (64, 1, "waits for others"), (64, 2, "while others wait in shuffle")],
)
def test_a_shuffle_without_the_whole_warp_fails(emulator: Emulator, threads: int, wrong: int, text: str) -> None:
    assert emulator.run("rotate", torch.randn(64), torch.zeros(64), threads, wrong) == EMULATOR
    assert text in emulator.failure


def test_a_warp_meets_with_all_its_lanes(emulator: Emulator) -> None:
    y = torch.zeros(64)
    assert emulator.run("meet", y, 0) == 0
    assert y.eq(1).all()
    assert emulator.run("meet", y, 1) == EMULATOR
    assert re.search(r"meet: kernels.cu:\d+: sync_warp: thread \d+ of block .* waits for others", emulator.failure)


@pytest.mark.parametrize(("wrong", "text"), [(1, "have ended"), (2, "while others wait in sync_threads")])
def test_a_barrier_that_not_all_threads_reach_fails(emulator: Emulator, wrong: int, text: str) -> None:
    y = torch.zeros(96)
    assert emulator.run("barriers", y, wrong) == EMULATOR
    assert text in emulator.failure
    assert emulator.run("barriers", y, 0) == 0  # the next launch is a new one
    assert y.eq(1).all()
    assert text in emulator.failure  # but the first failure stays, until it is reset
    emulator.library.nibble_emulator_reset()
    assert emulator.failure == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_has_the_fragments_of_ptx(emulator: Emulator, dtype: torch.dtype) -> None:
    """Whole numbers, which fp32 adds exactly; the kernel places fragments by the tables of PTX's mma.m16n8k16."""
    a, b, d = (torch.randint(-9, 10, shape).float() for shape in ((16, 16), (8, 16), (16, 8)))
    expected = d + a @ b.T
    assert emulator.run("multiply", a.to(dtype), b.to(dtype), d, int(dtype is torch.bfloat16)) == 0
    assert d.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_keeps_subnormal_and_exact_products(emulator: Emulator, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.zeros(16, 8)
    a[:, ::2] *= torch.finfo(dtype).smallest_normal / 8
    a[:, 1::2] = 0
    expected = a.double() @ b.double().T
    assert emulator.run("multiply", a, b, d, int(dtype is torch.bfloat16)) == 0
    torch.testing.assert_close(d.double(), expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_torchs(emulator: Emulator, dtype: torch.dtype) -> None:
    """Random bits, every value of the dtype, and both neighbours of each midpoint of two values."""
    every = torch.arange(-(1 << 15), 1 << 15).short().view(dtype).float()
    halfway = (every.view(torch.int32) + (0x1000 if dtype is torch.float16 else 0x8000)).view(torch.float32)
    near = [(halfway.view(torch.int32) + i).view(torch.float32) for i in (-1, 0, 1)]
    tiny = torch.arange(1 << 15).float() * 2.0**-26  # multiples of a quarter of fp16's smallest
    x = torch.cat([torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).int().view(torch.float32), every, *near, tiny, -tiny])
    assert x.numel() % 128 == 0
    y = torch.zeros(x.numel(), dtype=dtype)
    assert emulator.run("round", x, y, x.numel() // 128, int(dtype is torch.bfloat16)) == 0
    nan = x.isnan()
    assert y[~nan].view(torch.int16).equal(x[~nan].to(dtype).view(torch.int16))
    assert y[nan].isnan().all()


def test_byte_permute(emulator: Emulator) -> None:
    selectors = torch.randint(8, (64, 4))
    words = torch.tensor([0x03020100, 0x07060504] + [sum(s << 4 * i for i, s in enumerate(row)) for row in selectors])
    y = torch.zeros(64, dtype=torch.int32)
    assert emulator.run("permute", words.int(), y) == 0
    assert y.view(torch.uint8).view(64, 4).equal(selectors.byte())


def test_order_of_threads_and_blocks(emulator: Emulator, request: pytest.FixtureRequest) -> None:
    y = torch.zeros(1)
    assert emulator.run("last_one", y, 3, 5) == 0
    assert float(y) == (0.0 if "falling" in request.node.name else 14.0)


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_limits_of_a_launch(emulator: Emulator, blocks: int, threads: int) -> None:
    assert emulator.run("last_one", torch.zeros(1), blocks, threads) == EMULATOR
    assert "limits" in emulator.failure
