"""What holds for every primitive: torch.library's rules, the same bits twice, no wait for the device, few bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import samples
from kernels.dispatch import PRIMITIVES, Primitive, recording, run
from kernels.launches import LAUNCHES, Launch
from kernels.samples import Call, Draw
from kernels.traffic import Traffic, count, count_all

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
    "lora_down, 3 of rank 256": 1.00,
    "lora_down, 3 of rank 128": 1.00,
    "lora_down, 2 of rank 64": 1.00,
    "lora_down, rank 8": 1.00,
    "lora_update_, 3 of rank 256": 2.00,
    "lora_update_, 3 of rank 128": 1.82,
    "lora_update_, 2 of rank 64": 1.47,
    "lora_update_, rank 8": 1.05,
    "lora_outer, 3 of rank 256": 2.75,
    "lora_outer, 3 of rank 128": 1.69,
    "lora_outer, 2 of rank 64": 1.53,
    "lora_outer, rank 8": 1.08,
    "lora_outer, no dropout, 3 of rank 256": 1.64,
    "lora_outer, no dropout, 3 of rank 128": 1.53,
    "lora_outer, no dropout, 2 of rank 64": 1.39,
    "lora_outer, no dropout, rank 8": 1.08,
    "rope_turn, interleaved": 1.00,
    "rope_turn, half-split, grouped-query": 1.00,
    "rope_turn, partial": 1.00,
    "rope_turn_, partial": 1.00,
    "adamw_squares, fp32 weights": 1.00,
    "adamw_squares, 16-bit weights": 1.00,
    "adamw_update, fp32 weights": 1.00,
    "adamw_update, 16-bit weights": 1.00,
    "norm_forward, RMSNorm": 1.00,
    "norm_forward, add and RMSNorm": 1.00,
    "norm_backward, RMSNorm": 1.00,
    "norm_backward, add and RMSNorm": 1.00,
    "norm_daffine, RMSNorm": 1.02,
    "norm_forward, LayerNorm": 1.00,
    "norm_forward, add and LayerNorm": 1.00,
    "norm_backward, LayerNorm": 1.00,
    "norm_backward, add and LayerNorm": 1.00,
    "norm_backward, two branches": 1.00,
    "norm_daffine, LayerNorm": 1.03,
    "attention_forward, causal, grouped": 1.93,
    "attention_forward, bidirectional": 1.49,
    "attention_dq, causal, grouped": 1.52,
    "attention_dq, bidirectional": 1.33,
    "attention_dkdv, causal, grouped": 1.37,
    "attention_dkdv, bidirectional": 1.33,
    "attention_forward, window": 1.17,
    "attention_dq, window": 1.12,
    "attention_dkdv, window": 1.16,
    "decode_attention": 1.00,
    "decode_attention, window": 1.00,
    "decode_attention, grouped": 3.84,  # a group's heads read its places, after the first one from the L2 cache
    "bias_act_forward, silu": 1.00,
    "bias_act_forward, gelu": 1.00,
    "bias_act_forward, gelu_tanh": 1.00,
    "bias_act_forward, no bias": 1.00,
    "bias_act_backward, silu": 1.02,
    "bias_act_backward, gelu": 1.02,
    "bias_act_backward, gelu_tanh": 1.02,
    "bias_act_backward, no bias": 1.00,
    "bias_act_backward, frozen bias": 1.00,
    "linear_act_forward, gelu": 1.49,
    "linear_act_forward, quick_gelu, z not kept": 1.67,
    "linear_act_forward, silu, narrow": 1.00,
    "swiglu_forward, separate": 1.00,
    "swiglu_forward, packed": 1.00,
    "swiglu_backward, separate": 1.00,
    "swiglu_backward, packed": 1.00,
    "dropped_sum_forward, two branches": 1.00,
    "dropped_sum_backward, two branches": 1.00,
    "dropped_sum_forward, one branch, strided": 1.00,
    "norm_mma_forward, RMSNorm": 1.00,
    "norm_mma_backward, RMSNorm": 1.00,
    "norm_mma_forward, RMSNorm with residual": 1.00,
    "norm_mma_backward, RMSNorm with residual": 1.00,
    "norm_mma_dadapter, RMSNorm": 1.24,
    "norm_mma_pack": 1.00,
    "norm_mma_forward, LayerNorm": 1.00,
    "norm_mma_backward, LayerNorm": 1.00,
    "norm_mma_dadapter, LayerNorm": 1.34,
    "norm_mma_dmix": 1.33,
    "cross_entropy_rows, loss": 1.00,
    "cross_entropy_rows, loss and gradient": 1.5,
    "cross_entropy_rows, bias": 1.5,
    "dequantize_nf4_": 1.00,
    "dequantize_nf4_, 3 parts": 1.00,
    "dequantize_int8_": 1.00,
    "dequantize_int8_, 3 parts": 1.00,
    "few_rows_nf4, one": 1.00,
    "few_rows_int8, one": 1.00,
    "few_rows_nf4, 12, split": 2.08,
    "few_rows_int8, 12, split": 1.63,
    "few_rows_nf4, 64": 1.00,
    "few_rows_int8, 64": 1.00,
    "few_rows_nf4, fused": 1.00,
    "scale_gradient, hidden": 1.00,
    "scale_gradient, head": 1.00,
}

# At 64 tokens of 4,096 channels.
WIDE_RATIO = {
    "norm_mma_forward, RMSNorm": 1.33,
    "norm_mma_forward, RMSNorm with residual": 1.2,
    "norm_mma_forward, LayerNorm": 1.2,
    "norm_mma_backward, RMSNorm": 1.53,
    "norm_mma_backward, RMSNorm with residual": 1.41,
    "norm_mma_backward, LayerNorm": 1.4,
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


@triton.jit
def wasteful_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, sums_ptr: tl.tensor, scratch_ptr: tl.tensor, COLS: tl.constexpr
) -> None:
    """Reads a row of 5 channels twice, the weight, and a sum that it adds to and that passes through the scratch."""
    cols = tl.arange(0, COLS)
    x_ptr += tl.program_id(0) * 5
    x = tl.load(x_ptr + cols, mask=cols < 5) + tl.load(x_ptr + 4 - cols, mask=cols < 5)
    total = tl.sum(x * tl.load(weight_ptr + cols, mask=cols < 5))
    tl.store(scratch_ptr, total + tl.load(sums_ptr))
    tl.store(sums_ptr, tl.load(scratch_ptr))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter")
def test_which_accesses_are_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(x: Tensor, weight: Tensor, sums: Tensor) -> None:
        run(wasteful_kernel, (3,), Launch(rows=1, cols=8, warps=1), x, weight, sums, torch.zeros(1))

    monkeypatch.setitem(PRIMITIVES, "wasteful", Primitive(op=launcher, launcher=launcher))
    row = count(Call("wasteful", (torch.ones(3, 5), torch.ones(5), torch.zeros(1))), tokens=3)
    x, weight, value = 3 * 5 * 4, 5 * 4, 4
    assert row.least == x + weight + 2 * value
    assert row.moved == 2 * x + weight + 3 * 2 * value + 3 * 2 * value
    assert row.reloads == 2 * weight


@pytest.fixture(scope="module")
def traffic() -> list[Traffic]:
    return list(count_all())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter")
def test_bytes_moved(traffic: list[Traffic]) -> None:
    assert {row.call: round(row.ratio, 2) for row in traffic} == RATIO


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter")
def test_bytes_moved_of_rows_that_do_not_fit_the_registers() -> None:
    """At the width of LLaMA-7B, where norm_mma sweeps twice over a row."""
    draw = Draw(torch.device("cpu"), torch.float16, torch.Generator().manual_seed(0))
    calls = [each for each in samples.calls("norm_mma", draw, 64, 4096) if each.label in WIDE_RATIO]
    assert {each.label: round(count(each, 64).ratio, 2) for each in calls} == WIDE_RATIO
