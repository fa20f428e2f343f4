"""The counter-based dropout mask: the same bits everywhere, and as random as a mask must be."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.dropout import keep, keep_mask, threshold

SEEDS = [0, 1, 123456789012345, -(2**63), 2**63 - 1]


def mix(v: int) -> int:
    v = ((v ^ (v >> 16)) * 0x7FEB352D) % 2**32
    v = ((v ^ (v >> 15)) * 0x846CA68B) % 2**32
    return v ^ (v >> 16)


def kept(seed: int, site: int, index: int, p: float) -> bool:
    """The formula of kernels/dropout.py in Python's integers."""
    low, high = seed % 2**32, (seed >> 32) % 2**32
    key0 = mix((low + mix((site + 0x9E3779B9) % 2**32)) % 2**32)
    key1 = mix(high ^ key0)
    hashed = mix((mix(index % 2**32 ^ key0) + (index >> 32) + key1) % 2**32)
    return hashed >> 8 >= int(p * 2**24)


@triton.jit(do_not_specialize=["site", "first", "limit"])
def keep_kernel(
    seed_ptr: tl.tensor, out_ptr: tl.tensor, site: tl.tensor, first: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr
) -> None:
    block = tl.arange(0, BLOCK)
    tl.store(out_ptr + block, keep(tl.load(seed_ptr), site, first + block.to(tl.int64), limit))


def triton_mask(seed: int, site: int, first: int, count: int, p: float, device: torch.device) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.bool, device=device)
    keep_kernel[(1,)](torch.tensor([seed], device=device), out, site, first, threshold(p), BLOCK=count)
    return out.cpu()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("site", [0, 1, 77, 2**31 - 1])
def test_all_three_implementations_give_the_same_bits(seed: int, site: int, device: torch.device) -> None:
    mask = keep_mask(torch.tensor([seed]), site, 16, 8, 0.3, device).cpu()
    expected = torch.tensor([kept(seed, site, i, 0.3) for i in range(128)])
    assert torch.equal(mask.view(-1), expected)
    assert torch.equal(triton_mask(seed, site, 0, 128, 0.3, device), expected)


def test_indices_beyond_32_bits(device: torch.device) -> None:
    first = 2**32 - 64
    expected = torch.tensor([kept(5, 3, first + i, 0.5) for i in range(128)])
    assert torch.equal(triton_mask(5, 3, first, 128, 0.5, device), expected)
    assert not torch.equal(expected[64:], triton_mask(5, 3, 0, 64, 0.5, device))


def test_a_mask_is_pinned() -> None:
    """A resumed or repeated run needs these bits for ever."""
    mask = keep_mask(torch.tensor([42]), 7, 4, 16, 0.5, "cpu")
    words = [sum(int(bit) << i for i, bit in enumerate(row)) for row in mask.tolist()]
    assert words == [51634, 9152, 41108, 17172]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("site", [0, 1, 2])
def test_the_drop_rate_is_p(p: float, site: int) -> None:
    n = 1 << 18
    dropped = n - int(keep_mask(torch.tensor([2024]), site, n // 8, 8, p, "cpu").sum())
    assert abs(dropped - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_masks_of_neighbours_are_uncorrelated() -> None:
    """Next element, next row, next site, next seed, and seeds that differ in the high word only."""
    n = 1 << 18

    def signs(seed: int, site: int) -> torch.Tensor:
        return keep_mask(torch.tensor([seed]), site, n, 1, 0.5, "cpu").view(-1).float() * 2 - 1

    base = signs(9, 4)
    others = [base.roll(1), base.roll(8), signs(9, 5), signs(10, 4), signs(9 + (1 << 32), 4)]
    for other in others:
        assert abs(float((base * other).sum())) < 5 * n**0.5


def test_zero_probability_keeps_everything() -> None:
    assert keep_mask(torch.tensor([3]), 0, 64, 8, 0.0, "cpu").all()


def test_an_empty_mask_has_its_shape() -> None:
    assert keep_mask(torch.tensor([3]), 0, 0, 8, 0.1, "cpu").shape == (0, 8)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_outside_the_range_is_an_error(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        keep_mask(torch.tensor([3]), 0, 1, 1, p, "cpu")
