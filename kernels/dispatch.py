"""Where it is decided which implementation of an op runs, and with which launch configuration.

``auto`` takes Triton for CUDA tensors and the plain-torch reference otherwise; with TRITON_INTERPRET=1 Triton also runs
on CPU tensors (slowly: it is how the kernels are tested without a GPU).

An explicit choice holds for every op that has this backend, and never falls back: where the backend cannot run, that is
an error. An op that has no such implementation runs what it has, and its line in the log says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "cuda", "reference"]

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS: tuple[str, ...] = get_args(Backend)

log = logging.getLogger("nibble.kernels")

_settings: dict[str, str] = {}  # "backend": set_backend's argument, absent until then
_decisions: dict[str, str] = {}


class BackendError(ValueError):
    """The backend that was chosen explicitly cannot run here."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch configuration of one kernel for one shape class."""

    rows: int  # tokens of a tile
    cols: int  # channels of a tile; kernels that hold whole rows need a power of two >= the channel count
    warps: int
    chunk: int = 0  # tokens that one program sums over, a multiple of rows (kernels that reduce over tokens)


# kernel -> (largest channel count of the class, configuration), in ascending order. The one place to tune.
LAUNCHES: dict[str, tuple[tuple[int, Launch], ...]] = {
    "rms_norm_forward": (
        (128, Launch(rows=16, cols=128, warps=4)),
        (1024, Launch(rows=4, cols=1024, warps=4)),
        (4096, Launch(rows=1, cols=4096, warps=8)),
        (8192, Launch(rows=1, cols=8192, warps=8)),
        (16384, Launch(rows=1, cols=16384, warps=16)),
    ),
    "rms_norm_backward": (
        (128, Launch(rows=16, cols=128, warps=4)),
        (1024, Launch(rows=4, cols=1024, warps=4)),
        (4096, Launch(rows=1, cols=4096, warps=8)),
        (8192, Launch(rows=1, cols=8192, warps=16)),
        (16384, Launch(rows=1, cols=16384, warps=16)),
    ),
    "rms_norm_dweight": ((1 << 30, Launch(rows=32, cols=128, warps=4, chunk=256)),),
    "norm_mma_forward": (
        (64, Launch(rows=16, cols=64, warps=4)),
        (1 << 30, Launch(rows=16, cols=128, warps=4)),
    ),
    "norm_mma_backward": (
        (64, Launch(rows=16, cols=64, warps=4)),
        (1 << 30, Launch(rows=16, cols=128, warps=4)),
    ),
    "norm_mma_dadapter": (
        (64, Launch(rows=32, cols=64, warps=4, chunk=256)),
        (1 << 30, Launch(rows=32, cols=128, warps=4, chunk=256)),
    ),
    "norm_mma_dmix": ((1 << 30, Launch(rows=512, cols=16, warps=4)),),  # cols: router rows
    "bias_act_forward": ((1 << 30, Launch(rows=16, cols=128, warps=4)),),
    "bias_act_backward": ((1 << 30, Launch(rows=16, cols=128, warps=4, chunk=64)),),
}


def set_backend(name: str) -> str:
    """Choose the backend of every op in this process; returns the one that was in force.

    Before the first call it is that of the environment variable NIBBLE_KERNELS, or "auto".
    Raises ValueError for a name that is no `Backend`.
    """
    previous = _backend()
    _settings["backend"] = _checked(name, "backend")
    return previous


def choose(op: str, x: Tensor, available: tuple[str, ...], missing: Mapping[str, str] | None = None) -> str:
    """Name of the backend that runs `op` on `x`: one of `available`, the implementations that the op has, best first.

    `missing`: what an implementation needs and does not find on this machine, by backend.
    Raises BackendError where the op has the backend that was chosen explicitly, but it cannot run on `x` here.
    """
    obstacles = {backend: (missing or {}).get(backend) or _obstacle(backend, x) for backend in available}
    wanted = _backend()
    if wanted in available:
        if obstacles[wanted]:
            raise BackendError(
                f"{op}: backend {wanted!r} was chosen and cannot run ({obstacles[wanted]}); "
                f"accepted here: auto, {', '.join(backend for backend in available if not obstacles[backend])}"
            )
        record(op, wanted, "chosen explicitly")
        return wanted
    reason = "the only implementation"
    for backend in available:
        if not obstacles[backend]:
            break
        reason = obstacles[backend]
    if backend != "reference":
        reason = "CUDA tensor" if x.is_cuda else "TRITON_INTERPRET=1"
    record(op, backend, reason)
    return backend


def record(op: str, backend: str, reason: str) -> None:
    """Remember what runs `op`, and log it the first time and whenever it changes.

    `backend` is a `Backend` or, where an op has none of ours, what else it runs on.
    """
    if _decisions.get(op) != backend:
        _decisions[op] = backend
        wanted = _backend()
        if wanted in ("triton", "cuda") and backend != wanted:
            reason = f"has no {wanted} implementation; {reason}"
        log.info("%s: %s (%s)", op, backend, reason)


def decisions() -> dict[str, str]:
    """Backend of each op that has run in this process, by op."""
    return dict(_decisions)


def launch(kernel: str, channels: int) -> Launch:
    """Configuration of `kernel` for rows of `channels` elements."""
    for largest, configuration in LAUNCHES[kernel]:
        if channels <= largest:
            return configuration
    raise ValueError(f"{kernel} takes at most {LAUNCHES[kernel][-1][0]} channels, got {channels}")


def primitive(schema: str, fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: register a launcher as `torch.ops.nibble.<name>` and return the op that calls it.

    `schema` as in torch.library.define, e.g. "rms_norm_forward(Tensor x, float eps) -> Tensor"; `fake` returns outputs
    of the right shapes, strides and dtypes without computing them. (torch.library.define and not custom_op: a call
    costs a third of the host time.)
    """

    def register(launcher: Callable[P, R]) -> Callable[P, R]:
        name, signature = schema.split("(", 1)
        torch.library.define(f"nibble::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"nibble::{name}", "default")(launcher)
        torch.library.register_fake(f"nibble::{name}")(fake)
        return cast(Callable[P, R], getattr(torch.ops.nibble, name).default)

    return register


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Context in which a Triton launch goes to the device of `x` (Triton launches on the current one)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous (any row stride), else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that references compute in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _backend() -> str:
    if "backend" in _settings:
        return _settings["backend"]
    return _checked(os.environ.get("NIBBLE_KERNELS", "auto"), "NIBBLE_KERNELS")


def _obstacle(backend: str, x: Tensor) -> str:
    """Why `backend` cannot run on `x`; empty where it can."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "reference" or ((x.is_cuda or interpreted) and x.dtype != torch.float64):
        return ""
    return f"{x.dtype} tensor on {x.device.type}"


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} got {name!r}; accepted: {', '.join(BACKENDS)}")
    return name
