"""The rule for floating-point kernels: at most twice the error of torch's own expression in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_twice(ours: Tensor, torch_result: Tensor, reference: Tensor, what: str = "") -> None:
    """Compares largest and mean absolute error against `reference` (fp64) with torch's; one ulp of slack for zeros."""
    assert ours.shape == torch_result.shape == reference.shape, what
    assert ours.dtype == torch_result.dtype, what
    if not ours.numel():
        return
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    slack = torch.finfo(ours.dtype).eps * reference.abs().max().item()
    error, allowed = ((x.double() - reference.double()).abs() for x in (ours, torch_result))
    assert error.max() <= 2 * allowed.max() + slack, f"{what}: max error {error.max():.3g}, torch's {allowed.max():.3g}"
    assert error.mean() <= 2 * allowed.mean() + slack, f"{what}: mean error {error.mean():.3g}, {allowed.mean():.3g}"


def assert_rounded_once(ours: Tensor, reference: Tensor, what: str = "") -> None:
    """Half an ulp of the result, and fp32's own error relative to the largest value: fp32 maths, one cast."""
    allowed = 0.51 * torch.finfo(ours.dtype).eps * reference.double().abs() + 1e-6 * reference.double().abs().max()
    assert ((ours.double() - reference.double()).abs() <= allowed).all(), f"{what}: rounded more than once"
