"""What only NF4 linears have: weights that are fused of parts. The rest is in test_frozen_linear.py."""

from __future__ import annotations

import pytest
import torch

from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.nf4 import concatenate_nf4
from tests.kernels.packed import csrc as csrc
from tests.kernels.packed import nf4


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("tokens", [3, 80])
def test_a_fused_weight_is_its_parts_side_by_side(tokens: int, device: torch.device) -> None:
    torch.manual_seed(tokens)
    parts = [nf4(rows, 192, torch.float16, device) for rows in (16, 8, 24)]
    bias = torch.randn(48).to(device, torch.float16)
    x = torch.randn(tokens, 192).to(device, torch.float16).requires_grad_()
    y = linear_nf4(x, concatenate_nf4(parts), bias)
    ys = linears_nf4(x, parts, bias.split([16, 8, 24]))
    if tokens <= 64:
        assert torch.equal(y, torch.cat(ys, dim=1))
    dy = torch.randn(tokens, 48).to(y)
    whole = torch.cat([dequantize_nf4_reference(part, torch.float16) for part in parts])
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ whole)
    (dx,) = torch.autograd.grad(ys, x, dy.split([16, 8, 24], dim=1))
    assert torch.allclose(dx, dy @ whole, rtol=1e-2, atol=1e-2)


def test_an_nf4_weight_without_gradient_needs_no_graph(device: torch.device) -> None:
    x = torch.randn(70, 64, device=device)
    assert linear_nf4(x, nf4(8, 64, torch.float32, device)).grad_fn is None
    y = linear_nf4(x.requires_grad_(), nf4(8, 64, torch.float32, device))
    assert y.grad_fn is not None
    with torch.no_grad():
        assert linear_nf4(x, nf4(8, 64, torch.float32, device)).grad_fn is None
