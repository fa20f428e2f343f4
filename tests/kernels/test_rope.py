from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_reference, rope_table
from tests.kernels.tolerance import assert_rounded_once, assert_within_twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])


def expression(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The usual way: x cos + rotate(x) sin over whole heads, in x's dtype."""
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1)[:, None].to(x.dtype) for t in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), dim=-1)[:, None].to(x.dtype) for t in (cos, sin))
        turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return x * cos + turned * sin


def test_table_is_the_formula() -> None:
    cos, sin = rope_table(80, 700, 10000.0)
    angle = torch.arange(700, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 80, 2).double() / 80)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (700, 40)
    assert (cos.double() - angle.cos()).abs().max() < 1e-4  # 700 radians in fp32
    assert (sin.double() - angle.sin()).abs().max() < 1e-4
    assert torch.equal(rope_table(80, 300, 10000.0)[0], cos[:300])


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (127, 72), (257, 80), (577, 96), (729, 128)])
def test_error_is_torchs_own(tokens: int, head_dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(tokens)
    cos, sin = rope_table(head_dim, 800, 10000.0)
    positions = torch.randint(0, 800, (tokens,))
    tensors = [torch.randn(tokens, heads, head_dim).to(dtype) for heads in (4, 2)]
    grads = [torch.randn(x.shape).to(dtype) for x in tensors]
    leaves = [x.clone().requires_grad_() for x in tensors]
    outs = rope(*leaves, cos, sin, positions, interleaved=interleaved)
    torch.autograd.backward(outs, grads)
    for x, grad, leaf, out in zip(tensors, grads, leaves, outs, strict=True):
        theirs, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        y = expression(theirs, cos[positions], sin[positions], interleaved)
        reference = expression(wide, cos[positions], sin[positions], interleaved)
        assert_within_twice(out.detach(), y.detach(), reference.detach(), "out")
        assert_rounded_once(out.detach(), reference.detach(), "out")
        y.backward(grad)
        reference.backward(grad.double())
        assert leaf.grad is not None
        assert theirs.grad is not None
        assert wide.grad is not None
        assert_within_twice(leaf.grad, theirs.grad, wide.grad, "grad")
        assert_rounded_once(leaf.grad, wide.grad, "grad")


def test_interleaved_is_a_complex_product() -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(16, 50, 10000.0)
    q, positions = torch.randn(9, 3, 16), torch.randint(0, 50, (9,))
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[positions][:, None]
    out, _ = rope(q, q, cos, sin, positions, interleaved=True)
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2))


def test_layouts_are_permutations_of_each_other() -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(16, 50, 10000.0)
    q, positions = torch.randn(9, 3, 16), torch.randint(0, 50, (9,))
    halves = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    interleaved, _ = rope(q, q, cos, sin, positions, interleaved=True)
    split, _ = rope(q[..., halves], q[..., halves], cos, sin, positions, interleaved=False)
    assert torch.equal(interleaved[..., halves], split)


@LAYOUTS
def test_gradcheck(interleaved: bool) -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(6, 9, 100.0)
    positions = torch.tensor([3, 0, 8])
    q, k = (torch.randn(3, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, positions, interleaved=interleaved), (q, k))
    assert torch.autograd.gradcheck(lambda q: rope_reference(q, cos[positions], sin[positions], interleaved), q)


@LAYOUTS
def test_strided_and_empty_input_and_repeatability(interleaved: bool) -> None:
    torch.manual_seed(1)
    cos, sin = rope_table(16, 50, 10000.0)
    qk = torch.randn(3, 16, 20).permute(2, 0, 1)
    q, k = qk[:, :2], qk[:, 2:]
    positions = torch.arange(20)
    first = rope(q, k, cos, sin, positions, interleaved=interleaved)
    again = rope(q.contiguous(), k.contiguous(), cos, sin, positions, interleaved=interleaved)
    assert all(map(torch.equal, first, again))
    empty = rope(q[:0], k[:0], cos, sin, positions[:0], interleaved=interleaved)
    assert [x.shape for x in empty] == [(0, 2, 16), (0, 1, 16)]


def test_only_q_or_only_k_may_need_a_gradient() -> None:
    cos, sin = rope_table(8, 5, 10000.0)
    q, k = torch.randn(5, 2, 8, requires_grad=True), torch.randn(5, 2, 8)
    rope(q, k, cos, sin, torch.arange(5), interleaved=True)[0].sum().backward()
    assert q.grad is not None


def test_saves_neither_q_nor_k() -> None:
    cos, sin = rope_table(8, 5, 10000.0)
    q, k = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q, k, cos, sin, positions := torch.arange(5), interleaved=True)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (cos, sin, positions)}


def test_wrong_shapes_are_refused() -> None:
    cos, sin = rope_table(8, 5, 10000.0)
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="even"):
        rope_table(7, 5, 10000.0)
    with pytest.raises(ValueError, match="d = 8"):
        rope(x, x[..., :4], cos, sin, torch.arange(5), interleaved=True)
    with pytest.raises(ValueError, match="position_ids"):
        rope(x, x, cos, sin, torch.arange(4), interleaved=True)
