"""MobileVLM's light-weight projector (LDP, arXiv 2312.16886), which Bunny has too: an MLP, then two blocks of
MobileNetV3 (arXiv 1905.02244) on the patch grid, the second at every other patch.

    x = linear_2(gelu(linear_1(features)))                                        [M, side, side, D]
    block(x) = norm(pointwise(gate(hardswish(norm(depthwise(x))))))               + x in the first block
    gate(h) = h * hardsigmoid(excite(relu(squeeze(mean of h over the grid))))     squeeze-excitation, arXiv 1709.01507

depthwise: 3 x 3, padded by 1, each channel alone; pointwise: D x D; both without bias. norm: LayerNorm over channels.
The inner width is D, so MobileNetV3's product before `depthwise` falls away.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kernels.projector import projector_mlp
from models.norm import Norm
from models.projectors.base import Projector
from models.projectors.config import ProjectorConfig, grid_side

EPS = 1e-5
DIVISOR = 8  # MobileNet's: widths are multiples of it


class MobileBlock(nn.Module):
    """[M, side, side, D] -> the same, or [M, ceil(side / 2), ceil(side / 2), D] with a stride of 2."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        squeezed = squeezed_width(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.depthwise_norm = Norm(dim, EPS, bias=True)
        self.squeeze = nn.Conv2d(dim, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, dim, 1)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.pointwise_norm = Norm(dim, EPS, bias=True)

    def reset(self) -> None:
        """torch's own start of convolutions and norms."""
        for layer in (self.depthwise, self.squeeze, self.excite, self.pointwise):
            layer.reset_parameters()
        for norm in (self.depthwise_norm, self.pointwise_norm):
            nn.init.ones_(norm.weight)
            assert norm.bias is not None
            nn.init.zeros_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.depthwise
        weight = conv.weight.to(x.dtype)
        h = F.conv2d(x.permute(0, 3, 1, 2), weight, None, conv.stride, conv.padding, groups=conv.groups)
        h = F.hardswish(_normed(h.permute(0, 2, 3, 1), self.depthwise_norm))
        h = h * self._gate(h.mean((1, 2)))[:, None, None]
        h = _normed(_product(h, self.pointwise), self.pointwise_norm)
        return h + x if conv.stride == (1, 1) else h

    def _gate(self, mean: Tensor) -> Tensor:  # [M, D] -> [M, D], each in [0, 1]
        return F.hardsigmoid(_product(F.relu(_product(mean, self.squeeze)), self.excite))


class LdpProjector(Projector):
    """`ldp`."""

    def __init__(self, config: ProjectorConfig, vision_dim: int, language_dim: int) -> None:
        super().__init__(config)
        if language_dim % DIVISOR:
            raise ValueError(f"projector ldp to width {language_dim}: it needs a multiple of {DIVISOR}")
        self.linear_1 = nn.Linear(vision_dim, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)
        self.block_1 = MobileBlock(language_dim, 1)
        self.block_2 = MobileBlock(language_dim, 2)

    def reset(self) -> None:
        """torch's own start of each layer, as in MobileVLM and Bunny."""
        self.linear_1.reset_parameters()
        self.linear_2.reset_parameters()
        self.block_1.reset()
        self.block_2.reset()

    def forward(self, features: Tensor) -> Tensor:
        side = grid_side(self.config.kind, features.shape[1])
        first, second = self.linear_1, self.linear_2
        rows = projector_mlp(features.flatten(0, 1), first.weight, first.bias, second.weight, second.bias, "gelu")
        x: Tensor = self.block_2(self.block_1(rows.unflatten(0, (features.shape[0], side, side))))
        return x.flatten(1, 2)


def squeezed_width(dim: int) -> int:
    """A quarter of `dim`, as the nearest multiple of 8, never less than 0.9 of it (MobileNet's rule)."""
    quarter = dim // 4
    rounded = max(DIVISOR, (quarter + DIVISOR // 2) // DIVISOR * DIVISOR)
    return rounded if rounded >= 0.9 * quarter else rounded + DIVISOR


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """Over the last dimension of [M, side, side, D]."""
    out: Tensor = norm(x.reshape(-1, x.shape[-1]))
    return out.view(x.shape)


def _product(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution of channels that come last: [..., in] -> [..., out], in x's dtype."""
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.linear(x, conv.weight.flatten(1).to(x.dtype), bias)
