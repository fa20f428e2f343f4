"""What holds for every primitive: torch.library's rules, the same bits twice, no wait for the device, few bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels import samples
from kernels.dispatch import PRIMITIVES, recording
from kernels.launches import LAUNCHES
from kernels.samples import Call, Draw
from kernels.traffic import Traffic, count_all

TOKENS, WIDTH = 40, 64
SAMPLED = [
    (op, i)
    for op in samples.ops()
    for i in range(len(list(samples.calls(op, Draw(torch.device("meta"), torch.float16), TOKENS, WIDTH))))
]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])

# Bytes moved over the least possible at kernels/traffic.py's size; 1.00 is a kernel that touches every byte once.
# Where it is more, kernels/<op>.py says why.
RATIO = {
    "rms_norm_forward": 1.00,
    "rms_norm_backward": 1.00,
    "rms_norm_dweight": 1.01,
    "bias_act_forward, silu": 1.00,
    "bias_act_forward, gelu": 1.00,
    "bias_act_backward, silu": 1.01,
    "bias_act_backward, gelu": 1.01,
    "norm_mma_forward, RMSNorm": 1.9,
    "norm_mma_forward, LayerNorm": 2.34,
    "norm_mma_backward, RMSNorm": 1.91,
    "norm_mma_backward, LayerNorm": 1.91,
    "norm_mma_dadapter, RMSNorm": 1.23,
    "norm_mma_dadapter, LayerNorm": 1.24,
    "norm_mma_dmix": 1.00,
}


def call(op: str, index: int, dtype: torch.dtype, device: torch.device) -> Call:
    draw = Draw(device, dtype, torch.Generator().manual_seed(index))
    return list(samples.calls(op, draw, TOKENS, WIDTH))[index]


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def test_every_primitive_and_every_kernel_has_a_sample() -> None:
    kernels: set[str] = set()
    called: set[str] = set()
    draw = Draw(torch.device("cpu"), torch.float16, torch.Generator().manual_seed(0))
    with recording(lambda kernel, *_: kernels.add(kernel.__name__.removesuffix("_kernel"))):
        for op in samples.ops():
            for each in samples.calls(op, draw, 1, 32):
                called.add(each.primitive)
                if not torch.cuda.is_available():
                    each.registered.launcher(*each.arguments)
    assert called == set(PRIMITIVES)
    assert torch.cuda.is_available() or kernels == set(LAUNCHES)


@pytest.mark.parametrize(("op", "index"), SAMPLED)
def test_torch_library_finds_nothing_wrong(op: str, index: int, device: torch.device) -> None:
    each = call(op, index, torch.float16, device)
    torch.library.opcheck(each.registered.op, each.arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "index"), SAMPLED)
def test_the_same_bits_twice_without_waiting(op: str, index: int, dtype: torch.dtype, device: torch.device) -> None:
    """Everything that a primitive returns or writes in place. The launcher runs without data too: it cannot look."""
    outcomes = []
    for _ in range(2):
        each = call(op, index, dtype, device)
        with waiting_is_an_error():
            result = each.registered.op(*each.arguments)
        outcomes.append(list(tensors((each.arguments, result))))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.fixture(scope="module")
def traffic() -> list[Traffic]:
    return list(count_all())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter")
def test_bytes_moved(traffic: list[Traffic]) -> None:
    assert {row.call: round(row.ratio, 2) for row in traffic} == RATIO
