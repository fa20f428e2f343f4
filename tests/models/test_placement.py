"""Which dtype the tensors of a 16-bit model are placed in, and that it runs with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.placement import fill
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models.tiny import gradients, step_loss, tiny_config, tiny_model

CPU = torch.device("cpu")
CONFIGS = [
    tiny_config(language_placement="block", vision_placement="router_block"),
    tiny_config(vision_placement="normal"),
    tiny_config(train_vision="frozen"),
]


def placed(source: VisionLanguageModel, dtype: torch.dtype, bits: int = 16) -> VisionLanguageModel:
    """`source`, its frozen tensors stored for activations of this dtype."""
    with torch.device("meta"):
        model = VisionLanguageModel(source.config)
    model.start_trainable(0, CPU)
    for part in ("language", "vision"):
        module = source.get_submodule(part)
        stream = ((n, p.data) for n, p in module.named_parameters() if "_adapter." not in n)
        fill(model.get_submodule(part), stream, bits=lambda name: bits, device=CPU, dtype=dtype, source="test")
    for name, parameter in source.trainable().items():
        model.get_parameter(name).data.copy_(parameter)
    return model.eval()


@pytest.mark.parametrize("bits", [16, 4])
def test_the_tower_keeps_norms_and_embeddings_in_fp32_as_lavin_does(bits: int) -> None:
    source = tiny_model(CONFIGS[0])
    dtypes: dict[torch.dtype, set[str]] = {}
    for name, parameter in placed(source, torch.float16, bits).named_parameters():
        if ".quantized." not in name:
            dtypes.setdefault(parameter.dtype, set()).add(name)
    learns = set(source.trainable())
    towers = {
        name
        for name, _ in source.named_parameters()
        if name in ("vision.class_embedding", "vision.position_embedding")
        or (name.startswith("vision.") and "norm." in name)
    }
    assert len(towers) == 2 + 2 + 6 * 4
    assert dtypes.keys() == {torch.float32, torch.float16}
    assert dtypes[torch.float32] == learns | towers
    assert {"vision.layers.0.attention.q.bias", "language.norm.weight"} <= dtypes[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=["router_block", "normal", "frozen"])
def test_a_16_bit_model_is_close_to_the_fp32_one(config: VLMConfig, dtype: torch.dtype) -> None:
    source = tiny_model(config)
    model = placed(source, dtype)
    tiles = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.vision(tiles, None, None)
        assert features.dtype == dtype
        assert close(features, source.vision(tiles, None, None))
    losses = [step_loss(m) for m in (model, source)]
    assert close(*losses)
    if dtype == torch.float16:  # bf16 has 8 bits, too few to tell a gradient's error from rounding
        got, expected = (gradients(loss, m.trainable()) for loss, m in zip(losses, (model, source), strict=True))
        assert [name for name, gradient in got.items() if not close(gradient, expected[name])] == []


def close(got: Tensor, expected: Tensor) -> bool:
    """To a tenth of what is largest: what is wrong is wrong by about 1."""
    return bool((got.float() - expected).abs().max() <= 0.1 * expected.abs().max())
