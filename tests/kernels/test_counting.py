"""kernels/counting.py: FLOPs, bytes and launches by formula; memory by what lives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import unpacked
from kernels.attention import varlen_attention
from kernels.counting import counting
from kernels.dispatch import decisions
from kernels.dropped_sum import dropped_sum
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_nf4 import linears_nf4
from kernels.lora_linear import lora_down, lora_linear
from kernels.nf4 import NF4Tensor
from kernels.swiglu import swiglu

META = torch.device("meta")
T, D, F, V = 512, 256, 384, 1000


def bf16(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=grad)


def nf4(rows: int, columns: int) -> NF4Tensor:
    n = rows * columns

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    return NF4Tensor(
        codes=empty(torch.uint8, n // 2), absmax_codes=empty(torch.uint8, n // 64),
        absmax2=empty(torch.float32, -(-n // 64 // 256)), offset=empty(torch.float32), shape=(rows, columns),
        dtype=torch.bfloat16, first_block=0,
    )  # fmt: skip


def test_products_views_and_what_lives() -> None:
    x, w = bf16(T, D), bf16(F, D)
    with counting() as counter:
        y = x @ w.T
        (op,) = counter.ops
        assert (op.name, op.kind, op.flops, op.launches) == ("mm", "product", 2 * T * D * F, 1)
        assert op.bytes == 2 * (T * D + F * D + T * F)
        half = y[: T // 2].view(-1)
        assert (counter.live, counter.peak, len(counter.ops)) == (2 * T * F, 2 * T * F, 1)
        mark = counter.mark()
        z = torch.addmm(half.view(T // 2, F), x[: T // 2], w.T)
        assert [(op.name, op.flops) for op in counter.since(mark)] == [("addmm", T * D * F)]
        del y
        assert counter.live == 3 * T * F  # half holds all of y's memory
        del half
        counter.reset_peak()
        assert (counter.live, counter.peak) == (T * F, T * F)
        del z
    assert (counter.live, counter.peak) == (0, T * F)


def test_a_primitive_launches_nothing_and_counts_its_kernels() -> None:
    before = decisions()
    gate, up = bf16(T, F, grad=True), bf16(T, F, grad=True)
    with counting(86) as counter:
        h = swiglu(gate, up)
        h.backward(torch.empty_like(h))
    names = [(op.name, op.bytes, op.launches) for op in counter.ops if op.launches]
    assert names == [("swiglu_forward", 3 * 2 * T * F, 1), ("swiglu_backward", 5 * 2 * T * F, 1)]
    assert gate.grad is not None and gate.grad.is_meta
    assert decisions() == before, "counting is no run"


def test_a_sum_through_dropout_moves_three_streams_each_way() -> None:
    a, b = bf16(T, D, grad=True), bf16(T, D, grad=True)
    seed = torch.empty(1, dtype=torch.int64, device=META)
    with counting() as counter:
        y = dropped_sum(a, b, dropout=0.1, seed=seed, site=0)
        assert counter.live == 2 * T * D, "no mask is kept"
        y.backward(torch.empty_like(y))
        dropped_sum(a, b, dropout=0.0, seed=seed, site=0)
    names = [(op.name, op.bytes, op.launches) for op in counter.ops if op.launches]
    each = 3 * 2 * T * D
    assert names == [("dropped_sum_forward", each + 8, 1), ("dropped_sum_backward", each + 8, 1), ("add", each, 1)]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 100)])
def test_attention_goes_by_pairs(causal: bool, window: int | None) -> None:
    heads, width, pairs = 4, 64, 12_345
    q, k, v = (bf16(T, heads, width, grad=True) for _ in range(3))
    bounds = torch.empty(5, dtype=torch.int32, device=META)
    with counting() as counter:
        counter.pairs = pairs
        o = varlen_attention(q, k, v, bounds, T, causal=causal, window=window)
        kept = counter.live
        assert kept == 2 * T * heads * width + 4 * T * heads  # o and lse
        o.backward(torch.empty_like(o))
    flops = {op.name: op.flops for op in counter.ops if op.kind == "attention"}
    assert sum(flops.values()) == (4 + 14) * pairs * heads * width
    assert set(flops) == {"attention_forward", "attention_dq", "attention_dkdv"}


def test_unpacked_weights_have_a_buffer_of_their_own() -> None:
    x, weights = bf16(T, D, grad=True), (nf4(F, D), nf4(F, D))
    size = 2 * 2 * F * D
    with unpacked.apart(size, torch.bfloat16, META), counting() as counter:
        ys = linears_nf4(x, weights)
        assert counter.live == 2 * 2 * T * F, "the results, and no unpacked weight"
        torch.autograd.grad(ys, x, [torch.empty_like(y) for y in ys])
        assert unpacked.counters.dequantisations == 1  # the ring still had them
        unpacked.forget()
        linears_nf4(x, weights)
        assert unpacked.counters.dequantisations == 2
    assert not any(where[0] == META for where in unpacked._rings), "nothing of it is left"
    packed = sum(w.codes.numel() + w.absmax_codes.numel() + 4 * w.absmax2.numel() + 4 for w in weights)
    unpacking = [op for op in counter.ops if op.name == "dequantize_nf4_"]
    assert [(op.bytes, op.launches) for op in unpacking] == 2 * [(packed + size, 1)]
    products = [op for op in counter.ops if op.kind == "product"]
    assert sum(op.flops for op in products) == (2 + 2 + 2) * 2 * T * D * F


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_takes_two_products_and_a_chunk_of_logits(with_bias: bool) -> None:
    hidden, head, bias = bf16(T, D, grad=True), bf16(V, D), bf16(V) if with_bias else None
    labels, weights = torch.empty(T, dtype=torch.int64, device=META), torch.empty(T, device=META)
    with counting() as counter:
        loss = linear_cross_entropy(hidden, head, labels, weights, bias=bias)
        assert sum(op.flops for op in counter.ops) == 2 * 2 * T * D * V
        logits = 2 * T * 1024  # rows start at multiples of 64 elements
        kept = 2 * T * D + 4 + 4  # dhidden, its scale, the loss
        assert counter.live == kept
        assert kept + logits <= counter.peak <= kept + logits + 3 * 4 * T
        loss.backward()


def test_own_products_count_by_their_table() -> None:
    x, w, rank = bf16(T, D, grad=True), bf16(F, D), 8
    a, b = (torch.empty(shape, device=META, requires_grad=True) for shape in ((rank, D), (F, rank)))
    seed = torch.empty(1, dtype=torch.int64, device=META)
    with counting() as counter:
        y = lora_linear(x, w, None, a, b, scaling=1.0, dropout=0.1, seed=seed)
        y.backward(torch.empty_like(y))
    by_name = {op.name: op.flops for op in counter.ops if op.name.startswith("lora")}
    assert by_name == {"lora_down": 2 * T * D * rank, "lora_update_": 2 * T * D * rank, "lora_outer": 2 * T * F * rank}
    plain = sum(op.flops for op in counter.ops if op.kind == "product" and not op.name.startswith("lora"))
    assert plain == 2 * 2 * T * D * F + 2 * 2 * T * F * rank  # x W^T, dy W; h B^T, dy B


def test_a_copy_inside_of_a_primitive_counts_and_a_view_does_not() -> None:
    """Codes of more than 1,024 channels are fp32 partial sums, added and cast."""
    x, a, seed = bf16(T, 2048), bf16(8, 2048), torch.empty(1, dtype=torch.int64, device=META)
    with counting() as counter:
        lora_down(x, a, 1, 0.1, seed, 0)
    assert [(op.name, op.bytes) for op in counter.ops[:2]] == [("sum", 4 * 8 * T * 3), ("to", (4 + 2) * 8 * T)]
    assert [op.name for op in counter.ops[2:]] == ["lora_down"]


def test_a_convolution() -> None:
    x, w = torch.empty(2, 3, 28, 28, device=META), torch.empty(16, 3, 14, 14, device=META)
    with counting() as counter:
        torch.nn.functional.conv2d(x, w, stride=14)
    assert [op.flops for op in counter.ops] == [2 * 2 * 16 * 4 * 3 * 14 * 14]


def test_what_other_ops_move() -> None:
    """Rows of a table, not the table; what is only written once, what is changed in place twice; no kernel, no op."""
    table, x, rows = bf16(V, D), bf16(T, D), torch.empty(7, dtype=torch.int64, device=META)
    stream, some = 2 * T * D, 2 * 7 * D
    with counting() as counter:
        torch.promote_types(torch.float32, x.dtype)
        wide = torch.result_type(x, table)
        assert wide == torch.bfloat16 and not counter.ops
        torch.nn.functional.embedding(rows, table)
        picked = x.index_select(0, rows)
        x[rows]
        x.index_add_(0, rows, picked)
        torch.zeros_like(x).fill_(1)
        x.copy_(bf16(T, D))
        x.mul_(2)
        torch._foreach_mul_([x, x[:7]], 2.0)
    moved = {op.name: op.bytes for op in counter.ops}
    assert moved == {
        "embedding": 2 * some + 56, "index_select": 2 * some + 56, "index": 2 * some + 56,
        "index_add_": 3 * some + 56, "zeros_like": stream, "fill_": stream, "copy_": 2 * stream, "mul_": 2 * stream,
        "_foreach_mul_": 2 * (stream + some),
    }  # fmt: skip
    assert all(op.launches == 1 for op in counter.ops)
