"""Which dtype the tensors of a 16-bit model are placed in, and that it runs with them; what is packed already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels.int8 import quantize_int8
from kernels.nf4 import quantize_nf4
from models.linear import Linear
from models.placement import fill, specs, stored
from models.quantized import Spec, parts
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.errors import WeightsError
from tests.models.tiny import gradients, packed_copy, step_loss, tiny_config, tiny_model

CPU = torch.device("cpu")
CONFIGS = [
    tiny_config(language_placement="block", vision_placement="router_block"),
    tiny_config(vision_placement="normal"),
    tiny_config(train_vision="frozen"),
]


def placed(source: VisionLanguageModel, dtype: torch.dtype, bits: int = 16) -> VisionLanguageModel:
    """`source`, its frozen tensors stored for activations of this dtype."""
    return packed_copy(source, lambda part, name: bits, dtype=dtype)


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


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_will_be_stored_is_known_beforehand(bits: int) -> None:
    with torch.device("meta"):
        empty = VisionLanguageModel(CONFIGS[0])
    source = tiny_model(CONFIGS[0])
    model = placed(source, torch.bfloat16, bits)
    for part in ("language", "vision"):
        expected = specs(empty.get_submodule(part), bits=lambda name: bits, dtype=torch.bfloat16)
        found: dict[str, Spec] = {}
        for name in (n for n, _ in source.get_submodule(part).named_parameters() if "_adapter." not in n):
            weight = stored(model.get_submodule(part), name)
            tensors = {name: weight} if isinstance(weight, Tensor) else parts(weight)
            prefix = "" if isinstance(weight, Tensor) else f"{name}."
            found |= {f"{prefix}{key}": (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        assert found == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_arrive_as_copies(bits: int) -> None:
    weight = torch.randn(37, 32)
    packed = quantize_nf4(weight) if bits == 4 else quantize_int8(weight)
    linear = Linear(32, 37)
    fill(
        nn.ModuleDict({"a": linear}), [("a.weight", packed)], bits=lambda name: bits, device=CPU, dtype=torch.float16,
        source="test",
    )  # fmt: skip
    found = linear.frozen_weight()
    assert type(found) is type(packed) and not isinstance(found, Tensor)
    assert (found.shape, found.dtype) == ((37, 32), torch.float32)
    for part, tensor in parts(found).items():
        assert torch.equal(tensor, parts(packed)[part])
        assert tensor.data_ptr() != parts(packed)[part].data_ptr()


def test_a_weight_that_is_packed_otherwise_than_asked_for_is_refused() -> None:
    for name, packed, bits in (("a", quantize_int8(torch.ones(4, 64)), 4), ("a", quantize_nf4(torch.ones(4, 64)), 16)):
        module = nn.ModuleDict({name: Linear(64, 4)})
        with pytest.raises(WeightsError, match=f"a.weight: .* in the file, {bits} asked"):
            fill(module, [("a.weight", packed)], bits=lambda _, bits=bits: bits, device=CPU, dtype=torch.float16,
                 source="test")  # fmt: skip


def close(got: Tensor, expected: Tensor) -> bool:
    """To a tenth of what is largest: what is wrong is wrong by about 1."""
    return bool((got.float() - expected).abs().max() <= 0.1 * expected.abs().max())
