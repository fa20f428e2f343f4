"""bitsandbytes and Unsloth on weights that were quantized here: the same bits for everyone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.nf4 import BLOCK, BLOCK2, NF4Tensor, dynamic_map

PARTS = ("codes", "absmax_codes", "absmax2", "offset")


def parts(q: NF4Tensor, suffix: str = "") -> dict[str, Tensor]:
    """The tensors of a quantized weight as inputs of a benchmark, so that they rotate with the others."""
    return {name + suffix: getattr(q, name) for name in PARTS}


def whole(inputs: dict[str, Any], rows: int, columns: int, suffix: str = "") -> NF4Tensor:
    """The weight of `parts` again."""
    tensors = {name: inputs[name + suffix] for name in PARTS}
    return NF4Tensor(**tensors, shape=(rows, columns), dtype=torch.bfloat16)


def quant_state(q: NF4Tensor) -> Any:
    """bitsandbytes' description of the same weight, doubly quantized."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    nested = functional.QuantState(absmax=q.absmax2, code=dynamic_map(q.device), blocksize=BLOCK2, dtype=torch.float32)
    levels = functional.get_4bit_type("nf4", device=q.device)
    return functional.QuantState(
        absmax=q.absmax_codes, shape=torch.Size(q.shape), code=levels, blocksize=BLOCK, quant_type="nf4", dtype=q.dtype,
        offset=q.offset, state2=nested,
    )  # fmt: skip


def bitsandbytes_linear(q: NF4Tensor) -> Callable[[Tensor], Tensor]:
    """Linear4bit's product, without the module around it."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    state, codes = quant_state(q), q.codes[:, None]
    return lambda x: bitsandbytes.matmul_4bit(x, codes, state)


def bitsandbytes_dequantize(q: NF4Tensor) -> Callable[[], Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state, codes = quant_state(q), q.codes[:, None]
    return lambda: functional.dequantize_4bit(codes, state)


def unsloth_dequantize(q: NF4Tensor) -> Callable[[], Tensor]:
    """Unsloth's three launches into a buffer that it reuses."""
    from unsloth.kernels.utils import fast_dequantize

    state, codes = quant_state(q), q.codes[:, None]
    return lambda: fast_dequantize(codes, state)
