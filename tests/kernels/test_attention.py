from __future__ import annotations

import inspect
import logging
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, attention_peers, dispatch
from kernels.attention import IMPLEMENTATIONS, attend, implementations, varlen_attention, varlen_attention_reference
from kernels.dispatch import BackendError
from tests.kernels.tolerance import assert_within_twice

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
RANDOM_SHAPES = 200 if GPU else 4
# Heads of a group, head dim, causal: few, since each is a kernel to compile.
HEADS = [(1, 64, False), (1, 72, False), (1, 80, True), (1, 96, True), (4, 128, True), (2, 24, True), (2, 64, False)]
CAUSAL = pytest.mark.parametrize("causal", [True, False])
# Lengths, heads, key heads, head dim.
SHAPES: list[tuple[tuple[int, ...], int, int, int]] = [
    ((1,), 2, 2, 64), ((1, 1, 125), 4, 2, 72), ((129, 0, 128), 2, 1, 80), ((0, 288, 288, 1, 0), 1, 1, 96),
    ((257, 257, 215), 2, 2, 128),
]  # fmt: skip
SMALL = [((33,), 1, 1, 64), ((1, 1, 0, 62, 3), 2, 1, 72), ((9, 58), 1, 1, 128), ((97,), 1, 1, 40),
         ((31,), 1, 1, 80), ((5, 28), 1, 1, 96),
         ((1,) * 33 + (7, 0, 2), 1, 1, 16)]  # fmt: skip
LARGE = [((1, 1, 577, 0, 290, 600, 579), 32, 8, 128), ((729, 729), 16, 16, 72), ((1,) * 300 + (77,), 4, 2, 64)]


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(tokens: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, head_dim).to(dtype) for n in (heads, groups, groups)]


def expression(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """torch's own call for the whole pack, with the mask written out [T, T]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def visible(cu_seqlens: Tensor, causal: bool, window: int | None = None) -> Tensor:
    """[T, T], by the definition, one segment after another."""
    mask = torch.zeros(int(cu_seqlens[-1]), int(cu_seqlens[-1]), dtype=torch.bool)
    for start, stop in pairwise(cu_seqlens.tolist()):
        block = torch.ones(stop - start, stop - start, dtype=torch.bool)
        mask[start:stop, start:stop] = block.tril() if causal else block
    if window is not None:  # key > query - window
        at = torch.arange(len(mask))
        mask &= at[None, :] > at[:, None] - window
    return mask


def assert_error_is_torchs_own(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor], mask: Tensor, scale: float | None = None
) -> None:
    grad = torch.randn(tensors[0].shape).to(tensors[0])
    results = []
    for function, to in (
        (compute, grad.dtype),
        (lambda q, k, v: expression(q, k, v, mask, scale), grad.dtype),
        (lambda q, k, v: expression(q, k, v, mask, scale), torch.float64),
    ):
        leaves = [x.detach().to(to).requires_grad_() for x in tensors]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))])
    for name, *values in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_within_twice(*values, name)


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "heads", "groups", "head_dim"), SHAPES)
def test_error_is_torchs_own(
    lengths: tuple[int, ...], heads: int, groups: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    cu_seqlens = bounds(*lengths)
    assert_error_is_torchs_own(
        lambda q, k, v: attend("sdpa", q, k, v, cu_seqlens, max(lengths), causal=causal),
        inputs(sum(lengths), heads, groups, head_dim, dtype), visible(cu_seqlens, causal),
    )  # fmt: skip


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "heads", "groups", "head_dim"), SMALL + (SHAPES[1:] + LARGE if GPU else []))
def test_the_own_kernels_error_is_torchs_own(
    lengths: tuple[int, ...], heads: int, groups: int, head_dim: int, dtype: torch.dtype, causal: bool,
    device: torch.device,
) -> None:  # fmt: skip
    cu_seqlens = bounds(*lengths)
    mask, on_device = visible(cu_seqlens, causal).to(device), cu_seqlens.to(device)
    assert_error_is_torchs_own(
        lambda q, k, v: attend("triton", q, k, v, on_device, max(lengths), causal=causal),
        [x.to(device) for x in inputs(sum(lengths), heads, groups, head_dim, dtype)], mask,
    )  # fmt: skip


WINDOWS = [((97,), 1, 1, 40, 5), ((1, 1, 0, 62, 3, 100), 1, 1, 72, 64), ((1,) * 33 + (7, 0, 71), 2, 1, 16, 33),
           ((258,), 1, 1, 16, 191)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "sdpa"])
@pytest.mark.parametrize(("lengths", "heads", "groups", "head_dim", "window"), WINDOWS)
def test_a_window(
    lengths: tuple[int, ...], heads: int, groups: int, head_dim: int, window: int, implementation: str,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    """Narrower than a tile, as wide, one wider, one short of three; the last with two queries in the last tile."""
    cu_seqlens = bounds(*lengths)
    mask, on_device = visible(cu_seqlens, True, window).to(device), cu_seqlens.to(device)
    assert_error_is_torchs_own(
        lambda q, k, v: attend(implementation, q, k, v, on_device, max(lengths), causal=True, window=window),
        [x.to(device) for x in inputs(sum(lengths), heads, groups, head_dim, dtype)], mask,
    )  # fmt: skip


@pytest.mark.parametrize("window", [17, 65])
def test_what_a_window_hides_is_not_read(window: int, device: torch.device) -> None:
    """Not only masked: what is not finite would come through a mask as 0 * nan. Both ways, of tiles of 64."""
    leaves = [x.to(device).half() for x in inputs(270, 1, 1, 16)]
    for x in leaves[1:]:
        x[: 192 - window] = torch.nan  # whole tiles of 32 or 64 keys before what the last 78 queries see
    out = attend("triton", *leaves, bounds(270).to(device), 270, causal=True, window=window)
    assert torch.isfinite(out[192:]).all()
    assert torch.isnan(out[: 192 - window]).all()

    leaves = [x.to(device).half().requires_grad_() for x in inputs(270, 1, 1, 16)]
    out = attend("triton", *leaves, bounds(270).to(device), 270, causal=True, window=window)
    grad = torch.zeros_like(out)
    grad[192 + window :] = torch.nan  # queries that see none of the first 192 keys
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    assert all(torch.isfinite(x[:192]).all() for x in (dq, dk, dv))
    assert torch.isnan(dv[192 + window :]).all()


def test_a_window_that_hides_nothing_is_plain_causal_attention(backend: str, device: torch.device) -> None:
    launched: list[object] = []
    results = []
    for window, longest in ((None, 70), (70, 70), (100, 2**31 - 1)):
        leaves = [x.to(device).requires_grad_() for x in inputs(100, 2, 1, 16)]
        with dispatch.recording(lambda kernel, grid, config, args, constants: launched.append(constants["WINDOW"])):
            out = varlen_attention(*leaves, bounds(70, 30).to(device), longest, causal=True, window=window)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert launched == ([0] * 9 if backend == "triton" else [])


@pytest.mark.parametrize("window", [1, 4])
def test_gradcheck_of_a_window(window: int) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(7, 2, 1, 4)]
    cu_seqlens = bounds(2, 0, 5)
    expected = varlen_attention_reference(*tensors, cu_seqlens, causal=True, window=window)
    torch.testing.assert_close(varlen_attention(*tensors, cu_seqlens, 5, causal=True, window=window), expected)
    for attention_ in (varlen_attention_reference, lambda *x, **options: varlen_attention(*x, 5, **options)):
        assert torch.autograd.gradcheck(
            lambda *x: attention_(*x, cu_seqlens, causal=True, window=window),  # noqa: B023
            tensors,
        )


def test_a_window_of_one_token_has_its_own_value(device: torch.device) -> None:
    """And scores without a gradient, to the bit."""
    leaves = [x.to(device).requires_grad_() for x in inputs(70, 2, 2, 64)]
    out = attend("triton", *leaves, bounds(70).to(device), 70, causal=True, window=1)
    dq, dk, _ = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(out, leaves[2])
    assert not dq.any()
    assert not dk.any()


def test_windows_that_are_refused() -> None:
    tensors = inputs(6, 2, 2, 8)
    for window, causal in ((0, True), (-3, True), (2, False), (6, False)):
        with pytest.raises(ValueError, match=f"only causal; got window={window}, causal={causal}"):
            varlen_attention(*tensors, bounds(6), 6, causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype: torch.dtype, device: torch.device) -> None:
    """Views of one tensor of q, k and v, as a fused projection gives them."""
    draw = random.Random(0)
    for i in range(RANDOM_SHAPES):
        longest = draw.choice([1, 9, 300, 1200]) if GPU else draw.choice([1, 9, 40])
        lengths = [draw.choice([0, 1, draw.randint(0, longest)]) for _ in range(draw.randint(0, 12 if GPU else 3))]
        lengths += [draw.randint(64, 64 + longest), 0]  # enough values for a largest error that means something
        groups, (group, head_dim, causal) = draw.randint(1, 4 if GPU else 1), draw.choice(HEADS)
        scale, window = draw.choice([None, 0.2]), draw.choice([None, 7, 50, 130]) if GPU and causal else None
        cu_seqlens = bounds(*lengths)
        torch.manual_seed(i)
        packed = torch.randn(sum(lengths), (group + 2) * groups, head_dim).to(device, dtype)
        tensors = list(packed.split([group * groups, groups, groups], dim=1))
        mask, on_device = visible(cu_seqlens, causal, window).to(device), cu_seqlens.to(device)

        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {"causal": causal, "scale": scale, "window": window}  # noqa: B023
            return attend("triton", q, k, v, on_device, max(lengths), **options)  # noqa: B023

        assert_error_is_torchs_own(compute, tensors, mask, scale)


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_its_own(dtype: torch.dtype, causal: bool, device: torch.device) -> None:
    """A router's token: o is v, and its scores have no gradient, to the bit."""
    leaves = [x.to(device).requires_grad_() for x in inputs(3, 2, 1, 64, dtype)]
    out = attend("triton", *leaves, bounds(1, 1, 0, 1).to(device), 1, causal=causal)
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(out, leaves[2].detach().repeat(1, 2, 1))
    torch.testing.assert_close(dv, torch.full_like(dv, 2))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 100), (True, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("groups", "head_dim"), [(4, 64), (2, 80), (1, 128)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_that_is_here(
    implementation: str, groups: int, head_dim: int, dtype: torch.dtype, causal: bool, window: int | None
) -> None:
    if missing := implementations()[implementation] or attention._windowless(implementation, window):
        pytest.skip(missing)
    cu_seqlens = bounds(1, 1, 257, 0, 127, 30)
    mask, on_device = visible(cu_seqlens, causal, window).cuda(), cu_seqlens.cuda()
    assert_error_is_torchs_own(
        lambda q, k, v: attend(implementation, q, k, v, on_device, 257, causal=causal, window=window),
        [x.cuda() for x in inputs(416, 4, groups, head_dim, dtype)], mask,
    )  # fmt: skip


@CAUSAL
def test_gradcheck(causal: bool) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(7, 2, 1, 4)]
    cu_seqlens = bounds(3, 0, 3, 1)
    assert torch.autograd.gradcheck(lambda *x: varlen_attention_reference(*x, cu_seqlens, causal=causal), tensors)
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, 3, causal=causal, scale=0.3), tensors)


@CAUSAL
def test_reference_and_scale(causal: bool, backend: str, device: torch.device) -> None:
    tensors, cu_seqlens = [x.to(device) for x in inputs(20, 4, 2, 16)], bounds(9, 0, 4, 4, 3).to(device)
    for scale in (None, 0.1):
        ours = varlen_attention(*tensors, cu_seqlens, 9, causal=causal, scale=scale)
        torch.testing.assert_close(ours, varlen_attention_reference(*tensors, cu_seqlens, causal=causal, scale=scale))


def test_segments_are_strangers(backend: str, device: torch.device) -> None:
    """Changing one segment changes no bit of another; a segment of length one returns its own value."""
    q, k, v = (x.to(device) for x in inputs(30, 2, 2, 16))
    cu_seqlens = bounds(1, 12, 17).to(device)
    first = varlen_attention(q, k, v, cu_seqlens, 17, causal=True)
    torch.testing.assert_close(first[0], v[0])
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
    attend("sdpa", *inputs(5 * 17, 2, 2, 16), bounds(17, 17, 17, 17, 17), 17, causal=False)
    assert shapes == [(5, 2, 17, 16)]
    shapes.clear()
    attend("sdpa", *inputs(29, 2, 2, 16), bounds(1, 1, 9, 0, 9, 8, 1), 9, causal=True)
    assert shapes == [(2, 2, 1, 16), (2, 2, 9, 16), (1, 2, 8, 16), (1, 2, 1, 16)]


def test_strided_and_empty_input_and_repeatability(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(21, 3, 4, 16, device=device).unbind(1)  # as a fused projection gives them
    cu_seqlens = bounds(5, 8, 8).to(device)
    first = varlen_attention(q, k, v, cu_seqlens, 8, causal=True)
    assert first.is_contiguous() or backend == "reference"
    for other in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        assert torch.equal(first, varlen_attention(*other, cu_seqlens, 8, causal=True)) or backend == "reference"
    channels_apart = [x.mT.contiguous().mT for x in (q, k, v)]
    torch.testing.assert_close(first, varlen_attention(*channels_apart, cu_seqlens, 8, causal=True))
    for no_tokens in (bounds(), bounds(0, 0)):
        empty = q[:0].clone().requires_grad_()
        out = varlen_attention(empty, k[:0], v[:0], no_tokens.to(device), 0, causal=True)
        out.sum().backward()
        assert out.shape == (0, 4, 16)
        assert empty.grad is not None


def test_the_own_kernels_copy_no_view_and_skip_what_is_not_trained(device: torch.device) -> None:
    q, k, v = torch.randn(21, 3, 4, 16, device=device).unbind(1)
    launched: dict[str, list[object]] = {}
    with dispatch.recording(lambda kernel, grid, config, args, constants: launched.update({kernel.__name__: [*args]})):
        attend("triton", q.requires_grad_(), k, v, bounds(5, 8, 8).to(device), 8, causal=True).sum().backward()
    assert list(launched) == ["attention_forward_kernel", "attention_dq_kernel"]
    for arguments in launched.values():
        assert [x.data_ptr() for x in arguments[:3] if isinstance(x, Tensor)] == [x.data_ptr() for x in (q, k, v)]
    q.requires_grad_(False)
    with dispatch.recording(lambda kernel, grid, config, args, constants: launched.update({kernel.__name__: [*args]})):
        attend("triton", q, k, v.requires_grad_(), bounds(5, 8, 8).to(device), 8, causal=True).sum().backward()
    assert v.grad is not None
    assert "attention_dkdv_kernel" in launched


def test_heads_that_lie_far_apart(device: torch.device) -> None:
    """More than 2^31 elements from the first head to the last; of the memory between them nothing is touched."""
    torch.manual_seed(0)
    near = [torch.randn(5, 3, 16, device=device).half().requires_grad_() for _ in range(3)]
    with torch.no_grad():
        room = torch.empty(2**31 + 3 * 16 * 5, dtype=torch.float16, device=device)
        far = [room[i * 80 :].as_strided((5, 3, 16), (16, 2**30, 1)).copy_(x) for i, x in enumerate(near)]
    outs = []
    for q, k, v in (near, [x.requires_grad_() for x in far]):
        out = attend("triton", q, k, v, bounds(2, 3).to(device), 3, causal=True)
        outs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, expected in zip(*outs, strict=True):
        assert torch.equal(ours, expected)


def test_tokens_that_no_segment_covers(device: torch.device) -> None:
    """The reference refuses them, having the lengths at hand; the own kernels take them for one segment more."""
    tensors = [x.to(device) for x in inputs(20, 2, 2, 16)]
    short, whole = (attend("triton", *tensors, x.to(device), 9, causal=False) for x in (bounds(4, 7), bounds(4, 7, 9)))
    assert torch.equal(short, whole)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs(6, 4, 2, 8)
    with pytest.raises(ValueError, match="multiple of G"):
        varlen_attention(q, k[:, :1].expand(6, 3, 8), v[:, :1].expand(6, 3, 8), bounds(6), 6, causal=True)
    with pytest.raises(ValueError, match=r"of one dtype; got .*float16"):
        varlen_attention(q, k.half(), v, bounds(6), 6, causal=True)
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q, k, v, bounds(6).long(), 6, causal=True)
    with pytest.raises(ValueError, match="covers 5 tokens, q has 6"):
        attend("sdpa", q, k, v, bounds(5), 5, causal=True)
    with pytest.raises(ValueError, match=r"'flesh': unknown; accepted here: .*sdpa"):
        attend("flesh", q, k, v, bounds(6), 6, causal=True)


def test_what_the_own_kernels_refuse(device: torch.device) -> None:
    wide = [x.to(device) for x in inputs(6, 1, 1, 136)]
    with pytest.raises(ValueError, match=r"at most 128 channels .* got 136"):
        attend("triton", *wide, bounds(6).to(device), 6, causal=True)
    with pytest.raises(ValueError, match="above 0; got 8 and -1"):
        attend("triton", *(x[..., :8] for x in wide), bounds(6).to(device), 6, causal=True, scale=-1.0)


@pytest.mark.skipif(GPU, reason="about a machine without a CUDA device")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(6, 2, 2, 8)
    nothing = {"triton": "", "flash": "no CUDA device", "flash_attn": "no CUDA device", "xformers": "no CUDA device"}
    assert implementations() == nothing | {"sdpa": ""}
    monkeypatch.delenv("TRITON_INTERPRET")
    assert implementations() == nothing | {"sdpa": "", "triton": "no CUDA device"}
    with pytest.raises(ValueError, match="'flash': no CUDA device; accepted here: sdpa"):
        attend("flash", *tensors, bounds(6), 6, causal=True)
    monkeypatch.setattr(dispatch, "_settings", {"backend": "triton"})
    with pytest.raises(BackendError, match=r"attention: backend 'triton' .* on cpu"):
        varlen_attention(*tensors, bounds(6), 6, causal=True)


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    parent, _, child = name.rpartition(".")
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        fake_module(monkeypatch, parent, **{child: module})


@CAUSAL
def test_what_flash_attn_is_told(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of flash-attn 2.8's function, as far as it is used."""

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k, dropout_p) == (4, 4, 0.0)
        behind, ahead = window_size
        assert ahead == (-1 if behind == -1 else 0)
        window = None if behind == -1 else behind + 1  # keys from query - behind on are seen
        return varlen_attention_reference(q, k, v, cu_seqlens_q, causal=causal, scale=softmax_scale, window=window)

    fake_module(monkeypatch, "flash_attn", flash_attn_varlen_func=stand_in)
    tensors, cu_seqlens = inputs(6, 4, 2, 8), bounds(2, 4)
    for window in (None, 1, 3)[: 3 if causal else 1]:
        out = attention_peers.flash_attn(*tensors, cu_seqlens, 4, causal, 0.2, window)
        expected = varlen_attention_reference(*tensors, cu_seqlens, causal=causal, scale=0.2, window=window)
        assert torch.equal(out, expected)


@CAUSAL
def test_what_xformers_is_told(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the masks and the function of xformers 0.0.35, as far as they are used."""

    class Mask(SimpleNamespace):
        def __init__(self, q_seqinfo: Any, k_seqinfo: Any) -> None:
            super().__init__(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    class CausalMask(Mask):
        pass

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask, p: float = 0.0, scale: Any = None
    ) -> Tensor:
        assert query.shape == key.shape == value.shape == (1, 6, 4, 8)
        assert attn_bias.q_seqinfo is attn_bias.k_seqinfo
        assert attn_bias.q_seqinfo.max_seqlen == 6  # of any bound, what is possible
        q, k, v, seqstart = query[0], key[0], value[0], attn_bias.q_seqinfo.seqstart
        return varlen_attention_reference(q, k, v, seqstart, causal=isinstance(attn_bias, CausalMask), scale=scale)[
            None
        ]

    masks = SimpleNamespace(_SeqLenInfo=SimpleNamespace, BlockDiagonalMask=Mask, BlockDiagonalCausalMask=CausalMask)
    fmha = SimpleNamespace(attn_bias=masks, memory_efficient_attention=stand_in)
    fake_module(monkeypatch, "xformers.ops", fmha=fmha)
    tensors, cu_seqlens = inputs(6, 4, 2, 8), bounds(2, 4)
    out = attention_peers.xformers(*tensors, cu_seqlens, 100, causal, 0.2)
    assert torch.equal(out, varlen_attention_reference(*tensors, cu_seqlens, causal=causal, scale=0.2))


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
    attention_peers._varlen_attn.cache_clear()
    for groups in (4, 2):
        attention_peers.flash(*inputs(6, 4, groups, 8), bounds(2, 4), 4, causal, 0.2)
    if causal:
        attention_peers.flash(*inputs(6, 4, 4, 8), bounds(2, 4), 4, causal, 0.2, 3)
    attention_peers._varlen_attn.cache_clear()
    assert [call["window_size"] for call in calls[2:]] == ([(2, 0)] if causal else [])  # of 3 tokens, 2 are before it
    calls = calls[:2]
    assert all(call["window_size"] == ((-1, 0) if causal else (-1, -1)) for call in calls)
    assert all(call["scale"] == 0.2 for call in calls)
    assert not calls[0].get("enable_gqa", False)
    assert calls[1].get("enable_gqa", False) is (takes_gqa and "enable_gqa" in signature.parameters)
    assert calls[1]["key"].shape[1] == (2 if "enable_gqa" in calls[1] else 4)


def test_flash_attention_is_given_what_it_can_load() -> None:
    q, k, v = torch.randn(6, 3, 2, 16).unbind(1)
    assert all(attention_peers._aligned(x) is x for x in (q, k, v))
    for x in (torch.randn(6, 2, 20)[..., :16], torch.randn(6, 2, 24)[..., 4:20], torch.randn(6, 16, 2).mT):
        assert attention_peers._aligned(x).is_contiguous()
        assert torch.equal(attention_peers._aligned(x), x)


class OnGpu(Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Sets the compute capability of the GPU that `OnGpu` tensors are on; every implementation is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_peers, "_not_importable", lambda module: "")
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_settings", {"backend": "auto"})

    def set_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(dispatch, "_capability", lambda index: 10 * capability[0] + capability[1])

    return set_capability


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "implementation", "reason"),
    [
        ((7, 5), torch.float16, 64, "reference", "no kernel for torch.float16 with head dim 64 on sm_75"),
        ((8, 0), torch.float16, 128, "flash", "predicted to be the fastest here"),
        ((9, 0), torch.bfloat16, 72, "flash", "predicted to be the fastest here"),
        ((9, 0), torch.bfloat16, 20, "triton", "predicted to be the fastest here"),
        ((9, 0), torch.float32, 64, "triton", "predicted to be the fastest here"),
        ((9, 0), torch.float32, 160, "reference", "no kernel for torch.float32 with head dim 160 on sm_90"),
        ((9, 0), torch.float64, 64, "reference", "no kernel for torch.float64 with head dim 64 on sm_90"),
    ],
)  # fmt: skip
def test_what_a_gpu_takes(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, implementation: str, reason: str,
    on_gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    on_gpu(capability)
    for i, name in enumerate(IMPLEMENTATIONS):
        monkeypatch.setitem(IMPLEMENTATIONS, name, lambda q, *rest, i=i: torch.full_like(q, i))
    tensors = [x.as_subclass(OnGpu) for x in inputs(9, 2, 2, head_dim, dtype)]
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        out = varlen_attention(*tensors, bounds(4, 5), 5, causal=True)
    ran = list(IMPLEMENTATIONS)[int(out[0, 0, 0])]
    assert ran == ("sdpa" if implementation == "reference" else implementation)
    assert [record.getMessage() for record in caplog.records] == [f"attention: {implementation} ({reason})"]


def test_a_torch_without_flash_attention(
    on_gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu((9, 0))
    monkeypatch.setattr(attention_peers, "_not_importable", lambda module: "ImportError: no such module")
    assert implementations()["flash"] == "ImportError: no such module"
    q = inputs(9, 2, 2, 64, torch.float16)[0].as_subclass(OnGpu)
    why = "predicted to be the fastest here; not flash: ImportError: no such module"
    assert attention._preferred(q, 5, None) == ("triton", why)
    monkeypatch.setattr(attention, "PREFERENCES", [attention.Preference("sdpa", (q.dtype,), 80, 64, longest=4)])
    assert attention._preferred(q, 4, None)[0] == "sdpa"
    assert attention._preferred(q, 5, None)[0] == "reference"


@pytest.mark.parametrize("takes_window", [True, False])
def test_who_takes_a_window(
    takes_window: bool, on_gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the signature of what is installed; one that takes none is passed over, and refused where it is named."""
    on_gpu((9, 0))
    from torch.nn.attention.varlen import varlen_attn

    def windowless(q: Tensor) -> Tensor:
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn if takes_window else windowless)
    fake_module(monkeypatch, "flash_attn", flash_attn_varlen_func=windowless)
    q, k, v = (x.as_subclass(OnGpu) for x in inputs(9, 2, 2, 64, torch.float16))
    assert attention._preferred(q, 9, None)[0] == "flash"
    assert attention._preferred(q, 9, 4)[0] == ("flash" if takes_window else "triton")
    for name in ("xformers", "flash_attn", *(() if takes_window else ("flash",))):
        with pytest.raises(ValueError, match=rf"'{name}': .*takes no window.*; accepted here: triton, .*sdpa"):
            attend(name, q, k, v, bounds(9), 9, causal=True, window=4)


def test_a_module_that_does_not_import_says_why() -> None:
    assert attention_peers._not_importable("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    in_torch = attention_peers._not_importable("torch.nn.attention.varlen")
    assert bool(in_torch) != torch.backends.cuda.is_flash_attention_available()
