"""S2 (arXiv 2403.13043), as Bunny-v1.1 has it: a tower sees a picture at several sizes, in crops of its own size.

    scales 384, 768, 1152 of a tower of 384 pixels: 1, 4 and 9 crops, row by row      all in one pass of the tower
    the features of a scale's crops are put together to one map, 27, 54 and 81 a side, and means of its squares make
    27 a side of each; the channels of the scales stand one after another

A picture of the largest size becomes smaller by bicubic interpolation in fp32, without antialiasing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.vision.config import TowerConfig


def crops(pictures: Tensor, config: TowerConfig) -> Tensor:
    """fp32 [N, 3, largest, largest] -> [N * config.crops, 3, image_size, image_size], a picture's crops together."""
    parts = [_cut(_scaled(pictures, scale), config.image_size) for scale in config.scales]
    return torch.cat(parts, dim=1).flatten(0, 1)


def rows_of_crops(pictures: Tensor, config: TowerConfig) -> Tensor:
    """Which crop stands for each crop where a picture stands for each picture: int64 [N] -> [N * config.crops]."""
    return (pictures[:, None] * config.crops + torch.arange(config.crops, device=pictures.device)).flatten()


def joined(features: Tensor, config: TowerConfig) -> Tensor:
    """Of crops -> of pictures: [N * config.crops, K, W] -> [N, K, scales * W]. Means are summed in fp32."""
    across = [scale // config.image_size for scale in config.scales]
    parts = features.unflatten(0, (-1, config.crops)).split([n**2 for n in across], dim=1)
    return torch.cat([_reduced(part, n, config.grid) for part, n in zip(parts, across, strict=True)], dim=-1)


def _scaled(pictures: Tensor, size: int) -> Tensor:
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bicubic")


def _cut(pictures: Tensor, side: int) -> Tensor:
    """[N, 3, n * side, n * side] -> [N, n^2, 3, side, side], row by row."""
    squares = pictures.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [N, 3, n, side, n, side]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _reduced(features: Tensor, across: int, grid: int) -> Tensor:
    """The features of `across`^2 crops as one map, in means of `across`^2 neighbours: [N, across^2, grid^2, W] ->
    [N, grid^2, W]"""
    if across == 1:
        return features[:, 0]
    maps = features.unflatten(2, (grid, grid)).unflatten(1, (across, across)).transpose(2, 3)
    whole = maps.flatten(3, 4).flatten(1, 2)  # [N, across * grid, across * grid, W]
    return whole.unflatten(2, (grid, across)).unflatten(1, (grid, across)).mean((2, 4)).flatten(1, 2)
