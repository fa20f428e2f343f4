"""Our tensor names, their shapes, and how another project's names correspond to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig
from models.weights.archive import Shape
from models.weights.errors import WeightsError


@dataclass(frozen=True, slots=True)
class Names:
    """Another project's name for each of ours. In a layer it is `layer`, the module's name, and .weight or .bias."""

    outside: Mapping[str, str]  # whole names outside the layers
    layer: str  # prefix with the layer's number as {}
    modules: Mapping[str, str]  # our module within a layer -> theirs

    def of(self, name: str) -> str:
        if name in self.outside:
            return self.outside[name]
        _, index, rest = name.split(".", 2)
        module, _, leaf = rest.rpartition(".")
        return f"{self.layer.format(index)}{self.modules[module]}.{leaf}"


def language_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Every tensor of a LLaMA model by its name within the module."""
    dim, ffn = config.dim, config.ffn_dim
    kv_dim = config.num_kv_heads * config.head_dim
    layer: dict[str, Shape] = {
        "attention_norm": (dim,), "attention.q": (dim, dim), "attention.k": (kv_dim, dim), "attention.v": (kv_dim, dim),
        "attention.o": (dim, dim), "mlp_norm": (dim,), "mlp.gate": (ffn, dim), "mlp.up": (ffn, dim),
        "mlp.down": (dim, ffn),
    }  # fmt: skip
    shapes: dict[str, Shape] = {"embed.weight": (config.vocab_size, dim)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{module}.weight": shape for module, shape in layer.items()}
    return shapes | {"norm.weight": (dim,), "head.weight": (config.vocab_size, dim)}


def vision_shapes(config: ClipConfig) -> dict[str, Shape]:
    """Every tensor of a CLIP tower by its name within the module."""
    width, mlp, patch = config.width, config.mlp_dim, config.patch_size
    layer: dict[str, Shape] = {
        "attention_norm": (width,), "attention.q": (width, width), "attention.k": (width, width),
        "attention.v": (width, width), "attention.o": (width, width), "mlp_norm": (width,), "mlp.up": (mlp, width),
        "mlp.down": (width, mlp),
    }  # fmt: skip
    shapes: dict[str, Shape] = {
        "patch_embed.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "position_embedding": (config.num_tokens, width),
        "pre_norm.weight": (width,),
        "pre_norm.bias": (width,),
    }
    for i in range(config.num_layers):
        for module, shape in layer.items():
            shapes[f"layers.{i}.{module}.weight"] = shape
            shapes[f"layers.{i}.{module}.bias"] = shape[:1]
    return shapes


def tower_config(
    file: Path, *, width: int, num_layers: int, num_heads: int, patch_size: int, image_size: int, mlp_dim: int,
    norm_eps: float,
) -> ClipConfig:  # fmt: skip
    """The tower that `file` describes; a WeightsError where its numbers make no tower."""
    if num_heads < 1 or width % num_heads:
        raise WeightsError(file, f"a width of {width} does not divide into {num_heads} heads")
    if not 0 < patch_size <= image_size:
        raise WeightsError(file, f"a tile of {image_size} pixels has no patches of {patch_size}")
    try:
        return ClipConfig(
            width=width, num_layers=num_layers, num_heads=num_heads, patch_size=patch_size, image_size=image_size,
            mlp_dim=mlp_dim, norm_eps=norm_eps,
        )  # fmt: skip
    except ValueError as error:
        raise WeightsError(file, str(error)) from error


def check_shapes(file: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], do: str = "") -> None:
    """Raises a WeightsError that lists every difference between the tensors `found` in `file` and those `expected`."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    mismatched = [
        f"{name}: got {_text(found[name])}, expected {_text(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if missing or extra or mismatched:
        raise WeightsError(file, missing=missing, extra=extra, mismatched=mismatched, do=do)


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
