"""Runs torch code on meta tensors as on a card, and counts instead of computing: FLOPs, bytes, launches, memory.

    with counting(90) as counter:
        loss = model(pack)        # on the meta device
        loss.backward()
    counter.ops, counter.live, counter.peak

An op is one of torch's, or one primitive of ours, whose launcher runs: its workspaces are allocated, its kernels are
noted and not launched. What is counted:

    flops       2 M N K of products, by shape; of attention 4 (forward) and 14 (backward) times pairs x H x d, where
                `Counter.pairs` says how many scores there are, since a meta tensor's segments have no lengths. All
                else is bound by memory, and has none
    bytes       each tensor that an op, or a launched kernel, reads or writes, once; twice what is read and written in
                place. Of a table only the rows that are looked up or added to
    launches    kernels; a view, or memory that is only set aside, is none
    live, peak  bytes of the storages that were allocated inside and live still; views share theirs

Live memory is followed by weak references to storages, as torch.distributed._tools.mem_tracker does. What a kernel of
torch sets aside within itself is not seen: workspaces of cuBLAS, for one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import library
from kernels.dispatch import PRIMITIVES, Kernel, as_on_card, recording
from kernels.launches import Launch

Kind = Literal["product", "attention", "memory"]


@dataclass(frozen=True, slots=True)
class Op:
    """One op that was run."""

    name: str
    kind: Kind
    flops: int
    bytes: int
    launches: int


@dataclass
class Counter:
    """What ran, in order, and the memory that it took. Set `pairs` before attention runs."""

    # Scores of attention: sum over segments of length^2, half of it where causal; (length^2 - (length - w)^2) / 2 where
    # the segment is longer than a window w.
    pairs: int = 0
    ops: list[Op] = field(default_factory=list)
    live: int = 0  # bytes, allocated since the start
    peak: int = 0  # most bytes since the start or the last `reset_peak`

    def mark(self) -> int:
        """Where the list of ops is now, for `since`."""
        return len(self.ops)

    def since(self, mark: int) -> list[Op]:
        return self.ops[mark:]

    def reset_peak(self) -> None:
        """The peak begins anew, from what is live."""
        self.peak = self.live

    def _allocated(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, size: int) -> None:
        self.live -= size


@contextmanager
def counting(card: int = 90) -> Iterator[Counter]:
    """Counts what runs inside on meta tensors, as on a card of this compute capability."""
    counter = Counter()
    mode = _Counting(counter)
    with as_on_card(card), recording(mode.kernel), library.recording(mode.function), mode:
        yield counter


class _Counting(TorchDispatchMode):
    """Sees every op below autograd."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.launched: list[int] = []  # bytes of each kernel of the primitive that is running

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and what skips it takes longer to import than a model to count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._know(tree_leaves((args, kwargs)))  # made outside: theirs is not our memory
        if func.namespace == "nibble":
            return self._primitive(func, args)
        result = func(*args, **kwargs)
        op = _torch_op(func, args, kwargs, result)
        if op is not None:
            self.counter.ops.append(op)
        self._track(tree_leaves(result))
        return result

    def _primitive(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func._schema.name.removeprefix("nibble::")
        outside, self.launched = self.launched, []
        with self:  # what the launcher allocates and adds up are ops too
            result = PRIMITIVES[name].launcher(*args)
        flops = _FLOPS[name](args, self.counter.pairs) if name in _FLOPS else 0
        kind: Kind = "attention" if name.startswith("attention") else "product" if flops else "memory"
        self.counter.ops.append(Op(name, kind, flops, sum(self.launched), len(self.launched)))
        self.launched = outside
        self._track(tree_leaves(result))
        return result

    def kernel(
        self, kernel: Kernel, grid: tuple[int, ...], config: Launch, args: tuple[object, ...],
        constants: dict[str, object],
    ) -> None:  # fmt: skip
        """A kernel of Triton's would be launched."""
        self.launched.append(_bytes(args))

    def function(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A function of csrc's would be launched."""
        self.launched.append(_bytes(tensors))

    def _know(self, values: Sequence[Any]) -> None:
        for storage in _storages(values):
            if self._is_new(storage):
                self.known[storage._cdata] = weakref.ref(storage)

    def _track(self, values: Sequence[Any]) -> None:
        """Counts the storages among `values` that nobody has seen, until they are gone."""
        for storage in _storages(values):
            if self._is_new(storage):
                size = storage.nbytes()
                self.counter._allocated(size)
                self.known[storage._cdata] = weakref.ref(storage, _freed(self.counter, size))

    def _is_new(self, storage: torch.UntypedStorage) -> bool:
        reference = self.known.get(storage._cdata)
        return reference is None or reference() is not storage


def _freed(counter: Counter, size: int) -> Callable[[object], None]:
    return lambda _: counter._freed(size)


def _storages(values: Sequence[Any]) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in values if isinstance(value, Tensor))


def _bytes(values: Sequence[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


# Ops that return memory as it is: no kernel runs.
_UNTOUCHED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")

_LOOK_UP = ("embedding", "gather", "index", "index_select")  # rows of their first argument
_ADD_ROWS = ("index_add_",)  # (to, dim, index, rows)
_WRITE = (  # and do not read their first argument
    "copy_", "fill_", "full_like", "new_full", "new_ones", "new_zeros", "ones_like", "zero_", "zeros_like",
)  # fmt: skip


def _torch_op(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Op | None:
    """The op as it counts; None for a view, memory that nothing is written to, or a question (promote_types)."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    views = views and _shares_memory(result, args)  # `to` and `reshape` may copy, inside of a primitive
    computes = schema.is_mutable or any(isinstance(value, Tensor) for value in tree_leaves(result))
    if views or not computes or name in _UNTOUCHED or name == "_unsafe_view":
        return None
    flops = _product_flops(name, args, result)
    return Op(name, "product" if flops else "memory", flops, _moved(name, args, kwargs, result), 1)


def _shares_memory(result: Any, args: tuple[Any, ...]) -> bool:
    given = {storage._cdata for storage in _storages(tree_leaves(args))}
    return all(storage._cdata in given for storage in _storages(tree_leaves(result)))


def _moved(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that an op of torch reads and writes."""
    inputs = tree_leaves((args, kwargs))
    outputs = [] if kwargs.get("out") is not None else tree_leaves(result)  # an `out` is among the inputs
    if name.startswith("_foreach_") and result is None:
        outputs = list(args[0])  # in place, and nothing is returned
    if name in _LOOK_UP:
        return _bytes([*outputs, *outputs, *inputs]) - _bytes([args[0]])
    if name in _ADD_ROWS:
        return 2 * _bytes(args[3:4]) + _bytes(inputs) - _bytes([args[0]])
    if name in _WRITE:
        return _bytes([*inputs, *outputs]) - _bytes([args[0]])
    return _bytes([*inputs, *outputs])


def _product_flops(name: str, args: tuple[Any, ...], result: Any) -> int:
    """2 M N K; 0 for what is no product."""
    if name in ("mm", "bmm"):
        return 2 * result.numel() * int(args[0].shape[-1])
    if name in ("addmm", "addmm_", "baddbmm"):
        return 2 * result.numel() * int(args[1].shape[-1])
    if name == "convolution":
        return 2 * result.numel() * math.prod(args[1].shape[1:])
    if name == "convolution_backward":
        gradient, _, weight, *_ = args
        return 2 * sum(args[10][:2]) * gradient.numel() * math.prod(weight.shape[1:])
    return 0


def _scores(args: tuple[Any, ...], at: int, products: int, pairs: int) -> int:
    _, heads, head_dim = args[at].shape
    return products * 2 * pairs * int(heads) * int(head_dim)


# FLOPs of the primitives that multiply, of their arguments and Counter.pairs.
_FLOPS: dict[str, Callable[[tuple[Any, ...], int], int]] = {
    "attention_forward": lambda args, pairs: _scores(args, 0, 2, pairs),
    "attention_dq": lambda args, pairs: _scores(args, 1, 3, pairs),
    "attention_dkdv": lambda args, pairs: _scores(args, 1, 4, pairs),
    "linear_act_forward": lambda args, _: 2 * args[0].numel() * args[1].shape[0],
    "lora_down": lambda args, _: 2 * args[0].numel() * args[1].shape[0],
    "lora_update_": lambda args, _: 2 * args[0].numel() * args[1].shape[1],
    "lora_outer": lambda args, _: 2 * args[1].numel() * args[0].shape[1],
    "few_rows_nf4": lambda args, _: 2 * args[0].numel() * sum(args[5]),
    "few_rows_int8": lambda args, _: 2 * args[0].numel() * sum(scale.numel() for scale in args[2]),
}
