"""The MLP of a block: what all have, and the plain one of Phi, CLIP and SigLIP. `D` width, `F` channels within."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from kernels.activation import Activation, bias_act
from models.linear import Linear


class MLP(nn.Module, ABC):
    """down(hidden x). Blocks call the two apart: recomputation leaves out the last product."""

    down: Linear

    @abstractmethod
    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call."""

    @abstractmethod
    def hidden(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """[T, D] -> [T, F]"""


class PlainMLP(MLP):
    """hidden x = act(up x)."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = Linear(dim, hidden_dim, bias=bias)
        self.down = Linear(hidden_dim, dim, bias=bias)

    def groups(self) -> list[tuple[Linear, ...]]:
        return [(self.up,), (self.down,)]

    def hidden(self, x: Tensor, seed: Tensor | None) -> Tensor:
        return bias_act(self.up.product(x, seed), self.up.bias, self.activation, reuse=True)
