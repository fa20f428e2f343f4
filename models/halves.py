"""A block of two halves, attention and MLP, under each policy of models/recompute.py: of the language models and the
towers whose block is sequential."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from models.linear import Linear
from models.recompute import Body, Policy, recomputed

First = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def two_halves(
    policy: Policy, first: First, second: Body, last: Linear, x: Tensor, delta: Tensor | None, seed: Tensor | None, *,
    whole: nn.Module, of_second: Iterable[nn.Module | None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """x, delta -> x, delta, [T, D] each.

    Args:
        first: (x, delta) -> (x, delta): the stream that enters, and what attention adds to it.
        second: (x, delta) -> (stream that enters, stream that leaves, [T, F] that `last` multiplies), as `recomputed`
            wants it.
        whole: the module with the parameters of both.
        of_second: the modules with those of the second.
    """
    if policy == "keep_input":

        def both(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
            x, delta = first(x, delta)
            return x, *second(x, delta)[1:]

        return recomputed(both, last, x, delta, whole.parameters(), seed)
    x, delta = first(x, delta)
    if policy == "recompute_mlp":
        return recomputed(second, last, x, delta, _parameters(of_second), seed)
    _, x, hidden = second(x, delta)
    return x, last(hidden, seed)


def _parameters(modules: Iterable[nn.Module | None]) -> Iterator[nn.Parameter]:
    for module in modules:
        if module is not None:
            yield from module.parameters()
