"""The logarithm against torch's in 64 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.logarithm import logarithm


@triton.jit
def logarithm_kernel(x_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(x_ptr + at, logarithm(tl.load(x_ptr + at)))


def test_logarithm(device: torch.device) -> None:
    """To two ulps, near 1 too."""
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0)).mul_(12).exp_()
    x[:2048] = 1 + x[:2048] * 1e-6
    x[0] = 1.0
    exact = x.double().log()
    got = x.to(device)
    logarithm_kernel[(1,)](got, SIZE=4096)
    assert got[0] == 0.0
    assert ((got.cpu().double() - exact).abs() <= 2.4e-7 * exact).all()
