"""Random small models of transformers: each family with the freedom that its configuration has, every tensor drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.drawn import drawn

transformers = pytest.importorskip("transformers")
Draw = random.Random


@dataclass(frozen=True)
class Widths:
    """What heads and MLPs may be drawn from."""

    head: tuple[int, ...] = (4, 6, 8, 10, 16)
    mlp: tuple[int, ...] = (17, 32, 45, 50)


ANY = Widths()
# a LayerNorm over four channels magnifies rounding so much that two correct towers differ by 1e-4 in fp32
TOWERS_OWN = Widths(head=(8, 10, 12), mlp=(17, 32, 45))
# bitsandbytes on a CPU unpacks wrongly where a row is no multiple of a block of 64
WHOLE_BLOCKS = Widths(head=(64,), mlp=(64, 128, 192))


def _shape(draw: Draw, widths: Widths) -> dict[str, int]:
    kv_heads, group = draw.choice((1, 2, 3)), draw.choice((1, 1, 2, 3))
    head_dim = draw.choice(widths.head)
    return {
        "hidden_size": kv_heads * group * head_dim, "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads, "num_hidden_layers": draw.choice((1, 2, 3)),
        "intermediate_size": draw.choice(widths.mlp), "vocab_size": draw.randrange(21, 90),
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _rope(draw: Draw, factor: float = 1.0) -> dict[str, Any]:
    theta = draw.choice((1e4, 5e5, 733.0))
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}}


def _part(draw: Draw, head_dim: int) -> float:
    """A share of the head that is an even number of channels."""
    return 2 * draw.randint(1, head_dim // 2) / head_dim


def llama(draw: Draw, widths: Widths = ANY) -> Any:
    """LLaMA-1/2/3 and Vicuna, and what the class allows beyond them: biases."""
    return transformers.LlamaConfig(
        **_shape(draw, widths), **_rope(draw), rms_norm_eps=draw.choice((1e-5, 1e-6)),
        attention_bias=draw.random() < 0.3, mlp_bias=draw.random() < 0.3, tie_word_embeddings=draw.random() < 0.3,
    )  # fmt: skip


def phi(draw: Draw, widths: Widths = ANY) -> Any:
    """Phi-1.5 and Phi-2: dropout is off where one evaluates."""
    shape = _shape(draw, widths)
    factor = _part(draw, shape["hidden_size"] // shape["num_attention_heads"])
    return transformers.PhiConfig(**shape, **_rope(draw, factor), resid_pdrop=0.1)


def phi3(draw: Draw, widths: Widths = ANY) -> Any:
    """Phi-3-mini, with windows that are shorter than the sequences."""
    window = draw.choice((None, 1, 2, 5, 9))
    return transformers.Phi3Config(**_shape(draw, widths), **_rope(draw), sliding_window=window)


def stablelm(draw: Draw, widths: Widths = ANY) -> Any:
    """StableLM-2-1.6B."""
    shape = _shape(draw, widths)
    factor = _part(draw, shape["hidden_size"] // shape["num_attention_heads"])
    return transformers.StableLmConfig(
        **shape, **_rope(draw, factor), use_qkv_bias=draw.random() < 0.7, tie_word_embeddings=draw.random() < 0.3
    )


FAMILIES: dict[str, Callable[..., Any]] = {"llama": llama, "phi": phi, "phi3": phi3, "stablelm": stablelm}


def language_model(config: Any, seed: int) -> Any:
    """The model of a configuration, fp32, for evaluation."""
    return drawn(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed).eval()


def rounded(weight: Tensor) -> Tensor:
    """`weight` in bitsandbytes' NF4 with quantised scales, and back."""
    bnb = pytest.importorskip("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return cast(Tensor, bnb.functional.dequantize_4bit(codes, state))


def load_in_four_bits(kind: Any, folder: Path) -> Any:
    """What `kind.from_pretrained` makes of `folder` with bitsandbytes' NF4, multiplied in fp32: bitsandbytes' own
    product on a CPU rounds to bf16 (by 4e-4 of the result), its unpacked weights are exact."""
    bnb = pytest.importorskip("bitsandbytes")
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = kind.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    ).eval()
    found = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.forward = partial(F.linear, weight=weight, bias=module.bias)
            found += 1
    assert found
    return model


def _tower_shape(draw: Draw, widths: Widths) -> dict[str, Any]:
    heads, head_dim, patch = draw.choice((1, 2, 3)), draw.choice(widths.head), draw.choice((2, 3, 4))
    return {
        "hidden_size": heads * head_dim, "num_attention_heads": heads, "num_hidden_layers": draw.choice((2, 3, 5)),
        "intermediate_size": draw.choice(widths.mlp), "patch_size": patch,
        "image_size": patch * draw.choice((2, 3, 5)),
    }  # fmt: skip


def clip(draw: Draw, widths: Widths = TOWERS_OWN) -> Any:
    """OpenAI's CLIP."""
    return transformers.CLIPVisionConfig(**_tower_shape(draw, widths), projection_dim=8)


def siglip(draw: Draw, widths: Widths = TOWERS_OWN) -> Any:
    """SigLIP; its tiles need not be whole patches (384 pixels are 27 patches of 14 and 6 pixels more)."""
    shape = _tower_shape(draw, widths)
    shape["image_size"] += draw.choice((0, shape["patch_size"] - 1))
    return transformers.SiglipVisionConfig(**shape)


TOWERS: dict[str, Callable[..., Any]] = {"clip": clip, "siglip": siglip}


def tower(config: Any, seed: int) -> Any:
    """The tower of a configuration, fp32, for evaluation."""
    kind = transformers.CLIPVisionModel if config.model_type == "clip_vision_model" else transformers.SiglipVisionModel
    model = kind(config)
    model.set_attn_implementation("eager")
    return drawn(model, seed).eval()


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """`model` as transformers writes it."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder
