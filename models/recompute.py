"""What each layer of a model keeps for its backward pass, and what it computes there once more.

    save_all        keeps what its ops need, computes nothing again (but the norm that a tower's router reads)
    recompute_mlp   computes norm and MLP again (the second half of a block): gate and up are not kept
    keep_input      keeps the layer's input alone, computes all of it again

The same ops run on the same numbers (dropout is a function of a seed and an index, kernels/dropout.py), so loss and
gradients are the same bits whatever is chosen.

`recomputed` is our own because torch.utils.checkpoint keeps what enters, and two parts enter: a residual stream comes
as x + delta, which the norm that begins a layer adds up on its way. Kept here is their sum as that norm has written it:
one tensor, no addition of its own, and the recomputation reads one stream where the forward read two. Nor does it
compute the layer's last product again, with LoRA or without, which a backward pass never asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from models.linear import Linear

Policy = Literal["save_all", "recompute_mlp", "keep_input"]
POLICIES: tuple[Policy, ...] = get_args(Policy)  # from most memory to least


@dataclass(frozen=True, slots=True)
class ActivationPolicy:
    """What each layer keeps for its backward pass, in forward order."""

    language: tuple[Policy, ...]
    vision: tuple[Policy, ...]

    @classmethod
    def uniform(cls, policy: Policy, num_language: int, num_vision: int) -> ActivationPolicy:
        """The same for all layers."""
        return cls((policy,) * num_language, (policy,) * num_vision)

    @classmethod
    def from_json(cls, value: Any) -> ActivationPolicy:
        """What `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            found = cls(tuple(value["language"]), tuple(value["vision"]))
        except (KeyError, TypeError):
            raise ValueError(f"not an activation policy: {value!r}") from None
        for policy in (*found.language, *found.vision):
            check_policy(policy)
        return found

    def to_json(self) -> dict[str, list[Policy]]:
        """Plain lists, one entry a layer."""
        return {"language": list(self.language), "vision": list(self.vision)}

    def describe(self) -> str:
        """`language: keep_input x 12, save_all x 20; vision: save_all x 24`."""
        return f"language: {_runs(self.language)}; vision: {_runs(self.vision)}"


def check_policy(policy: Any) -> Policy:
    """`policy`, if it is one.

    Raises:
        ValueError: it is none.
    """
    for known in POLICIES:
        if policy == known:
            return known
    raise ValueError(f"no such policy: {policy!r}; there are {', '.join(POLICIES)}")


def _runs(policies: tuple[Policy, ...]) -> str:
    return ", ".join(f"{policy} x {len(list(same))}" for policy, same in groupby(policies)) or "no layers"


Body: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: Body, last: Sequence[Linear], seed: Tensor | None, x: Tensor, delta: Tensor | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        stream, *outputs = body(x, delta)
        ctx.save_for_backward(stream)
        ctx.body, ctx.last, ctx.seed, ctx.trained = body, last, seed, trained
        ctx.set_materialize_grads(False)
        return _through(last, outputs, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        body, last, seed, trained = ctx.body, ctx.last, ctx.seed, ctx.trained
        needs_stream = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        stream = ctx.saved_tensors[0].detach().requires_grad_(needs_stream)
        left_out: dict[int, Linear] = {}  # products that are not computed again, by the place of their output
        with torch.enable_grad():
            outputs = list(body(stream, None)[1:])
            for i, linear in enumerate(last, start=len(outputs) - len(last)):
                if linear.trains_weight:
                    outputs[i] = linear(outputs[i], seed)
                else:
                    left_out[i] = linear
        dys: dict[int, Tensor | None] = {i: dy for i, dy in enumerate(grads) if dy is not None}
        edges = {i: get_gradient_edge(outputs[i]) for i in dys if outputs[i].requires_grad}
        read = {i: outputs[i].detach() for i, linear in left_out.items() if linear.lora is not None}
        del outputs  # the graph has what it needs of them
        own: dict[nn.Parameter, Tensor] = {}  # gradients of LoRA's
        for i, linear in left_out.items():
            if (dy := dys.get(i)) is not None:
                dys[i], learned = linear.gradients(read.pop(i, None), dy, seed, needs_x=i in edges)
                own |= learned
        inputs = [stream, *trained] if needs_stream else list(trained)
        found = _gradients(list(edges.values()), inputs, [dys[i] for i in edges])
        dx = found.pop(0) if needs_stream else None
        by_parameter = (own.get(p, dp) for p, dp in zip(trained, found, strict=True))
        return None, None, None, dx, dx if ctx.needs_input_grad[4] else None, *by_parameter


def _gradients(edges: list[GradientEdge], inputs: list[Tensor], dys: list[Tensor | None]) -> list[Tensor | None]:
    """Of the inputs; None for one that nothing was computed from."""
    return list(torch.autograd.grad(edges, inputs, dys, allow_unused=True)) if edges else [None] * len(inputs)


def recomputed(
    body: Body, last: Linear | Sequence[Linear] | None, x: Tensor, delta: Tensor | None,
    trained: Iterable[nn.Parameter], seed: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `body` gives, and its backward pass from one kept tensor.

    Args:
        body: (x, delta) -> (stream, y, ...), [T, D] each, where stream = x + delta (x without a delta) is what is kept
            and is not returned, and the rest of it depends on the stream only: body(stream, None) gives the same bits.
        last: what the last y goes through, or each of the last ys through one of its own; unless its weight is trained,
            its product is left out of the recomputation.
        trained: every parameter that `body` and `last` use and that requires a gradient.
        seed: int64 [1], for the dropout of LoRA on `last`.
    """
    linears = () if last is None else (last,) if isinstance(last, Linear) else last
    if not torch.is_grad_enabled():
        return _through(linears, body(x, delta)[1:], seed)
    learns = (p for p in trained if p.requires_grad)
    return cast(tuple[Tensor, ...], _Recomputed.apply(body, linears, seed, x, delta, *learns))  # type: ignore[no-untyped-call]


def _through(last: Sequence[Linear], outputs: Sequence[Tensor], seed: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs, the last of them through these linears."""
    middle = len(outputs) - len(last)
    return *outputs[:middle], *(linear(y, seed) for linear, y in zip(last, outputs[middle:], strict=True))
