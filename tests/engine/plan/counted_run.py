"""A small model that runs on real CPU tensors, and the bytes that torch's allocator handed out meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine.plan.meta_model import Bits, PackShape
from models.linear import Linear
from models.pack import Pack, Segments
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models.drawn import drawn

LENGTHS = (1, 1, 13, 10, 7)  # of segments: two modality tokens, two samples, the rest
SHAPE = PackShape(tokens=32, supervised=24, segments=5, tiles=2, pairs=0, longest=13)


def real_model(config: VLMConfig, bits: Bits) -> VisionLanguageModel:
    """Random numbers, linears stored in `bits`, and gradients that are there, as the optimiser keeps them."""
    model = drawn(VisionLanguageModel(config))
    for path, module in list(model.named_modules()):
        width = bits.vision if path.startswith("vision") else bits.head if path == "language.head" else bits.layers
        if isinstance(module, Linear) and width < 16:
            assert module.weight is not None
            module.quantize(module.weight.data, bits=width, device=torch.device("cpu"), name=path)
    for parameter in model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


def real_pack(config: VLMConfig, tiles: int) -> Pack:
    """A pack of SHAPE, with `tiles` images; without modality tokens these are two samples of a token more."""
    size, tokens, rows = config.vision.picture_size, SHAPE.tokens, SHAPE.supervised
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).int()
    slots = tiles * config.tokens_per_tile
    return Pack(
        input_ids=torch.arange(tokens) % 50,
        segments=Segments(
            cu_seqlens=bounds, max_seqlen=SHAPE.longest, position_ids=positions,
            router_row=(torch.arange(tokens) % 2).int(),
        ),
        modality_rows=torch.arange(2 if config.has_modality_token else 0),
        tiles=torch.randn(tiles, 3, size, size) if tiles else None,
        tile_router=torch.arange(tiles),
        image_slots=4 + torch.arange(slots),
        supervised=4 + torch.arange(rows),
        labels=torch.arange(rows) % 50,
        weights=torch.full((rows,), 1 / rows),
        num_samples=2,
    )  # fmt: skip


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that were alive at once of those that `work` allocated on the CPU, by the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    return max(accumulate(size for _, size in events))


def saved_bytes(work: Callable[[], object], but: set[int]) -> int:
    """Bytes of the storages that autograd keeps while `work` runs, but for those at the addresses `but`."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in but:
            kept[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work()
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def interpreted(*, bodies: bool) -> Iterator[None]:
    """Triton's interpreter without its garbage: it leaves each launch's arguments in a reference cycle, which is
    collected at once in here. Without `bodies` kernels are launched and compute nothing: they cannot allocate, so what
    is counted is the same in a hundredth of the time, and numbers are whatever memory holds."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def collecting(self: Any, *args: Any, **kwargs: Any) -> None:
        if bodies:
            launch(self, *args, **kwargs)
            gc.collect()

    gc.collect()
    gc.freeze()  # so that a collection looks at what is new only
    interpreter.GridExecutor.__call__ = collecting
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = launch
        gc.unfreeze()
