"""Fills a model that was built on the meta device, one tensor at a time: quantized, cast and placed as it arrives.

Host and device peaks are the model as it is stored plus one tensor; nothing is ever whole in 16 bits. Where a module
says `keeps_fp32`, its own tensors are not cast: they are small, and rounding them would be for nothing.

What was quantized before (by an earlier run, or by bitsandbytes in the file) may arrive packed; it is copied as it is,
in as many bits as it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kernels.int8 import Int8Tensor
from kernels.nf4 import NF4Tensor
from models.linear import Linear
from models.quantized import Packed, Spec, from_parts, part_specs, parts
from models.weights.errors import WeightsError
from models.weights.host_memory import trim_heap
from models.weights.names import shapes_of

TRIMMED_BYTES = 1 << 20  # tensors from this size on are followed by a look at the heap: 0.2 ms beside 1 GB of weights
Bits = Callable[[str], int]  # of a linear's weight by its name in the module: 4, 8 or 16


def fill(
    module: nn.Module, stream: Iterable[tuple[str, Tensor | Packed]], *, bits: Bits, device: torch.device,
    dtype: torch.dtype, source: str, on_tensor: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Gives `module` its frozen weights.

    `stream` yields (name within the module, tensor in its file's dtype, or a packed weight); `bits` says for a linear's
    weight how it is stored (4, 8 or 16). Parameters that need a gradient keep it. Adapters, which no base file holds,
    are not expected.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; the message lists them. Or a value is not
            finite where the weight is quantized. Or a weight is quantized in its file, and other bits are asked for.
    """
    expected = shapes_of(module)
    extra: list[str] = []
    mismatched: list[str] = []
    quantized: list[str] = []
    for name, tensor in stream:
        shape = expected.pop(name, None)
        if shape is None:
            extra.append(name)
        elif shape != tuple(tensor.shape):
            mismatched.append(f"{name}: file {tuple(tensor.shape)}, model {shape}")
        elif clash := _clash(module, name, tensor, bits(name)):
            quantized.append(clash)
        else:
            try:
                _place(module, name, tensor, bits(name), device, dtype)
            except ValueError as error:
                raise WeightsError(source, str(error), do="copy the weights again") from error
            if on_tensor is not None:
                on_tensor(name)
        nbytes = tensor.nbytes
        del tensor  # before the next one is made
        if nbytes >= TRIMMED_BYTES:
            trim_heap()
    if quantized:
        raise WeightsError(
            source, "its weights are quantized already, and in other bits than are asked for", mismatched=quantized,
            do="ask for the bits of the file, or name the model in 16 bits, of which 4 and 8 are made when it is read",
        )  # fmt: skip
    if expected or extra or mismatched:
        raise WeightsError(source, missing=sorted(expected), extra=extra, mismatched=mismatched)


def specs(module: nn.Module, *, bits: Bits, dtype: torch.dtype) -> dict[str, Spec]:
    """Every tensor that `fill` will give to `module`, as it will be stored: {name: (dtype, shape)}, the parts of a
    packed weight as name.part."""
    found: dict[str, Spec] = {}
    for name, shape in shapes_of(module).items():
        owner = module.get_submodule(name.rpartition(".")[0])
        if is_packed(module, name, bits(name)):
            rows, columns = shape
            found |= {f"{name}.{part}": spec for part, spec in part_specs((rows, columns), bits(name)).items()}
        else:
            found[name] = (_dtype(owner, dtype), shape)
    return found


def stored(module: nn.Module, name: str) -> Tensor | Packed:
    """What `fill` made of the tensor of this name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, Linear) and leaf == "weight":
        return owner.frozen_weight()
    return module.get_parameter(name)


def is_packed(module: nn.Module, name: str, bits: int) -> bool:
    """Whether a tensor is stored in `bits` < 16: linears' weights are."""
    path, _, leaf = name.rpartition(".")
    return bits < 16 and leaf == "weight" and isinstance(module.get_submodule(path), Linear)


def _clash(module: nn.Module, name: str, tensor: Tensor | Packed, bits: int) -> str:
    """What is wrong with the bits of a tensor that comes quantized; empty where nothing is."""
    if isinstance(tensor, Tensor):
        return ""
    held = 4 if isinstance(tensor, NF4Tensor) else 8
    asked = bits if is_packed(module, name, bits) else 16  # any dense dtype
    return "" if held == asked else f"{name}: {held} bits in the file, {asked} asked"


def _dtype(owner: nn.Module, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if getattr(owner, "keeps_fp32", False) else dtype


def _place(
    module: nn.Module, name: str, tensor: Tensor | Packed, bits: int, device: torch.device, dtype: torch.dtype
) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(tensor, NF4Tensor | Int8Tensor):
        copies = {part: each.to(device, copy=True) for part, each in parts(tensor).items()}
        assert isinstance(owner, Linear)
        owner.hold(from_parts(copies, tensor.shape, tensor.dtype))
    elif is_packed(module, name, bits):
        assert isinstance(owner, Linear)
        owner.quantize(tensor, bits=bits, device=device, name=name)
    else:
        old = getattr(owner, leaf)
        new = nn.Parameter(tensor.to(device, _dtype(owner, dtype), copy=True), requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
