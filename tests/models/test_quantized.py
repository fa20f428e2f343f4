"""Frozen weights in few bits as parameters: names, casts, copies, state dicts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.int8 import Int8Tensor, dequantize_int8, quantize_int8
from kernels.nf4 import NF4Tensor, quantize_nf4
from models.linear import Linear
from models.quantized import QuantizedWeight, from_parts, parts
from models.vlm import VisionLanguageModel
from tests.models.tiny import packed_copy, step_loss, tiny_config, tiny_model

CPU = torch.device("cpu")
CONFIG = tiny_config(ffn_dim=37, dropout=0.0)
BITS = {"language": 4, "head": 8, "vision": 8}


def quantized(bits: int, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return QuantizedWeight(quantize_nf4(weight) if bits == 4 else quantize_int8(weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_that_do_not_fit_the_shape_are_refused(bits: int) -> None:
    """Kernels take the shape's word for it and would read past the end."""
    packed = quantized(bits).packed()
    whole = parts(packed)
    assert from_parts(whole, (37, 96), torch.bfloat16).shape == packed.shape
    for part, tensor in whole.items():
        for wrong in (tensor[:-1], tensor.bool()):
            with pytest.raises(ValueError, match=f"{part} of a packed weight \\[37, 96\\] is"):
                from_parts(whole | {part: wrong}, (37, 96), torch.bfloat16)
    with pytest.raises(ValueError, match="codes of a packed weight"):
        from_parts({name: tensor for name, tensor in whole.items() if name != "codes"}, (37, 96), torch.bfloat16)


def dense(weight: NF4Tensor | Int8Tensor) -> Tensor:
    return (dequantize_nf4 if isinstance(weight, NF4Tensor) else dequantize_int8)(weight, torch.float32)


def model_of(seed: int) -> VisionLanguageModel:
    """The language model in NF4, its head and the tower in int8."""
    return packed_copy(tiny_model(CONFIG, seed), lambda part, name: BITS["head" if name == "head.weight" else part])


def test_names_dtypes_and_bytes() -> None:
    nf4, int8 = quantized(4), quantized(8)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in nf4.named_parameters()} == {
        "codes": (torch.uint8, (37 * 48,)), "absmax_codes": (torch.uint8, (56,)),
        "absmax2": (torch.int32, (1,)), "offset": (torch.int32, (1,)),
    }  # fmt: skip
    assert {n: (p.dtype, tuple(p.shape)) for n, p in int8.named_parameters()} == {
        "codes": (torch.int8, (37, 96)), "scale": (torch.int32, (37,)),
    }  # fmt: skip
    for module in (nf4, int8):
        assert not any(p.requires_grad for p in module.parameters())
        assert sum(p.nbytes for p in module.parameters()) == module.packed().nbytes


def test_what_was_quantized_comes_back_without_a_copy() -> None:
    weight = quantize_nf4(torch.randn(640, 96)).rows(64, 128)
    packed = QuantizedWeight(weight).packed()
    assert isinstance(packed, NF4Tensor) and packed.first_block == weight.first_block == 96
    assert (packed.shape, packed.dtype, packed.offset.shape) == (weight.shape, weight.dtype, torch.Size([]))
    assert packed.codes.data_ptr() == weight.codes.data_ptr() and packed.absmax2.dtype == torch.float32
    assert torch.equal(dense(packed), dense(weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_one_object_until_the_parameters_change(bits: int) -> None:
    module, other = quantized(bits), quantized(bits, seed=1)
    first = module.packed()
    assert module.packed() is first
    module.load_state_dict(other.state_dict())
    second = module.packed()
    assert second is not first and torch.equal(dense(second), dense(other.packed()))
    assert module.packed() is second
    module.load_state_dict(quantized(bits).state_dict(), assign=True)
    assert torch.equal(dense(module.packed()), dense(quantized(bits).packed()))
    third = module.packed()
    module.to("meta")
    assert module.packed() is not third and module.packed().device.type == "meta"


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_that_was_moved_is_found(bits: int) -> None:
    """As from the CPU to a GPU: torch keeps the parameters and puts other memory under them."""
    module = quantized(bits)
    codes, before = module.codes, module.packed()
    module._apply(torch.clone)
    assert module.codes is codes and module.packed() is not before
    assert module.packed().codes.data_ptr() == module.codes.data_ptr() != before.codes.data_ptr()


@pytest.mark.parametrize("bits", [4, 8])
def test_casts_leave_the_scales_alone(bits: int) -> None:
    expected = dense(quantized(bits).packed())
    module = quantized(bits)
    module.packed()
    for cast in (module.half, module.bfloat16, module.double, lambda: module.to(torch.float16)):
        cast()
        assert torch.equal(dense(module.packed()), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_in_inference_mode(bits: int) -> None:
    """Parameters that are made there have no version."""
    with torch.inference_mode():
        module = quantized(bits)
        assert module.packed() is module.packed()
    assert torch.equal(dense(module.packed()), dense(quantized(bits).packed()))


def test_a_copy_has_its_own_memory() -> None:
    module = quantized(4)
    module.packed()
    other = copy.deepcopy(module)
    assert other.packed().codes.data_ptr() == other.codes.data_ptr() != module.codes.data_ptr()
    assert torch.equal(dense(other.packed()), dense(module.packed()))


def test_state_dict_through_a_file(tmp_path: Path) -> None:
    saved, other = model_of(0), model_of(1)
    expected, before = step_loss(saved), step_loss(other)
    assert not torch.equal(expected, before)
    state = saved.state_dict()
    assert {"language.layers.0.mlp.up.quantized.codes", "language.head.quantized.scale"} <= state.keys()
    save_file(state, tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(step_loss(other), expected)


def test_nothing_frozen_trains() -> None:
    model = model_of(0)
    assert set(model.trainable()) == set(tiny_model(CONFIG).trainable())
    step_loss(model).backward()
    frozen = {name: p for name, p in model.named_parameters() if ".quantized." in name}
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(frozen) == 4 * 3 * 7 + 2 * (1 + 6 * 6) and len(linears) == 3 * 7 + 1 + 6 * 6
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())
