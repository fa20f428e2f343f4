"""A model whose linears are stored in 4 or 8 bits equals the 16-bit model that holds the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.data.packing import collate, token_weights
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.int8 import dequantize_int8, quantize_int8
from kernels.nf4 import quantize_nf4
from models.linear import Linear
from models.placement import fill
from models.vlm import VisionLanguageModel
from models.weights.errors import WeightsError
from tests.models.tiny import (
    assert_close,
    assert_gradients_close,
    gradients,
    packed_copy,
    random_samples,
    tiny_config,
    tiny_model,
)

CPU = torch.device("cpu")
# 37 is odd: the rows of NF4's blocks cross, and the last block of most weights is not full.
CONFIG = tiny_config(ffn_dim=37, language_placement="block", vision_placement="router_block", dropout=0.0)
PARTS = ("language", "vision")


def frozen(model: VisionLanguageModel) -> dict[str, Tensor]:
    """What files of LLaMA and CLIP would hold, by name in the joint model."""
    return {n: p.data for n, p in model.named_parameters() if n.startswith(PARTS) and "_adapter." not in n}


def linears(model: VisionLanguageModel) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}


def rounded(weight: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return dequantize_nf4(quantize_nf4(weight))
    return dequantize_int8(quantize_int8(weight)) if bits == 8 else weight


def filled(source: VisionLanguageModel, bits: dict[str, int]) -> VisionLanguageModel:
    """The same, stored in `bits` of a name in the joint model."""
    return packed_copy(source, lambda part, name: bits[f"{part}.{name}"])


def run(model: VisionLanguageModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of all rows, loss, gradients."""
    samples, tiles = random_samples([(20, True), (15, False), (33, True)])
    pack = collate(samples, token_weights(samples, "token"), tiles)
    loss = model(pack)
    return model.logits(model.hidden(pack)).detach(), loss, gradients(loss, dict(model.named_parameters()))


@pytest.mark.parametrize("head", [16, 8, 4])
@pytest.mark.parametrize("vision", [16, 8, 4])
@pytest.mark.parametrize("language", [16, 8, 4])
def test_stored_in_few_bits_equals_holding_the_rounded_weights(language: int, vision: int, head: int) -> None:
    original = tiny_model(CONFIG)
    bits = {n: 16 if n not in linears(original) else language if n.startswith("language") else vision
            for n in frozen(original)}  # fmt: skip
    bits["language.head.weight"] = head
    model = filled(original, bits)
    for name, weight in frozen(original).items():
        weight.copy_(rounded(weight, bits[name]))
    logits, loss, found = run(model)
    expected_logits, expected_loss, expected = run(original)
    assert_close(logits, expected_logits, "logits")
    assert_close(loss, expected_loss, "loss")
    assert_gradients_close(found, expected, floor=2e-7)
    kept = {name for name, _ in model.named_parameters() if ".quantized." not in name}
    assert kept == {name for name, _ in original.named_parameters() if bits.get(name, 16) == 16}


def test_rounding_matters() -> None:
    """The comparison above would not notice a model that ignores `bits`."""
    original = tiny_model(CONFIG)
    results = []
    for few in (16, 8, 4):
        bits = {name: few if name in linears(original) else 16 for name in frozen(original)}
        results.append(run(filled(original, bits))[0])
    exact, eight, four = results
    assert 1e-4 < (eight - exact).abs().max() < (four - exact).abs().max() / 3


def test_fill_lists_what_does_not_fit() -> None:
    original = tiny_model(CONFIG)
    tensors = {n.removeprefix("language."): p for n, p in frozen(original).items() if n.startswith("language")}
    del tensors["layers.1.attention.k.weight"]
    tensors["layers.0.mlp.up.weight"] = torch.zeros(36, 32)
    tensors["layers.3.mlp.up.weight"] = torch.zeros(37, 32)
    with torch.device("meta"):
        model = VisionLanguageModel(CONFIG)
    with pytest.raises(WeightsError) as caught:
        fill(model.language, tensors.items(), bits=lambda name: 16, device=CPU, dtype=torch.float32, source="a.pth")
    assert caught.value.missing == ["layers.1.attention.k.weight"]
    assert caught.value.extra == ["layers.3.mlp.up.weight"]
    assert len(caught.value.mismatched) == 1 and "layers.0.mlp.up.weight" in caught.value.mismatched[0]
    assert "a.pth" in str(caught.value)
