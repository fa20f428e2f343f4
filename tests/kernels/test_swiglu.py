from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.tolerance import assert_rounded_once, assert_within_twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(function: object, gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    out = function(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 2730), (127, 4304), (257, 72), (577, 96), (729, 688)])
def test_error_is_torchs_own(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    gate, up, grad = (torch.randn(tokens, width).mul(3).to(dtype) for _ in range(3))
    ours = run(swiglu, gate, up, grad)
    expression = run(lambda g, u: F.silu(g) * u, gate, up, grad)
    reference = run(lambda g, u: F.silu(g) * u, gate.double(), up.double(), grad)
    for name, *values in zip(("h", "dgate", "dup"), ours, expression, reference, strict=True):
        assert_within_twice(*values, name)
        assert_rounded_once(values[0], values[2], name)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_stay_finite(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-300.0, -100.0, 0.0, 100.0, 300.0]], dtype=dtype)
    h, dgate, dup = run(swiglu, gate, torch.ones_like(gate), torch.ones_like(gate))
    assert h.tolist() == dup.tolist() == [[0.0, 0.0, 0.0, 100.0, 300.0]]
    assert dgate.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


def test_saves_gate_and_up_only() -> None:
    gate, up = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_strided_and_empty_input_and_repeatability() -> None:
    torch.manual_seed(1)
    both = torch.randn(12, 14)
    gate, up = both.chunk(2, dim=1)
    grad = torch.randn(7, 12).T
    first = run(swiglu, gate, up, grad)
    assert all(map(torch.equal, first, run(swiglu, gate.contiguous(), up.contiguous(), grad.contiguous())))
    assert run(swiglu, gate[:0], up[:0], grad[:0])[1].shape == (0, 7)


def test_mismatch_is_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        swiglu(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="must agree"):
        swiglu(torch.randn(2, 3), torch.randn(2, 3).half())
