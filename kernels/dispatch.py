"""Where it is decided which implementation of an op runs, and where every Triton kernel is launched.

``auto`` takes Triton for CUDA tensors and the plain-torch reference otherwise; with TRITON_INTERPRET=1 Triton also runs
on CPU tensors (slowly: it is how the kernels are tested without a GPU), with NIBBLE_EMULATE=1 csrc's kernels do so.

An explicit choice holds for every op that has this backend, and never falls back: where the backend cannot run, that is
an error. An op that has no such implementation runs what it has, and its line in the log says so.

A launcher asks `launch` for its configuration (the table is in kernels/launches.py) and launches through `run`, so that
what a kernel is given can be recorded: python -m kernels.compile and python -m kernels.traffic live on that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor

from kernels.launches import LAUNCHES, OWN_PRODUCTS, PROCESSORS, Launch, Products

Backend = Literal["auto", "triton", "cuda", "reference"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

BACKENDS: tuple[str, ...] = get_args(Backend)
EMULATED_PROCESSORS = 4

log = logging.getLogger("nibble.kernels")

_settings: dict[str, str] = {}  # "backend": set_backend's argument, absent until then
_decisions: dict[str, str] = {}


class BackendError(ValueError):
    """The backend that was chosen explicitly cannot run here."""


class NothingInstalled(BackendError):
    """No backend that `auto` takes is installed here; the text says what to install."""


class Kernel(Protocol):
    """A function under @triton.jit, compiled or interpreted."""

    arg_names: list[str]
    __name__: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


# Called with what `run` would launch: kernel, grid, configuration, arguments, constants.
Recorder = Callable[[Kernel, tuple[int, ...], Launch, tuple[object, ...], dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class Primitive:
    """An op that launches kernels: `op` through torch's dispatcher, `launcher` without it."""

    op: Callable[..., Any]
    launcher: Callable[..., Any]


PRIMITIVES: dict[str, Primitive] = {}  # by name, in order of import

_recorders: list[Recorder] = []
_targets: list[int] = []  # cards of `as_on_card`


def set_backend(name: str) -> str:
    """Choose the backend of every op in this process; returns the one that was in force.

    Before the first call it is that of the environment variable NIBBLE_KERNELS, or "auto".
    Raises ValueError for a name that is no `Backend`.
    """
    previous = _backend()
    _settings["backend"] = _checked(name, "backend")
    return previous


def choose(
    op: str, x: Tensor, available: tuple[str, ...], missing: Mapping[str, str] | None = None, why: str = "",
    install: str = "",
) -> str:  # fmt: skip
    """Name of the backend that runs `op` on `x`: one of `available`, the implementations that the op has, best first.

    `missing`: what an implementation needs and does not find on this machine, by backend. `why`: why the first is best.
    `install`: what to do where only the reference is left for a CUDA tensor, if it is no choice there (fp64 apart).
    Raises BackendError where the op has the backend that was chosen explicitly, but it cannot run on `x` here, and
    NothingInstalled where `install` is needed.
    """
    obstacles = {backend: (missing or {}).get(backend) or _obstacle(backend, x) for backend in available}
    wanted = _backend()
    if wanted in available:
        if obstacles[wanted]:
            raise BackendError(
                f"{op}: backend {wanted!r} was chosen and cannot run ({obstacles[wanted]}); accepted here: "
                f"{', '.join(name for name in ('auto', *available) if name in BACKENDS and not obstacles.get(name))}"
            )
        record(op, wanted, "chosen explicitly")
        return wanted
    reason = "the only implementation"
    for backend in available:
        if not obstacles[backend]:
            break
        reason = obstacles[backend]
    if backend == "reference" and install and x.is_cuda and x.dtype != torch.float64:
        raise NothingInstalled(f"{op}: {reason}; {install}")
    if why and backend == available[0]:
        reason = why
    elif backend != "reference" and (backend == available[0] or not (missing or {}).get(available[0])):
        on_cpu = "NIBBLE_EMULATE=1" if backend == "cuda" else "TRITON_INTERPRET=1"
        reason = "CUDA tensor" if x.is_cuda else on_cpu
    record(op, backend, reason)
    return backend


def record(op: str, backend: str, reason: str) -> None:
    """Remember what runs `op`, and log it the first time and whenever it changes.

    `backend` is a `Backend` or, where an op has none of ours, what else it runs on. Under `as_on_card` nothing runs,
    and nothing is remembered.
    """
    if _targets:
        return
    if _decisions.get(op) != backend:
        _decisions[op] = backend
        wanted = _backend()
        if wanted in ("triton", "cuda") and backend != wanted:
            reason = f"has no {wanted} implementation; {reason}"
        log.info("%s: %s (%s)", op, backend, reason)


def decisions() -> dict[str, str]:
    """Backend of each op that has run in this process, by op."""
    return dict(_decisions)


def launch(kernel: str, size: int, x: Tensor) -> Launch:
    """Configuration of `kernel` on the card of `x`, for rows of `size` channels.

    Raises ValueError for rows that are too wide.
    """
    here = card(x)
    for choice in LAUNCHES[kernel]:
        if size <= choice.largest and (not choice.cards or here in choice.cards):
            return choice.launch
    raise ValueError(f"{kernel} takes at most {LAUNCHES[kernel][-1].largest} channels, got {size}")


def own_product(x: Tensor, n: int) -> bool:
    """Whether x [M, K] times a weight [n, K], with its activation, is linear_act's own product on the card of `x`."""
    m, k = x.shape

    def covered(products: Products) -> bool:
        ranges = ((m, products.m), (k, products.k), (n, products.n))
        return card(x) in products.cards and all(least <= size <= most for size, (least, most) in ranges)

    return x.dtype != torch.float32 and any(map(covered, OWN_PRODUCTS))


def run(kernel: Kernel, grid: tuple[int, ...], config: Launch, *args: object, **constants: object) -> None:
    """Launch `kernel` on the device of the first argument, a tensor; an empty grid launches nothing.

    `config` sets warps, stages and those of ROWS, COLS, INNER and CHUNK that the kernel has.
    """
    if 0 in grid:
        return
    for name in _tile_names(cast(Hashable, kernel)):
        constants[name] = getattr(config, name.lower())
    for recorder in _recorders:
        recorder(kernel, grid, config, args, constants)
    if _targets:
        return
    first = cast(Tensor, args[0])
    with _on_device(first):
        kernel[grid](*args, **constants, num_warps=config.warps, num_stages=config.stages)


@cache
def _tile_names(kernel: Any) -> tuple[str, ...]:
    return tuple(name for name in ("ROWS", "COLS", "INNER", "CHUNK") if name in kernel.arg_names)


def recording(recorder: Recorder) -> AbstractContextManager[None]:
    """Calls `recorder` before each launch."""
    return listed(recorder, _recorders)


@contextmanager
def listed(item: T, items: list[T]) -> Iterator[None]:
    """Inside, `item` stands at the end of `items`."""
    items.append(item)
    try:
        yield
    finally:
        items.remove(item)


def as_on_card(card: int) -> AbstractContextManager[None]:
    """Launchers choose as they would on a card of this compute capability (90), and launch nothing.

    Ops take meta tensors then as that card takes its own, by the automatic choice and with everything installed.
    """
    return listed(card, _targets)


def on_another_card() -> bool:
    """Whether `as_on_card` is in force."""
    return bool(_targets)


def card(x: Tensor) -> int:
    """Compute capability as in LAUNCHES; 0 for the interpreter, which takes the choices for all cards."""
    if _targets:
        return _targets[-1]
    return _capability(x.device.index) if x.is_cuda else 0


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU, or stands for a tensor there."""
    return x.is_cuda or bool(_targets and _targets[-1])


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the card of `x`; a few for the emulator."""
    if _targets:
        return PROCESSORS.get(_targets[-1], EMULATED_PROCESSORS)
    return _multiprocessors(x.device.index) if x.is_cuda else EMULATED_PROCESSORS


@cache
def _multiprocessors(index: int | None) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it that of `x`."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def primitive(schema: str, fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: register a launcher as `torch.ops.nibble.<name>` and return the op that calls it.

    `schema` as in torch.library.define, e.g. "rms_norm_forward(Tensor x, float eps) -> Tensor"; `fake` returns outputs
    of the right shapes, strides and dtypes without computing them. Arguments that the schema marks as written to,
    "Tensor(a!) x" or "Tensor(a!)[] x", have their version counted up, so that autograd refuses a tensor that it saved
    before. (torch.library.define and not custom_op: a call costs a third of the host time.)
    """

    def register(launcher: Callable[P, R]) -> Callable[P, R]:
        name, signature = schema.split("(", 1)
        torch.library.define(f"nibble::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(torch.ops.nibble, name).default
        torch.library.impl(f"nibble::{name}", "default")(_counting_versions(launcher, overload._schema))
        torch.library.register_fake(f"nibble::{name}")(fake)
        op = cast(Callable[P, R], overload)
        PRIMITIVES[name] = Primitive(op=op, launcher=launcher)
        return op

    return register


def _counting_versions(launcher: Callable[..., R], schema: torch.FunctionSchema) -> Callable[..., R]:
    """`launcher`, and afterwards one more version of each tensor that it writes to; itself where it writes to none."""
    written = [i for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    if not written:
        return launcher

    def counting(*args: Any) -> R:
        result = launcher(*args)
        values = (value for i in written for value in (args[i] if isinstance(args[i], list) else [args[i]]))
        torch.autograd.graph.increment_version(value for value in values if isinstance(value, Tensor))
        return result

    return counting


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous (any row stride), else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that references compute in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _backend() -> str:
    if _targets:
        return "auto"
    if "backend" in _settings:
        return _settings["backend"]
    return _checked(os.environ.get("NIBBLE_KERNELS", "auto"), "NIBBLE_KERNELS")


def _obstacle(backend: str, x: Tensor) -> str:
    """Why `backend` cannot run on `x`; empty where it can."""
    runs = x.is_cuda or (bool(_targets) and backend in ("triton", "cuda")) or _runs_on_the_cpu(backend)
    if backend == "reference" or (x.dtype != torch.float64 and runs):
        return ""
    return f"{x.dtype} tensor on {x.device.type}"


def _runs_on_the_cpu(backend: str) -> bool:
    variable = {"triton": "TRITON_INTERPRET", "cuda": "NIBBLE_EMULATE"}.get(backend)
    return variable is not None and os.environ.get(variable) == "1"


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} got {name!r}; accepted: {', '.join(BACKENDS)}")
    return name
