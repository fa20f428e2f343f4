"""bitsandbytes and Unsloth on weights that were quantized here: the same bits for everyone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import library
from kernels.nf4 import NF4Tensor
from kernels.nf4_bitsandbytes import to_quant_state

T = TypeVar("T")
PARTS = ("codes", "absmax_codes", "absmax2", "offset")


def parts(q: NF4Tensor, suffix: str = "") -> dict[str, Tensor]:
    """The tensors of a quantized weight as inputs of a benchmark, so that they rotate with the others."""
    return {name + suffix: getattr(q, name) for name in PARTS}


def whole(inputs: dict[str, Any], rows: int, columns: int, suffix: str = "") -> NF4Tensor:
    """The weight of `parts` again."""
    tensors = {name: inputs[name + suffix] for name in PARTS}
    return NF4Tensor(**tensors, shape=(rows, columns), dtype=torch.bfloat16)


def require_csrc(call: T) -> T:
    """`call` itself, or what else ours consists of. Raises RuntimeError where csrc cannot serve this GPU: no peer's
    kernel is timed as ours."""
    why = library.available_for(torch.empty(0, device="cuda")) if torch.cuda.is_available() else ""
    if why:
        raise RuntimeError(f"csrc: {why}")
    return call


def empty_linear4bit(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' module for a weight [rows, columns] in NF4, double quantised, that computes in `dtype`; the weight,
    a Params4bit, and its `quant_state` are still to be set."""
    modules: Any = importlib.import_module("bitsandbytes.nn")
    with torch.device("meta"):
        return modules.Linear4bit(
            columns, rows, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
        )


def bitsandbytes_linear(q: NF4Tensor) -> Callable[[Tensor], Tensor]:
    """Linear4bit's product, without the module around it."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    codes, state = to_quant_state(q)
    return lambda x: bitsandbytes.matmul_4bit(x, codes, state)


def bitsandbytes_dequantize(q: NF4Tensor) -> Callable[[], Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes, state = to_quant_state(q)
    return lambda: functional.dequantize_4bit(codes, state)


def unsloth_dequantize(q: NF4Tensor) -> Callable[[], Tensor]:
    """Unsloth's three launches, into a new tensor as the others'."""
    from unsloth.kernels.utils import fast_dequantize

    codes, state = to_quant_state(q)
    return lambda: fast_dequantize(codes, state)
