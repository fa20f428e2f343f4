"""The shape of a vision tower, and which of its tokens become image tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from models.vision.preprocessing import LAVIN, Preprocessing

if TYPE_CHECKING:
    from models.mlp import MLP
    from models.vision.block import Attention

NUM_TAPS = 6  # image tokens of `class_tokens`: one for each block whose class token is taken

LayerFeature = Literal["patch", "cls_patch"]  # of one layer, as LLaVA, Bunny and Imp take it
SelectFeature = Literal["class_tokens", LayerFeature]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerConfig(ABC):
    """The shape of a tower; each family sets defaults and says what it has and what its blocks are made of.

    select_layer counts as transformers' `hidden_states`: 0 is what the embeddings give (after the norm before the
    blocks, where there is one), k what block k gives, raw; negative ones count from the end, -1 the last block.

    Raises:
        ValueError: the shape has no meaning, or such a tower has not what is to be selected.
    """

    family: ClassVar[str]
    trained_on: ClassVar[Preprocessing]
    has_class_token: ClassVar[bool] = True
    has_pre_norm: ClassVar[bool] = False  # a norm between embeddings and blocks
    has_patch_bias: ClassVar[bool] = True

    width: int  # W of the residual stream
    num_layers: int  # of the whole tower, of which `layers_run` are run
    num_heads: int
    patch_size: int
    image_size: int  # of a tile's side, in pixels
    mlp_dim: int
    norm_eps: float
    select_layer: int = -2
    select_feature: SelectFeature = "patch"  # class_tokens: LaVIN's, of all blocks; cls_patch: all tokens
    scales: tuple[int, ...] = ()  # S2: pixels a side at which a picture is seen, the least first; empty: as one tile

    def __post_init__(self) -> None:
        if self.select_feature not in get_args(SelectFeature):
            accepted = ", ".join(get_args(SelectFeature))
            raise ValueError(f"select_feature {self.select_feature!r}: accepted are {accepted}")
        if self.width % self.num_heads:
            raise ValueError(f"a tower of width {self.width} cannot have {self.num_heads} heads of one width")
        if self.patch_size > self.image_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not fit in tiles of {self.image_size}")
        if self.select_feature == "class_tokens":
            self._check_taps()
        elif not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(
                f"select_layer {self.select_layer} of a tower of {self.num_layers} blocks: "
                f"accepted are {-self.num_layers - 1} to {self.num_layers}"
            )

        if self.scales:
            self._check_scales()

    def _check_scales(self) -> None:
        if self.has_class_token:
            raise ValueError(f"S2's scales with a {self.family} tower, which has a class token; choose a SigLIP tower")
        rising = self.scales == tuple(sorted(set(self.scales)))
        if not rising or self.scales[0] != self.image_size or any(scale % self.image_size for scale in self.scales):
            raise ValueError(
                f"S2's scales {', '.join(map(str, self.scales))} of a tower of {self.image_size} pixels: accepted are "
                f"rising multiples of {self.image_size}, that itself the first"
            )

    def _check_taps(self) -> None:
        if not self.has_class_token:
            raise ValueError(f"select_feature 'class_tokens': {self.family} has no class token; choose 'patch'")
        if self.num_layers < NUM_TAPS:
            raise ValueError(f"a tower of {self.num_layers} blocks: at least {NUM_TAPS} are needed, one an image token")

    @abstractmethod
    def parts(self) -> tuple[Attention, MLP]:
        """Attention and MLP of a block."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What the tower is fed: LaVIN feeds one whose class tokens it takes otherwise than it was trained."""
        return LAVIN if self.select_feature == "class_tokens" else self.trained_on

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> int:
        """Patches a side; pixels that fill none (6 of SigLIP's 384) are not seen."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_tokens(self) -> int:
        """P: tokens of a tile within the tower, its patches and the class token."""
        return self.num_patches + self.has_class_token

    @property
    def tokens_out(self) -> int:
        """K: tokens of a tile that leave the tower."""
        if self.select_feature == "class_tokens":
            return NUM_TAPS
        return self.num_patches if self.select_feature == "patch" else self.num_tokens

    @property
    def feature_width(self) -> int:
        """Channels of what leaves the tower for a picture: those of every scale."""
        return self.width * max(1, len(self.scales))

    @property
    def picture_size(self) -> int:
        """Pixels a side of a picture that the tower is given."""
        return max((self.image_size, *self.scales))

    @property
    def crops(self) -> int:
        """Tiles of `image_size` that the tower sees of a picture."""
        return sum((scale // self.image_size) ** 2 for scale in self.scales) or 1

    @property
    def layers_run(self) -> int:
        """Blocks on the way to what is selected: those that a tower has."""
        if self.select_feature == "class_tokens":
            return self.num_layers
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @property
    def taps(self) -> list[int]:
        """Number of blocks run when features are taken: 4, 8, ..., 24 for the class tokens of 24 blocks."""
        if self.select_feature == "class_tokens":
            return [self.num_layers * (i + 1) // NUM_TAPS for i in range(NUM_TAPS)]
        return [self.layers_run]

    def rope_table(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin of each token of a tile, fp32 [P, head_dim / 2], where q and k turn."""
        return None
