"""Packed weights for tests, and where csrc's kernels run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc import build
from kernels import library
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.dispatch import set_backend
from kernels.int8 import Int8Tensor, dequantize_int8_reference, quantize_int8
from kernels.linear_int8 import linear_int8, linears_int8
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def csrc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """csrc's kernels, chosen explicitly: on a GPU where they are built, else in the emulator; skips without both."""
    if ON_GPU and library.missing():
        pytest.skip(library.missing())
    if not ON_GPU:
        if build.find_cxx() is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setenv("NIBBLE_EMULATE", "1")
    previous = set_backend("cuda")
    yield
    set_backend(previous)


@dataclass(frozen=True)
class Kind:
    """A format of packed weights and its ops."""

    name: str
    quantize: Callable[[Tensor], Any]
    reference: Callable[[Any, torch.dtype], Tensor]  # unpacks
    linear: Callable[..., Tensor]
    linears: Callable[..., tuple[Tensor, ...]]

    def draw(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Any:
        """A weight as large as a layer's, the same on every device."""
        return self.quantize(weight(rows, columns, dtype, device))


NF4 = Kind("nf4", quantize_nf4, dequantize_nf4_reference, linear_nf4, linears_nf4)
INT8 = Kind("int8", quantize_int8, dequantize_int8_reference, linear_int8, linears_int8)
KINDS = pytest.mark.parametrize("kind", [NF4, INT8], ids=lambda kind: kind.name)


def weight(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(rows, columns) * columns**-0.5).to(device, dtype)


def nf4(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> NF4Tensor:
    return quantize_nf4(weight(rows, columns, dtype, device))


def int8(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Int8Tensor:
    return quantize_int8(weight(rows, columns, dtype, device))


def expressions(
    kind: Kind, x: Tensor, qs: Sequence[Any], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The linears as torch computes them in x's dtype, and in fp64 with the weights as they are stored."""
    dense = [kind.reference(q, x.dtype) for q in qs]
    exact = [kind.reference(q, torch.float32).double() for q in qs]
    linear = torch.nn.functional.linear
    return (
        [linear(x, w, bias) for w, bias in zip(dense, biases, strict=True)],
        [linear(x.double(), w, None if b is None else b.double()) for w, b in zip(exact, biases, strict=True)],
    )
