"""The router inside norm_mma: the same as routing first and mixing then, without gradients of [T, D] for a few rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.layer_norm import layer_norm_reference
from kernels.norm_mma import add_norm_mma
from kernels.rms_norm import rms_norm_reference
from kernels.router import Router, route, route_backward, router_mix
from tests.kernels.tolerance import assert_within_twice

EPS, TEMPERATURE, T, D, H = 1e-5, 0.7, 33, 64, 8
ROWS = torch.tensor([0, 1])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_router_mix_is_a_softmax_over_two_paths() -> None:
    n, w, b = torch.randn(3, 16), torch.randn(2, 16), torch.randn(2)
    mix = router_mix(n.half(), w, b, 10.0)
    logits = (n.half().double() @ w.double().T + b.double()) / 10
    expected = torch.sigmoid(logits[:, 0] - logits[:, 1])
    assert mix.dtype == torch.float32
    torch.testing.assert_close(mix, torch.stack((expected, 1 - expected), dim=-1).float())


@pytest.mark.parametrize("bias", [None, drawn(D, seed=1)], ids=["RMSNorm", "LayerNorm"])
def test_the_gradient_is_that_of_the_formula(bias: Tensor | None) -> None:
    leaves = [x.double().requires_grad_() for x in (drawn(2, D), drawn(2, D, seed=2), drawn(2))]
    weight = drawn(D, seed=3).double()
    bias = None if bias is None else bias.double()
    rows, router_w, router_b = leaves
    router = Router(router_w, router_b, TEMPERATURE, ROWS)
    mix = route(rows, weight, bias, EPS, router)
    dmix = drawn(2, 2, seed=4).double()
    expected = torch.autograd.grad(mix, leaves, dmix)
    with torch.no_grad():
        got = route_backward(dmix, mix, rows, weight, bias, EPS, router)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layer_norm", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("with_delta", [False, True], ids=["stream", "stream + delta"])
def test_routing_inside_is_routing_outside(
    backend: str, dtype: torch.dtype, layer_norm: bool, with_delta: bool, device: torch.device
) -> None:
    """Stream, y and every gradient; `outside` leaves the router's rows to autograd."""
    x, delta, dstream, dy = (drawn(T, D, seed=i).to(device, dtype) for i in range(4))
    weight, bias = drawn(D, seed=5).to(device, dtype), drawn(D, seed=6).to(device) if layer_norm else None
    down, up = [drawn(H, D), drawn(H)], [drawn(D, H // 2), drawn(D)]
    parameters = [p.to(device) / 4 for p in (*down, *up, *(drawn(*p.shape, seed=7) for p in up), drawn(2, D), drawn(2))]
    row = (torch.arange(T) % 2).to(device)
    rows = ROWS.to(device)

    def results(inside: bool, dtype: torch.dtype) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        activations = [t.detach().to(dtype).requires_grad_() for t in ((x, delta) if with_delta else (x,))]
        trained = [p.detach().to(wide).requires_grad_() for p in parameters]
        first, second = activations[0], activations[1] if with_delta else None
        norm = weight.to(dtype), None if bias is None else bias.to(wide)
        *adapter, router_w, router_b = trained
        mix: Tensor | Router = Router(router_w, router_b, TEMPERATURE, rows)
        if not inside:
            stream = first if second is None else first + second
            at = stream.index_select(0, rows)
            n = rms_norm_reference(at, norm[0], EPS) if norm[1] is None else layer_norm_reference(at, *norm, EPS)
            mix = router_mix(n, router_w, router_b, TEMPERATURE)
        outputs = add_norm_mma(first, second, *norm, EPS, *adapter, mix, row, scale=0.5)
        leaves = [*activations, *trained]
        gradients = torch.autograd.grad(outputs, leaves, (dstream.to(dtype), dy.to(dtype)))
        return [*(o.detach() for o in outputs), *gradients]

    inside, outside = results(True, dtype), results(False, dtype)
    dispatch.set_backend("reference")  # the fixture puts the other one back
    truth = results(False, torch.float64)
    for i, (ours, theirs, exact) in enumerate(zip(inside, outside, truth, strict=True)):
        assert_within_twice(ours, theirs, exact, f"result {i}")


def test_a_router_without_rows_for_the_tokens_is_refused() -> None:
    adapter = [drawn(H, D), drawn(H), drawn(D, H // 2), drawn(D), drawn(D, H // 2), drawn(D)]
    router = Router(drawn(2, D), drawn(2), TEMPERATURE, ROWS)
    with pytest.raises(ValueError, match="each token's row"):
        add_norm_mma(drawn(2, D), None, drawn(D), None, EPS, *adapter, router, None, scale=1.0)
