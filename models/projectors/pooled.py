"""Bunny's projectors that make one embedding of four features, by linear layers alone.

    sppv1      linear_1 - mean - linear_2                  mean: of the 2 x 2 features of a square of the patch grid;
    sppv2      linear_1 - linear_2 - mean                  the last row and column of an odd grid are dropped
    sppv3      linear_0 - mean - linear_1 - linear_2
    minigpt    linear of 4 features after another: their 4 W channels, feature by feature
    vanilla    the same, channel by channel

No activation stands between the linears of spp, and the mean of affine images is the affine image of the mean: the mean
is taken first, and each product has a quarter of the rows. All three have all three layers in their files; those that
one does not use get no gradient.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.projectors.base import Projector, affine
from models.projectors.config import GROUP, ProjectorConfig, grid_side


class SppProjector(Projector):
    """`sppv1`, `sppv2`, `sppv3`."""

    def __init__(self, config: ProjectorConfig, vision_dim: int, language_dim: int) -> None:
        super().__init__(config)
        self.linear_0 = nn.Linear(vision_dim, vision_dim)
        self.linear_1 = nn.Linear(vision_dim, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)

    def reset(self) -> None:
        """torch's own start of a linear layer, as in Bunny."""
        for layer in (self.linear_0, self.linear_1, self.linear_2):
            layer.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        x = _means_of_squares(features, grid_side(self.config.kind, features.shape[1]))
        if self.config.kind == "sppv3":
            x = affine(x, self.linear_0)
        return affine(affine(x, self.linear_1), self.linear_2)


class GroupProjector(Projector):
    """`minigpt`, `vanilla`."""

    def __init__(self, config: ProjectorConfig, vision_dim: int, language_dim: int) -> None:
        super().__init__(config)
        self.linear = nn.Linear(GROUP * vision_dim, language_dim)

    def reset(self) -> None:
        """torch's own start of a linear layer, as in Bunny."""
        self.linear.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        groups = features.unflatten(1, (self.tokens(features.shape[1]), GROUP))  # [M, K', 4, W]
        if self.config.kind == "vanilla":
            groups = groups.transpose(2, 3)
        return affine(groups.flatten(2), self.linear)


def _means_of_squares(features: Tensor, side: int) -> Tensor:
    """Of 2 x 2 features each, [M, side^2, W] -> [M, (side // 2)^2, W]; sums in fp32."""
    half = side // 2
    grid = features.unflatten(1, (side, side))[:, : 2 * half, : 2 * half]
    squares = grid.unflatten(2, (half, 2)).unflatten(1, (half, 2))  # [M, half, 2, half, 2, W]
    return squares.mean((2, 4)).flatten(1, 2)
