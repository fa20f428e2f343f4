"""A norm over the last dimension: RMSNorm, or LayerNorm when it has a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm


class Norm(nn.Module):
    """[T, D] -> [T, D]; statistics in fp32, weight (and bias) [D].

    In a 16-bit model a LayerNorm's weight and bias stay in fp32, as in CLIP; an RMSNorm's weight does not, as in LLaMA.
    """

    def __init__(self, dim: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.keeps_fp32 = bias
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, delta [T, D] -> the stream x + delta and its norm, in one pass; without a delta the stream is x."""
        if self.bias is None:
            return add_rms_norm(x, delta, self.weight, self.eps)
        stream, y = add_layer_norm(x, delta, self.weight, self.bias, self.eps)
        return stream, y

    def add_for_two(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`add` for two branches that read the norm, one result each: the gradients of both arrive in one backward
        pass, which adds them up on its way. Of a LayerNorm."""
        assert self.bias is not None
        stream, y, same = add_layer_norm(x, delta, self.weight, self.bias, self.eps, branches=2)
        return stream, y, same
