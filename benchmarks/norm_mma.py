"""Norm and MMA adapter in one op, alone and with the residual added in the same pass (goal G11).

norm=rms: the language model, tokens routed by one of two modality rows. norm=layer: the CLIP tower, each token routes
itself. Without dropout, whose masks differ between implementations.

Bytes, in passes over [T, D], of the algorithm (the adapter's gradients need the whole du first, hence a second pass):
forward x, y; backward dy, x in, dx out, then dy, x in again. With add: stream, delta in, stream, y out; dstream too.
The codes of 8 values a token and the parameters, below one percent of it, are not counted.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, passes
from kernels.norm_mma import add_norm_mma, norm_mma, norm_mma_reference

EPS, CODE, SCALE = 1e-6, 8, 1.0
ADAPTER = ("down_w", "down_b", "up0_w", "up0_b", "up1_w", "up1_b")
FP32 = torch.float32


def cases() -> list[Case]:
    language = [
        Case("norm_mma", {"T": tokens, "D": width, "norm": "rms", "add": 0})
        for width in (4096, 5120)
        for tokens in (512, 2048, 8192)
    ]
    tower = Case("norm_mma", {"T": 2056, "D": 1024, "norm": "layer", "add": 0})
    added = [Case("norm_mma", {"T": tokens, "D": 4096, "norm": "rms", "add": 1}) for tokens in (2048, 8192)]
    return [*language, tower, *added]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, width, add = case.shape["T"], case.shape["D"], case.shape["add"]
    is_tower = case.shape["norm"] == "layer"
    routers = tokens if is_tower else 2

    def draw(generator: torch.Generator) -> Inputs:
        def fp32(*shape: int, scale: float) -> Tensor:
            return normal(generator, *shape, dtype=FP32, scale=scale)

        up = CODE // 2
        return {
            "x": normal(generator, tokens, width),
            **({"delta": normal(generator, tokens, width)} if add else {}),
            "weight": normal(generator, width),
            "bias": normal(generator, width) if is_tower else None,
            "row": None if is_tower else torch.randint(2, (tokens,), generator=generator, device=device).int(),
            "mix": fp32(routers, 2, scale=1.0).softmax(-1),
            "down_w": fp32(CODE, width, scale=width**-0.5), "down_b": fp32(CODE, scale=0.1),
            "up0_w": fp32(width, up, scale=0.5), "up0_b": fp32(width, scale=0.1),
            "up1_w": fp32(width, up, scale=0.5), "up1_b": fp32(width, scale=0.1),
        }  # fmt: skip

    return Problem(
        draw=draw,
        differentiable=("x", *(("delta",) if add else ()), *ADAPTER, "mix"),
        reference=_with(_reference, add),
        variants=(
            Variant("nibble", lambda: _nibble(add)),
            Variant("lavin", lambda: _with(_lavin, add)),
            Variant("torch", lambda: _with(_torch, add)),
            Variant("compile", lambda: _with(compiled(_torch), add), quick=False),
        ),
        cost=passes(4, 6, tokens, width) if add else passes(2, 5, tokens, width),
    )


def _with(adapt: Call, add: int) -> Call:
    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        stream = inputs["x"] + inputs["delta"]
        return stream, *adapt(inputs | {"x": stream})

    return added if add else adapt


def _arguments(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return (*(inputs[name] for name in ADAPTER), inputs["mix"], inputs["row"])


def _nibble(add: int) -> Call:
    def plain(inputs: Inputs) -> tuple[Tensor, ...]:
        norm = inputs["weight"], inputs["bias"], EPS
        return (norm_mma(inputs["x"], *norm, *_arguments(inputs), scale=SCALE),)  # type: ignore[arg-type]

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        norm = inputs["weight"], inputs["bias"], EPS
        return tuple(add_norm_mma(inputs["x"], inputs["delta"], *norm, *_arguments(inputs), scale=SCALE))  # type: ignore[arg-type]

    return added if add else plain


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    adapter = [inputs[name] for name in ADAPTER]
    norm = inputs["weight"], inputs["bias"], EPS
    return (norm_mma_reference(inputs["x"], *norm, adapter, inputs["mix"], inputs["row"], SCALE, 0.0, None, 0),)


def _routed(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mix = inputs["mix"] if inputs["row"] is None else inputs["mix"].index_select(0, inputs["row"])
    first, second = mix.to(dtype).split(1, dim=-1)
    return first, second  # [T, 1] each


def _torch(inputs: Inputs) -> tuple[Tensor, ...]:
    """The formula with torch's norms and products in 16 bits."""
    x, weight = inputs["x"], inputs["weight"]
    if inputs["bias"] is None:
        n = F.rms_norm(x, weight.shape, weight, EPS)
    else:
        n = F.layer_norm(x, weight.shape, weight, inputs["bias"], EPS)
    down_w, down_b, up0_w, up0_b, up1_w, up1_b = (inputs[name].to(n.dtype) for name in ADAPTER)
    codes = F.linear(n, down_w, down_b).chunk(2, dim=-1)

    def expand(up_w: Tensor, up_b: Tensor) -> Tensor:
        return torch.cat([code @ part.T for code, part in zip(codes, up_w.chunk(2), strict=True)], dim=-1) + up_b

    m0, m1 = _routed(inputs, n.dtype)
    return (n + SCALE * (m0 * expand(up0_w, up0_b) + m1 * expand(up1_w, up1_b)),)


def _lavin(inputs: Inputs) -> tuple[Tensor, ...]:
    """LaVIN's own expression, the eager reference of G11: an fp32 norm, then grouped convolutions under autocast."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    if bias is None:
        wide = x.float()
        n = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).type_as(x) * weight
    else:
        n = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), EPS).type_as(x)
    down_w, down_b, up0_w, up0_b, up1_w, up1_b = (inputs[name] for name in ADAPTER)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        code = F.conv1d(n[None].transpose(1, 2), down_w[..., None], down_b)
        e0 = F.conv1d(code, up0_w[..., None], up0_b, groups=2).transpose(1, 2)[0]
        e1 = F.conv1d(code, up1_w[..., None], up1_b, groups=2).transpose(1, 2)[0]
        m0, m1 = _routed(inputs, n.dtype)
        return (n + (e0 * SCALE * m0 + e1 * SCALE * m1),)


BENCH = Bench("norm_mma", __doc__ or "", cases, problem, tiny={"T": 12, "D": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
