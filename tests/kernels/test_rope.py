"""RoPE against the usual expression, forward and backward, with either backend, in place too."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.dispatch import PRIMITIVES, Kernel, as_on_card, recording
from kernels.launches import Launch
from kernels.rope import rope, rope_reference, rope_table, rope_table_2d
from kernels.samples import Call
from kernels.traffic import count
from tests.kernels.tolerance import assert_rounded_once, assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
POSITIONS = 800
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])


def expression(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The usual way: x cos + rotate(x) sin over the channels that turn, in x's dtype."""
    x, passing = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1)[:, None].to(x.dtype) for t in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), dim=-1)[:, None].to(x.dtype) for t in (cos, sin))
        turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return torch.cat((x * cos + turned * sin, passing), dim=-1)


def assert_accurate(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    turning: int,
    dtype: torch.dtype,
    device: torch.device,
    interleaved: bool,
    inplace: bool,
) -> None:
    generator = torch.Generator().manual_seed(tokens + head_dim + turning)
    cos, sin = rope_table(turning, POSITIONS, 10000.0, device)
    positions = torch.randint(0, POSITIONS, (tokens,), generator=generator, dtype=torch.int32).to(device)
    tensors, grads = (
        [torch.randn(tokens, count, head_dim, generator=generator).to(device, dtype) for count in heads] for _ in "xg"
    )
    leaves = [x.clone().requires_grad_() for x in tensors]
    outs = rope(*(leaf * 1 for leaf in leaves), cos, sin, positions, interleaved=interleaved, inplace=inplace)
    got = torch.autograd.grad(outs, leaves, grads)
    for x, grad, out, dx in zip(tensors, grads, outs, got, strict=True):
        for what, ours, value, sign in (("out", out.detach(), x, 1), ("grad", dx, grad, -1)):
            table = cos[positions], sign * sin[positions]
            truth = expression(value.double(), *table, interleaved)
            assert_within_twice(ours, expression(value, *table, interleaved), truth, what)
            assert_rounded_once(ours, truth, what)


@INPLACE
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "turning"),
    [(1, (4, 2), 64, 64), (7, (3, 1), 72, 72), (5, (5, 5), 80, 32), (3, (40, 8), 128, 128), (5, (16, 2), 96, 96)],
)
def test_error_is_torchs_own(
    backend: str, tokens: int, heads: tuple[int, int], head_dim: int, turning: int, dtype: torch.dtype,
    interleaved: bool, inplace: bool, device: torch.device,
) -> None:  # fmt: skip
    assert_accurate(tokens, heads, head_dim, turning, dtype, device, interleaved, inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "turning"), [(64, 32), (80, 32), (64, 16)], ids=["Phi-1.5", "Phi-2", "StableLM"])
def test_parts_of_a_fused_product_with_a_bias(
    backend: str, head_dim: int, turning: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Half-split and partial, in place on slices of one [T, 3 D]: forward, and the gradient through the product."""
    tokens, heads, inner = 5, 3, 16
    generator = torch.Generator().manual_seed(head_dim + turning)
    width = heads * head_dim
    shapes = (tokens, inner), (3 * width, inner), (3 * width,), (tokens, 3 * width)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    cos, sin = rope_table(turning, POSITIONS, 10000.0, device)
    at = torch.randint(0, POSITIONS, (tokens,), generator=generator).to(device)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        qkv = torch.addmm(bias, x, weight.T).unflatten(-1, (-1, head_dim))
        q, k, v = (qkv[:, i * heads : (i + 1) * heads] for i in range(3))
        turned = rope(q, k, cos, sin, at, interleaved=False, inplace=True)
        assert [y.data_ptr() for y in turned] == [q.data_ptr(), k.data_ptr()]
        return torch.cat((*turned, v), dim=1).flatten(1)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q, k, v = torch.addmm(bias, x, weight.T).unflatten(-1, (-1, head_dim)).chunk(3, dim=1)
        return torch.cat((*(expression(y, cos[at], sin[at], False) for y in (q, k)), v), dim=1).flatten(1)

    results = []
    for function, to in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        leaves = [x.detach().to(to).requires_grad_() for x in drawn[:3]]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, drawn[3].to(to))])
    for name, *values in zip(("out", "dx", "dweight", "dbias"), *results, strict=True):
        assert_within_twice(*values, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(RANDOM_SHAPES):
        tokens, most = (1 + below(4096), 64) if torch.cuda.is_available() else (1 + below(6), 6)
        head_dim = (64, 72, 80, 96, 128, 256)[below(6)]
        turning = head_dim if below(2) else 2 * (1 + below(head_dim // 2))
        heads = 1 + below(most), 1 + below(most)
        assert_accurate(tokens, heads, head_dim, turning, dtype, device, below(2) == 1, below(2) == 1)


def test_table_is_the_formula() -> None:
    cos, sin = rope_table(80, 700, 10000.0)
    angle = torch.arange(700, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 80, 2).double() / 80)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (700, 40)
    assert (cos.double() - angle.cos()).abs().max() < 1e-4  # 700 radians in fp32
    assert (sin.double() - angle.sin()).abs().max() < 1e-4
    assert torch.equal(rope_table(80, 300, 10000.0)[0], cos[:300])


def test_table_of_a_grid_turns_patches_as_eva_does() -> None:
    """EVA's formula, patch by patch: half of the head by its row, half by its column, pairs side by side."""
    height, width, head_dim = 3, 2, 16
    cos, sin = rope_table_2d(head_dim, height, width)
    torch.manual_seed(0)
    x = torch.randn(1 + height * width, 2, head_dim)
    out, _ = rope(x, x, cos, sin, torch.arange(1 + height * width), interleaved=True)
    assert torch.equal(out[0], x[0])  # the class token
    frequency = 1 / 10000.0 ** (torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    for row in range(height):
        for column in range(width):
            angle = torch.cat((row / height * 16 * frequency, column / width * 16 * frequency))
            patch = 1 + row * width + column
            turned = torch.view_as_complex(x[patch].unflatten(-1, (-1, 2))) * torch.polar(torch.ones(8), angle)
            torch.testing.assert_close(out[patch], torch.view_as_real(turned).flatten(-2))


def test_the_axes_of_a_grid_are_tables_of_one_dimension() -> None:
    cos, sin = rope_table_2d(64, 24, 24)
    by_row, by_column = (table[1:].view(24, 24, 2, 16).unbind(2) for table in (cos, sin))
    positions = torch.arange(24) / 24 * 16
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    for half, axis in ((0, 1), (1, 0)):
        for table, expected in ((by_row, angle.cos()), (by_column, angle.sin())):
            along = table[half].select(axis, 5)  # any column, any row
            torch.testing.assert_close(along, expected)


def test_interleaved_is_a_complex_product(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(16, 50, 10000.0, device)
    q, positions = torch.randn(9, 3, 16, device=device), torch.randint(0, 50, (9,), device=device)
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[positions][:, None]
    out, _ = rope(q, q, cos, sin, positions, interleaved=True)
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2))


def test_layouts_are_permutations_of_each_other(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(16, 50, 10000.0, device)
    q, positions = torch.randn(9, 3, 20, device=device), torch.randint(0, 50, (9,), device=device)
    halves = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2), torch.arange(16, 20)))
    interleaved, _ = rope(q, q, cos, sin, positions, interleaved=True)
    split, _ = rope(q[..., halves], q[..., halves], cos, sin, positions, interleaved=False)
    assert torch.equal(interleaved[..., halves], split)


@LAYOUTS
@INPLACE
def test_gradcheck(interleaved: bool, inplace: bool) -> None:
    torch.manual_seed(0)
    cos, sin = rope_table(6, 9, 100.0)
    positions = torch.tensor([3, 0, 8])
    q, k = (torch.randn(3, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (2, 1))

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q * 1, k * 1, cos, sin, positions, interleaved=interleaved, inplace=inplace)

    assert torch.autograd.gradcheck(turn, (q, k))
    assert torch.autograd.gradcheck(lambda q: rope_reference(q, cos[positions], sin[positions], interleaved), q)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_is_where_it_was(
    backend: str, dtype: torch.dtype, interleaved: bool, device: torch.device
) -> None:
    """The gradient is the turn back. Two roundings, each of at most half an ulp of the pair's length."""
    torch.manual_seed(0)
    cos, sin = rope_table(64, POSITIONS, 10000.0, device)
    q = torch.randn(10, 2, 80, device=device).to(dtype).requires_grad_()
    out, _ = rope(q, q.detach(), cos, sin, torch.arange(0, POSITIONS, 80, device=device), interleaved=interleaved)
    (back,) = torch.autograd.grad(out, q, out.detach())
    assert ((back - q).abs() <= 2 * torch.finfo(dtype).eps * q.detach().abs().amax()).all()
    assert torch.equal(back[..., 64:], q[..., 64:])


@LAYOUTS
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_strided_and_empty_input(backend: str, interleaved: bool, index: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    cos, sin = rope_table(16, 50, 10000.0, device)
    positions = torch.arange(6, device=device, dtype=index).flip(0)
    for qk in (torch.randn(3, 16, 6).permute(2, 0, 1), torch.randn(6, 5, 16)):  # heads apart; a wider buffer
        q, k = qk.to(device)[:, :2], qk.to(device)[:, 2:3]
        first = rope(q, k, cos, sin, positions, interleaved=interleaved)
        again = rope(q.contiguous(), k.contiguous(), cos, sin, positions, interleaved=interleaved)
        assert all(map(torch.equal, first, again))
        empty = rope(q[:0], k[:0], cos, sin, positions[:0], interleaved=interleaved)
        assert [x.shape for x in empty] == [(0, 2, 16), (0, 1, 16)]


def test_only_q_or_only_k_may_need_a_gradient(backend: str, device: torch.device) -> None:
    cos, sin = rope_table(8, 5, 10000.0, device)
    q, k = (torch.randn(5, heads, 8, device=device) for heads in (2, 1))
    positions = torch.arange(5, device=device)
    for x in (q, k):
        x.requires_grad_()
        outs = rope(q, k, cos, sin, positions, interleaved=True)
        (grad,) = torch.autograd.grad([out.square().sum() for out in outs], x, retain_graph=True)
        torch.testing.assert_close(grad, 2 * x.detach())  # lengths stay
        (unused,) = torch.autograd.grad(outs[0 if x is k else 1].sum(), x, allow_unused=True)
        assert unused is None
        x.requires_grad_(False)


def test_saves_neither_q_nor_k(backend: str, device: torch.device) -> None:
    cos, sin = rope_table(8, 5, 10000.0, device)
    q, k = (torch.randn(5, 2, 8, requires_grad=True, device=device) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q, k, cos, sin, positions := torch.arange(5, device=device), interleaved=True)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (cos, sin, positions)}


# In place: q and k are slices of what one linear layer returned, [T, H + 2 G, d].

H, G, D = 4, 2, 8


def fused(device: torch.device) -> tuple[Tensor, Tensor, Callable[..., tuple[Tensor, Tensor]]]:
    """x, a buffer computed from it, and rope on slices of a buffer."""
    torch.manual_seed(0)
    x = torch.randn(5, H + 2 * G, D, device=device, requires_grad=True)
    cos, sin = rope_table(4, 5, 10000.0, device)

    def turn(qkv: Tensor, inplace: bool = True) -> tuple[Tensor, Tensor]:
        positions = torch.arange(5, device=device)
        return rope(qkv[:, :H], qkv[:, H : H + G], cos, sin, positions, interleaved=False, inplace=inplace)

    return x, 3 * x, turn


def test_in_place_is_in_place_and_has_the_same_gradients(backend: str, device: torch.device) -> None:
    x, qkv, turn = fused(device)
    results = []
    for inplace in (False, True):
        buffer = 3 * x
        before = buffer.detach().clone()
        q, k = turn(buffer, inplace)
        v = buffer.detach()[:, H + G :]
        (gradient,) = torch.autograd.grad(q.square().sum() + k.exp().sum() + v.sum(), x)
        assert inplace == (q.data_ptr() == buffer.data_ptr())
        assert torch.equal(v, before[:, H + G :])
        results.append([q, k, gradient])
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        q, k = turn(qkv)
    assert torch.equal(q, results[0][0])
    assert q.data_ptr() == qkv.data_ptr()


def test_results_of_in_place_may_be_changed_in_place_again(backend: str, device: torch.device) -> None:
    x, qkv, turn = fused(device)
    q, _ = turn(qkv)
    (gradient,) = torch.autograd.grad(q.mul_(2).sum(), x)
    (expected,) = torch.autograd.grad((2 * turn(3 * x, False)[0]).sum(), x)
    assert torch.equal(gradient, expected)


def test_what_was_saved_before_is_not_taken_for_what_it_was(backend: str, device: torch.device) -> None:
    _, qkv, turn = fused(device)
    square = qkv.square().sum()  # its gradient needs qkv's values
    q, _ = turn(qkv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + q.sum()).backward()


def test_what_was_computed_before_keeps_its_gradient(backend: str, device: torch.device) -> None:
    x, qkv, turn = fused(device)
    total = qkv.sum()
    turn(qkv)
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


@pytest.mark.parametrize("which", ["the buffer", "q", "a new slice"])
def test_what_was_overwritten_has_the_gradient_of_its_new_value(backend: str, which: str, device: torch.device) -> None:
    cos, sin = rope_table(4, 5, 10000.0, device)
    x, qkv, turn = fused(device)
    q, k = qkv[:, :H], qkv[:, H : H + G]
    rope(q, k, cos, sin, torch.arange(5, device=device), interleaved=False, inplace=True)
    overwritten = {"the buffer": qkv, "q": q, "a new slice": qkv[:, 1:2]}[which]
    turned = torch.cat((*turn(3 * x, False), 3 * x[:, H + G :]), dim=1)
    value = {"the buffer": turned, "q": turned[:, :H], "a new slice": turned[:, 1:2]}[which]
    assert torch.equal(overwritten, value)
    gradients = (torch.autograd.grad(tensor.exp().sum(), x)[0] for tensor in (overwritten, value))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("before", [True, False])
def test_v_may_be_a_slice_of_the_same_buffer(backend: str, before: bool, device: torch.device) -> None:
    x, qkv, turn = fused(device)
    v = qkv[:, H + G :] if before else None
    q, k = turn(qkv)
    v = qkv[:, H + G :] if v is None else v
    plain = *turn(3 * x, False), 3 * x[:, H + G :]
    gradients = (
        torch.autograd.grad(q.square().sum() + k.exp().sum() + v.exp().sum(), x)[0] for q, k, v in ((q, k, v), plain)
    )
    torch.testing.assert_close(*gradients)


def test_what_cannot_be_done_in_place_is_refused(device: torch.device) -> None:
    cos, sin = rope_table(8, 5, 10000.0, device)
    x, other = torch.randn(5, 4, 8, device=device), torch.randn(5, 4, 8, device=device)

    def turn(q: Tensor, k: Tensor) -> None:
        rope(q, k, cos, sin, torch.arange(5, device=device), interleaved=True, inplace=True)

    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        turn(x.clone().requires_grad_(), other)
    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        turn(x.clone().requires_grad_()[:, :2], other)
    with pytest.raises(ValueError, match=r"contiguous within a token, got strides \(8, 40, 1\)"):
        turn(x.transpose(0, 1).contiguous().transpose(0, 1), other)
    with pytest.raises(ValueError, match="contiguous within a token"):
        turn(x[:1].expand(5, -1, -1), other)
    for q, k in ((x, x), (x[:, :3], x[:, 2:]), (x[:, 1:], x[:, :2]), (x.view(-1)[:80].view(5, 2, 8), x[:, 3:])):
        with pytest.raises(ValueError, match="share memory"):
            turn(q, k)
    turn(x[:, :3], x[:, 3:])
    turn(x.view(-1)[:80].view(5, 2, 8), x.view(-1)[80:].view(5, 2, 8))
    with pytest.raises(RuntimeError, match="multiple views"):  # autograd's own rule
        turn(*(3 * x.requires_grad_()).split((2, 2), dim=1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter")
@LAYOUTS
def test_in_place_touches_only_what_turns(triton_backend: None, interleaved: bool) -> None:
    tokens, heads, head_dim, turning = 24, (6, 2), 80, 32
    x = [torch.randn(tokens, count, head_dim).half() for count in heads]
    cos, sin = rope_table(turning, tokens, 10000.0)
    positions = torch.arange(tokens, dtype=torch.int32)
    traffic = count(Call("rope_turn_", (x, cos, sin, positions, interleaved, False)), tokens)
    assert traffic.least == 2 * 2 * tokens * sum(heads) * turning + cos.nbytes + sin.nbytes + positions.nbytes


@pytest.mark.parametrize("turning", [2, 32, 256])
def test_the_tiles_of_any_head_fit_into_registers(turning: int) -> None:
    per_thread = []

    def note(_: Kernel, __: tuple[int, ...], config: Launch, ___: tuple[object, ...], constants: Any) -> None:
        elements = constants["HEADS"] * (2 * constants["PAIRS"] + constants["PASSING"])
        per_thread.append(elements / (32 * config.warps))

    with as_on_card(90), recording(note):
        for heads in (1, 8, 40, 128):
            x, table = torch.empty(9, heads, 256, device="meta"), torch.empty(9, turning // 2, device="meta")
            PRIMITIVES["rope_turn"].launcher(
                [x], table, table, torch.empty(9, dtype=torch.int32, device="meta"), True, False
            )
    assert 0 < max(per_thread) <= 96


def test_wrong_shapes_are_refused() -> None:
    cos, sin = rope_table(8, 5, 10000.0)
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="even"):
        rope_table(7, 5, 10000.0)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        rope_table_2d(6, 2, 2)
    with pytest.raises(ValueError, match=r"d >= 8.*\(5, 2, 4\)"):
        rope(x[..., :4], x[..., :4], cos, sin, torch.arange(5), interleaved=True)
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(4, 4\)"):
        rope(x, x, cos, sin[:4], torch.arange(5), interleaved=True)
    with pytest.raises(ValueError, match="position_ids"):
        rope(x, x, cos, sin, torch.arange(4), interleaved=True)
