from __future__ import annotations

import inspect
import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, dispatch
from kernels.attention import varlen_attention, varlen_attention_reference
from tests.kernels.tolerance import assert_within_twice

CAUSAL = pytest.mark.parametrize("causal", [True, False])


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(tokens: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, head_dim).to(dtype) for n in (heads, groups, groups)]


def expression(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's own call for the whole pack, with the mask written out [T, T]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def visible(cu_seqlens: Tensor, causal: bool) -> Tensor:
    """[T, T], by the definition, one segment after another."""
    mask = torch.zeros(int(cu_seqlens[-1]), int(cu_seqlens[-1]), dtype=torch.bool)
    for start, stop in pairwise(cu_seqlens.tolist()):
        block = torch.ones(stop - start, stop - start, dtype=torch.bool)
        mask[start:stop, start:stop] = block.tril() if causal else block
    return mask


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim"),
    [((1,), 2, 2, 64), ((1, 1, 125), 4, 2, 72), ((129, 0, 128), 2, 1, 80), ((0, 288, 288, 1, 0), 1, 1, 96),
     ((257, 257, 215), 2, 2, 128)],
)  # fmt: skip
def test_error_is_torchs_own(
    lengths: tuple[int, ...], heads: int, groups: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    cu_seqlens = bounds(*lengths)
    mask, tensors = visible(cu_seqlens, causal), inputs(sum(lengths), heads, groups, head_dim, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    results = []
    for compute, to in (
        (lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, max(lengths), causal=causal), dtype),
        (lambda q, k, v: expression(q, k, v, mask), dtype),
        (lambda q, k, v: expression(q, k, v, mask), torch.float64),
    ):
        leaves = [x.to(to, copy=True).requires_grad_() for x in tensors]
        out = compute(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))])
    for name, *values in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_within_twice(*values, name)


@CAUSAL
def test_gradcheck(causal: bool) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(7, 2, 1, 4)]
    cu_seqlens = bounds(3, 0, 3, 1)
    assert torch.autograd.gradcheck(lambda *x: varlen_attention_reference(*x, cu_seqlens, causal=causal), tensors)
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, 3, causal=causal, scale=0.3), tensors)


@CAUSAL
def test_reference_and_scale(causal: bool) -> None:
    tensors, cu_seqlens = inputs(20, 4, 2, 16), bounds(9, 0, 4, 4, 3)
    for scale in (None, 0.1):
        ours = varlen_attention(*tensors, cu_seqlens, 9, causal=causal, scale=scale)
        torch.testing.assert_close(ours, varlen_attention_reference(*tensors, cu_seqlens, causal=causal, scale=scale))


def test_segments_are_strangers() -> None:
    """Changing one segment changes no bit of another; a segment of length one returns its own value."""
    q, k, v = inputs(30, 2, 2, 16)
    cu_seqlens = bounds(1, 12, 17)
    first = varlen_attention(q, k, v, cu_seqlens, 17, causal=True)
    assert torch.equal(first[0], v[0])
    for x in (q, k, v):
        x[1:13] += 1
    second = varlen_attention(q, k, v, cu_seqlens, 17, causal=True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[13:], second[13:])
    assert not torch.equal(first[1:13], second[1:13])


def test_equal_neighbours_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(q.shape))
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    varlen_attention(*inputs(5 * 17, 2, 2, 16), bounds(17, 17, 17, 17, 17), 17, causal=False)
    assert shapes == [(5, 2, 17, 16)]
    shapes.clear()
    varlen_attention(*inputs(29, 2, 2, 16), bounds(1, 1, 9, 0, 9, 8, 1), 9, causal=True)
    assert shapes == [(2, 2, 1, 16), (2, 2, 9, 16), (1, 2, 8, 16), (1, 2, 1, 16)]


def test_strided_and_empty_input_and_repeatability() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(21, 3, 4, 16).unbind(1)  # as a fused projection gives them
    cu_seqlens = bounds(5, 8, 8)
    first = varlen_attention(q, k, v, cu_seqlens, 8, causal=True)
    assert torch.equal(first, varlen_attention(q, k, v, cu_seqlens, 8, causal=True))
    torch.testing.assert_close(
        first, varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, 8, causal=True)
    )
    for no_tokens in (bounds(), bounds(0, 0)):
        empty = q[:0].clone().requires_grad_()
        out = varlen_attention(empty, k[:0], v[:0], no_tokens, 0, causal=True)
        out.sum().backward()
        assert out.shape == (0, 4, 16)
        assert empty.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs(6, 4, 2, 8)
    with pytest.raises(ValueError, match="multiple of G"):
        varlen_attention(q, k[:, :1].expand(6, 3, 8), v[:, :1].expand(6, 3, 8), bounds(6), 6, causal=True)
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q, k, v, bounds(6).long(), 6, causal=True)
    with pytest.raises(ValueError, match="covers 5 tokens, q has 6"):
        varlen_attention(q, k, v, bounds(5), 5, causal=True)


@CAUSAL
@pytest.mark.parametrize("takes_gqa", [True, False])
def test_what_torchs_varlen_attention_is_told(causal: bool, takes_gqa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim's arguments bind to the installed signature (less `enable_gqa` for torch 2.11's)."""
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    if not takes_gqa:
        parameters = [p for name, p in signature.parameters.items() if name != "enable_gqa"]
        signature = signature.replace(parameters=parameters)
    calls: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return torch.empty_like(args[0])

    spy.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spy)
    attention._varlen_attn.cache_clear()
    for groups in (4, 2):
        attention._flash(*inputs(6, 4, groups, 8), bounds(2, 4), 4, causal, None)
    attention._varlen_attn.cache_clear()
    assert all(call["window_size"] == ((-1, 0) if causal else (-1, -1)) for call in calls)
    assert "enable_gqa" not in calls[0]
    assert calls[1].get("enable_gqa", False) is (takes_gqa and "enable_gqa" in signature.parameters)
    assert calls[1]["key"].shape[1] == (2 if "enable_gqa" in calls[1] else 4)


class OnGpu(Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True


@pytest.mark.parametrize(
    ("capability", "dtype", "implementation", "reason"),
    [
        ((7, 5), torch.float16, "sdpa", "FlashAttention 2 refuses sm_75"),
        ((8, 0), torch.float16, "flash", "16-bit CUDA tensor: torch.nn.attention.varlen"),
        ((9, 0), torch.bfloat16, "flash", "16-bit CUDA tensor: torch.nn.attention.varlen"),
        ((9, 0), torch.float32, "sdpa", "torch.float32 tensor on cpu"),
    ],
)
def test_cards_without_flash_attention_take_a_call_a_segment(
    capability: tuple[int, int], dtype: torch.dtype, implementation: str, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_flash", lambda q, *rest: torch.full_like(q, 7))
    monkeypatch.setattr(dispatch, "_decisions", {})
    tensors = [x.as_subclass(OnGpu) for x in inputs(9, 2, 2, 8, dtype)]
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        out = varlen_attention(*tensors, bounds(4, 5), 5, causal=True)
    assert bool((out == 7).all()) == (implementation == "flash")
    assert [record.getMessage() for record in caplog.records] == [f"attention: {implementation} ({reason})"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("groups", "head_dim"), [(4, 64), (2, 80), (1, 128)])
def test_flash_error_is_torchs_own(groups: int, head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    cu_seqlens = bounds(1, 1, 257, 0, 127, 30).cuda()
    mask = visible(cu_seqlens, causal).cuda()
    tensors = [x.cuda() for x in inputs(416, 4, groups, head_dim, dtype)]
    grad = torch.randn(tensors[0].shape).to("cuda", dtype)
    results = []
    for compute, to in (
        (lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 257, causal=causal), dtype),
        (lambda q, k, v: expression(q, k, v, mask), dtype),
        (lambda q, k, v: expression(q, k, v, mask), torch.float64),
    ):
        leaves = [x.to(to, copy=True).requires_grad_() for x in tensors]
        out = compute(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))])
    for name, *values in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_within_twice(*values, name)
