"""Rotary position embedding of q and k in one launch (RoFormer, arXiv 2104.09864).

Pair i of a head at position p turns by the angle p * theta^(-2i/r), r the channels that turn:

    a' = a cos - b sin        b' = a sin + b cos        backward: the same turn with -sin

`interleaved` says where a pair lies in the head: (2i, 2i + 1) in Meta's LLaMA files, (i, i + r/2) in Hugging Face's.
q [T, H, d] and k [T, G, d] fp16, bf16 or fp32, heads contiguous within a token, tokens at any stride; table fp32
[P, r/2]; position_ids int32 or int64 [T]. r < d is partial rotary (Phi-2 32 of 80): the channels from r on pass. Maths
in fp32, one rounding to the dtype at the end. Only references to table and positions are saved.

Reads and writes q and k once, the table rows of each token once a tile of heads (from cache). In place, partial rotary
touches the channels that turn and no others. A pair's channels are loaded as whole runs of a head, 16 bytes a thread,
in either layout; interleaved pairs are told apart in registers.

In place the results are new tensors on the old memory, which autograd knows to have changed: who saved q, k or what
they are views of finds another version in its backward; what is computed from them later has the gradient of the new
values. So v may be a third slice of their buffer, but its gradient then costs two copies of the buffer's. The backward
allocates: a gradient is never known to be one consumer's alone (q' + z hands one tensor to both).
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose, launch, primitive, run, wide


def rope_table(
    head_dim: int, positions: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, head_dim / 2]. Angles are taken in fp32, as LLaMA does.

    head_dim: the channels that turn, fewer than a head has for partial rotary. Raises ValueError for an odd number.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    angle = _angles(torch.arange(positions, dtype=torch.float32, device=device), head_dim, theta)
    return angle.cos(), angle.sin()


def rope_table_2d(
    head_dim: int,
    grid_h: int,
    grid_w: int,
    theta: float = 10000.0,
    *,
    trained_grid: int = 16,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [1 + grid_h * grid_w, head_dim / 2], of row-major patches and `interleaved` pairs: EVA02-CLIP.

    The first half of a head turns by the patch's row, the second by its column, each as a head of head_dim / 2; an axis
    of n patches has the positions i * trained_grid / n. Row 0 is the class token's and turns nothing; patch p has row
    p + 1. Formula: VisionRotaryEmbeddingFast of EVA-CLIP, eva_clip/rope.py, https://github.com/baaivision/EVA.
    Raises ValueError where head_dim is no multiple of 4.
    """
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(f"head_dim must be a positive multiple of 4, got {head_dim}")
    rows, columns = (
        _angles(torch.arange(n, dtype=torch.float32, device=device) / n * trained_grid, head_dim // 2, theta)
        for n in (grid_h, grid_w)
    )
    patches = torch.cat((rows[:, None].expand(-1, grid_w, -1), columns.expand(grid_h, -1, -1)), dim=-1).flatten(0, 1)
    angle = torch.cat((patches.new_zeros(1, head_dim // 2), patches))
    return angle.cos(), angle.sin()


def _angles(positions: Tensor, channels: int, theta: float) -> Tensor:
    """positions fp32 [P] -> [P, channels / 2]."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    return torch.outer(positions, 1.0 / (theta**exponent))


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, d] turned by its tokens' rows cos, sin [T, r/2] of the table."""
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, r/2]
    turned, passing = wide(x).split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned, passing), dim=-1).to(x.dtype)


@triton.jit
def turn_tile(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    sign: tl.tensor,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Turns the heads `head` [HEADS] of one token; the pointers are those of its first head and its row of the table.

    The table's address waits for the token's position. The barrier keeps the loads of x, which need not wait, ahead of
    the table's; ptxas puts them behind.
    """
    live = (head < heads)[:, None]
    x_head, y_head = x_ptr + head[:, None] * WIDTH, y_ptr + head[:, None] * WIDTH
    pair = tl.arange(0, PAIRS)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(x_head + both, mask=live & (both < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(x, (head.shape[0], PAIRS, 2)))
    else:
        a = tl.load(x_head + pair, mask=live & (pair < HALF), other=0.0)
        b = tl.load(x_head + HALF + pair, mask=live & (pair < HALF), other=0.0)
    if PASSING > 0:
        rest = 2 * HALF + tl.arange(0, PASSING)[None, :]
        passing = tl.load(x_head + rest, mask=live & (rest < WIDTH))
    tl.debug_barrier()
    cos = tl.load(cos_ptr + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + pair, mask=pair < HALF, other=0.0) * sign
    a, b = a.to(tl.float32), b.to(tl.float32)
    c, d = a * cos - b * sin, a * sin + b * cos
    if INTERLEAVED:
        tl.store(y_head + both, tl.interleave(c, d), mask=live & (both < 2 * HALF))
    else:
        tl.store(y_head + pair, c, mask=live & (pair < HALF))
        tl.store(y_head + HALF + pair, d, mask=live & (pair < HALF))
    if PASSING > 0:
        tl.store(y_head + rest, passing, mask=live & (rest < WIDTH))


@triton.jit
def rope_turn_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor | None,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor | None,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    q_out_stride: tl.tensor,
    k_out_stride: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    sign: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """One program: HEADS heads of one token, of q or of k. The programs of a token are neighbours.

    WIDTH: d; HALF: r/2, padded PAIRS; PASSING: d - r, padded, 0 where nothing passes or it may stay. sign: of sin.
    """
    q_tiles = tl.cdiv(q_heads, HEADS)
    tiles = q_tiles + tl.cdiv(k_heads, HEADS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tl.load(position_ptr + token).to(tl.int64) * HALF
    if tile < q_tiles:
        turn_tile(
            q_ptr + token * q_stride, q_out_ptr + token * q_out_stride, cos_ptr + row, sin_ptr + row,
            tile * HEADS + tl.arange(0, HEADS), q_heads, sign, WIDTH, HALF, PAIRS, PASSING, INTERLEAVED,
        )  # fmt: skip
    elif k_ptr is not None:
        turn_tile(
            k_ptr + token * k_stride, k_out_ptr + token * k_out_stride, cos_ptr + row, sin_ptr + row,
            (tile - q_tiles) * HEADS + tl.arange(0, HEADS), k_heads, sign, WIDTH, HALF, PAIRS, PASSING, INTERLEAVED,
        )  # fmt: skip


def _launch(
    x: list[Tensor], out: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inverse: bool
) -> None:
    """x and out: q and k, or one of the two."""
    tokens, _, width = x[0].shape
    half = cos.shape[1]
    heads = [tensor.shape[1] for tensor in x]
    pairs = triton.next_power_of_2(half)
    config = launch("rope_turn", 2 * half * max(heads), x[0])
    passing = 0 if out[0] is x[0] or width == 2 * half else triton.next_power_of_2(width - 2 * half)
    head = max(2 * pairs, passing // 2)  # in registers: what passes takes half as many
    tile = min(max(config.cols // head, 1), triton.next_power_of_2(max(heads)))
    second: tuple[Tensor | None, Tensor | None] = (x[1], out[1]) if len(x) == 2 else (None, None)
    run(
        rope_turn_kernel, (tokens * sum(triton.cdiv(count, tile) for count in heads),), config,
        x[0], second[0], out[0], second[1], cos, sin, position_ids,
        x[0].stride(0), x[-1].stride(0), out[0].stride(0), out[-1].stride(0),
        heads[0], heads[1] if len(x) == 2 else 0, -1.0 if inverse else 1.0,
        HEADS=tile, WIDTH=width, HALF=half, PAIRS=pairs, PASSING=passing, INTERLEAVED=interleaved,
    )  # fmt: skip


def _turned(
    x: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inverse: bool
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in x]


@primitive(
    "rope_turn(Tensor[] x, Tensor cos, Tensor sin, Tensor position_ids, bool interleaved, bool inverse) -> Tensor[]",
    fake=_turned,
)
def rope_turn(
    x: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """x: one or two of [T, H, d], any H, heads contiguous within a token; cos, sin contiguous -> turned, contiguous."""
    out = _turned(x, cos, sin, position_ids, interleaved, inverse)
    _launch(x, out, cos, sin, position_ids, interleaved, inverse)
    return out


@primitive(
    "rope_turn_(Tensor(a!)[] x, Tensor cos, Tensor sin, Tensor position_ids, bool interleaved, bool inverse) -> ()",
    fake=lambda *_: None,
)
def rope_turn_(
    x: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inverse: bool
) -> None:
    """`rope_turn` in place."""
    _launch(x, x, cos, sin, position_ids, interleaved, inverse)


def _turn(
    x: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inverse: bool, inplace: bool
) -> list[Tensor]:
    """By the chosen backend. In place it returns x."""
    if choose("rope", x[0], ("triton", "reference")) == "triton":
        table = cos.contiguous(), sin.contiguous(), position_ids.contiguous()
        if not inplace:
            x = [tensor if _whole_heads(tensor) else tensor.contiguous() for tensor in x]
            return rope_turn(x, *table, interleaved, inverse)
        rope_turn_(x, *table, interleaved, inverse)
        return x
    cos, sin = cos[position_ids], sin[position_ids]
    turned = [rope_reference(tensor, cos, -sin if inverse else sin, interleaved) for tensor in x]
    return [tensor.copy_(result) for tensor, result in zip(x, turned, strict=True)] if inplace else turned


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, inplace: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        ctx.set_materialize_grads(False)
        turned = _turn([q, k], cos, sin, position_ids, interleaved, False, inplace)
        return tuple(x.detach() for x in turned) if inplace else tuple(turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = {i: grad for i, grad in enumerate(grads) if ctx.needs_input_grad[i] and grad is not None}
        cos, sin, position_ids = ctx.saved_tensors
        turned = _turn(list(wanted.values()), cos, sin, position_ids, ctx.interleaved, True, False) if wanted else []
        by_input = dict(zip(wanted, turned, strict=True))
        return by_input.get(0), by_input.get(1), None, None, None, None, None


class _Overwritten(torch.autograd.Function):
    """What q and k are after `rope` in place: the history of their memory, where the results have one of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        return *_turn([grad], cos, sin, position_ids, ctx.interleaved, True, False), None, None, None, None


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    *,
    interleaved: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn q [T, H, d] and k [T, G, d] by the rows `position_ids` [T] of the table cos, sin fp32 [P, r/2], r <= d.

    Positions must be in the table (not checked); the table is not trained. inplace: the results lie where q and k were,
    whose values are gone (top of the file); they may be parts of one buffer, also of one that autograd knows, if they
    are slices of it (it forbids writing to the results of one split or unbind).
    Raises ValueError where the shapes do not fit, and in place for (a view of) a leaf that requires a gradient, for
    heads that are not contiguous within a token and for memory that q and k share.
    """
    half = cos.shape[-1]
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2] or q.shape[-1] < 2 * half:
        raise ValueError(
            f"rope takes q [T, H, d], k [T, G, d] with d >= {2 * half}, twice the table's width; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"rope takes a table cos, sin [P, r/2], got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if position_ids.shape != q.shape[:1]:
        raise ValueError(f"position_ids must be [{q.shape[0]}], got {tuple(position_ids.shape)}")
    if inplace:
        _check_inplace(q, k)
    turned = _Rope.apply(q, k, cos, sin, position_ids, interleaved, inplace)  # type: ignore[no-untyped-call]
    if inplace and torch.is_grad_enabled():
        for x in (q, k):
            if x.requires_grad:
                _Overwritten.apply(x, cos, sin, position_ids, interleaved)  # type: ignore[no-untyped-call]
    return turned[0], turned[1]


def _whole_heads(x: Tensor) -> bool:
    """Whether the heads of x [T, H, d] are contiguous within a token."""
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _memory(x: Tensor) -> int:
    """What tells one tensor's memory from another's: on the meta device all addresses are 0."""
    storage = x.untyped_storage()
    return storage._cdata if x.is_meta else storage.data_ptr()


def _check_inplace(q: Tensor, k: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad and (x if x._base is None else x._base).is_leaf for x in (q, k)):
        raise ValueError("rope(inplace=True) cannot overwrite a leaf that requires a gradient")
    tokens = q.shape[0]
    if not all(_whole_heads(x) and (tokens < 2 or x.stride(0) >= x[0].numel()) for x in (q, k)):
        raise ValueError(
            f"rope(inplace=True) takes heads that are contiguous within a token, got strides {q.stride()}, {k.stride()}"
        )
    if tokens and _memory(q) == _memory(k):
        first, second = sorted((q, k), key=Tensor.storage_offset)
        gap, stride = second.storage_offset() - first.storage_offset(), first.stride(0)
        one_after_the_other = gap >= (tokens - 1) * stride + first[0].numel()
        side_by_side = stride == second.stride(0) and first[0].numel() <= gap <= stride - second[0].numel()
        if not (one_after_the_other or side_by_side):
            raise ValueError("rope(inplace=True): q and k share memory")
