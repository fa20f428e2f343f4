"""One token over a cache: against fp64, with either backend, and what it writes into the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import varlen_attention
from kernels.decode_attention import decode_attention, decode_attention_reference
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4


def drawn(
    batch: int, heads: int, groups: int, head_dim: int, places: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + places + head_dim)
    shapes = [(batch, heads, head_dim), *[(batch, groups, head_dim)] * 2, *[(batch, places, groups, head_dim)] * 2]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def assert_accurate(tensors: list[Tensor], lengths: Tensor, window: int | None = None) -> None:
    q, k, v, keys, values = tensors
    ours = [keys.clone(), values.clone()]
    out = decode_attention(q, k, v, *ours, lengths, window=window)
    scale = q.shape[-1] ** -0.5
    expression = decode_attention_reference(q, k, v, keys.clone(), values.clone(), lengths, scale, window)
    wide = [x.double() for x in tensors]
    assert_within_twice(out, expression, decode_attention_reference(*wide, lengths, scale, window))
    for cache, old, new in zip(ours, (keys, values), (k, v), strict=True):
        expected = old.clone()
        expected[torch.arange(len(lengths)), lengths.cpu()] = new
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "head_dim", "places"),
    [(1, 1, 1, 64, 1), (3, 4, 4, 32, 130), (2, 6, 2, 72, 33), (1, 8, 1, 80, 300), (2, 4, 2, 128, 257)],
)
def test_error_is_torchs_own(
    backend: str, batch: int, heads: int, groups: int, head_dim: int, places: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Lengths from an empty cache to its last place."""
    lengths = torch.tensor([places - 1, 0, places // 2][:batch], device=device)
    assert_accurate(drawn(batch, heads, groups, head_dim, places, dtype, device), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def below(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    for _ in range(RANDOM_SHAPES):
        batch, groups, places = below(5), below(4), below(400)
        lengths = torch.randint(0, places, (batch,), generator=generator).to(device)
        tensors = drawn(batch, groups * below(4), groups, 8 * below(17), places, dtype, device)
        assert_accurate(tensors, lengths, (None, below(400))[below(3) - 1])


def test_views_of_one_tensor(backend: str, device: torch.device) -> None:
    """q, k, v as slices of one product's output."""
    together = torch.randn(2, 3 * 4 * 32, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = (part.unflatten(-1, (4, 32)) for part in together.chunk(3, dim=1))
    cache = [torch.zeros(2, 5, 4, 32, device=device) for _ in range(2)]
    out = decode_attention(q, k, v, *cache, torch.tensor([0, 0], device=device))
    torch.testing.assert_close(out, v)  # nothing else is seen


def test_lengths_may_lie_apart(backend: str, device: torch.device) -> None:
    for lengths in (torch.tensor([3], device=device).expand(2), torch.tensor([3, 9, 1, 9], device=device)[::2]):
        assert_accurate(drawn(2, 2, 2, 64, 5, torch.float32, device), lengths)


def test_what_lies_behind_is_not_seen(backend: str, device: torch.device) -> None:
    tensors = drawn(1, 2, 2, 64, 40, torch.float32, device)
    lengths = torch.tensor([7], device=device)
    before = decode_attention(*(x.clone() for x in tensors), lengths)
    for cache in tensors[3:]:
        cache[:, 7:] = 1e4
    assert torch.equal(decode_attention(*tensors, lengths), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 130, 299])
def test_a_window(backend: str, window: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([299, 0, window - 1, 200], device=device)
    assert_accurate(drawn(4, 4, 2, 32, 300, dtype, device), lengths, window)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_window_is_that_of_the_packed_attention(backend: str, window: int, device: torch.device) -> None:
    """The last token of a segment; and what lies before its window may be anything."""
    q, k, v = (torch.randn(9, n, 32, generator=torch.Generator().manual_seed(n)).to(device) for n in (4, 2, 2))
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=device)
    expected = varlen_attention(q, k, v, bounds, 9, causal=True, window=window)[8:]
    cache = [torch.cat((x[:8], torch.zeros_like(x[:4])))[None].contiguous() for x in (k, v)]
    if backend == "triton":
        for x in cache:
            x[:, : 9 - window] = torch.nan
    out = decode_attention(q[8:], k[8:], v[8:], *cache, torch.tensor([8], device=device), window=window)
    torch.testing.assert_close(out, expected)


def test_a_window_that_hides_nothing_changes_no_bit(backend: str, device: torch.device) -> None:
    tensors, lengths = drawn(2, 2, 2, 64, 40, torch.float32, device), torch.tensor([39, 20], device=device)
    plain, *others = (
        decode_attention(*(x.clone() for x in tensors), lengths, window=window) for window in (None, 40, 99)
    )
    assert all(torch.equal(plain, other) for other in others)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, keys, values = drawn(2, 4, 2, 64, 5, torch.float32, torch.device("cpu"))
    lengths = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="H a multiple of G"):
        decode_attention(q[:, :3], k, v, keys, values, lengths)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(q.half(), k, v, keys, values, lengths)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(q, k, v, keys, values, lengths.int())
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(q, k, v, keys.transpose(1, 2).contiguous().transpose(1, 2), values, lengths)
    for window in (0, -2):
        with pytest.raises(ValueError, match=f"at least 1 place, got {window}"):
            decode_attention(q, k, v, keys, values, lengths, window=window)
    with pytest.raises(ValueError, match="no gradients"):
        decode_attention(q.requires_grad_(), k, v, keys, values, lengths)
